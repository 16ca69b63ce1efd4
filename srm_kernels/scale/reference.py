"""Scale statistics and DyT in plain PyTorch (docs/METHOD.md §3; section 3.5 of the article)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import wide_dtype


def rms_scale(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean vector μ_h (H, d) and the scale σ_h (H,) of each head of Y (B, H, N, d).

    σ_h is sqrt(mean ‖Y_h − μ_h‖²). Both means are taken over batch and tokens.
    """
    Y = y.to(wide_dtype(y.dtype))
    mean = Y.mean((0, 2))
    centred = Y - mean[None, :, None, :]
    return mean, centred.square().sum(-1).mean((0, 2)).sqrt()


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return w ⊙ tanh(αx) + b along the last axis, in the dtype of x."""
    wide = wide_dtype(x.dtype)
    bounded = (alpha.to(wide) * x.to(wide)).tanh()
    return (weight.to(wide) * bounded + bias.to(wide)).to(x.dtype)


def tau_loss(thetas: Sequence[Tensor], sigmas: Sequence[Tensor], reference: float, floor: float) -> Tensor:
    """Return the mean over links and heads of (log((τ σ̄ + floor)/σ_ref))² with τ = exp(θ)."""
    wide = wide_dtype(thetas[0].dtype)
    tau, sigma = torch.stack(list(thetas)).to(wide).exp(), torch.stack(list(sigmas)).to(wide)
    return ((tau * sigma + floor) / reference).log().square().mean()
