"""What every neck hands to the head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NeckOutput(NamedTuple):
    """What a neck hands to the head, and what it knows about itself."""

    fused: Tensor  # (B, C, P, P)
    weights: Tensor | None  # (B, S) gate weights; None without a gate
    gain: Tensor | None  # (B,) γ
    norm: Tensor | None  # (B,) ‖M‖_F before the cap
    losses: dict[str, Tensor]  # unweighted scalars "tau", "entropy", "balance"
    pyramid: list[Tensor] | None  # four updated maps (B, C, h_s, w_s), on request
