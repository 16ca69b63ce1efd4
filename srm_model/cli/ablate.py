"""`srm-iqa ablate`: train, evaluate, attack and measure what a study file declares, and only what is missing."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from srm_model.attacks import MSE, Attack, PairInversion, Suite, audit, sweep_steps, transfer
from srm_model.backbones import check_backbone, check_size
from srm_model.checkpoint import CONFIG, read_card
from srm_model.cli import runs
from srm_model.cli.attack import attack_checkpoint
from srm_model.cli.study import FULL, Model, Stronger, Study, read_study, slug
from srm_model.cli.train import EVALUATION, logistic_of, new_model, train_neck
from srm_model.files import claimed, read_json, write_json
from srm_model.model import build_model
from srm_model.reports.records import STUDY, Records
from srm_model.training import evaluate as evaluate_model
from srm_model.training.loop import HISTORY

_CLEAN = "clean"  # the kind of a training's line, which all others of that model need
CLAIMS = "claims.lock"
_TIMED_PASSES = 7


_WAIT = 2.0  # seconds between looks at what other processes have done


class Job(NamedTuple):
    """One line of results: what it is of, and how it is measured where it is missing."""

    kind: str
    identity: dict[str, Any]
    label: str
    measure: Callable[[], dict[str, Any]]
    needs: tuple[Model, ...] = ()  # to be trained before


def run(args: argparse.Namespace) -> None:
    """Do the jobs that `results.jsonl` lacks, one line for each, and say what there is."""
    study = read_study(args.study, runs.named_folders(args.data or ()))
    for backbone in study.backbones:
        check_backbone(backbone)
    with nullcontext() if args.dry_run else runs.writing(args.out, shared=True):
        _run(study, args)


def _run(study: Study, args: argparse.Namespace) -> None:
    out = Path(args.out)
    device = runs.device_from(args.device)
    records = Records(out)
    jobs = list(_jobs(study, out, device, args))
    _check_sets(jobs, records, out)
    for backbone, side in sorted({(m.backbone, m.config.image_size) for job in jobs for m in job.needs}):
        check_size(backbone, side)
    missing = _missing(jobs, records, out)
    if args.dry_run:
        for job in missing:
            print(job.label)
        print(f"{len(missing)} of {len(jobs)} results are missing")
        return
    write_json(out / STUDY, study.to_dict())
    if device.type == "cpu":
        runs.keep_memory()
    with runs.recorded(out, args.arguments, title=study.title):
        _share(jobs, out, device, progress=not args.no_progress)
    lines = Records(out).lines
    rows = [
        [kind, sum(line["kind"] == kind for line in lines)] for kind in dict.fromkeys(j.kind for j in jobs)
    ]
    print(runs.table(["results", "lines"], rows))
    print(f"tables and figures: srm-iqa report {out}")


def _share(jobs: list[Job], out: Path, device: torch.device, *, progress: bool) -> None:
    """Do what is missing and no other process that shares the folder has at hand; ends when nothing is missing."""
    while missing := _missing(jobs, Records(out), out):
        untrained = {str(job.needs[0].folder) for job in missing if job.kind == _CLEAN}
        idle, left = True, len(missing)
        for job in missing:
            if job.kind != _CLEAN and any(str(model.folder) in untrained for model in job.needs):
                continue
            with claimed(out / CLAIMS, f"{job.kind} {json.dumps(job.identity)}") as mine:
                # Somebody may have done it, and let go, since the last look.
                if not mine or job not in _missing(jobs, records := Records(out), out):
                    continue
                if progress:
                    runs.say(f"{left} to do: {job.label}")
                _do(job, records, device)
                idle, left = False, left - 1
                if job.kind == _CLEAN:
                    untrained.discard(str(job.needs[0].folder))
        if idle:
            time.sleep(_WAIT)


def _missing(jobs: list[Job], records: Records, out: Path) -> list[Job]:
    """Jobs without a line, and trainings whose weights are gone, or are others, while a job needs them."""
    without = [job for job in jobs if records.find(job.kind, job.identity) is None]
    trained = {
        str(job.needs[0].folder): line["values"]["sha256"]
        for job in jobs
        if job.kind == _CLEAN and (line := records.find(_CLEAN, job.identity)) is not None
    }
    needed = {str(model.folder) for job in without if job.kind != _CLEAN for model in job.needs}
    lost = {
        folder
        for folder in needed & trained.keys()
        if not (path := out / folder / CONFIG).is_file() or read_json(path)["sha256"] != trained[folder]
    }
    return [
        job for job in jobs if job in without or (job.kind == _CLEAN and str(job.needs[0].folder) in lost)
    ]


def _check_sets(jobs: list[Job], records: Records, out: Path) -> None:
    """ValueError where a model's line is of another set than is here: its other lines would be taken for this one's."""
    for job in (job for job in jobs if job.kind == _CLEAN):
        line = records.elsewhere(_CLEAN, job.identity, "fingerprint")
        if line is not None:
            raise ValueError(
                f"{out}: its results are of another {job.identity['data']} (fingerprint "
                f"{line['identity']['fingerprint'][:12]}) than is here ({job.identity['fingerprint'][:12]}); expected "
                "the same set, or another folder with --out"
            )


def _do(job: Job, records: Records, device: torch.device) -> None:
    start = time.perf_counter()
    values = job.measure()
    known = records.find(job.kind, job.identity)
    if known is not None:  # weights that were lost, trained again
        if values["sha256"] != known["values"]["sha256"]:
            raise ValueError(
                f"{job.label}: its weights were lost, and trained again, on other hardware or with other versions, "
                "they are others; what is missing of this model would not belong to what is there. Expected the folder "
                f"{known['values']['folder']} as it was, or another --out"
            )
        return
    records.add(
        {
            "kind": job.kind,
            "identity": job.identity,
            "values": values,
            "seconds": round(time.perf_counter() - start, 1),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": _device_name(device),
            "versions": runs.versions(),
            "commit": _commit(),
        }
    )


def _jobs(study: Study, out: Path, device: torch.device, args: argparse.Namespace) -> Iterator[Job]:
    opened: dict[Any, dict[str, Any]] = {}

    def splits(model: Model) -> dict[str, Any]:
        key = model.data, model.config.seed, model.config.image_size
        if key not in opened:
            opened[key] = runs.open_splits(
                study.data[model.data], model.config, progress=not args.no_progress
            )
        return opened[key]

    grid = list(study.models())
    full = [model for model in grid if model.variant == FULL]
    yield from _models(study, full, out, splits, device, args)
    yield from _swaps(study, full, out, splits, device)
    yield from _audits(study, full, out, splits, device)
    ablated = [model for model in grid if model.variant != FULL]
    yield from _models(study, ablated, out, splits, device, args)
    yield from _audits(study, ablated, out, splits, device)
    yield from _stronger(study, grid, out, splits, device, args)
    yield from _sweeps(study, full, out, splits, device)
    yield from _transfers(study, full, out, splits, device)
    if study.efficiency:
        for backbone in study.backbones:
            for neck in study.necks:
                yield Job(
                    "efficiency",
                    {
                        "backbone": backbone,
                        "neck": neck,
                        "config": study.config.to_dict(),
                        "device": device.type,
                    },
                    f"measure {backbone}, {neck}",
                    lambda backbone=backbone, neck=neck: _efficiency(backbone, neck, study, device),  # type: ignore[misc]
                )


def _models(
    study: Study,
    models: list[Model],
    out: Path,
    splits: Callable[[Model], dict[str, Any]],
    device: torch.device,
    args: argparse.Namespace,
) -> Iterator[Job]:
    """Trained, diagnosed and attacked."""
    progress = not args.no_progress
    for model in models:
        yield Job(
            _CLEAN,
            {**model.identity, "fingerprint": splits(model)["test"].fingerprint},
            f"train {_label(model)}",
            lambda model=model: _train(study, model, out, splits(model), device, args),  # type: ignore[misc]
            (model,),
        )
        if model.neck != "none" and model.config.links:
            yield Job(
                "diagnostics",
                model.identity,
                f"diagnose {_label(model)}",
                lambda model=model: _diagnose(out / model.folder, splits(model)["test"], device),  # type: ignore[misc]
                (model,),
            )
    for model in models:
        yield from _attacks(study, model, out, splits, device, progress)


def _attacks(
    study: Study,
    model: Model,
    out: Path,
    splits: Callable[[Model], dict[str, Any]],
    device: torch.device,
    progress: bool,
    stronger: Stronger | None = None,
) -> Iterator[Job]:
    """At each of the study's budgets with its settings, or at those and with those of a stronger group."""
    for norm, eps in study.budgets_of(model) if stronger is None else stronger.budgets:
        suite = study.suite if stronger is None else stronger.suite
        identity = {**model.identity, "norm": norm, "eps": eps, "images": study.images, "suite": suite}
        label = f"attack {_label(model)}, {norm} {eps:.4g}"
        yield Job(
            "attack" if stronger is None else "stronger",
            identity if stronger is None else {**identity, "attack": stronger.config},
            label if stronger is None else f"{label}, {stronger.name}",
            lambda norm=norm, eps=eps: _attack(  # type: ignore[misc]
                study, model, out, splits(model)["test"], device, norm, eps, progress, stronger
            ),
            (model, _beside(model)),
        )


