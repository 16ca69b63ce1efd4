"""Write the model card of a checkpoint as Markdown, from the results in the checkpoint's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from srm_model.checkpoint import read_card
from srm_model.files import read_json
from srm_model.metrics import LogisticMap, doubts
from srm_model.norms import norm_of
from srm_model.reports import bootstrap

CARD = "MODEL_CARD.md"
LOAD_FOLDER = "model, card = load_model(PATH_OF_THIS_FOLDER)  # needs no network"
LOAD_SHIPPED = "model, card = load_model()  # needs no network"
_CLEAN = "none"
Interval = tuple[float, float] | None


class Result(NamedTuple):
    """Correlations of a checkpoint on clean test images, or under the worst attack at one budget."""

    attack: str  # "none", or norm and budget
    images: int
    srocc: float | None
    srocc_interval: Interval
    plcc: float | None
    plcc_interval: Interval
    worst: str  # attack with the lowest SROCC


def results_of(folder: str | Path) -> list[Result]:
    """Return the results in a checkpoint's folder that were measured with the checkpoint's weights.

    Intervals are central 95 % intervals of a bootstrap over the images (`srm_model.reports.bootstrap`). The worst
    attack is chosen separately for each resample. An interval is None if the result's file has no scores, or if the
    correlation is not finite in more than 5 % of the resamples.

    Args:
        folder: Folder of the checkpoint.
    """
    folder = Path(folder)
    digest = read_card(folder)["sha256"]
    found = []
    clean = _read(folder / "evaluation.json")
    if clean.get("sha256") == digest:
        intervals = _intervals(clean, [clean])
        found.append(
            Result(_CLEAN, clean["n"], clean["srocc"], intervals[0], clean["plcc"], intervals[1], "")
        )
    for attacked in _attacks(folder, digest):
        worst = attacked["worst"]
        intervals = _intervals(attacked, list(attacked.get("attacks", {}).values()))
        found.append(
            Result(
                _budget(attacked),
                len(attacked["mos"]),
                worst["srocc"],
                intervals[0],
                worst["plcc"],
                intervals[1],
                worst["srocc_attack"],
            )
        )
    return found


def model_card(
    folder: str | Path,
    *,
    notes: Sequence[str] = (),
    licences: Sequence[str] = (),
    use: str = LOAD_FOLDER,
    program: str | None = None,
) -> str:
    """Return the text of a model card.

    Args:
        folder: Folder of the checkpoint. The card has the results of `results_of` and of `audit.json`.
        notes: Further facts about the model, one line each.
        licences: Licences of the model's parts, one line each.
        use: Line of Python that loads the model.
        program: File name of an exported program. If given, the card says how to load the program.
    """
    document = read_card(folder)
    card, digest = document["card"], document["sha256"]
    dataset, validation = card.get("dataset") or {}, card.get("val") or {}
    side, epoch = document["config"].get("image_size"), card.get("epoch")
    lines = [
        f"# {document['backbone']} with the neck `{document['neck']}`",
        "",
        f"A no-reference image quality model. Input: pixels in [0, 1], {side}×{side}. Output: one score per image",
        "(on the scale of labels from 0 to 1, higher is better).",
        "",
        f"- dataset: {dataset.get('name', 'unknown')}{_split(dataset)}",
        f"- weights: {f'epoch {epoch}, the best on the validation images' if epoch else 'unknown'}",
        *_labels(dataset),
        f"- validation: SROCC {cell(validation.get('srocc'))}, PLCC {cell(validation.get('plcc'))}",
        *(f"- {note}" for note in notes),
    ]
    if "epoch" not in card:
        lines += ["", "**This model was not trained. Its scores have no meaning.**"]
    lines += ["", "## Measured", "", *_measured(Path(folder), digest), "", "## Audit", ""]
    lines += [_verdict(Path(folder), digest), "", *_limits(dataset, results_of(folder))]
    if licences:
        lines += ["## Licences", "", *(f"- {licence}" for licence in licences), ""]
    lines += ["## Use", "", "```python", "from srm_model import load_model", "", use, "```", ""]
    if program is not None:
        lines += [
            f"`{program}` is a `torch.export` program of the reference backend, for any batch size. Import",
            "`srm_kernels` first, which registers its operators, then call `torch.export.load`.",
            "",
        ]
    return "\n".join(lines)


def table(results: Sequence[Result]) -> list[str]:
    """Return the lines of a Markdown table of results, with 95 % intervals in brackets."""
    rows: list[list[Any]] = [["attack", "test images", "SROCC", "PLCC", "worst attack"], ["---"] * 5]
    for result in results:
        srocc = _with_interval(result.srocc, result.srocc_interval)
        plcc = _with_interval(result.plcc, result.plcc_interval)
        rows.append([result.attack, result.images, srocc, plcc, result.worst])
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def cell(value: float | None) -> str:
    """Format a correlation with three decimals; return "undefined" for None and NaN."""
    return "undefined" if value is None or math.isnan(value) else f"{value:.3f}"


def _with_interval(value: float | None, interval: Interval) -> str:
    return cell(value) if interval is None else f"{cell(value)} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _attacks(folder: Path, digest: str) -> list[dict[str, Any]]:
    """Return the results of attacks on the weights with this sha256, sorted by norm and budget."""
    found = [read_json(path) for path in (folder / "attacks").glob("*.json")]
    own = [item for item in found if (item.get("settings") or {}).get("checkpoint") == digest]
    return sorted(own, key=lambda item: (item["norm"], item["eps"]))


def _budget(attacked: Mapping[str, Any]) -> str:
    return f"{attacked['norm']} {norm_of(attacked['norm']).brief(attacked['eps'])}"


def _intervals(about: Mapping[str, Any], scored: Sequence[Mapping[str, Any]]) -> tuple[Interval, Interval]:
    """Return the bootstrap intervals of the lowest SROCC and of the lowest PLCC among several score vectors."""
    if not scored or any(entry.get("scores") is None for entry in scored):
        return None, None
    mos = np.array(about["mos"], float)
    scores = [np.array(entry["scores"], float) for entry in scored]
    logistic = about.get("logistic")
    mapped = scores if logistic is None else list(map(LogisticMap.from_dict(logistic), scores))
    resampled = bootstrap.resampled_srocc(mos, scores), bootstrap.resampled_plcc(mos, mapped)
    low, high = (bootstrap.interval(np.min(replicates, axis=0)) for replicates in resampled)
    return low, high


def _split(dataset: Mapping[str, Any]) -> str:
    sizes = dataset.get("splits") or {}
    if not sizes:
        return ""
    return f" ({', '.join(f'{size} {name}' for name, size in sizes.items())} images)"


def _labels(dataset: Mapping[str, Any]) -> list[str]:
    labels = str(dataset.get("labels", "unknown"))
    lines = [f"- labels: {labels}"]
    kind, _, source = labels.partition(":")
    if kind == "metric":
        lines.append(f"- the labels are values of the metric {source.upper()}, not people's opinions")
    if kind == "opinions":
        lines.append(
            f"- the training and test images are not images of {source}, and no result here is a result on {source}. "
            "The labels are people's opinions of similar images: the label of an image is the opinion score of the "
            f"{source} image with the same photograph, distortion type and level"
        )
        lines.append(
            "- a predictor that knows only distortion type and level has an SROCC of "
            f"{cell(dataset.get('type_level_srocc'))} on the test images, so a high correlation is not evidence that "
            "the model perceives quality"
        )
    return lines


def _measured(folder: Path, digest: str) -> list[str]:
    """Return Markdown lines with the results of the weights that have this sha256.

    A table has a row for clean images, and a row for the worst attack at each budget. Notes follow the table.
    """
    results = results_of(folder)
    if not results:
        return ["The model has been neither evaluated nor attacked."]
    lines = table(results)
    if any(result.srocc_interval for result in results):
        lines += [
            "",
            "Brackets: central 95 % interval of a bootstrap over the test images. Images of the same photograph are",
            "not independent, so the intervals may be too narrow.",
        ]
    if all(result.attack == _CLEAN for result in results):
        return [*lines, "", "The model has not been attacked: its robustness is not known."]
    attacked = _attacks(folder, digest)
    weak = [f"- {_budget(item)}, {doubt}" for item in attacked for doubt in doubts(item.get("attacks", {}))]
    return [*lines, "", *weak] if weak else lines


def _verdict(folder: Path, digest: str) -> str:
    """Summarise the audit of the weights that have this sha256."""
    found = _read(folder / "audit.json")
    if found.get("sha256") != digest:
        return "Not audited: masked gradients may make the model look more robust than it is."
    failed = [check["title"] for check in found["checks"] if check["passed"] is False]
    asked = sum(check["passed"] is not None for check in found["checks"])
    if failed:
        return f"**Failed**: {len(failed)} of {asked} checks ({', '.join(failed)}). Do not trust its robust figures."
    open_ = [check["title"] for check in found["checks"] if check["passed"] is None]
    left = f" Not run: {', '.join(open_)}." if open_ else ""
    return f"Passed at {_budget(found)}: none of {asked} checks found masked gradients.{left}"


def _limits(dataset: Mapping[str, Any], results: Sequence[Result]) -> list[str]:
    """Return the section about uses that the results do not support."""
    labels = str(dataset.get("labels", ""))
    lines = []
    if labels.startswith(("metric:", "opinions:")):
        lines.append(
            "- Camera photographs, such as those of KonIQ-10k: all training and test images are synthetic "
            "distortions of a few photographs. The model was not tested on camera photographs, and nothing is claimed "
            "about them."
        )
        lines.append("- Distortions other than those of the training.")
    budgets = [result.attack for result in results if result.attack != _CLEAN]
    if budgets:
        lines.append(f"- Attacks beyond the measured budgets ({', '.join(budgets)}), or in another norm.")
    return ["## Not intended for", "", *lines, ""] if lines else []
