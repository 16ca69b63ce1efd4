"""The scale statistic of an attention output, and DyT (docs/METHOD.md §3; section 3.5 of the article)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import autocast
from ..checks import check_number, check_tensors, check_tokens, wide_dtype
from ..dispatch import choose_kernels
from ..registration import later, register_operator
from . import reference

_PLAIN, _KERNELS = ("reference", "torch"), f"{__name__}.kernels"


def _cast_dyt(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    return (x, *autocast.no_narrower(autocast.promoted(*parameters), x))


def _cast_taus(thetas: Sequence[Tensor], sigmas: Sequence[Tensor], *rest: object) -> tuple[Any, ...]:
    cast = autocast.promoted(*thetas, *sigmas)
    return cast[: len(thetas)], cast[len(thetas) :], *rest


class RMSScale(NamedTuple):
    """The scale statistic of each head.

    Attributes:
        mean: μ (H, d), the mean vector.
        rms: σ (H,), the root mean square distance from μ.
    """

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
    """Compute the scale statistic of a link's output over batch and tokens.

    Source: docs/METHOD.md §3.1; section 3.5 of the article.

    For each head h, μ_h = mean(Y_h) and σ_h = sqrt(mean(‖Y_h − μ_h‖²)). All backends compute σ_h from squared distances
    to means. They do not use the identity σ_h² = mean(‖Y_h‖²) − ‖μ_h‖², because it is inaccurate in floating point if
    μ_h is large. The operator is differentiable where σ > 0.

    Args:
        y: Y (B, H, N, d); float64, float32, bfloat16 or float16, any strides.
        backend: A name of `backends()`, or None.

    Returns:
        μ (H, d) and σ (H,) in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: The dtype is not accepted.
        ValueError: The shape is not (B, H, N, d).
        NotImplementedError: The requested backend cannot run the call.
    """
    check_tokens("y", y)
    chosen = choose_kernels(backend, y, "rms_scale", sizes=lambda: (y.shape[2], y.shape[3]), call=(y.shape,))
    return RMSScale(*_rms_scale(y, chosen))


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """Compute the dynamic tanh w ⊙ tanh(αx) + b along the last axis (docs/METHOD.md §3.4; section 3.5 of the article).

    tanh is computed in fp32 (fp64 for fp64 inputs). The operator is differentiable in all tensors.

    Args:
        x: (…, C); float64, float32, bfloat16 or float16, any strides.
        alpha: α, one element. `alpha`, `weight` and `bias` have one dtype: the dtype of `x` or a wider dtype.
        weight: w (C,).
        bias: b (C,).
        backend: A name of `backends()`, or None.

    Returns:
        A tensor with the shape and dtype of `x`.

    Raises:
        TypeError: A dtype is not accepted.
        ValueError: Shapes or devices do not match.
        NotImplementedError: The requested backend cannot run the call.
    """
    x, alpha, weight, bias = _cast_dyt(x, alpha, weight, bias)
    check_tensors(x=x)
    check_tensors(alpha=alpha, weight=weight, bias=bias)
    if x.dim() < 1 or alpha.numel() != 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and alpha {tuple(alpha.shape)}; expected (…, C) and one element"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        autocast.check_parameter(name, parameter, x.shape[-1:], x)
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
    """Compute the loss L_τ of all links, in one kernel launch (docs/METHOD.md §3.3).

    L_τ = mean over links and heads of (log((τ σ̄ + floor)/σ_ref))² with τ = exp(θ). The operator is twice
    differentiable in θ.

    Args:
        thetas: θ (H,) of each link; float64, float32, bfloat16 or float16, with the dtype and device of `sigmas`.
        sigmas: σ̄ (H,) of each link, the moving average of σ. The operator gives no gradient for σ̄.
        reference: σ_ref, above 0.
        floor: Summand in the logarithm, at least 0.
        backend: A name of `backends()`, or None.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: A dtype is not accepted.
        ValueError: Shapes, devices or the lengths of the two lists do not match, the lists are empty, or
            `reference` or `floor` is outside its range.
        NotImplementedError: The requested backend cannot run the call.
    """
    if not thetas or len(thetas) != len(sigmas):
        raise ValueError(
            f"there are {len(thetas)} thetas and {len(sigmas)} sigmas; expected one of each for every link"
        )
    thetas, sigmas, *_ = _cast_taus(thetas, sigmas)
    both = (*thetas, *sigmas)
    names = (f"{name}[{i}]" for name in ("thetas", "sigmas") for i in range(len(thetas)))
    check_tensors(**dict(zip(names, both, strict=True)))
    if thetas[0].dim() != 1 or any(t.shape != thetas[0].shape for t in both):
        raise ValueError(
            f"thetas and sigmas have shapes {[tuple(t.shape) for t in both]}; expected (H,) each"
        )
    check_number("reference", reference, above=0)
    check_number("floor", floor, at_least=0)
    chosen = choose_kernels(backend, thetas[0], "tau_loss")
    sigmas = [s.detach() for s in sigmas]
    loss: Tensor = _tau_loss(list(thetas), sigmas, float(reference), float(floor), chosen)
    return loss
