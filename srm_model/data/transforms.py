"""From an image file to the network's input: shorter side to a size, then a crop (docs/METHOD.md §5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from srm_model.config import SRMConfig
from srm_model.data.images import Pixels, decoded

LONGEST = 16  # times the shorter side: what `load_resized` keeps of a longer image


def load_image(path: str | Path, image_size: int = SRMConfig.image_size) -> Tensor:
    """One image file under the evaluation transform: (3, S, S) float32 in [0, 1], S = `image_size`.

    An image that cannot be read is a ValueError.
    """
    return to_tensor(centre_crop(load_resized(path, image_size), image_size))


def load_resized(path: str | Path, image_size: int) -> Pixels:
    """The image with its shorter side brought to `image_size`, (H, W, 3) uint8; bicubic, antialiased, up or down.

    Of an image more than `LONGEST` times as long as wide only the middle, of that ratio, is resized and returned, so
    that memory is bounded by the decoded image and the crop. The centre crop is that of the whole image.
    """
    with decoded(path) as picture:
        shorter = min(picture.size)
        (left, right, width), (top, bottom, height) = (
            _span(side, shorter, image_size) for side in picture.size
        )
        return np.asarray(picture.resized((width, height), (left, top, right, bottom)))


def _span(side: int, shorter: int, size: int) -> tuple[float, float, int]:
    """Where the part of a side that is kept begins and ends, in the file's pixels, and its length once resized."""
    whole = max(size, round(side * size / shorter))
    kept = min(whole, LONGEST * size)
    start = (whole - size) // 2 - (kept - size) // 2
    return start * side / whole, (start + kept) * side / whole, kept


def centre_crop(pixels: Pixels, size: int) -> Pixels:
    """The `size`×`size` middle of an (H, W, 3) array."""
    height, width = pixels.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop_and_flip(pixels: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """A `size`×`size` part of an (H, W, 3) array at a uniformly drawn place, mirrored left to right half the time."""
    height, width = pixels.shape[:2]
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    crop = pixels[top : top + size, left : left + size]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def to_tensor(pixels: Pixels) -> Tensor:
    """(H, W, 3) uint8 → (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)
