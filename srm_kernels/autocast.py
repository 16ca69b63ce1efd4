"""What operators do where autocast is on: tensors of one call that differ in dtype are made to agree.

Tensors that agree already keep their dtype, so that autocast alone never changes an operator's precision. fp64 is left
alone, as torch leaves it. Without autocast nothing is cast, and tensors that differ are a TypeError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import DTYPES, wide_dtype

DEVICES = ("cpu", "cuda")


def enabled(tensor: Any) -> bool:
    """Whether autocast casts a tensor such as this."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.dtype == torch.float64:
        return False
    return tensor.device.type in DEVICES and torch.is_autocast_enabled(tensor.device.type)


def lowered(*tensors: Tensor) -> list[Tensor]:
    """Tensors that differ in dtype in that of autocast, as torch casts the arguments of attention."""
    given = list(tensors)
    if _agree(given):
        return given
    dtype = torch.get_autocast_dtype(given[0].device.type)
    return [tensor.to(dtype) for tensor in given]


def promoted(*tensors: Tensor) -> list[Tensor]:
    """Tensors that differ in dtype in the widest of them, as torch casts the arguments of `torch.cat`."""
    given = list(tensors)
    if _agree(given):
        return given
    dtype = given[0].dtype
    for tensor in given:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in given]


def no_narrower(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Parameters, each in its own dtype or, where that is narrower, in one that holds the dtype of `like` too."""
    if not enabled(like):
        return list(tensors)
    holding = (like.dtype, torch.float32)
    return [
        t.to(torch.promote_types(t.dtype, like.dtype)) if t.dtype not in holding and enabled(t) else t
        for t in tensors
    ]


def widened(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Tensors in the dtype of statistics and solves that belongs to `like`."""
    if not enabled(like):
        return list(tensors)
    return [t.to(wide_dtype(like.dtype)) if enabled(t) else t for t in tensors]


def _agree(tensors: Sequence[Any]) -> bool:
    """Whether there is nothing to cast."""
    return not all(map(enabled, tensors)) or all(tensor.dtype == tensors[0].dtype for tensor in tensors)