def _train(
    study: Study,
    model: Model,
    out: Path,
    splits: dict[str, Any],
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, Any]:
    folder = out / model.folder
    train_neck(
        new_model(model.backbone, model.neck, model.config, pretrained=study.pretrained),
        folder,
        splits,
        device=device,
        freeze_backbone=study.freeze_backbone,
        workers=args.workers,
        progress=not args.no_progress,
    )
    found, document = read_json(folder / EVALUATION), read_card(folder)
    return {
        **{key: found[key] for key in ("srocc", "plcc", "n", "labels")},
        "val": document["card"]["val"],
        "epoch": document["card"]["epoch"],
        "sha256": document["sha256"],
        "folder": str(model.folder),
    }


def _attack(
    study: Study,
    model: Model,
    out: Path,
    dataset: Any,
    device: torch.device,
    norm: str,
    eps: float,
    progress: bool,
    stronger: Stronger | None = None,
) -> dict[str, Any]:
    folder = out / model.folder
    found = attack_checkpoint(
        folder,
        dataset,
        norm=norm,
        eps=eps,
        config=model.config if stronger is None else model.config.replace(**stronger.config),
        device=device,
        surrogate=_surrogate(out, model),
        limit=study.images,
        suite=study.suite if stronger is None else stronger.suite,
        progress=progress,
        within="" if stronger is None else stronger.name,
    )
    return {
        "clean": {key: found["clean"][key] for key in ("srocc", "plcc")},
        "attacks": {
            name: {
                key: entry[key] for key in ("srocc", "plcc", "loss", "zero_gradients", "nonfinite_gradients")
            }
            for name, entry in found["attacks"].items()
        },
        "worst": found["worst"],
        "incomplete": found["incomplete"],
        "images": len(found["mos"]),
        "radius": found["radius"],
    }


