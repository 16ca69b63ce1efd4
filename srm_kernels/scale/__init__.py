"""The scale statistic of an attention output, and DyT (docs/METHOD.md §3, article 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import autocast
from ..checks import DTYPES, check_number, check_tensors, check_tokens, wide_dtype
from ..registration import later, register_operator
from ..runtime import choose_kernels
from . import reference

_PLAIN, _KERNELS = ("reference", "torch"), f"{__name__}.kernels"


def _cast_dyt(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    return (x, *autocast.no_narrower(autocast.promoted(*parameters), x))


def _cast_taus(thetas: Sequence[Tensor], sigmas: Sequence[Tensor], *rest: object) -> tuple[Any, ...]:
    cast = autocast.promoted(*thetas, *sigmas)
    return cast[: len(thetas)], cast[len(thetas) :], *rest


class RMSScale(NamedTuple):
    """Per head: the mean vector (H, d) and the root mean square distance from it (H,)."""

    mean: Tensor
    rms: Tensor


_rms_scale = register_operator(
    "rms_scale",
    "Tensor y",
    "(Tensor, Tensor)",
    dict.fromkeys(_PLAIN, reference.rms_scale) | {"triton": later(_KERNELS, "rms_scale")},
    fake=lambda y: (
        y.new_empty((y.shape[1], y.shape[3]), dtype=wide_dtype(y.dtype)),
        y.new_empty((y.shape[1],), dtype=wide_dtype(y.dtype)),
    ),
    differentiable=("y",),
    derivatives={"triton": later(_KERNELS, "rms_scale_backward")},
)

_dyt = register_operator(
    "dyt",
    "Tensor x, Tensor alpha, Tensor weight, Tensor bias",
    "Tensor",
    dict.fromkeys(_PLAIN, reference.dyt) | {"triton": later(_KERNELS, "dyt")},
    fake=lambda x, *_: x.new_empty(x.shape),
    differentiable=("x", "alpha", "weight", "bias"),
    derivatives={"triton": later(_KERNELS, "dyt_backward")},
    autocast=_cast_dyt,
)

_tau_loss = register_operator(
    "tau_loss",
    "Tensor[] thetas, Tensor[] sigmas, float reference, float floor",
    "Tensor",
    dict.fromkeys(_PLAIN, reference.tau_loss) | {"triton": later(_KERNELS, "tau_loss")},
    fake=lambda thetas, *_: thetas[0].new_empty((), dtype=wide_dtype(thetas[0].dtype)),
    differentiable=("thetas",),
    autocast=_cast_taus,
)


def rms_scale(y: Tensor, *, backend: str | None = None) -> RMSScale:
    """The scale statistic σ of one link's output, over batch and tokens (docs/METHOD.md §3.1, article 3.5).

    y: (B, H, N, d), float64, float32, bfloat16 or float16. Returns (mean (H, d), rms (H,)) in fp32 (fp64 for
    fp64): μ_h = mean(Y_h), σ_h = sqrt(mean ‖Y_h − μ_h‖²), by two passes, so that a large mean cancels nothing.
    Differentiable where σ > 0. Raises TypeError for other dtypes, ValueError for other shapes.
    """
    check_tokens("y", y)
    return RMSScale(
        *_rms_scale(
            y,
            choose_kernels(backend, y, "rms_scale", sizes=lambda: (y.shape[2], y.shape[3]), call=(y.shape,)),
        )
    )


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """Dynamic tanh w ⊙ tanh(αx) + b along the last axis (docs/METHOD.md §3.4, article 3.5).

    x: (…, C). alpha: one element. weight, bias: (C,). The three parameters share a dtype, x's or a wider one
    (fp32 parameters under autocast). Returns x's shape and dtype; tanh is taken in fp32 (fp64 for fp64).
    Raises TypeError for dtypes, ValueError for shapes or devices.
    """
    x, alpha, weight, bias = _cast_dyt(x, alpha, weight, bias)
    check_tensors(x=x)
    check_tensors(alpha=alpha, weight=weight, bias=bias)
    if DTYPES.index(alpha.dtype) > DTYPES.index(x.dtype):
        raise TypeError(
            f"alpha, weight and bias are {alpha.dtype} and x is {x.dtype}; expected them no narrower"
        )
    if alpha.device != x.device:
        raise ValueError(f"alpha is on {alpha.device} and x on {x.device}; expected one device")
    if x.dim() < 1 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}; "
            "expected (…, C), (C,) and (C,)"
        )
    if alpha.numel() != 1:
        raise ValueError(f"alpha has shape {tuple(alpha.shape)}; expected one element")
    chosen = choose_kernels(
        backend, x, "dyt", sizes=lambda: (x.shape[1:-1].numel(), x.shape[-1]), call=(x.shape,)
    )
    return _dyt(x, alpha, weight, bias, chosen)


def tau_loss(
    thetas: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    *,
    reference: float,
    floor: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """L_τ = mean over links and heads of (log((τ σ̄ + floor)/σ_ref))², τ = exp(θ), in one launch (docs/METHOD.md §3.3).

    thetas: θ (H,) for every link; sigmas: σ̄ (H,) likewise, which receives no gradient; one dtype (float64, float32,
    bfloat16, float16) and device. reference: σ_ref > 0. Returns a scalar in fp32 (fp64 for fp64). Differentiable in
    θ, twice. Raises TypeError for dtypes, ValueError for shapes, counts or σ_ref.
    """
    if not thetas or len(thetas) != len(sigmas):
        raise ValueError(
            f"there are {len(thetas)} thetas and {len(sigmas)} sigmas; expected one of each for every link"
        )
    thetas, sigmas, *_ = _cast_taus(thetas, sigmas)
    check_tensors(
        **{f"thetas[{i}]": t for i, t in enumerate(thetas)},
        **{f"sigmas[{i}]": t for i, t in enumerate(sigmas)},
    )
    for tensor in (*thetas, *sigmas):
        if tensor.dim() != 1 or tensor.shape != thetas[0].shape:
            raise ValueError(
                f"thetas and sigmas have shapes {[tuple(t.shape) for t in (*thetas, *sigmas)]}; expected (H,) each"
            )
    check_number("reference", reference, above=0)
    check_number("floor", floor, at_least=0)
    chosen = choose_kernels(backend, thetas[0], "tau_loss")
    loss: Tensor = _tau_loss(
        list(thetas), [s.detach() for s in sigmas], float(reference), float(floor), chosen
    )
    return loss
