"""Gain-capped fusion of stages and its losses (SPEC 4, article 3.6)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_number, check_tensors, wide_dtype
from ..registration import later, register_operator
from ..runtime import kernels_by_name
from . import reference

_PLAIN, _KERNELS = ("reference", "sdpa"), f"{__name__}.kernels"


class GatedFusion(NamedTuple):
    """The fused map γM and what made it."""

    fused: Tensor  # (B, C, h, w) in the maps' dtype
    weights: Tensor  # (B, S), a = softmax(g / T)
    gain: Tensor  # (B,), γ
    norm: Tensor  # (B,), ‖M‖_F before the cap


class GateLosses(NamedTuple):
    """Unweighted scalars."""

    entropy: Tensor
    balance: Tensor


def _fake_fusion(maps: Tensor, logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, S, *grid = maps.shape
    wide = wide_dtype(maps.dtype)
    rows = [maps.new_empty(shape, dtype=wide) for shape in ((B, S), (B,), (B,))]
    return maps.new_empty((B, *grid)), rows[0], rows[1], rows[2]


_fusion = register_operator(
    "gated_fusion",
    "Tensor maps, Tensor logits, Tensor? cap, float temperature, float eps",
    "(Tensor, Tensor, Tensor, Tensor)",
    dict.fromkeys(_PLAIN, reference.gated_fusion) | {"triton": later(_KERNELS, "gated_fusion")},
    fake=_fake_fusion,
    differentiable=("maps", "logits"),
    derivatives={"triton": later(_KERNELS, "gated_fusion_backward")},
)

_losses = register_operator(
    "gate_losses",
    "Tensor weights, float entropy_floor",
    "(Tensor, Tensor)",
    dict.fromkeys(_PLAIN, reference.gate_losses) | {"triton": later(_KERNELS, "gate_losses")},
    fake=lambda weights, _: tuple(weights.new_empty((), dtype=wide_dtype(weights.dtype)) for _ in range(2)),
    differentiable=("weights",),
    derivatives={"triton": later(_KERNELS, "gate_losses_backward")},
)


def gated_fusion(
    maps: Tensor,
    logits: Tensor,
    *,
    cap: float | Tensor | None,
    temperature: float = 1.0,
    eps: float = 1e-6,
    backend: str | None = None,
) -> GatedFusion:
    """Convex combination of stage maps under a bound on its norm (SPEC 4, article 3.6).

    maps: (B, S, C, h, w); logits: (B, S), of the maps' dtype or a wider one. cap: c, the bound on ‖fused‖_F,
    a number, a one-element tensor (which need not leave its device) or None for no bound; a constant to the
    derivative. a = softmax(logits / temperature), M = Σ_s a_s P_s, γ = min(1, c(1 − 2u)/(‖M‖_F + eps)) with u
    the unit roundoff of a half-precision output, so that ‖fused‖_F ≤ c after rounding too. NaN stays NaN.
    Returns (fused, weights, gain, norm); all but `fused` in fp32 (fp64 for fp64).
    Raises TypeError for dtypes, ValueError for shapes, cap ≤ 0, temperature ≤ 0 or eps < 0.
    """
    check_tensors(maps=maps)
    check_tensors(logits=logits)
    if logits.dtype not in (maps.dtype, wide_dtype(maps.dtype)):
        raise TypeError(f"logits is {logits.dtype} and maps {maps.dtype}; expected the same, or wider logits")
    if logits.device != maps.device:
        raise ValueError(f"logits is on {logits.device} and maps on {maps.device}; expected one device")
    if maps.dim() != 5 or logits.shape != maps.shape[:2]:
        raise ValueError(
            f"maps has shape {tuple(maps.shape)} and logits {tuple(logits.shape)}; expected (B, S, C, h, w) and (B, S)"
        )
    check_number("temperature", temperature, above=0)
    check_number("eps", eps, at_least=0)
    if isinstance(cap, Tensor):
        if cap.numel() != 1:
            raise ValueError(f"cap has shape {tuple(cap.shape)}; expected one element")
        cap = cap.detach().reshape(())
    elif cap is not None:
        check_number("cap", cap, above=0)
        cap = torch.full((), float(cap), dtype=wide_dtype(maps.dtype), device=maps.device)
    chosen = kernels_by_name(backend, maps, "gated_fusion")
    return GatedFusion(*_fusion(maps, logits, cap, float(temperature), float(eps), chosen))


def gate_losses(weights: Tensor, *, entropy_floor: float, backend: str | None = None) -> GateLosses:
    """Entropy floor and balance of the gate (SPEC 4, article 3.6, equations 27 and 28).

    weights: (B, S), rows on the simplex. entropy_floor: H_min in nats. Returns two unweighted scalars in fp32
    (fp64 for fp64): mean_b max(0, H_min − H(a_b)), with 0·log 0 = 0 and finite gradients at a one-hot row, and
    Σ_s (mean_b a_bs − 1/S)². Raises TypeError for dtypes, ValueError for shapes or a negative floor.
    """
    check_tensors(weights=weights)
    if weights.dim() != 2:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; expected (B, S)")
    check_number("entropy_floor", entropy_floor, at_least=0)
    chosen = kernels_by_name(backend, weights, "gate_losses")
    return GateLosses(*_losses(weights, float(entropy_floor), chosen))
