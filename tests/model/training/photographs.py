"""Write a dataset in TID2013's layout that is small enough to train on in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

FLAGS = (
    *("--backbone", "test_convnext", "--neck", "srm", "--device", "cpu", "--no-progress"),
    *("--set=channels=16", "--set=heads=2", "--set=rank=4", "--set=pool_size=2"),
    *("--image-size", "32", "--batch-size", "8", "--epochs", "2", "--lr-neck", "1e-3"),
)


def write_set(folder: Path) -> Path:
    """Write six images for each of five references. Images with more contrast have higher labels."""
    rng = np.random.default_rng(0)
    (folder / "distorted_images").mkdir(parents=True)
    lines = []
    for reference in range(1, 6):
        pixels = rng.uniform(0, 255, (5, 5, 3)).repeat(8, 0).repeat(8, 1)
        for kind in (1, 2):
            for level in (1, 2, 3):
                name = f"i{reference:02}_{kind:02}_{level}.bmp"
                contrast = (128 + (pixels - 128) / level).astype(np.uint8)
                Image.fromarray(contrast).save(folder / "distorted_images" / name)
                lines.append(f"{7.0 - level - 0.1 * kind + 0.05 * reference:.5f} {name}\n")
    (folder / "mos_with_names.txt").write_text("".join(lines))
    return folder
