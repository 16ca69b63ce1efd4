"""Regression head: from the fused map to a score (docs/METHOD.md §1.7).

`IQAModel` in `model.py` builds the head. There is only this head, so `SRMConfig` has no field for it. If you add
another head, add a field to `SRMConfig` that selects the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

VARIANCE_FLOOR = 1e-6


class Head(nn.Module):
    """Regression head, which computes one score from the fused map (docs/METHOD.md §1.7).

    Args:
        channels: Channels C of the fused map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = max(channels // 2, 1)
        self.conv = nn.Conv2d(channels, half, 3, padding=1)
        self.hidden = nn.Linear(2 * half, half)
        self.score = nn.Linear(half, 1)
        self.activation = nn.GELU()
        nn.init.constant_(self.score.bias, 0.5)  # the middle of normalised MOS

    def forward(self, fused: Tensor) -> Tensor:
        """Return scores (B,) of fused maps (B, C, P, P)."""
        x = self.activation(self.conv(fused)).flatten(2)
        deviation = (x.var(-1, correction=0) + VARIANCE_FLOOR).sqrt()
        statistics = torch.cat([x.mean(-1), deviation], -1)
        return self.score(self.activation(self.hidden(statistics))).squeeze(-1)
