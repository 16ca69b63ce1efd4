"""`srm-iqa export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from srm_model.checkpoint import load_weights, save_model
from srm_model.cli import runs
from srm_model.files import atomic_path, read_json, write_text
from srm_model.model import IQAModel, load_model

PROGRAM = "program.pt2"
CARD = "MODEL_CARD.md"


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint without its training state, an exported program and a model card."""
    folder, out = runs.one_checkpoint(args.checkpoint), Path(args.out)
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out}: is the checkpoint itself; give another folder to export to")
    model, card = load_model(folder)
    save_model(model, out, card=card)
    difference = _export_program(model, folder, out / PROGRAM)
    write_text(out / CARD, _model_card(model, card, _test_figures(folder)))
    print(f"{out}: config.json, model.safetensors, {PROGRAM} and {CARD}")
    print(f"the exported program and the model differ by at most {difference:.1e} on two random images")


def _export_program(model: IQAModel, folder: Path, path: Path) -> float:
    """torch.export of the reference path with any batch size; its largest difference from the model."""
    if model.stochastic:
        raise ValueError(
            f"{folder}: a model that pools at random in evaluation cannot be exported as a program"
        )
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


def _test_figures(folder: Path) -> dict[str, Any] | None:
    path = folder / "evaluation.json"
    return read_json(path) if path.is_file() else None


def _model_card(model: IQAModel, card: dict[str, Any], test: dict[str, Any] | None) -> str:
    dataset, validation = card.get("dataset") or {}, card.get("val") or {}
    labels = str(dataset.get("labels", "unknown"))
    lines = [
        f"# {model.backbone_name} with the neck `{model.neck_name}`",
        "",
        "A no-reference image quality model: pixels in [0, 1] in, one score per image out (normalised quality, about 0",
        f"to 1, higher is better). Images of {model.config.image_size}×{model.config.image_size} pixels.",
        "",
        f"- trained on: {dataset.get('name', 'unknown')}, epoch {card.get('epoch', 'unknown')}",
        f"- labels: {labels}",
        f"- validation: SROCC {_figure(validation.get('srocc'))}, PLCC {_figure(validation.get('plcc'))}",
    ]
    if labels.startswith("metric:"):
        metric = labels.partition(":")[2].upper()
        lines.append(f"- the labels are values of the metric {metric}, not people's opinion")
    if test is None:
        lines.append("- test: not evaluated")
    else:
        figures = f"SROCC {_figure(test['srocc'])}, PLCC {_figure(test['plcc'])}"
        lines.append(f"- {test['split']} split, clean, {test['n']} images: {figures}")
    lines += [
        "- robustness: nothing is claimed here; attack the model before relying on it",
        "",
        "```python",
        "from srm_model import load_model",
        "",
        "model, card = load_model(PATH_OF_THIS_FOLDER)  # reads nothing from a network",
        "```",
        "",
        f"`{PROGRAM}` is a `torch.export` program of the reference path, for any batch size: import",
        "`srm_kernels`, which registers its operators, then `torch.export.load`.",
        "",
    ]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
