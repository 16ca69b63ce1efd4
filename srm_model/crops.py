"""Score a whole image by the mean over crops, for models that were trained on images at their full resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class CropMean(nn.Module):
    """Return the mean score of evenly spaced square crops that cover the image.

    A side of length L has ⌈L / S⌉ crops of side S. Neighbours overlap if L is not a multiple of S.

    Args:
        model: Model from images (B, 3, S, S) to scores (B,).
        size: S, height and width of the crops in pixels.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of images of any size.

        Args:
            images: (B, 3, H, W) in [0, 1], with sides of at least S.

        Returns:
            Scores, (B,).

        Raises:
            ValueError: A side is shorter than S.
        """
        size = self.size
        if min(images.shape[-2:]) < size:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected sides of at least {size} pixels"
            )
        tops, lefts = (_starts(side, size) for side in images.shape[-2:])
        scores = [
            self.model(images[..., top : top + size, left : left + size]) for top in tops for left in lefts
        ]
        return torch.stack(scores).mean(0)


def _starts(side: int, size: int) -> list[int]:
    """Return the first pixel of each crop along one side."""
    return [round(start) for start in np.linspace(0, side - size, -(-side // size)).tolist()]


def at_full_resolution(card: Mapping[str, Any]) -> bool:
    """Return whether the card of a checkpoint says that no training image was resized."""
    return (card.get("dataset") or {}).get("resized") is False
