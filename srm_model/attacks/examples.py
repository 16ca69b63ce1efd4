"""Write the clean image, the attacked image and their magnified difference as files."""

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
    """Write the examples of a result as PNG files and `examples.json`.

    The scores in `examples.json` are those of the float images. The pixels in the PNG files are rounded to 8 bits, so a
    model can give slightly different scores to the files.

    Args:
        result: Result of `Suite.run` with `keep` above 0.
        folder: Folder of the files.

    Returns:
        The entries of `examples.json`. Each entry has these keys:

        - name, mos, clean_score, adversarial_score, attack and magnification;
        - clean, attacked and difference: file names, relative to the folder.

        A pixel value of the difference file is 0.5 + magnification · change, clipped to [0, 1]. The change is the
        attacked value minus the clean value, so unchanged pixels are mid-grey. The magnification is the largest whole
        number up to 1000 for which 99.9 % of the values need no clipping. If no whole number fulfils this condition,
        or if no pixel is changed, the magnification is 1.
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
    """Return the largest whole factor that keeps 99.9 % of the changes within ±0.5."""
    largest = float(np.quantile(np.abs(change), 0.999))
    # 0.5001 allows for the rounding of fp32 images, where a change of 0.01 may be slightly larger.
    return max(1, min(_MAX_MAGNIFICATION, int(0.5001 / largest))) if largest > 0 else 1


def _pixels(image: Tensor) -> np.ndarray:
    return image.detach().cpu().double().permute(1, 2, 0).numpy()
