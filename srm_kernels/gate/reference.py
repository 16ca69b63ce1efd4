"""The gate in plain PyTorch: GELU, logits, gain-capped fusion and losses.

Source: docs/METHOD.md §4; section 3.6 of the article.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import wide_dtype


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the u of docs/METHOD.md §4: the unit roundoff of `dtype` if it is bf16 or fp16, else 0."""
    return torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0.0


def biased_gelu(maps: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Return GELU(m + b) of the maps of all stages, (S, B, C, h, w), in the maps' dtype."""
    return torch.stack(_activated(maps, biases))


def gate_logits(
    maps: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Sequence[Tensor],
    offsets: Sequence[Tensor],
) -> Tensor:
    """Return g_s = w_s · mean(GELU(m_s + b_s)) + v_s, (B, S).

    m_s + b_s and its GELU have the dtype of the maps. The mean and all steps after it use fp32, or fp64 for fp64 maps.
    """
    wide = wide_dtype(maps[0].dtype)
    logits = [
        F.linear(m.mean((2, 3), dtype=wide), weight.to(wide), offset.to(wide))
        for m, weight, offset in zip(_activated(maps, biases), weights, offsets, strict=True)
    ]
    return torch.cat(logits, -1)


def _activated(maps: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [F.gelu(m + b.to(m.dtype)[:, None, None]) for m, b in zip(maps, biases, strict=True)]


def gated_fusion(
    maps: Tensor, logits: Tensor, cap: Tensor | None, cap_factor: float, temperature: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fuse the maps of the stages into M = Σ_s a_s P_s, and limit the norm of M with the gain γ (docs/METHOD.md §4).

    P is `maps` (B, S, C, h, w). The weights of the stages are a = softmax(g / T), where g is `logits` (B, S) and T is
    `temperature`. The gain cap c is `cap` · `cap_factor`. If `cap` is None, M is not limited.

    Returns:
        γM (B, C, h, w), a (B, S), γ (B,) and ‖M‖_F (B,).
    """
    wide = wide_dtype(maps.dtype)
    weights = (logits.to(wide) / temperature).softmax(-1)
    M = torch.einsum("bs,bschw->bchw", weights, maps.to(wide))
    norm = torch.linalg.vector_norm(M, dim=(1, 2, 3))
    if cap is None:
        gain = torch.where(norm.isnan(), norm, 1)
    else:
        limit = cap.to(wide) * (cap_factor * (1 - 2 * unit_roundoff(maps.dtype)))
        # Where the cap is not active, divide 1 by 1: inf/norm and 1/0 have NaN derivatives.
        length = norm + eps
        fits = length <= limit
        gain = torch.where(fits, 1, limit) / torch.where(fits, 1, length)
    return (gain[:, None, None, None] * M).to(maps.dtype), weights, gain, norm


def gate_losses(weights: Tensor, entropy_floor: float) -> tuple[Tensor, Tensor]:
    """Return mean_b max(0, H_min − H(a_b)) and Σ_s (mean_b a_bs − 1/S)² for a (B, S)."""
    a = weights.to(wide_dtype(weights.dtype))
    # The clamp keeps 0·log 0 and its derivative finite.
    entropy = -(a * a.clamp(min=torch.finfo(a.dtype).tiny).log()).sum(-1)
    balance = (a.mean(0) - 1 / a.shape[-1]).square().sum()
    return (entropy_floor - entropy).clamp(min=0).mean(), balance
