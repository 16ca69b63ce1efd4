"""`srm-iqa export`: weights and config, a program of the reference path, and a card of what was measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from srm_model import runs
from srm_model.backbones import check_size
from srm_model.checkpoint import load_weights, read_card, save_model
from srm_model.files import atomic_path, read_json, write_text
from srm_model.metrics import doubts
from srm_model.model import IQAModel, load_model
from srm_model.norms import norm_of
from srm_model.runs.training import EVALUATION

PROGRAM = "program.pt2"
CARD = "MODEL_CARD.md"
AUDIT = "audit.json"


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint without its training state, an exported program and a model card."""
    folder, out = runs.one_checkpoint(args.checkpoint), Path(args.out)
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out}: is the checkpoint itself; give another folder to export to")
    with runs.writing(out):
        model, card = load_model(folder)
        check_size(model.backbone_name, model.config.image_size)
        if model.stochastic:
            raise ValueError(
                f"{folder}: a model that pools at random in evaluation cannot be exported as a program"
            )
        save_model(model, out, card=card)
        difference = _export_program(model, folder, out / PROGRAM)
        write_text(out / CARD, _model_card(model, card, folder))
    print(f"{out}: config.json, model.safetensors, {PROGRAM} and {CARD}")
    print(f"the exported program and the model differ by at most {difference:.1e} on two random images")


def _export_program(model: IQAModel, folder: Path, path: Path) -> float:
    """torch.export of the reference path with any batch size; its largest difference from the model."""
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
    if labels.startswith("opinions:"):
        source = labels.partition(":")[2]
        lines.append(
            f"- the labels are people's opinions of nearly these images: those that {source} has for its images of the "
            f"same photograph, type and level. Type and level alone reach an SROCC of "
            f"{_figure(dataset.get('type_level_srocc'))} on the test images"
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
        "model, card = load_model(PATH_OF_THIS_FOLDER)  # reads nothing from a network",
        "```",
        "",
        f"`{PROGRAM}` is a `torch.export` program of the reference path, for any batch size: import",
        "`srm_kernels`, which registers its operators, then `torch.export.load`.",
        "",
    ]
    return "\n".join(lines)


def _measured(folder: Path, digest: str) -> list[str]:
    """A table of the clean test and of every attack on these very weights; results of others are left out."""
    rows: list[list[Any]] = []
    weak: list[str] = []
    clean = read_json(folder / EVALUATION) if (folder / EVALUATION).is_file() else None
    if clean is not None and clean.get("sha256") == digest:
        rows.append(["none", clean["n"], _figure(clean["srocc"]), _figure(clean["plcc"]), ""])
    for path in sorted((folder / "attacks").glob("*.json")):
        found = read_json(path)
        if (found.get("settings") or {}).get("checkpoint") == digest:
            budget = f"{found['norm']} {norm_of(found['norm']).brief(found['eps'])}"
            worst = found["worst"]
            figures = [_figure(worst["srocc"]), _figure(worst["plcc"])]
            rows.append([budget, len(found["mos"]), *figures, worst["srocc_attack"]])
            weak += [f"- {budget}, {doubt}" for doubt in doubts(found.get("attacks", {}))]
    if not rows:
        return ["Neither evaluated nor attacked: nothing is claimed."]
    table = [["attack", "test images", "SROCC", "PLCC", "worst attack"], ["---"] * 5, *rows]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in table]
    if len(rows) == 1 and rows[0][0] == "none":
        lines += ["", "It has not been attacked: nothing is claimed about its robustness."]
    return [*lines, "", *weak] if weak else lines


def _verdict(folder: Path, digest: str) -> str:
    """What `srm-iqa audit` found of these weights: whether the attacks above can be believed."""
    path = folder / AUDIT
    found = read_json(path) if path.is_file() else {}
    if found.get("sha256") != digest:
        return "Not audited: whether attacks measure its robustness or only fail to find its weakness is not known."
    failed = [check["title"] for check in found["checks"] if check["passed"] is False]
    asked = sum(check["passed"] is not None for check in found["checks"])
    if failed:
        return f"**Failed**: {len(failed)} of {asked} checks ({', '.join(failed)}). Do not trust its robust figures."
    return f"Passed: none of {asked} checks found a sign that the attacks are held up by masked gradients."


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
