"""The gate's logits, gain-capped fusion of stages and its losses (docs/METHOD.md §4, article 3.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..checks import DTYPES, check_number, check_tensors, is_parameter, wide_dtype
from ..registration import later, register_operator
from ..runtime import choose_kernels
from . import reference

_PLAIN, _KERNELS = ("reference", "torch"), f"{__name__}.kernels"


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
    """GELU(m + b) of the maps of all stages, what follows a convolution without its bias (docs/METHOD.md §4).

    maps: (B, C, h, w) for every stage, of one shape, float64, float32, bfloat16 or float16, any strides. biases: (C,)
    likewise, in the maps' dtype or a wider one, from which they are rounded. Returns (S, B, C, h, w) in the maps'
    dtype; by kernels in one launch. Differentiable in everything, twice.
    Raises TypeError for dtypes, ValueError for shapes.
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
    """g_s = w_s · GAP(GELU(m_s + b_s)) + v_s of every stage: the end of the gate (docs/METHOD.md §4).

    maps, biases: as in `biased_gelu`. readouts: w (1, C) and v (1,) for every stage, in the maps' dtype or a wider one.
    Returns (B, S) in fp32 (fp64 for fp64), in which the mean over positions and all after it are taken; by kernels in
    one launch. Differentiable in everything, twice. Raises TypeError for dtypes, ValueError for shapes.
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
    """Positions and channels of maps (…, C, h, w), which the choice of a backend goes by."""
    *_, C, h, w = maps.shape
    return h * w, C


def _check_stages(maps: Sequence[Tensor], **parameters: Sequence[Tensor]) -> None:
    """One map for every stage, alike, and of each parameter one that fits."""
    if not maps:
        raise ValueError("there are no maps; expected one for every stage")
    check_tensors(**{f"maps[{i}]": m for i, m in enumerate(maps)})
    first = maps[0]
    if first.dim() != 4 or any(m.shape != first.shape for m in maps):
        raise ValueError(
            f"maps have shapes {[tuple(m.shape) for m in maps]}; expected (B, C, h, w), one shape"
        )
    C = first.shape[1]
    shapes = {"biases": (C,), "weights": (1, C), "offsets": (1,)}
    for name, group in parameters.items():
        if len(group) != len(maps):
            raise ValueError(f"{name} has {len(group)} entries and maps {len(maps)}; expected as many")
        for parameter in group:
            if is_parameter(parameter, shapes[name], first):
                continue
            check_tensors(**{name: parameter})
            if DTYPES.index(parameter.dtype) > DTYPES.index(first.dtype):
                raise TypeError(
                    f"{name} is {parameter.dtype} and maps {first.dtype}; expected it no narrower"
                )
            if parameter.device != first.device:
                raise ValueError(
                    f"{name} is on {parameter.device} and maps on {first.device}; expected one device"
                )
            if parameter.shape != torch.Size(shapes[name]):
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}; expected {shapes[name]}")


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
    """Convex combination of stage maps under a bound on its norm (docs/METHOD.md §4, article 3.6).

    maps: (B, S, C, h, w); logits: (B, S), of the maps' dtype or a wider one. cap: c, the bound on ‖fused‖_F,
    a number, a one-element tensor (which need not leave its device) or None for no bound; a constant to the
    derivative. A tensor may hold 0 (the result is 0) or infinity (no bound).
    cap_factor: c is `cap` times this, so that it may follow a buffer without a launch of its own.
    a = softmax(logits / temperature), M = Σ_s a_s P_s, γ = min(1, c(1 − 2u)/(‖M‖_F + eps)) with u the unit
    roundoff of a half-precision output, so that ‖fused‖_F ≤ c after rounding too. NaN stays NaN.
    Returns (fused, weights, gain, norm); all but `fused` in fp32 (fp64 for fp64).
    Raises TypeError for dtypes, ValueError for shapes, cap or its factor ≤ 0, temperature ≤ 0 or eps < 0.
    """
    (logits,) = autocast.no_narrower((logits,), maps)
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
    check_number("cap_factor", cap_factor, above=0)
    check_number("temperature", temperature, above=0)
    check_number("eps", eps, at_least=0)
    if isinstance(cap, Tensor):
        if cap.numel() != 1:
            raise ValueError(f"cap has shape {tuple(cap.shape)}; expected one element")
        cap = cap.detach().reshape(())
    elif cap is not None:
        check_number("cap", cap, above=0)
        # By way of fp64: a number beyond fp32's range is infinite there, no bound.
        cap = torch.tensor(float(cap), dtype=torch.float64).to(maps.device, wide_dtype(maps.dtype))
    chosen = choose_kernels(backend, maps, "gated_fusion", sizes=lambda: _sizes(maps), call=(maps.shape,))
    factors = float(cap_factor), float(temperature), float(eps)
    return GatedFusion(*_fusion(maps, logits, cap, *factors, chosen))


def gate_losses(weights: Tensor, *, entropy_floor: float, backend: str | None = None) -> GateLosses:
    """Entropy floor and balance of the gate (docs/METHOD.md §4, article 3.6, equations 27 and 28).

    weights: (B, S), rows on the simplex. entropy_floor: H_min in nats. Returns two unweighted scalars in fp32
    (fp64 for fp64): mean_b max(0, H_min − H(a_b)), with 0·log 0 = 0 and finite gradients at a one-hot row, and
    Σ_s (mean_b a_bs − 1/S)². Raises TypeError for dtypes, ValueError for shapes or a negative floor.
    """
    check_tensors(weights=weights)
    if weights.dim() != 2:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; expected (B, S)")
    check_number("entropy_floor", entropy_floor, at_least=0)
    chosen = choose_kernels(backend, weights, "gate_losses")
    return GateLosses(*_losses(weights, float(entropy_floor), chosen))
