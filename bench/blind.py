"""Compare checkpoints with BRISQUE, NIQE and PIQE on a dataset: `python -m bench.blind --data DIR --checkpoint CKPT`.

All models score the same images: the test split of the dataset, at the image size of the checkpoints or at a larger
`--size`. With a larger size, a checkpoint scores an image as `srm-iqa score` does, by the mean over crops. Each model
is then attacked by `square_mse`, a square attack. The attack needs only scores, no gradients. It uses the same batches
and random numbers for all models. Before the attack, a linear map is applied to the scores of each model. The map is
fitted on the validation split: there, the mapped scores have the same mean and standard deviation as the labels. PLCC
is computed after a logistic map, which is also fitted on the validation split.

A row of the output file has the clean scores of one model, or the result of an attack on one batch. A metric (BRISQUE,
NIQE or PIQE) is left out if a package that it needs is missing. `bench/README.md` lists the packages.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.classical import METRICS, Classical
from bench.harness import DEVICE, RESULTS, machine_with_load, parser
from srm_model import runs
from srm_model.attacks import Suite
from srm_model.attacks.guard import predict
from srm_model.attacks.problem import parse_budget
from srm_model.attacks.suite import Job, spread
from srm_model.checkpoint import read_card
from srm_model.cli.options import device_from, positive
from srm_model.config import SRMConfig
from srm_model.crops import CropMean, at_full_resolution
from srm_model.data.base import type_level_result
from srm_model.external import ExternalModel
from srm_model.metrics import LogisticMap, plcc, srocc
from srm_model.profiling.results import append, newest, read
from srm_model.reports.bootstrap import interval, resampled_plcc, resampled_srocc

Row = dict[str, Any]
Scores = npt.NDArray[np.float64]
BUDGETS = ("1/255", "2/255", "4/255")
KEYS = ("kind", "model", "version", "settings", "eps", "batch")


class Subject(NamedTuple):
    """A checkpoint or a metric. `version` is the hash of the checkpoint's weights, or the metric's package versions."""

    name: str
    version: str
    model: ExternalModel


@dataclass(frozen=True)
class Bench:
    """Images and settings that all models share."""

    val: Any  # dataset
    test: Any  # dataset
    config: Any  # SRMConfig of the first checkpoint, with attack_queries from the command line
    budgets: tuple[str, ...]
    images: int  # number of attacked images
    batch_size: int
    machine: Row

    def settings(self, kind: str) -> Row:
        """Return the settings that a row depends on; `kind` is "clean" or "attack"."""
        data = {"dataset": self.test.fingerprint, "seed": self.test.seed, "size": self.test.image_size}
        if kind == "clean":
            return data
        about = {"queries": self.config.attack_queries, "images": self.images, "batch_size": self.batch_size}
        return {**data, **about, "area": self.config.attack_square_area}

    def row(self, kind: str, subject: Subject, **about: Any) -> Row:
        """Return the entries that identify a row, and a description of the machine."""
        identity = {"kind": kind, "model": subject.name, "version": subject.version}
        return {**identity, "settings": self.settings(kind), **about, "machine": self.machine}


def key_of(row: Row) -> str:
    """Return, as text, the entries that identify a row: kind, model, version, settings, budget and batch."""
    return json.dumps([row.get(name) for name in KEYS], sort_keys=True)


def checkpoints(folders: Sequence[str], device: str, size: int) -> list[Subject]:
    """Open the checkpoints in some folders, for images of `size`×`size` pixels.

    Raises:
        ValueError: The size is below the image size of a checkpoint; or it is above, and training images of the
            checkpoint may have been resized.
    """
    found = []
    for folder in folders:
        path = runs.one_checkpoint(folder)
        model, card = runs.open_checkpoint(path, device_from(device))
        own = model.config.image_size
        if size < own or (size > own and not at_full_resolution(card)):
            accepted = f"{own} or more"
            if not at_full_resolution(card):
                accepted = f"only {own}, because its card does not say that no training image was resized"
            raise ValueError(f"--size {size}: {folder} accepts {accepted}")
        scorer = model if size == own else CropMean(model, own)
        found.append(Subject(folder, read_card(path)["sha256"], ExternalModel(scorer).eval()))
        found[-1].model.to(device_from(device))
    return found


def metrics() -> list[Subject]:
    """Open the classical metrics that are installed; print a line on stderr for each metric that is not."""
    found = []
    for metric in METRICS:
        try:
            subject = Subject(metric.name, metric.version(), ExternalModel(Classical(metric.load())).eval())
        except Exception as error:  # an unsuitable version of a package can raise anything
            about = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(
                f"{metric.name}: left out, needs {' and '.join(metric.packages)} ({about})", file=sys.stderr
            )
        else:
            found.append(subject)
    return found


def clean_row(bench: Bench, subject: Subject) -> Row:
    """Score the validation and the test split; the row has an `error` if a score is not finite."""
    row, start = bench.row("clean", subject), time.process_time()
    try:
        for split in ("val", "test"):
            dataset = getattr(bench, split)
            batches = runs.batches(dataset, range(len(dataset)), bench.batch_size)
            scores = [score for images in batches for score in predict(subject.model, images).tolist()]
            if broken := int((~np.isfinite(scores)).sum()):
                raise ValueError(f"{broken} of {len(scores)} scores of the {split} split are not finite")
            row[split] = {"mos": dataset.mos.tolist(), "scores": scores}
    except ValueError as error:
        return {**row, "error": str(error)}
    row["cpu_seconds"] = round((time.process_time() - start) / (len(bench.val) + len(bench.test)), 4)
    return row


def attacked_row(bench: Bench, subject: Subject, eps: str, number: int) -> Row:
    """Attack one batch of test images and return its row.

    Call `subject.model.match` first, so that the model's scores are on the scale of the labels. `number` is the index
    of the batch.
    """
    (attack, *_) = Suite.queries(bench.config).attacks
    job = Job(
        config=bench.config,
        model=subject.model,
        surrogate=None,
        attacks=(attack,),
        numbers={attack.name: 1},
        dataset=bench.test,
        norm="linf",
        eps=parse_budget(eps),
        batch_size=bench.batch_size,
        seed=bench.config.seed,
        limit=bench.images,
    )
    row, start = bench.row("attack", subject, eps=eps, batch=number), time.process_time()
    try:
        images, mos = job.load(number)
        clean = job.clean(number, images)
        attacked = job.score(number, job.craft(number, attack, images, mos).images)
    except ValueError as error:
        return {**row, "error": str(error)}
    seconds = (time.process_time() - start) / (len(mos) * (bench.config.attack_queries + 2))
    return {
        **row,
        "attack": attack.name,
        "mos": mos.tolist(),
        "clean": clean,
        "attacked": attacked,
        "cpu_seconds": round(seconds, 4),
    }


def rows(bench: Bench, subjects: Sequence[Subject], known: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows that are missing from `known` or have an error there.

    All models are attacked on a batch before the next batch starts.
    """
    done = {key_of(row): row for row in known if "error" not in row}
    ready = []
    for subject in subjects:
        row = done.get(key_of(bench.row("clean", subject)))
        if row is None:
            row = clean_row(bench, subject)
            yield row
        if "error" not in row:
            subject.model.match(row["val"]["scores"], row["val"]["mos"])
            ready.append(subject)
    count = min(bench.images, len(bench.test))
    for number in range(-(-count // bench.batch_size)):
        for eps in bench.budgets:
            for subject in ready:
                if key_of(bench.row("attack", subject, eps=eps, batch=number)) not in done:
                    yield attacked_row(bench, subject, eps, number)


def cell(value: float, replicates: Scores) -> str:
    """Return a correlation and its interval as text."""
    found = interval(replicates)
    return f"{value:.3f} [{found[0]:.3f}, {found[1]:.3f}]" if found else f"{value:.3f}"


def table(bench: Bench, subjects: Sequence[Subject], known: Sequence[Row]) -> list[str]:
    """Return the table as lines of text, with a line for each model.

    The cell of a model and a budget has a result only if all batches are attacked. If only some batches are attacked,
    the cell has the number of attacked images. If the attack on a batch failed, the cell has "error".

    If the labels are opinions of similar images, the last line has the SROCC of a predictor that knows only distortion
    type and level, on the test split and on the attacked images.
    """
    count = min(bench.images, len(bench.test))
    size = bench.test.image_size
    titles = ["SROCC", "PLCC", f"SROCC of {count}", *bench.budgets]
    cells_of = [["model", *titles, "CPU s/score"]]
    for subject in subjects:
        own = [row for row in newest(known, KEYS) if (row["model"], row["version"]) == subject[:2]]
        clean = [row for row in own if row["kind"] == "clean" and row["settings"] == bench.settings("clean")]
        cells, seconds = [""] * len(titles), ""
        if clean and "error" in clean[-1]:
            cells[0] = clean[-1]["error"]
        elif clean:
            val, test = clean[-1]["val"], clean[-1]["test"]
            mos, scores = np.array(test["mos"]), np.array(test["scores"])
            mapped = LogisticMap.fit(val["scores"], val["mos"])(scores)
            cells[0] = cell(srocc(scores, mos), resampled_srocc(mos, [scores])[0])
            cells[1] = cell(plcc(mapped, mos), resampled_plcc(mos, [mapped])[0])
            seconds = f"{clean[-1]['cpu_seconds']:.3f}"
        for column, eps in enumerate(bench.budgets, 3):
            attacked = [
                row
                for row in own
                if row["kind"] == "attack"
                and row["settings"] == bench.settings("attack")
                and row["eps"] == eps
            ]
            attacked.sort(key=lambda row: row["batch"])
            if not attacked or any("error" in row for row in attacked):
                cells[column] = "error" if attacked else ""
                continue
            mos, before, after = (
                np.array([value for row in attacked for value in row[name]])
                for name in ("mos", "clean", "attacked")
            )
            if len(mos) < count:
                cells[column] = f"{len(mos)} of {count} images"
                continue
            replicates = resampled_srocc(mos, [before, after])
            cells[2] = cell(srocc(before, mos), replicates[0])
            cells[column] = cell(srocc(after, mos), replicates[1])
        cells_of.append([subject.name, *cells, seconds])
    widths = [max(map(len, column)) for column in zip(*cells_of, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in cells_of]
    return [
        f"{bench.test.name}, test split: {len(bench.test)} images, {size}×{size}; 95 % bootstrap intervals",
        f"square attack, L∞, {bench.config.attack_queries} queries: SROCC of {count} images, clean and by budget",
        *lines,
        *type_level(bench),
    ]


def type_level(bench: Bench) -> list[str]:
    """Return a line with the SROCC of a predictor that knows only distortion type and level, if it is defined."""
    names = bench.test.names
    attacked = [names[index] for index in spread(len(names), bench.images)]
    found = []
    for chosen, which in ((names, "images"), (attacked, "attacked images")):
        for ceiling in type_level_result(bench.test, chosen).values():
            found.append(f"SROCC {ceiling:.3f} on the {len(chosen)} {which}")
    if not found:
        return []
    return [f"predictor that knows only distortion type and level: {', '.join(found)}"]


def opened(options: argparse.Namespace) -> tuple[Bench, list[Subject]]:
    """Open the models and the dataset.

    Raises:
        ValueError: A checkpoint or the dataset cannot be read, or the checkpoints differ in image size or seed.
    """
    cards = [read_card(runs.one_checkpoint(folder)) for folder in options.checkpoint]
    pairs = {(card["config"]["image_size"], card["config"]["seed"]) for card in cards}
    if len(pairs) > 1:
        raise ValueError(
            f"the checkpoints have the image sizes and seeds {sorted(pairs)}; expected equal ones, because all models "
            "score the same images"
        )
    config = SRMConfig.from_dict(cards[0]["config"]).replace(attack_queries=options.queries)
    size = options.size or config.image_size
    subjects = checkpoints(options.checkpoint, options.device, size)
    val, test = (
        runs.dataset_for(
            cards[0]["card"], config.replace(image_size=size), root=options.data, split=split, progress=False
        )
        for split in ("val", "test")
    )
    for folder, card in zip(options.checkpoint, cards, strict=True):
        if (card["card"].get("dataset") or {}).get("fingerprint") != test.fingerprint:
            runs.say(f"{folder}: trained on another dataset or split, so training may have used test images")
    budgets, images = tuple(options.eps), min(options.images, len(test))
    machine = machine_with_load(options.device)
    bench = Bench(val, test, config, budgets, images, options.batch_size, machine)
    return bench, [*subjects, *metrics()]


def command() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = parser("blind", __doc__)
    add = made.add_argument
    add("--data", required=True, metavar="DIR", help="folder of a dataset, as for srm-iqa train")
    add(
        "--checkpoint",
        required=True,
        action="append",
        metavar="CKPT",
        help="folder of a checkpoint; repeat the option for several checkpoints of the same image size and seed",
    )
    add(
        "--size",
        type=positive,
        metavar="PX",
        help="side of the square images (default: the image size of the checkpoints)",
    )
    add("--queries", type=positive, default=200, help="scores per image and budget (default: %(default)s)")
    add(
        "--images",
        type=positive,
        default=48,
        help="attack this many images of the test split, evenly spaced (default: %(default)s)",
    )
    add(
        "--eps",
        nargs="+",
        default=list(BUDGETS),
        metavar="BUDGET",
        help=f"L∞ budgets (default: {' '.join(BUDGETS)})",
    )
    add("--batch-size", type=positive, default=8, help="images that are attacked together (default: 8)")
    add("--device", default=DEVICE, help="device of the checkpoints (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=RESULTS / "cpu" / "blind.jsonl",
        metavar="FILE",
        help="append rows to FILE",
    )
    add(
        "--resume",
        action="store_true",
        help="keep the rows of FILE that have no error, and compute the others",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    made = command()
    options = made.parse_args(arguments)
    if device_from(options.device).type == "cpu":
        runs.keep_memory()
    try:
        for eps in options.eps:
            parse_budget(eps)
        bench, subjects = opened(options)
    except ValueError as error:
        made.error(str(error))
    known = read(options.out) if options.out.is_file() else []
    if known and not options.resume:
        made.error(f"{options.out}: has {len(known)} rows; give --resume to keep them, or another --out")
    for row in rows(bench, subjects, list(known)):
        append(options.out, row)
        known.append(row)
        about = f", {row['eps']}, batch {row['batch']}" if row["kind"] == "attack" else ""
        runs.say(f"{row['model']}: {row['kind']}{about}" + (f": {row['error']}" if "error" in row else ""))
    print("\n".join(table(bench, subjects, known)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
