"""Pieces that the Triton kernels of several operators are made of, and what every launch asks.

Importing this module imports Triton; nothing but a `kernels` module does.

Precision. Products of two stored tensors (queries, keys, values) are taken in their dtype and accumulate in fp32:
every product of two bf16 or fp16 numbers is exact there. What is computed, softmax blocks, X and their gradients,
stays fp32, and a product with it is taken by `wide_dot` in three passes of the tensor cores: "tf32x3", which keeps 22
bits of both factors, or "bf16x3", which keeps 16 and is used where tokens are bf16; a factor that is bf16 already needs
no low part, which leaves two passes. One pass would keep 11 or 8 bits: X may be many times larger than Y, so that what
is lost there comes back magnified. Tensors of fp32 are multiplied with one
another by "tf32x3" too. Where landmarks are chosen nothing coarser than that is used, and plain fp32 for fp32 tokens:
a score decides by its last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NORM_FLOOR = tl.constexpr(1e-6)
INFINITY = tl.constexpr(float("inf"))


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An output or a workspace that kernels fill; a function of its own, so that tests can fill it with NaN first."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def empty_like(tensor: Tensor) -> Tensor:
    """The same for an output that is laid out as a tensor is."""
    return torch.empty_like(tensor)


def readable(tensor: Tensor) -> Tensor:
    """What a kernel is given to read: Triton's interpreter computes wrongly in bf16, so there it gets fp32."""
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


def contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a kernel is given to read of several small tensors."""
    return tuple([readable(t).contiguous() for t in tensors])


def strides(*unnamed: Tensor, axes: str = "bhnd", **named: Tensor) -> dict[str, int]:
    """Strides as kernels name them: "stride_b" and so on of the unnamed, "key_stride_b" of `key=`."""
    tensors = [("", tensor) for tensor in unnamed] + [(f"{name}_", tensor) for name, tensor in named.items()]
    return {
        f"{prefix}stride_{axis}": stride
        for prefix, tensor in tensors
        for axis, stride in zip(axes, tensor.stride(), strict=True)
    }


def strides_of(maps: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """Of all maps by image, channel, row and column, as kernels name them."""
    return {f"strides_{axis}": tuple(m.stride(number) for m in maps) for number, axis in enumerate("bchw")}


def precision(dtype: torch.dtype) -> str:
    """How products are taken for tensors of this dtype; the interpreter multiplies in fp32 whatever it is told."""
    if INTERPRETED:
        return "ieee"
    return "bf16x3" if dtype == torch.bfloat16 else "tf32x3"


def finest_precision(dtype: torch.dtype, d: int) -> str:
    """How products are taken where landmarks are chosen; three passes over a d×d matrix need 128 KiB above d = 64."""
    return "ieee" if INTERPRETED or dtype == torch.float32 or d > 64 else "tf32x3"


def padded(size: int) -> int:
    """The power of two, 16 or more, that a tile needs to hold `size` entries."""
    return max(16, power_of_two(size))


def power_of_two(size: int) -> int:
    """The least that is not below `size`; Triton's own costs the host as much as an allocation does."""
    return 1 << (size - 1).bit_length()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def token_offsets(rows, columns, n_stride, d_stride):
    """[ROWS, COLUMNS] offsets in 64 bits: a tensor may pass 2³¹ elements."""
    return rows.to(tl.int64)[:, None] * n_stride + columns.to(tl.int64)[None, :] * d_stride


@triton.jit
def load_tokens(ptr, rows, valid, n_stride, d_stride, d: tl.constexpr, D: tl.constexpr):
    """Rows of a token matrix, [ROWS, D]; zeros where a row is not valid and beyond d."""
    columns = tl.arange(0, D)
    offsets = token_offsets(rows, columns, n_stride, d_stride)
    return tl.load(ptr + offsets, mask=valid[:, None] & (columns < d)[None, :], other=0.0)


@triton.jit
def rms_factor(tokens, d: tl.constexpr, NORMALISE: tl.constexpr):
    """√d / (‖x‖ + 1e-6) of every row, [ROWS], or ones.

    Rows are multiplied by it after a product, never before: the stored numbers enter the product unrounded.
    """
    wide = tokens.to(tl.float32)
    norm = tl.sqrt(tl.sum(wide * wide, 1))
    return d**0.5 / (norm + NORM_FLOOR) if NORMALISE else norm * 0.0 + 1.0


@triton.jit
def rms_factor_product(gradient, tokens, d: tl.constexpr, NORMALISE: tl.constexpr):
    """The gradient of x from that of x·√d/(‖x‖ + 1e-6), both [ROWS, D]."""
    if NORMALISE:
        wide = tokens.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide * wide, 1))
        along = tl.sum(wide * gradient, 1)
        # The norm's derivative at 0 is taken as 0, as torch does.
        along = tl.where(norm > 0, along / (norm * (norm + NORM_FLOOR)), tl.where(norm == 0, 0.0, norm))
        gradient = (d**0.5 / (norm + NORM_FLOOR))[:, None] * (gradient - wide * along[:, None])
    return gradient


@triton.jit
def bf16_pair(x):
    """x as the sum of two bf16 tensors, of which it keeps 16 bits."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def wide_dot(a, b, PRECISION: tl.constexpr):
    """a b in fp32, of which one at least was computed; see the module's docstring.

    As in Triton's own passes, what the low part makes of an infinity, NaN, does not count.
    """
    if PRECISION == "bf16x3" and b.dtype == tl.bfloat16:
        high, low = bf16_pair(a)
        rest = tl.dot(low, b)
        product = tl.dot(high, b, tl.where(rest == rest, rest, 0.0))
    elif PRECISION == "bf16x3" and a.dtype == tl.bfloat16:
        high, low = bf16_pair(b)
        rest = tl.dot(a, low)
        product = tl.dot(a, high, tl.where(rest == rest, rest, 0.0))
    else:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return product
