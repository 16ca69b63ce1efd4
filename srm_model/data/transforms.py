"""The transforms from an image file to the network's input (docs/METHOD.md §5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from srm_model.config import SRMConfig
from srm_model.data.images import Pixels, decoded

LONGEST = 16  # largest ratio of the longer to the shorter side; `load_resized` crops longer images
WHOLE = 3  # largest side of `load_whole`, as a multiple of the image size of the model


def load_image(path: str | Path, image_size: int = SRMConfig.image_size) -> Tensor:
    """Load an image file with the evaluation transform: (3, S, S) float32 in [0, 1], S = `image_size`.

    Args:
        path: Path of the file.
        image_size: S, height and width of the result.

    Returns:
        The image.

    Raises:
        ValueError: The image cannot be read.
    """
    return to_tensor(centre_crop(load_resized(path, image_size), image_size))


def load_whole(path: str | Path, image_size: int) -> Tensor:
    """Load a whole image file for `srm_model.crops.CropMean`: (3, H, W) float32 in [0, 1].

    An image whose sides are from `image_size` to `WHOLE` times `image_size` keeps its resolution. If the shorter side
    is less than `image_size`, the image is enlarged until this side is `image_size`. If the longer side is more than
    `WHOLE` times `image_size`, the image is shrunk until this side is `WHOLE` times `image_size`, or until the shorter
    side is `image_size`. A longer side that is still too long is cropped around its centre.

    Args:
        path: Path of the file.
        image_size: Height and width of the crops of `CropMean`.

    Returns:
        The image. H and W are from `image_size` to `WHOLE` times `image_size`.

    Raises:
        ValueError: The image cannot be read.
    """
    most = WHOLE * image_size
    with decoded(path) as picture:
        least = image_size / min(picture.size)
        scale = max(least, min(1.0, most / max(picture.size)))
        sides = [max(image_size, round(side * scale)) for side in picture.size]
        width, height = (min(side, most) for side in sides)
        (left, right), (top, bottom) = (
            _in_file(side, whole, (whole - kept) // 2, kept)
            for side, whole, kept in zip(picture.size, sides, (width, height), strict=True)
        )
        return to_tensor(np.asarray(picture.resized((width, height), (left, top, right, bottom))))


def load_resized(path: str | Path, image_size: int) -> Pixels:
    """Load an image and resize its shorter side to `image_size`, bicubic and antialiased.

    If the longer side is more than `LONGEST` times the shorter side, the image is first cropped around its centre to
    the aspect ratio `LONGEST`. The crop limits the peak memory and does not change the result of `centre_crop`.

    Returns:
        Pixels, (H, W, 3) uint8.

    Raises:
        ValueError: The image cannot be read.
    """
    with decoded(path) as picture:
        shorter = min(picture.size)
        (left, right, width), (top, bottom, height) = (
            _span(side, shorter, image_size) for side in picture.size
        )
        return np.asarray(picture.resized((width, height), (left, top, right, bottom)))


def _span(side: int, shorter: int, size: int) -> tuple[float, float, int]:
    """Return the kept part of a side: its start and end in pixels of the file, and its length after resizing."""
    whole = max(size, round(side * size / shorter))
    kept = min(whole, LONGEST * size)
    start = (whole - size) // 2 - (kept - size) // 2
    return *_in_file(side, whole, start, kept), kept


def _in_file(side: int, whole: int, start: int, kept: int) -> tuple[float, float]:
    """Return the start and end, in pixels of the file, of `kept` of the `whole` pixels of a resized side."""
    return start * side / whole, (start + kept) * side / whole


def centre_crop(pixels: Pixels, size: int) -> Pixels:
    """Return the `size`×`size` centre of an (H, W, 3) array."""
    height, width = pixels.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop_and_flip(pixels: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """Return a `size`×`size` crop of an (H, W, 3) array, from a uniformly random position.

    With probability 0.5, the crop is mirrored left to right.
    """
    height, width = pixels.shape[:2]
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    crop = pixels[top : top + size, left : left + size]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def to_tensor(pixels: Pixels) -> Tensor:
    """Convert (H, W, 3) uint8 to (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)
