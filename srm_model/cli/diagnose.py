"""`srm-iqa diagnose`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from srm_model import runs
from srm_model.attacks.suite import spread
from srm_model.cli.options import device_from
from srm_model.cli.streams import as_named
from srm_model.cli.tables import print_json, print_text
from srm_model.diagnosis import diagnose
from srm_model.files import write_json, write_text
from srm_model.necks import NECKS
from srm_model.reports.conditioning import markdown, render

PICTURED = 2


def run(args: argparse.Namespace) -> None:
    """Diagnose each checkpoint, print the tables, and write `diagnosis.json`, `diagnosis.md` and `diagnosis.html`.

    The files are written into the folder of `--out`. Without `--out`, they are written into the checkpoint's folder.
    """
    without = [name for name, kind in NECKS.items() if kind.attention != "nystrom"]
    folders = [folder for folder in runs.checkpoints(args.folder) if folder.name not in without]
    if not folders:
        raise ValueError(f"{args.folder}: no checkpoint has landmark systems; expected one with the neck srm")
    with runs.writing(args.out or args.folder):
        _diagnose_all(args, folders)


def _diagnose_all(args: argparse.Namespace, folders: list[Path]) -> None:
    device = device_from(args.device)
    for folder in folders:
        model, card = runs.open_checkpoint(folder, device, args.backend)
        progress = not args.no_progress
        dataset = runs.dataset_for(card, model.config, root=args.data, split=args.split, progress=progress)
        indices = spread(len(dataset), args.images)
        if progress:
            runs.say(f"diagnosing {folder} on {len(indices)} images, {device}")
        found = diagnose(model, runs.batches(dataset, indices, args.batch_size), pictured=PICTURED)
        about = {
            "checkpoint": str(folder),
            "data": f"{dataset.name}, {dataset.split} split",
            "images": len(indices),
        }
        out = Path(args.out) if args.out else folder
        write_json(out / "diagnosis.json", {**about, "config": model.config.to_dict(), **found})
        write_text(out / "diagnosis.md", markdown(found))
        pictures = [_picture(dataset[index][0]) for index in indices[:PICTURED]]
        write_text(out / "diagnosis.html", render(found, about, pictures))
        if args.json:
            for table, rows in _rows(found).items():
                print_json([{"checkpoint": str(folder), **row} for row in rows], table)
        else:
            print(markdown(found))
        print_text(as_named(out / "diagnosis.html"), as_json=args.json)


def _rows(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the tables that `markdown` formats, as a dict from the name of a table to its rows."""
    return {
        "settings": [{"setting": name, **summary} for name, summary in found["table"].items()],
        "links": [
            {"link": name, "rank": link["rank"], **link["all"]} for name, link in found["links"].items()
        ],
        "errors": found["errors"],
        "changes": found["changes"],
    }


def _picture(image: Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
