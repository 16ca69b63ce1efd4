"""Run the jobs of a study, and return their results as plain JSON values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from srm_model import runs
from srm_model.attacks import MSE, Attack, PairInversion, Suite, audit, sweep_steps, transfer
from srm_model.checkpoint import CONFIG, read_card
from srm_model.files import read_json
from srm_model.model import build_model
from srm_model.neck.diagnosis import measure, quantiles
from srm_model.runs.attacking import attack_checkpoint
from srm_model.runs.training import EVALUATION, logistic_of, new_model, train_neck
from srm_model.study.context import Context
from srm_model.study.file import Model, Stronger, slug
from srm_model.training import evaluate
from srm_model.training.loop import HISTORY


def trained(c: Context, model: Model) -> dict[str, Any]:
    """Train a model, and return its SROCC and PLCC on clean test images together with facts about its checkpoint.

    The checkpoint is that of the epoch with the highest SROCC on the validation split. The facts are the number of
    this epoch ("epoch"), its validation results ("val"), the digest of the weights ("sha256") and the folder
    ("folder").
    """
    folder = c.out / model.folder
    train_neck(
        new_model(model.backbone, model.neck, model.config, pretrained=c.study.pretrained),
        folder,
        c.splits(model),
        device=c.device,
        freeze_backbone=c.study.freeze_backbone,
        workers=c.workers,
        progress=c.progress,
    )
    found, document = read_json(folder / EVALUATION), read_card(folder)
    return {
        **{key: found[key] for key in ("srocc", "plcc", "n", "labels")},
        "val": document["card"]["val"],
        "epoch": document["card"]["epoch"],
        "sha256": document["sha256"],
        "folder": str(model.folder),
    }


def attacked(
    c: Context, model: Model, norm: str, eps: float, stronger: Stronger | None = None
) -> dict[str, Any]:
    """Attack a trained model with the settings of the study or of a group of stronger attacks."""
    found = attack_checkpoint(
        c.out / model.folder,
        c.test(model),
        norm=norm,
        eps=eps,
        config=model.config if stronger is None else model.config.replace(**stronger.config),
        device=c.device,
        surrogate=_surrogate(c, model),
        limit=c.study.images,
        suite=c.study.suite if stronger is None else stronger.suite,
        progress=c.progress,
        within="" if stronger is None else stronger.name,
    )
    keys = ("srocc", "plcc", "loss", "zero_gradients", "nonfinite_gradients")
    return {
        "clean": {key: found["clean"][key] for key in ("srocc", "plcc")},
        "attacks": {name: {key: entry[key] for key in keys} for name, entry in found["attacks"].items()},
        "worst": found["worst"],
        "incomplete": found["incomplete"],
        "images": len(found["mos"]),
        "radius": found["radius"],
    }


def swap_evaluated(c: Context, model: Model, changes: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a trained model as it is, and again with `changes` but without new training (see `swapped`)."""
    loaded, card = c.opened(model)
    own, other = (
        evaluate(one, c.test(model), batch_size=model.config.batch_size, logistic=logistic_of(card))
        for one in (loaded, swapped(loaded, changes))
    )
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


def swapped(model: Any, changes: dict[str, Any]) -> Any:
    """Return a copy of a trained model to which `changes` are applied.

    A key of `changes` is "neck", "beta" or the name of a config field. The value of "neck" is the name of another neck.
    The value of "beta" is a number that replaces β of every link. All other weights stay as trained.
    """
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


def _surrogate(c: Context, model: Model) -> Path | None:
    """Return the folder with the surrogate's checkpoint, or None if the study does not train the surrogate.

    The surrogate is the model on which the transfer attacks against `model` are crafted.
    """
    folder = c.out / model.surrogate.folder
    return folder if (folder / CONFIG).is_file() else None


def audited(c: Context, model: Model, eps: float, changes: dict[str, Any]) -> dict[str, Any]:
    """Audit a trained model, or a copy of it to which `changes` are applied (see `swapped`)."""
    loaded, _ = c.opened(model)
    surrogate = _surrogate(c, model)
    found = audit(
        swapped(loaded, changes) if changes else loaded,
        c.test(model),
        norm="linf",
        eps=eps,
        surrogate=None if surrogate is None else runs.open_checkpoint(surrogate, c.device)[0],
        config=model.config,
        images=c.study.audit,
        seed=model.seed,
    )
    return {"passed": found.passed, "failed": list(found.failed), **found.to_dict()}