def _beside(model: Model) -> Model:
    """The surrogate of its transfer attack: the neck beside it; for an ablation, the one beside the full model."""
    other = "srm" if model.neck == "none" else "none"
    return Model(model.data, model.backbone, other, FULL, model.seed, model.config)


def _surrogate(out: Path, model: Model) -> Path | None:
    path = out / _beside(model).folder
    return path if (path / CONFIG).is_file() else None


def _swaps(
    study: Study,
    grid: list[Model],
    out: Path,
    splits: Callable[[Model], dict[str, Any]],
    device: torch.device,
) -> Iterator[Job]:
    """What trained weights do under another attention, rank or link weight, with no training: clean scores."""
    for model in grid:
        if model.neck != "srm":
            continue
        for name, changes in study.swaps.items():

            def measure(model: Model = model, changes: dict[str, Any] = changes) -> dict[str, Any]:
                trained, card = runs.open_checkpoint(out / model.folder, device)
                dataset, size = splits(model)["test"], model.config.batch_size
                logistic = logistic_of(card)
                own = evaluate_model(trained, dataset, batch_size=size, logistic=logistic)
                other = evaluate_model(swapped(trained, changes), dataset, batch_size=size, logistic=logistic)
                moved = np.abs(np.subtract(other["scores"], own["scores"]))
                return {
                    "srocc": other["srocc"],
                    "plcc": other["plcc"],
                    "trained_srocc": own["srocc"],
                    "moved": {
                        "median": float(np.median(moved)),
                        "maximum": float(moved.max()),
                        "spread": float(np.std(own["scores"])),
                    },
                }

            yield Job(
                "swap",
                {**model.identity, "swap": name, "changes": changes},
                f"swap {name} into {_label(model)}",
                measure,
                (model,),
            )


