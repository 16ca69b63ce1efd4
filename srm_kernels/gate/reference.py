"""Gain-capped fusion and its losses in plain PyTorch (SPEC 4, article 3.6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import wide_dtype


def unit_roundoff(dtype: torch.dtype) -> float:
    """u of a half-precision output, 0 for fp32 and fp64."""
    return torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0.0


def gated_fusion(
    maps: Tensor, logits: Tensor, cap: Tensor | None, temperature: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """γM (B, C, h, w), a (B, S), γ (B,) and ‖M‖_F (B,), for M = Σ_s a_s P_s, a = softmax(g / T)."""
    wide = wide_dtype(maps.dtype)
    weights = (logits.to(wide) / temperature).softmax(-1)
    M = torch.einsum("bs,bschw->bchw", weights, maps.to(wide))
    norm = torch.linalg.vector_norm(M, dim=(1, 2, 3))
    if cap is None:
        gain = torch.where(norm.isnan(), norm, 1)
    else:
        limit = cap.to(wide) * (1 - 2 * unit_roundoff(maps.dtype))
        gain = (limit / (norm + eps)).clamp(max=1)
    return (gain[:, None, None, None] * M).to(maps.dtype), weights, gain, norm


def gate_losses(weights: Tensor, entropy_floor: float) -> tuple[Tensor, Tensor]:
    """mean_b max(0, H_min − H(a_b)) and Σ_s (mean_b a_bs − 1/S)², for a (B, S)."""
    a = weights.to(wide_dtype(weights.dtype))
    # The clamp keeps 0·log 0 and its derivative finite.
    entropy = -(a * a.clamp(min=torch.finfo(a.dtype).tiny).log()).sum(-1)
    balance = (a.mean(0) - 1 / a.shape[-1]).square().sum()
    return (entropy_floor - entropy).clamp(min=0).mean(), balance