def swept(c: Context, model: Model, norm: str, eps: float, label: str) -> dict[str, Any]:
    """Attack a trained model with increasing numbers of PGD steps, for figure 5 of the report."""
    loaded, card = c.opened(model)
    pairs = PairInversion(margin=model.config.pair_margin, temperature=model.config.pair_temperature)
    with _unfinished(c, label) as resume:
        rows = sweep_steps(
            Suite([Attack("pgd_mse", MSE()), Attack("pgd_pair_inversion", pairs)], model.config),
            loaded,
            c.test(model),
            norm=norm,
            eps=eps,
            logistic=logistic_of(card),
            batch_size=model.config.attack_batch_size,
            seed=model.config.seed,
            limit=c.study.images,
            resume=resume,
        )
    return {"rows": rows}


def transferred(c: Context, models: Sequence[Model], norm: str, eps: float, label: str) -> dict[str, Any]:
    """Attack each model, and score all attacked images with every model, for table 10 of the report."""
    opened = {f"{m.backbone}/{m.neck}": c.opened(m) for m in models}
    config = models[0].config
    with _unfinished(c, label) as resume:
        found = transfer(
            {name: model for name, (model, _) in opened.items()},
            c.test(models[0]),
            norm=norm,
            eps=eps,
            config=config,
            logistics={name: logistic_of(card) for name, (_, card) in opened.items()},
            batch_size=config.attack_batch_size,
            seed=config.seed,
            limit=c.study.images,
            resume=resume,
        )
    clean = ("srocc", "plcc")
    keys = ("source", "target", *clean, "zero_gradients", "nonfinite_gradients")
    return {
        "clean": {name: {key: entry[key] for key in clean} for name, entry in found["clean"].items()},
        "pairs": [{key: pair[key] for key in keys} for pair in found["pairs"]],
    }


@contextmanager
def _unfinished(c: Context, label: str) -> Iterator[Path]:
    """Yield a folder for the unfinished results of a job, and remove it when the job is finished."""
    folder = c.out / "unfinished" / slug(label)
    yield folder
    shutil.rmtree(folder)


def diagnosed(c: Context, model: Model) -> dict[str, Any]:
    """Measure a trained neck for tables 1, 2 and 12 and figures 3 and 4 of the report.

    The entries "links", "update_ratio" and "gate" cover all links, heads and test images. The entry "trajectory" has
    values of each epoch of the training (see `_trajectory`).
    """
    loaded, _ = c.opened(model)
    dataset = c.test(model)
    found = []
    for images in runs.batches(dataset, range(len(dataset)), model.config.batch_size):
        with torch.no_grad():
            found.append(measure(loaded.neck, loaded.pyramid(images.to(c.device))))
    links = [figures for one in found for figures in one.links.values()]
    ratios = [ratio for one in found for ratio in one.update_ratio.values()]
    kept = ("weights", "gain", "norm")
    gate = {name: torch.cat([getattr(one.output, name).float() for one in found]) for name in kept}
    gate["entropy"] = torch.special.entr(gate["weights"]).sum(-1)
    return {
        "links": {name: quantiles(torch.cat([one[name].flatten() for one in links])) for name in links[0]},
        "update_ratio": quantiles(torch.tensor(ratios)),
        "gate": {name: values.tolist() for name, values in gate.items()},
        "trajectory": _trajectory(c.out / model.folder / HISTORY),
    }


def _trajectory(path: Path) -> list[dict[str, Any]]:
    """Return one dict for each epoch of the training.

    Each dict has the number of the epoch, τ ("tau"), two scales of the attention output Y of a link, and the share of
    images whose fused map the gain cap reduced ("gain_active"). The scale of Y is σ̄ / σ_ref before Y is multiplied by
    τ ("sigma_before_tau"), and τ·σ̄ / σ_ref afterwards ("sigma_after_tau"). σ_ref is the `reference_scale` of the link.
    τ and the two scales are medians over all links and heads.
    """
    rows = []
    for text in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        entry = {"epoch": row["epoch"], "gain_active": row["diagnostics"]["gain_active"]}
        for name in ("tau", "sigma_before_tau", "sigma_after_tau"):
            values = [np.atleast_1d(link[name]) for link in row["diagnostics"]["links"].values()]
            entry[name] = float(np.median(np.concatenate(values)))
        rows.append(entry)
    return rows
