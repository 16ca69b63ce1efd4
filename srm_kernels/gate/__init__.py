"""The gate: GELU, logits, gain-capped fusion of the stages, and losses.

Source: docs/METHOD.md §4; section 3.6 of the article.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..checks import check_number, check_tensors, wide_dtype
from ..dispatch import choose_kernels
from ..registration import later, register_operator
from . import reference

_PLAIN, _KERNELS = ("reference", "torch"), f"{__name__}.kernels"


class GatedFusion(NamedTuple):
    """The fused map γM, and the weights, gain and norm of the fusion.

    Attributes:
        fused: γM (B, C, h, w) in the maps' dtype.
        weights: a = softmax(g / T), (B, S).
        gain: γ (B,).
        norm: ‖M‖_F (B,), the norm of the map M before it is multiplied by γ.
    """

    fused: Tensor
    weights: Tensor
    gain: Tensor
    norm: Tensor


class GateLosses(NamedTuple):
    """The losses L_H (`entropy`) and L_B (`balance`) of the gate, two scalars.

    Neither loss is multiplied by its coefficient in the total loss.
    """

    entropy: Tensor
    balance: Tensor


def _fake_fusion(maps: Tensor, logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, S, *grid = maps.shape
    wide = wide_dtype(maps.dtype)
    rows = [maps.new_empty(shape, dtype=wide) for shape in ((B, S), (B,), (B,))]
    return maps.new_empty((B, *grid)), rows[0], rows[1], rows[2]


def _cast_stages(maps: Sequence[Tensor], *parameters: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    maps = autocast.promoted(*maps)
    return maps, *(autocast.no_narrower(group, maps[0]) if maps else list(group) for group in parameters)


_gelu = register_operator(
    "biased_gelu",
    "Tensor[] maps, Tensor[] biases",
    "Tensor",
    dict.fromkeys(_PLAIN, reference.biased_gelu) | {"triton": later(_KERNELS, "biased_gelu")},
    fake=lambda maps, _: maps[0].new_empty((len(maps), *maps[0].shape)),
    differentiable=("maps", "biases"),
    autocast=_cast_stages,
)

_logits = register_operator(
    "gate_logits",
    "Tensor[] maps, Tensor[] biases, Tensor[] weights, Tensor[] offsets",
    "Tensor",
    dict.fromkeys(_PLAIN, reference.gate_logits) | {"triton": later(_KERNELS, "gate_logits")},
    fake=lambda maps, *_: maps[0].new_empty((maps[0].shape[0], len(maps)), dtype=wide_dtype(maps[0].dtype)),
    differentiable=("maps", "biases", "weights", "offsets"),
    autocast=_cast_stages,
)

_fusion = register_operator(
    "gated_fusion",
    "Tensor maps, Tensor logits, Tensor? cap, float cap_factor, float temperature, float eps",
    "(Tensor, Tensor, Tensor, Tensor)",
    dict.fromkeys(_PLAIN, reference.gated_fusion) | {"triton": later(_KERNELS, "gated_fusion")},
    fake=_fake_fusion,
    differentiable=("maps", "logits"),
    derivatives={"triton": later(_KERNELS, "gated_fusion_backward")},
    autocast=lambda maps, logits, *rest: (maps, *autocast.no_narrower((logits,), maps), *rest),
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


def biased_gelu(maps: Sequence[Tensor], biases: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Compute GELU(m + b) for the maps of all stages, in one kernel launch (docs/METHOD.md §4).

    Each map m is the output of a convolution that was run without its bias b. The operator is twice differentiable in
    all tensors.

    Args:
        maps: One map (B, C, h, w) for each stage, all of one shape, any strides; float64, float32, bfloat16 or float16.
        biases: One bias (C,) for each stage, in the maps' dtype or a wider one. The operator rounds biases to the maps'
            dtype.
        backend: A name of `backends()`, or None.

    Returns:
        (S, B, C, h, w) in the maps' dtype.

    Raises:
        TypeError: A dtype is not accepted.
        ValueError: Shapes, devices or the numbers of maps and biases do not match.
        NotImplementedError: The requested backend cannot run the call.
    """
    maps, biases = _cast_stages(maps, biases)
    _check_stages(maps, biases=biases)
    chosen = choose_kernels(
        backend, maps[0], "biased_gelu", sizes=lambda: _sizes(maps[0]), call=(maps[0].shape,)
    )
    return _gelu(maps, biases, chosen)


