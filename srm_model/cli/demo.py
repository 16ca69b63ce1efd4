"""`srm-iqa demo`: run the full pipeline on photographs from installed packages; nothing is downloaded."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from srm_model import runs
from srm_model.cli import attack
from srm_model.cli.options import device_from
from srm_model.cli.tables import print_text
from srm_model.cli.train import print_clean
from srm_model.config import SRMConfig
from srm_model.data.synthesize import synthesize
from srm_model.files import make_folder
from srm_model.reports import write_report
from srm_model.runs.attacking import attack_checkpoint
from srm_model.runs.training import new_model, train_neck

BACKBONE = "tf_efficientnet_lite0"  # a package contains its ImageNet weights
NECKS = ("srm", "none")
EPS = 1 / 255
TITLE = "Demo: two necks trained and attacked on distorted photographs"

# The demo has few images and takes minutes, so it has fewer steps and larger learning rates than the protocol.
FULL: dict[str, Any] = {
    "image_size": 160,
    "batch_size": 16,
    "epochs": 3,
    "warmup_epochs": 1,
    "lr_backbone": 2e-4,
    "lr_neck": 1e-3,
    "attack_steps": 10,
    "attack_restarts": 1,
}
QUICK: dict[str, Any] = {**FULL, "image_size": 96, "epochs": 1, "attack_steps": 3}
FULL_DATA: dict[str, Any] = {}
QUICK_DATA: dict[str, Any] = {"types": (1, 8, 10, 17), "levels": (1, 3, 5)}
FULL_IMAGES, QUICK_IMAGES = 48, 16


def run(args: argparse.Namespace) -> None:
    """Synthesise a dataset, train, attack and write the report. Steps that an earlier call finished are skipped."""
    with runs.writing(args.out):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    fields, data, images = (QUICK, QUICK_DATA, QUICK_IMAGES) if args.quick else (FULL, FULL_DATA, FULL_IMAGES)
    config = SRMConfig(**fields, seed=args.seed)
    out, progress = Path(args.out), not args.no_progress
    device = device_from(args.device)

    make_folder(out)
    with runs.recorded(out, args.arguments, title=TITLE) as record:
        if progress:
            runs.say(f"distorting photographs into {out / 'data'}")
        data = {**data, "image_size": config.image_size, "seed": args.seed}
        root = synthesize(out / "data", progress=runs.bars(progress), **data)
        splits = runs.open_splits(root, config, progress=progress)
        record["dataset"] = runs.dataset_card(splits["train"])
        for neck in NECKS:
            model = new_model(BACKBONE, neck, config, pretrained=True)
            train_neck(model, out / neck, splits, device=device, progress=progress)
        results = []
        for neck, other in zip(NECKS, reversed(NECKS), strict=True):
            result = attack_checkpoint(
                out / neck,
                splits["test"],
                norm="linf",
                eps=EPS,
                config=config,
                device=device,
                surrogate=out / other,
                limit=images,
                keep=4,
                progress=progress,
            )
            results.append((out / neck, result))
    report = write_report(out)

    text = partial(print_text, as_json=args.json)
    text("Clean test images, from photographs that training has not seen:")
    print_clean([out / neck for neck in NECKS], as_json=args.json, table="clean")
    text(f"\nAttacked, {images} of those images:")
    attack.print_results(results, as_json=args.json, table="attacked")
    text(
        f"\nThe labels come from the metric {splits['test'].labels.partition(':')[2].upper()}, which compares each "
        "image with its original, and not from people.\n"
        "The test set is too small to compare the necks."
    )
    text(f"\nReport: {report}")
