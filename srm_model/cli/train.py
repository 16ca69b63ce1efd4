"""`srm-iqa train` and `srm-iqa evaluate`."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from srm_model import runs
from srm_model.checkpoint import read_card
from srm_model.cli.options import config_from, device_from
from srm_model.cli.tables import print_rows, print_type_level
from srm_model.data import ImageCache
from srm_model.files import read_json, write_json
from srm_model.runs.training import EVALUATION, logistic_of, new_model, train_neck
from srm_model.training import evaluate as evaluate_model


def run(args: argparse.Namespace) -> None:
    """Train each neck, save it in its folder, evaluate it on the test split and print the correlations."""
    with runs.process_group() as writes, runs.writing(args.out):
        folders = _train_all(args, writes)
    if writes:
        print_clean(folders, as_json=args.json)


def _train_all(args: argparse.Namespace, writes: bool) -> list[Path]:
    config, device = config_from(args), device_from(args.device)
    cache = None if args.cache is None else ImageCache(args.cache, args.cache_size)
    progress = writes and not args.no_progress
    splits = runs.open_splits(args.data, config, cache, progress=progress)
    # Build all models before anything is written, because an unknown backbone fails here.
    models = {
        neck: new_model(args.backbone, neck, config, pretrained=args.pretrained)
        for neck in dict.fromkeys(args.neck)
    }
    out = Path(args.out)
    title = args.title or f"{args.backbone} · {splits['train'].name}"
    dataset = runs.dataset_card(splits["train"])
    with runs.recorded(out, args.arguments, title=title, dataset=dataset) if writes else nullcontext():
        for neck, model in models.items():
            train_neck(
                model,
                out / neck,
                splits,
                device=device,
                freeze_backbone=args.freeze_backbone,
                resume=not args.restart,
                workers=args.workers,
                progress=progress,
                save_every=args.save_every,
                compile=args.compile,
            )
    return [out / neck for neck in models]


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate checkpoints. Only results on the test split of the training dataset are saved (`evaluation.json`)."""
    kept = args.data is None and args.split == "test"
    found = runs.checkpoints_of_study(args.folder)
    with runs.process_group() as writes, runs.writing(args.folder) if kept else nullcontext():
        rows = _evaluate_all(args, found, writes and kept, progress=writes and not args.no_progress)
    if writes:
        columns = {"checkpoint": "checkpoint", "SROCC": "srocc", "PLCC": "plcc", "images": "images"}
        print_rows(rows, columns, as_json=args.json)
        if not args.json:
            print_type_level(rows, "checkpoint")


def _evaluate_all(
    args: argparse.Namespace, folders: dict[str, Path], writes: bool, *, progress: bool
) -> list[dict[str, Any]]:
    device = device_from(args.device)
    rows = []
    for name, folder in folders.items():
        model, card = runs.open_checkpoint(folder, device, args.backend)
        dataset = runs.dataset_for(card, model.config, root=args.data, split=args.split, progress=progress)
        with runs.running() as ran:
            found = evaluate_model(
                model,
                dataset,
                batch_size=args.batch_size,
                logistic=logistic_of(card),
                workers=args.workers,
                progress=progress,
            )
        if writes:
            kernels = runs.kernels_of(model.config, device, ran)
            about = {"kernels": kernels, "sha256": read_card(folder)["sha256"]}
            write_json(folder / EVALUATION, {**found, **about})
        if progress:
            runs.say_kernels(model.config, device, ran)
        rows.append({"checkpoint": name, **_correlations(found)})
    return rows


def print_clean(folders: list[Path], *, as_json: bool = False, table: str | None = None) -> None:
    """Print the correlations of trained checkpoints on clean test images as a table (see `print_rows`)."""
    rows = [{"neck": folder.name, **_correlations(read_json(folder / EVALUATION))} for folder in folders]
    columns = {"neck": "neck", "SROCC": "srocc", "PLCC": "plcc", "test images": "images"}
    print_rows(rows, columns, as_json=as_json, table=table)
    if not as_json:
        print_type_level(rows, "neck")


def _correlations(evaluation: dict[str, Any]) -> dict[str, Any]:
    found = {"srocc": evaluation["srocc"], "plcc": evaluation["plcc"], "images": evaluation["n"]}
    return {**found, "type_level_srocc": evaluation.get("type_level_srocc")}
