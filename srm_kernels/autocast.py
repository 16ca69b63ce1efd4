"""Cast the arguments of operators under autocast.

Without autocast, no argument is cast, and an operator raises a TypeError if the dtypes of its arguments do
not match. With autocast, an operator uses the functions of this module to cast arguments whose dtypes do not
match. The docstring of each function states the dtype after the cast. As in torch, fp64 tensors are never
cast.

If all arguments of a call are fp32, they are not cast, so the call keeps its precision. This differs from
torch's own operators: under autocast, a matrix product casts fp32 arguments to bf16 or fp16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import DTYPES, NO_NARROWER, check_tensors, wide_dtype

DEVICES = ("cpu", "cuda")


def enabled(tensor: Any) -> bool:
    """Return whether autocast casts this tensor."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.dtype == torch.float64:
        return False
    return tensor.device.type in DEVICES and torch.is_autocast_enabled(tensor.device.type)


def lowered(*tensors: Tensor) -> list[Tensor]:
    """Cast tensors of different dtypes to autocast's dtype, as torch does for `scaled_dot_product_attention`."""
    if _agree(tensors):
        return list(tensors)
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [tensor.to(dtype) for tensor in tensors]


def promoted(*tensors: Tensor) -> list[Tensor]:
    """Cast tensors of different dtypes to their promoted dtype, as torch casts arguments of `torch.cat`."""
    if _agree(tensors):
        return list(tensors)
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def no_narrower(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Cast each parameter that cannot represent all values of `like.dtype` to a dtype that can."""
    if not enabled(like):
        return list(tensors)
    holding = (like.dtype, torch.float32)
    return [
        t.to(torch.promote_types(t.dtype, like.dtype)) if t.dtype not in holding and enabled(t) else t
        for t in tensors
    ]


def widened(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Cast tensors to `wide_dtype(like.dtype)`, the dtype of intermediate results."""
    if not enabled(like):
        return list(tensors)
    return [t.to(wide_dtype(like.dtype)) if enabled(t) else t for t in tensors]


def _agree(tensors: Sequence[Any]) -> bool:
    return not all(map(enabled, tensors)) or all(tensor.dtype == tensors[0].dtype for tensor in tensors)


def check_parameter(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Check the dtype, shape and device of a parameter that is applied to the tensor `like`.

    Raises:
        TypeError: `value` is not a floating-point tensor, or autocast is off and the dtype of `value` is narrower than
            `like.dtype`.
        ValueError: The shape of `value` is not `shape`, or `value` is on another device than `like`.
    """
    # Modules check many parameters per call, so the usual case must be cheap.
    if (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.dtype in NO_NARROWER[like.dtype]
        and value.device == like.device
        and value.numel()
    ):
        return
    check_tensors(**{name: value})
    if value.dtype not in NO_NARROWER[like.dtype] and not enabled(like):
        raise TypeError(f"{name} is {value.dtype}; expected {like.dtype} or a wider dtype")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; expected {like.device}")
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {tuple(shape)}")