def swapped(model: Any, changes: dict[str, Any]) -> Any:
    """The trained weights in a model with other config fields, `neck`, or every link weighted by `beta`."""
    fields = {key: value for key, value in changes.items() if key not in ("neck", "beta")}
    other: Any = build_model(
        model.backbone_name, neck=changes.get("neck", model.neck_name), config=model.config.replace(**fields)
    )
    other.load_state_dict(model.state_dict())
    if "beta" in changes:
        with torch.no_grad():
            for beta in other.neck.beta.values():
                beta.fill_(changes["beta"])
    device = next(model.parameters()).device
    return other.to(device).to(memory_format=torch.channels_last)


def _audits(
    study: Study,
    grid: list[Model],
    out: Path,
    splits: Callable[[Model], dict[str, Any]],
    device: torch.device,
) -> Iterator[Job]:
    """At the article's larger budget, as trained, and the unablated with `audit_swaps` too."""
    for model in filter(study.audited, grid):
        eps = model.config.eps_linf_tables[-1]
        swappable = model.neck == "srm" and model.variant == FULL
        for swap in (None, *(study.audit_swaps if swappable else ())):
            changes = {} if swap is None else study.swaps[swap]

            def measure(
                model: Model = model, eps: float = eps, changes: dict[str, Any] = changes
            ) -> dict[str, Any]:
                loaded, _ = runs.open_checkpoint(out / model.folder, device)
                surrogate = _surrogate(out, model)
                found = audit(
                    swapped(loaded, changes) if changes else loaded,
                    splits(model)["test"],
                    norm="linf",
                    eps=eps,
                    surrogate=None if surrogate is None else runs.open_checkpoint(surrogate, device)[0],
                    config=model.config,
                    images=study.audit,
                    seed=model.seed,
                )
                return {"passed": found.passed, "failed": list(found.failed), **found.to_dict()}

            identity = {**model.identity, "norm": "linf", "eps": eps, "images": study.audit}
            label = f"audit {_label(model)}"
            if swap is not None:
                identity, label = {**identity, "swap": swap, "changes": changes}, f"{label}, {swap}"
            yield Job("audit", identity, label, measure, (model, _beside(model)))


def _stronger(
    study: Study,
    grid: list[Model],
    out: Path,
    splits: Callable[[Model], dict[str, Any]],
    device: torch.device,
    args: argparse.Namespace,
) -> Iterator[Job]:
    """Table 15: whether more steps, restarts or kinds of attack find what the study's own did not."""
    for group in study.stronger:
        for model in grid:
            name = model.neck if model.variant == FULL else model.variant
            if name not in group.models or model.seed not in group.seeds:
                continue
            yield from _attacks(study, model, out, splits, device, not args.no_progress, group)


