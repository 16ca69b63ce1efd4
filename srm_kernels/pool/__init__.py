"""Adaptive average pooling of feature maps to a square grid (docs/METHOD.md §1.5; section 3.6 of the article)."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_count, check_tensors
from ..dispatch import choose_kernels
from ..registration import later, register_operator
from . import reference

_KERNELS = f"{__name__}.kernels"

_pool = register_operator(
    "adaptive_pool",
    "Tensor x, SymInt size",
    "Tensor",
    dict.fromkeys(("reference", "torch"), reference.adaptive_pool)
    | {"triton": later(_KERNELS, "adaptive_pool")},
    fake=lambda x, size: x.new_empty((*x.shape[:2], size, size)),
    differentiable=("x",),
    derivatives={"triton": later(_KERNELS, "adaptive_pool_backward")},
)


def adaptive_pool(x: Tensor, size: int, *, backend: str | None = None) -> Tensor:
    """Average a map over the cells of a P×P grid (docs/METHOD.md §1.5; section 3.6 of the article).

    The cells are those of `torch.nn.functional.adaptive_avg_pool2d`. Sums are computed in fp32 (fp64 for fp64 inputs).
    The operator is differentiable. For every backend, second derivatives are computed by the reference.

    Args:
        x: (B, C, h, w); float64, float32, bfloat16 or float16, any strides. h and w can have any size.
        size: P, at least 1.
        backend: A name of `backends()`, or None.

    Returns:
        (B, C, P, P) in the dtype of `x`, contiguous.

    Raises:
        TypeError: The dtype is not accepted.
        ValueError: The shape is not (B, C, h, w), or `size` is less than 1.
        NotImplementedError: The requested backend cannot run the call.
    """
    check_tensors(x=x)
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, C, h, w)")
    size = check_count("size", size)
    chosen = choose_kernels(
        backend, x, "adaptive_pool", sizes=lambda: (x.shape[2] * x.shape[3], x.shape[1]), call=(x.shape,)
    )
    return _pool(x, size, chosen)
