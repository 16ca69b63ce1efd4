"""Attacked images as files: clean, attacked, and their difference made visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from srm_model.attacks.suite import SuiteResult
from srm_model.files import atomic_path, write_json

_MAX_MAGNIFICATION = 1000


def save_examples(result: SuiteResult, folder: str | Path) -> list[dict[str, Any]]:
    """Write `result.examples` to `folder` as PNG files and `examples.json`; returns what the latter holds.

    Each entry gives name, mos, clean_score, adversarial_score, attack, the file names clean, attacked and
    difference (relative to the folder), and magnification: the difference picture is mid-grey plus so many
    times the change, chosen so that 99.9 % of its values fit. The scores belong to the float images; the
    pictures are rounded to 8 bits.
    """
    folder = Path(folder)
    entries = []
    for number, example in enumerate(result.examples):
        change = _pixels(example.attacked) - _pixels(example.clean)
        magnification = _magnification(change)
        pictures = {
            "clean": _pixels(example.clean),
            "attacked": _pixels(example.attacked),
            "difference": 0.5 + magnification * change,
        }
        files = {kind: f"{number:02d}-{example.attack}-{kind}.png" for kind in pictures}
        for kind, picture in pictures.items():
            with atomic_path(folder / files[kind]) as path:
                Image.fromarray(np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)).save(path)
        entries.append(
            {
                "name": result.names[example.position],
                "mos": result.mos[example.position],
                "clean_score": example.clean_score,
                "adversarial_score": example.attacked_score,
                "attack": example.attack,
                **files,
                "magnification": magnification,
            }
        )
    write_json(folder / "examples.json", entries)
    return entries


def _magnification(change: np.ndarray) -> int:
    """The largest whole factor that keeps 99.9 % of the changes within half the range; 1 if nothing changed."""
    largest = float(np.quantile(np.abs(change), 0.999))
    # 1e-4: images are fp32, so a change of exactly 0.01 comes out a little above it.
    return max(1, min(_MAX_MAGNIFICATION, int(0.5001 / largest))) if largest > 0 else 1


def _pixels(image: Tensor) -> np.ndarray:
    return image.detach().cpu().double().permute(1, 2, 0).numpy()
