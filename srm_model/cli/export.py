"""`srm-iqa export`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from srm_model import runs
from srm_model.backbones import check_size
from srm_model.checkpoint import load_weights, save_model
from srm_model.files import atomic_path, write_text
from srm_model.model import IQAModel, load_model
from srm_model.reports.card import CARD, model_card

PROGRAM = "program.pt2"


def run(args: argparse.Namespace) -> None:
    """Write three things: a checkpoint without training state, an exported program, and a model card."""
    folder, out = runs.one_checkpoint(args.checkpoint), Path(args.out)
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out}: is the checkpoint itself; expected another folder")
    with runs.writing(out):
        model, card = load_model(folder)
        check_size(model.backbone_name, model.config.image_size)
        if model.stochastic:
            raise ValueError(
                f"{folder}: the model pools at random in evaluation mode; expected a deterministic model for export"
            )
        save_model(model, out, card=card)
        difference = _export_program(model, folder, out / PROGRAM)
        write_text(out / CARD, model_card(folder, program=PROGRAM))
    print(f"{out}: config.json, model.safetensors, {PROGRAM} and {CARD}")
    print(f"largest difference between the program and the model on two random images: {difference:.1e}")


def _export_program(model: IQAModel, folder: Path, path: Path) -> float:
    """Export a program that accepts any batch size and uses the reference backend.

    Return the largest difference between the scores of the exported program and the scores of `model`, on two random
    images.
    """
    plain = IQAModel(model.backbone_name, model.neck_name, model.config.replace(backend="reference"))
    load_weights(plain, folder)
    plain.eval().requires_grad_(False)
    side = model.config.image_size
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(plain, (images,), dynamic_shapes=({0: batch},))
    with atomic_path(path) as temporary:
        torch.export.save(program, temporary)
    with torch.no_grad():
        return float((program.module()(images) - model(images)).abs().max())
