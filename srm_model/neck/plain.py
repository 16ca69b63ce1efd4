"""The output that all necks share, and the neck `none`."""

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
    """Output of a neck. For a neck without a gate, `weights`, `gain` and `norm` are None."""

    fused: Tensor  # (B, C, P, P), for the head
    weights: Tensor | None  # (B, S), of the gate
    gain: Tensor | None  # γ, (B,)
    norm: Tensor | None  # ‖M‖_F before the cap, (B,)
    losses: dict[str, Tensor]  # unweighted scalars "tau", "entropy" and "balance"
    pyramid: list[Tensor] | None  # four updated maps (B, C, h_s, w_s), or None if they were not requested


class PlainNeck(nn.Module):
    """The baseline `none`: the deepest map, aligned and pooled.

    Args:
        in_channels: Channels of the four maps, shallowest first.
        config: Constants of the model.
    """

    stochastic = False

    def __init__(self, in_channels: Sequence[int], config: SRMConfig) -> None:
        super().__init__()
        self.config = config
        self.align = nn.Conv2d(in_channels[-1], config.channels, 1)
        nn.init.zeros_(self.align.bias)  # type: ignore[arg-type]

    def forward(self, pyramid: Sequence[Tensor], *, statistics: BatchStatistics | None = None) -> NeckOutput:
        """Align and pool the last of four maps; return it as `fused`, (B, C, P, P). `statistics` is ignored."""
        fused = F.adaptive_avg_pool2d(self.align(pyramid[-1]), self.config.pool_size)
        losses = {name: fused.new_zeros(()) for name in ("tau", "entropy", "balance")}
        return NeckOutput(fused, None, None, None, losses, None)

    @torch.no_grad()
    def calibrate(self, pyramid: Sequence[Tensor]) -> None:
        """Scale the alignment weight so that the aligned map has RMS 1, as in `SRMNeck`."""
        scale_to_unit(self.align, pyramid[-1], self.config.calibration_range)

    def clamp_(self) -> None:
        """Do nothing; this neck has no τ."""

    def diagnose(self, pyramid: Sequence[Tensor]) -> dict[str, Any]:
        """Return an empty dict; this neck has no diagnostics."""
        return {}