def _sweeps(
    study: Study,
    grid: list[Model],
    out: Path,
    splits: Callable[[Model], dict[str, Any]],
    device: torch.device,
) -> Iterator[Job]:
    """Figure 5, on the first data set and backbone at the first budget."""
    if not study.sweep or not study.budgets:
        return
    norm, eps = study.budgets[0]
    for model in grid:
        if (model.data, model.backbone) != (next(iter(study.data)), study.backbones[0]):
            continue
        pairs = PairInversion(margin=model.config.pair_margin, temperature=model.config.pair_temperature)
        suite = Suite([Attack("pgd_mse", MSE()), Attack("pgd_pair_inversion", pairs)], model.config)

        def measure(model: Model = model, suite: Suite = suite) -> dict[str, Any]:
            loaded, card = runs.open_checkpoint(out / model.folder, device)
            with _unfinished(out, f"sweep {_label(model)}") as resume:
                rows = sweep_steps(
                    suite,
                    loaded,
                    splits(model)["test"],
                    norm=norm,
                    eps=eps,
                    logistic=logistic_of(card),
                    batch_size=model.config.attack_batch_size,
                    seed=model.config.seed,
                    limit=study.images,
                    resume=resume,
                )
            return {"rows": rows}

        identity = {**model.identity, "norm": norm, "eps": eps, "images": study.images}
        yield Job("sweep", identity, f"sweep steps of {_label(model)}", measure, (model,))


def _transfers(
    study: Study,
    grid: list[Model],
    out: Path,
    splits: Callable[[Model], dict[str, Any]],
    device: torch.device,
) -> Iterator[Job]:
    """Table 10: between the necks of a backbone, and between backbones, in every direction."""
    full = {(m.data, m.seed, m.backbone, m.neck): m for m in grid}
    for data in study.data:
        for seed in study.seeds:
            groups = [[(backbone, neck) for neck in study.necks] for backbone in study.backbones]
            groups += [
                [(backbone, neck) for backbone in pair] for pair in study.transfer for neck in study.necks
            ]
            for group in groups:
                for norm, eps in study.budgets if len(group) > 1 else ():
                    members = [full[data, seed, *entry] for entry in group]
                    names = ", ".join(f"{m.backbone}/{m.neck}" for m in members)
                    label = f"transfer between {names}, {data}, seed {seed}, {norm} {eps:.4g}"

                    def measure(
                        members: list[Model] = members, norm: str = norm, eps: float = eps, label: str = label
                    ) -> dict[str, Any]:
                        opened = {
                            f"{m.backbone}/{m.neck}": runs.open_checkpoint(out / m.folder, device)
                            for m in members
                        }
                        with _unfinished(out, label) as resume:
                            found = transfer(
                                {name: model for name, (model, _) in opened.items()},
                                splits(members[0])["test"],
                                norm=norm,
                                eps=eps,
                                config=members[0].config,
                                logistics={name: logistic_of(card) for name, (_, card) in opened.items()},
                                batch_size=members[0].config.attack_batch_size,
                                seed=members[0].config.seed,
                                limit=study.images,
                                resume=resume,
                            )
                        keys = ("source", "target", "srocc", "plcc")
                        return {
                            "clean": {
                                name: {key: entry[key] for key in ("srocc", "plcc")}
                                for name, entry in found["clean"].items()
                            },
                            "pairs": [{key: pair[key] for key in keys} for pair in found["pairs"]],
                        }

                    identity = {
                        "data": data,
                        "seed": seed,
                        "models": [f"{m.backbone}/{m.neck}" for m in members],
                        "config": members[0].config.to_dict(),
                        "norm": norm,
                        "eps": eps,
                        "images": study.images,
                    }
                    yield Job("transfer", identity, label, measure, tuple(members))


