"""Find where a model sees a loss of quality in an image, by gradient-free occlusion.

A window of the image is replaced by other parts of the same image, one part at a time. If the score rises, the window
was worse than the rest of the image in the view of the model. The model can be wrong. The window is not replaced by a
blank or blurred area, because such an area would itself lower the quality. The method follows permutation importance,
which replaces the value of a feature by the feature's values in other samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from srm_model.attacks.guard import predict

SHARE = 4  # a window has 1/4 of the image's height and width
WINDOWS = 7  # positions of the window along each side; neighbours overlap by half
PARTS = 4  # other parts of the image that replace a window, one at a time
_RIM = 8  # at each edge, 1/8 of the window blends into the image


class QualityMap(NamedTuple):
    """For each pixel, the change of the score after a window is replaced, averaged over all windows with the pixel."""

    score: float  # score of the image
    change: NDArray[
        np.float64
    ]  # (H, W), mean over the windows with this pixel; above 0, the model sees a loss of quality
    windows: int
    parts: int


def quality_map(
    model: nn.Module, image: Tensor, *, batch_size: int = 8, progress: bool = False
) -> QualityMap:
    """Compute, for each window of an image, how the score changes if other parts of the image replace the window.

    The model scores `WINDOWS`² · `PARTS` + 1 images, and no gradient is computed. The map is deterministic. Damage that
    covers most of the image is not visible in the map, because the parts that replace a window are damaged too.

    Args:
        model: Model from images (B, 3, H, W) in [0, 1] to scores (B,). Its state does not change.
        image: Image (3, H, W) in [0, 1], with sides of at least `SHARE` pixels.
        batch_size: Images per forward pass.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The map.

    Raises:
        ValueError: The image has a wrong shape, or the score of the image or of a copy with a replaced window is not
            finite.
    """
    if image.dim() != 3 or min(image.shape[1:]) < SHARE:
        raise ValueError(
            f"image has shape {tuple(image.shape)}; expected (3, H, W) with sides of at least {SHARE}"
        )
    height, width = image.shape[1] // SHARE, image.shape[2] // SHARE
    corners = _corners(image, height, width, WINDOWS)
    score = float(predict(model, image[None]))
    scores: list[float] = []
    with tqdm(total=PARTS * len(corners), unit="img", desc="map", leave=False, disable=not progress) as bar:
        for batch in _batches(_occluded(image, corners, height, width), batch_size):
            scores += predict(model, batch).tolist()
            bar.update(len(batch))
    if not all(map(math.isfinite, (score, *scores))):
        raise ValueError("the model's scores of the image with replaced windows are not all finite")
    changes = np.reshape(scores, (len(corners), PARTS)).mean(1) - score
    total, covered = np.zeros(image.shape[1:]), np.zeros(image.shape[1:])
    for (top, left), change in zip(corners, changes, strict=True):
        total[top : top + height, left : left + width] += change
        covered[top : top + height, left : left + width] += 1
    return QualityMap(score, total / covered, len(corners), PARTS)


def _corners(image: Tensor, height: int, width: int, count: int) -> list[tuple[int, int]]:
    """Return the top left corners of evenly spaced windows, row by row. The windows cover the whole image."""
    tops, lefts = (
        np.linspace(0, side - part, count).round().astype(int)
        for side, part in zip(image.shape[1:], (height, width), strict=True)
    )
    return [(int(top), int(left)) for top in tops for left in lefts]


def _occluded(image: Tensor, corners: list[tuple[int, int]], height: int, width: int) -> Iterator[Tensor]:
    """For each window, yield `PARTS` copies of the image; in each copy, a different part of the image is in the window.

    The parts are cells of a grid of `SHARE`×`SHARE` cells. Cells that overlap the replaced window are not used. The
    remaining cells are listed row by row, and `PARTS` evenly spaced cells of this list are used.
    """
    mask = _rim(height)[:, None] * _rim(width)[None]
    grid = _corners(image, height, width, SHARE)
    for top, left in corners:
        others = [(y, x) for y, x in grid if abs(y - top) >= height or abs(x - left) >= width]
        for number in range(PARTS):
            y, x = others[(2 * number + 1) * len(others) // (2 * PARTS)]
            part, result = image[:, y : y + height, x : x + width], image.clone()
            window = result[:, top : top + height, left : left + width]
            window += mask.to(image) * (part - window)
            yield result.clamp_(0, 1)


def _rim(side: int) -> Tensor:
    """Return blending weights along one side of a window: 1 in the middle, lower near both edges to avoid a seam."""
    distance = torch.arange(1, side + 1)
    return (torch.minimum(distance, distance.flip(0)) / (side // _RIM + 1)).clamp(max=1)


def _batches(images: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    batch: list[Tensor] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)