def gate_logits(
    maps: Sequence[Tensor],
    biases: Sequence[Tensor],
    readouts: Sequence[tuple[Tensor, Tensor]],
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute the gate logits g_s = w_s · GAP(GELU(m_s + b_s)) + v_s, in one kernel launch (docs/METHOD.md §4).

    The operator is twice differentiable in all tensors.

    Args:
        maps: As in `biased_gelu`.
        biases: As in `biased_gelu`.
        readouts: One pair (w, v) for each stage, w (1, C) and v (1,), in the maps' dtype or a wider one.
        backend: A name of `backends()`, or None.

    Returns:
        g (B, S) in fp32 (fp64 for fp64 inputs). The mean over positions and all later steps are computed in
        this dtype.

    Raises:
        TypeError: A dtype is not accepted.
        ValueError: Shapes, devices or the numbers of tensors do not match.
        NotImplementedError: The requested backend cannot run the call.
    """
    maps, biases, weights, offsets = _cast_stages(
        maps, biases, [w for w, _ in readouts], [v for _, v in readouts]
    )
    _check_stages(maps, biases=biases, weights=weights, offsets=offsets)
    chosen = choose_kernels(
        backend, maps[0], "gate_logits", sizes=lambda: _sizes(maps[0]), call=(maps[0].shape,)
    )
    return _logits(maps, biases, weights, offsets, chosen)


def _sizes(maps: Tensor) -> tuple[int, int]:
    """Return the numbers of positions and channels of maps (…, C, h, w), for the choice of a backend."""
    *_, C, h, w = maps.shape
    return h * w, C


def _check_stages(maps: Sequence[Tensor], **parameters: Sequence[Tensor]) -> None:
    if not maps:
        raise ValueError("maps is empty; expected one map for each stage")
    check_tensors(**{f"maps[{i}]": m for i, m in enumerate(maps)})
    first = maps[0]
    if first.dim() != 4 or any(m.shape != first.shape for m in maps):
        raise ValueError(
            f"maps have shapes {[tuple(m.shape) for m in maps]}; expected the same shape (B, C, h, w)"
        )
    C = first.shape[1]
    shapes = {"biases": (C,), "weights": (1, C), "offsets": (1,)}
    for name, group in parameters.items():
        if len(group) != len(maps):
            raise ValueError(f"{name} has {len(group)} entries; expected {len(maps)}, one for each map")
        for parameter in group:
            autocast.check_parameter(name, parameter, shapes[name], first)


def gated_fusion(
    maps: Tensor,
    logits: Tensor,
    *,
    cap: float | Tensor | None,
    cap_factor: float = 1.0,
    temperature: float = 1.0,
    eps: float = 1e-6,
    backend: str | None = None,
) -> GatedFusion:
    """Fuse stage maps by a convex combination with a capped norm (docs/METHOD.md §4; section 3.6 of the article).

    The result is γM, with a = softmax(g / T), M = Σ_s a_s P_s and γ = min(1, c(1 − 2u)/(‖M‖_F + eps)). For
    bfloat16 and float16 maps, u is the unit roundoff of their dtype; otherwise u is 0. The factor 1 − 2u
    keeps ‖γM‖_F ≤ c after γM is rounded to the maps' dtype. If ‖M‖_F of an image is NaN, γ and γM of this image
    are NaN. The operator is differentiable in maps and logits.

    Args:
        maps: P (B, S, C, h, w); float64, float32, bfloat16 or float16, any strides.
        logits: g (B, S), in the maps' dtype or fp32.
        cap: A number above 0 or a tensor of one element, for c = cap_factor · cap. None means no cap. The
            element of a tensor can also be 0 or infinite: 0 makes γM 0, and infinity means no cap. `cap`
            receives no gradient. A tensor is not copied to the CPU.
        cap_factor: The factor in c = cap_factor · cap, a number above 0. If `cap` is a tensor, the caller
            saves a kernel launch by passing the factor here instead of multiplying the tensor by it.
        temperature: T, above 0.
        eps: Summand in the denominator of γ, at least 0.
        backend: A name of `backends()`, or None.

    Returns:
        (γM, a, γ, ‖M‖_F). γM has the maps' dtype; the others are fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: A dtype is not accepted.
        ValueError: Shapes or devices do not match, or a number is outside its range.
        NotImplementedError: The requested backend cannot run the call.
    """
    (logits,) = autocast.no_narrower((logits,), maps)
    check_tensors(maps=maps)
    check_tensors(logits=logits)
    wide = wide_dtype(maps.dtype)
    if logits.dtype not in (maps.dtype, wide):
        raise TypeError(
            f"logits is {logits.dtype} and maps {maps.dtype}; expected logits in {maps.dtype} or {wide}"
        )
    if logits.device != maps.device:
        raise ValueError(f"logits is on {logits.device} and maps on {maps.device}; expected one device")
    if maps.dim() != 5 or logits.shape != maps.shape[:2]:
        raise ValueError(
            f"maps has shape {tuple(maps.shape)} and logits {tuple(logits.shape)}; expected (B, S, C, h, w) and (B, S)"
        )
    check_number("cap_factor", cap_factor, above=0)
    check_number("temperature", temperature, above=0)
    check_number("eps", eps, at_least=0)
    if isinstance(cap, Tensor):
        if cap.numel() != 1:
            raise ValueError(f"cap has shape {tuple(cap.shape)}; expected one element")
        cap = cap.detach().reshape(())
    elif cap is not None:
        check_number("cap", cap, above=0)
        # The conversion starts from fp64: a number beyond the range of fp32 becomes infinite, which means no cap.
        cap = torch.tensor(float(cap), dtype=torch.float64).to(maps.device, wide)
    chosen = choose_kernels(backend, maps, "gated_fusion", sizes=lambda: _sizes(maps), call=(maps.shape,))
    factors = float(cap_factor), float(temperature), float(eps)
    return GatedFusion(*_fusion(maps, logits, cap, *factors, chosen))


def gate_losses(weights: Tensor, *, entropy_floor: float, backend: str | None = None) -> GateLosses:
    """Compute the losses L_H and L_B of the gate (docs/METHOD.md §4; section 3.6 of the article, equations 27 and 28).

    L_H = mean_b max(0, H_min − H(a_b)) and L_B = Σ_s (mean_b a_bs − 1/S)². In the entropy H, 0·log 0 is 0.
    Gradients are finite even if a row of `weights` is one-hot. The operator is differentiable in `weights`.

    Args:
        weights: The weights a_bs, shape (B, S). Each row sums to 1. float64, float32, bfloat16 or float16.
        entropy_floor: H_min in nats, at least 0.
        backend: A name of `backends()`, or None.

    Returns:
        L_H and L_B, scalars in fp32 (fp64 for fp64 inputs). The coefficients that these two losses have in the total
        loss are not included.

    Raises:
        TypeError: The dtype is not accepted.
        ValueError: The shape is not (B, S), or the floor is negative.
        NotImplementedError: The requested backend cannot run the call.
    """
    check_tensors(weights=weights)
    if weights.dim() != 2:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; expected (B, S)")
    check_number("entropy_floor", entropy_floor, at_least=0)
    chosen = choose_kernels(backend, weights, "gate_losses")
    return GateLosses(*_losses(weights, float(entropy_floor), chosen))