@contextmanager
def _unfinished(out: Path, label: str) -> Iterator[Path]:
    """A folder for what is finished of a job; it goes when the whole is."""
    folder = out / "unfinished" / slug(label)
    yield folder
    shutil.rmtree(folder)


def _diagnose(folder: Path, dataset: Any, device: torch.device) -> dict[str, Any]:
    """Tables 1 and 2, figures 3 and 4: the model's own figures over the test set, and over the epochs."""
    model, _ = runs.open_checkpoint(folder, device)
    size = model.config.batch_size
    links: dict[str, list[Any]] = {}
    ratios: list[float] = []
    gate: dict[str, list[Any]] = {"entropy": [], "weights": [], "gain": [], "norm": []}
    for start in range(0, len(dataset), size):
        chosen = range(start, min(start + size, len(dataset)))
        images = torch.stack([dataset[index][0] for index in chosen]).to(device)
        found = model.diagnose(images)
        ratios += found["update_ratio"].values()
        for link in found["links"].values():
            for name, value in link.items():
                links.setdefault(name, []).append(value)
        with torch.no_grad():
            output = model.neck_output(images)
        weights = output.weights.float()
        gate["weights"] += weights.tolist()
        gate["entropy"] += torch.special.entr(weights).sum(-1).tolist()
        gate["gain"] += output.gain.tolist()
        gate["norm"] += output.norm.tolist()
    return {
        "links": {name: _spread(values) for name, values in links.items()},
        "update_ratio": _spread(ratios),
        "gate": gate,
        "trajectory": _trajectory(folder / HISTORY),
    }


def _spread(values: list[Any]) -> dict[str, float]:
    """Median and 90th percentile over links, heads and batches; where a batch has those already, their medians."""
    if isinstance(values[0], dict):
        return {key: float(np.median([value[key] for value in values])) for key in ("median", "p90")}
    flat = np.concatenate([np.atleast_1d(value) for value in values])
    return {"median": float(np.median(flat)), "p90": float(np.quantile(flat, 0.9))}


def _trajectory(path: Path) -> list[dict[str, Any]]:
    """τ and the scale before and after it, medians over links and heads, and what the cap did, by epoch."""
    rows = []
    for text in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        entry = {"epoch": row["epoch"], "gain_active": row["diagnostics"]["gain_active"]}
        for name in ("tau", "sigma_before_tau", "sigma_after_tau"):
            values = [np.atleast_1d(link[name]) for link in row["diagnostics"]["links"].values()]
            entry[name] = float(np.median(np.concatenate(values)))
        rows.append(entry)
    return rows


def _efficiency(backbone: str, neck: str, study: Study, device: torch.device) -> dict[str, Any]:
    """Table 3: the neck alone on one image, in bf16 on a GPU and fp32 elsewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = build_model(backbone, neck=neck, config=study.config).to(device)
    side = study.config.image_size
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    gpu = device.type == "cuda"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=gpu):
        pyramid = model.pyramid(image)
        with FlopCounterMode(display=False) as counted:
            model.neck(pyramid)
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        times = []
        for repeat in range(-2, _TIMED_PASSES):
            if gpu:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            model.neck(pyramid)
            if gpu:
                torch.cuda.synchronize(device)
            if repeat >= 0:
                times.append(1e3 * (time.perf_counter() - start))
        peak = (torch.cuda.max_memory_allocated(device) - held) / 2**20 if gpu else None
    return {
        "parameters": sum(parameter.numel() for parameter in model.neck.parameters()),
        "macs": counted.get_total_flops() / 2,
        "milliseconds": statistics.median(times),
        "peak_mib": peak,
        "precision": "bf16" if gpu else "fp32",
        "image_size": side,
        "channels": model.backbone.channels,
    }


def _label(model: Model) -> str:
    variant = "" if model.variant == FULL else f", {model.variant}"
    return f"{model.neck} on {model.backbone}, {model.data}{variant}, seed {model.seed}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _commit() -> str | None:
    """The commit that runs, with a + where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
