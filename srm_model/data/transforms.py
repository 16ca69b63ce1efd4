"""From an image file to the network's input: shorter side to a size, then a crop (SPEC section 5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from srm_model.config import SRMConfig
from srm_model.data.images import Pixels, open_rgb


def load_image(path: str | Path, image_size: int = SRMConfig.image_size) -> Tensor:
    """One image file under the evaluation transform: (3, S, S) float32 in [0, 1], S = `image_size`.

    An image that cannot be read is a ValueError.
    """
    return to_tensor(centre_crop(load_resized(path, image_size), image_size))


def load_resized(path: str | Path, image_size: int) -> Pixels:
    """The image with its shorter side brought to `image_size`, (H, W, 3) uint8; bicubic, antialiased, up or down."""
    image = open_rgb(path)
    width, height = image.size
    shorter = min(width, height)
    if shorter != image_size:
        size = (
            max(image_size, round(width * image_size / shorter)),
            max(image_size, round(height * image_size / shorter)),
        )
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


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
