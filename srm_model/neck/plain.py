"""What every neck hands to the head, and the neck that mixes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srm_model.config import SRMConfig
from srm_model.statistics import BatchStatistics

from .calibration import scale_to_unit


class NeckOutput(NamedTuple):
    """What a neck hands to the head, and what it knows about itself."""

    fused: Tensor  # (B, C, P, P)
    weights: Tensor | None  # (B, S) gate weights; None without a gate
    gain: Tensor | None  # (B,) γ
    norm: Tensor | None  # (B,) ‖M‖_F before the cap
    losses: dict[str, Tensor]  # unweighted scalars "tau", "entropy", "balance"
    pyramid: list[Tensor] | None  # four updated maps (B, C, h_s, w_s), on request


class PlainNeck(nn.Module):
    """No neck: the deepest stage, aligned and pooled, goes to the head. The baseline `none`."""

    stochastic = False

    def __init__(self, in_channels: Sequence[int], config: SRMConfig) -> None:
        super().__init__()
        self.config = config
        self.align = nn.Conv2d(in_channels[-1], config.channels, 1)
        nn.init.zeros_(self.align.bias)  # type: ignore[arg-type]

    def forward(self, pyramid: Sequence[Tensor], *, statistics: BatchStatistics | None = None) -> NeckOutput:
        """Four maps → the last one as `fused` (B, C, P, P); there are no statistics to keep."""
        fused = F.adaptive_avg_pool2d(self.align(pyramid[-1]), self.config.pool_size)
        losses = {name: fused.new_zeros(()) for name in ("tau", "entropy", "balance")}
        return NeckOutput(fused, None, None, None, losses, None)

    @torch.no_grad()
    def calibrate(self, pyramid: Sequence[Tensor]) -> None:
        """Scale the align weight until its map has RMS 1, as in `SRMNeck`."""
        scale_to_unit(self.align, pyramid[-1], self.config.calibration_range)

    def clamp_(self) -> None:
        """Nothing to keep in range."""

    def diagnose(self, pyramid: Sequence[Tensor]) -> dict[str, Any]:
        """Nothing to report."""
        return {}
