"""`srm-iqa export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from srm_model import runs
from srm_model.backbones import check_size
from srm_model.checkpoint import load_weights, read_card, save_model
from srm_model.cli.tables import cell
from srm_model.files import atomic_path, read_json, write_text
from srm_model.metrics import doubts
from srm_model.model import IQAModel, load_model
from srm_model.norms import norm_of
from srm_model.runs.training import EVALUATION

PROGRAM = "program.pt2"
CARD = "MODEL_CARD.md"
AUDIT = "audit.json"


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint without training state, an exported program (reference backend) and a model card."""
    folder, out = runs.one_checkpoint(args.checkpoint), Path(args.out)
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out}: is the checkpoint itself; expected another folder")
    with runs.writing(out):
        model, card = load_model(folder)
        check_size(model.backbone_name, model.config.image_size)
        if model.stochastic:
            raise ValueError(f"{folder}: pools at random in evaluation, so it cannot be exported")
        save_model(model, out, card=card)
        difference = _export_program(model, folder, out / PROGRAM)
        write_text(out / CARD, _model_card(model, card, folder))
    print(f"{out}: config.json, model.safetensors, {PROGRAM} and {CARD}")
    print(f"largest difference between the program and the model on two random images: {difference:.1e}")


def _export_program(model: IQAModel, folder: Path, path: Path) -> float:
    """Export a program for any batch size; return the largest difference between its scores and the model's.

    The program uses the reference backend.
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


def _model_card(model: IQAModel, card: dict[str, Any], folder: Path) -> str:
    dataset, validation = card.get("dataset") or {}, card.get("val") or {}
    labels = str(dataset.get("labels", "unknown"))
    lines = [
        f"# {model.backbone_name} with the neck `{model.neck_name}`",
        "",
        "A no-reference image quality model. Input: pixels in [0, 1], "
        f"{model.config.image_size}×{model.config.image_size}. Output: one score per image (normalised quality, about",
        "0 to 1, higher is better).",
        "",
        f"- trained on: {dataset.get('name', 'unknown')}, epoch {card.get('epoch', 'unknown')}",
        f"- labels: {labels}",
        f"- validation: SROCC {cell(validation.get('srocc'))}, PLCC {cell(validation.get('plcc'))}",
    ]
    if labels.startswith("metric:"):
        metric = labels.partition(":")[2].upper()
        lines.append(f"- the labels are values of the metric {metric}, not people's opinions")
    if labels.startswith("opinions:"):
        source = labels.partition(":")[2]
        lines.append(
            f"- the labels are people's opinions of similar images: those of {source} with the same photograph, "
            "distortion type and level. Type and level alone reach an SROCC of "
            f"{cell(dataset.get('type_level_srocc'))} on the test images"
        )
    digest = read_card(folder)["sha256"]
    lines += [
        "",
        "## Measured",
        "",
        *_measured(folder, digest),
        "",
        "## Audit",
        "",
        _verdict(folder, digest),
        "",
        "## Use",
        "",
        "```python",
        "from srm_model import load_model",
        "",
        "model, card = load_model(PATH_OF_THIS_FOLDER)  # needs no network",
        "```",
        "",
        f"`{PROGRAM}` is a `torch.export` program of the reference backend, for any batch size. Import",
        "`srm_kernels` first, which registers its operators, then call `torch.export.load`.",
        "",
    ]
    return "\n".join(lines)


def _measured(folder: Path, digest: str) -> list[str]:
    """Return a table of the results, on clean images and under every attack, of the weights with this sha256."""
    rows: list[list[Any]] = []
    weak: list[str] = []
    clean = read_json(folder / EVALUATION) if (folder / EVALUATION).is_file() else None
    if clean is not None and clean.get("sha256") == digest:
        rows.append(["none", clean["n"], clean["srocc"], clean["plcc"], ""])
    for path in sorted((folder / "attacks").glob("*.json")):
        found = read_json(path)
        if (found.get("settings") or {}).get("checkpoint") == digest:
            budget = f"{found['norm']} {norm_of(found['norm']).brief(found['eps'])}"
            worst = found["worst"]
            rows.append([budget, len(found["mos"]), worst["srocc"], worst["plcc"], worst["srocc_attack"]])
            weak += [f"- {budget}, {doubt}" for doubt in doubts(found.get("attacks", {}))]
    if not rows:
        return ["The model has been neither evaluated nor attacked."]
    table = [["attack", "test images", "SROCC", "PLCC", "worst attack"], ["---"] * 5, *rows]
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in table]
    if len(rows) == 1 and rows[0][0] == "none":
        lines += ["", "The model has not been attacked: its robustness is not known."]
    return [*lines, "", *weak] if weak else lines


def _verdict(folder: Path, digest: str) -> str:
    """Summarise the audit of the weights that have this sha256."""
    path = folder / AUDIT
    found = read_json(path) if path.is_file() else {}
    if found.get("sha256") != digest:
        return "Not audited: masked gradients may make the model look more robust than it is."
    failed = [check["title"] for check in found["checks"] if check["passed"] is False]
    asked = sum(check["passed"] is not None for check in found["checks"])
    if failed:
        return f"**Failed**: {len(failed)} of {asked} checks ({', '.join(failed)}). Do not trust its robust figures."
    return f"Passed: none of {asked} checks found masked gradients."
