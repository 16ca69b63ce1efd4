"""Functions that the Triton kernels of several operators share, and helpers for their launches.

This module imports Triton, which is not always installed. Therefore, only modules with Triton kernels, or
with rules for their launches, may import this module.

Precision of products:

- Stored tensors (queries, keys, values) are multiplied in their dtype, and the products are accumulated in fp32. A
  product of two bf16 or fp16 numbers is exact in fp32. Two fp32 tensors are multiplied in the precision "tf32x3".
- Computed tensors (L, W, R, X and their gradients) stay in fp32. A product with at least one computed tensor uses
  `wide_dot`, which splits each of the two factors into a high part and a low part. It multiplies the parts in
  three passes of the tensor cores: high × high, high × low and low × high. The precision "tf32x3" keeps 22 bits
  of each factor. With bf16 tokens, the precision is "bf16x3", which keeps 16 bits of each factor. If one factor
  is stored in bf16, this factor has no low part, so two passes suffice.
- A single pass would keep only 11 bits (TF32) or 8 bits (bf16) of each factor. This is too inaccurate for the
  product Y = L X, for example: the entries of X can be much larger than those of Y, so the rounding errors of
  X would be large relative to Y.
- Landmarks are chosen by a score of each key, and the choice can depend on the last bits of these scores. The matrix
  products that compute the scores therefore use "tf32x3" or plain fp32 (`finest_precision`).
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
    """Allocate an output or workspace, without initialising its memory.

    The tests replace this function by one that also fills the memory with NaN (integers: an index out of range). They
    fail if a kernel does not write an entry of its output, or reads an entry of a workspace before writing it.
    """
    return torch.empty(shape, dtype=dtype, device=like.device)


def empty_like(tensor: Tensor) -> Tensor:
    """Allocate an output with the layout of a tensor; see `empty`."""
    return torch.empty_like(tensor)


def readable(tensor: Tensor) -> Tensor:
    """Return the tensor that a kernel reads: in Triton's interpreter, an fp32 copy of a bf16 tensor.

    The copy is needed because the interpreter computes wrong results in bf16. A tensor of another dtype is returned
    unchanged. If the interpreter is not used, every tensor is returned unchanged.
    """
    return tensor.float() if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor


def contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Convert tensors by `readable` and make them contiguous, for kernels that expect contiguous tensors.

    Use this function for small tensors only, because it can copy them.
    """
    return tuple([readable(t).contiguous() for t in tensors])


def strides(*unnamed: Tensor, axes: str = "bhnd", **named: Tensor) -> dict[str, int]:
    """Return the strides of tensors as keyword arguments of a kernel.

    The stride of axis b is named "stride_b" for a positional tensor, and "key_stride_b" for a tensor passed
    as `key=`.
    """
    tensors = [("", tensor) for tensor in unnamed] + [(f"{name}_", tensor) for name, tensor in named.items()]
    return {
        f"{prefix}stride_{axis}": stride
        for prefix, tensor in tensors
        for axis, stride in zip(axes, tensor.stride(), strict=True)
    }


def strides_of(maps: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the strides of maps (B, C, h, w) as keyword arguments of a kernel.

    Each of "strides_b", "strides_c", "strides_h" and "strides_w" is a tuple with the stride of every map
    along one axis.
    """
    return {f"strides_{axis}": tuple(m.stride(number) for m in maps) for number, axis in enumerate("bchw")}


def precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of the products in a kernel whose tokens have this dtype.

    In Triton's interpreter, products are always computed in fp32.
    """
    if INTERPRETED:
        return "ieee"
    return "bf16x3" if dtype == torch.bfloat16 else "tf32x3"


def finest_precision(dtype: torch.dtype, d: int) -> str:
    """Return the `input_precision` of the matrix products that compute the scores for choosing landmarks.

    The result is "tf32x3", with three exceptions that give "ieee" (plain fp32): Triton's interpreter, fp32 tokens, and
    d above 64. For d above 64, the three passes of "tf32x3" over a d×d matrix would need 128 KiB of shared memory.
    """
    return "ieee" if INTERPRETED or dtype == torch.float32 or d > 64 else "tf32x3"


def padded(size: int) -> int:
    """Return the length of a tile along an axis with `size` entries: a power of two, at least 16."""
    return max(16, power_of_two(size))


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`; faster than Triton's `next_power_of_2`."""
    return 1 << (size - 1).bit_length()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the tensor's device is current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def token_offsets(rows, columns, n_stride, d_stride):
    """Return the offsets [ROWS, COLUMNS] of entries of a token matrix, relative to the pointer of the matrix.

    The offsets are int64, because a tensor can have more than 2³¹ elements.
    """
    return rows.to(tl.int64)[:, None] * n_stride + columns.to(tl.int64)[None, :] * d_stride


@triton.jit
def load_tokens(ptr, rows, valid, n_stride, d_stride, d: tl.constexpr, D: tl.constexpr):
    """Load rows of a token matrix as a tile [ROWS, D]. Rows that are not valid and columns beyond d are zero."""
    columns = tl.arange(0, D)
    offsets = token_offsets(rows, columns, n_stride, d_stride)
    return tl.load(ptr + offsets, mask=valid[:, None] & (columns < d)[None, :], other=0.0)


@triton.jit
def rms_factor(tokens, d: tl.constexpr, NORMALISE: tl.constexpr):
    """Return a tensor [ROWS] with a factor for each row x of `tokens`: √d / (‖x‖ + 1e-6), or 1 without NORMALISE.

    Kernels multiply the stored tokens by another matrix first, and apply the factors to the rows of the product. If the
    tokens were normalised before the product, they would be rounded to their dtype a second time.
    """
    wide = tokens.to(tl.float32)
    norm = tl.sqrt(tl.sum(wide * wide, 1))
    return d**0.5 / (norm + NORM_FLOOR) if NORMALISE else norm * 0.0 + 1.0


@triton.jit
def rms_factor_product(gradient, tokens, d: tl.constexpr, NORMALISE: tl.constexpr):
    """Return the gradient with respect to each row x of `tokens`, [ROWS, D].

    `gradient` is the gradient with respect to x·√d/(‖x‖ + 1e-6). If NORMALISE is false, `gradient` is returned
    unchanged.
    """
    if NORMALISE:
        wide = tokens.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide * wide, 1))
        along = tl.sum(wide * gradient, 1)
        # The derivative of the norm at 0 is 0, as in torch.
        along = tl.where(norm > 0, along / (norm * (norm + NORM_FLOOR)), tl.where(norm == 0, 0.0, norm))
        gradient = (d**0.5 / (norm + NORM_FLOOR))[:, None] * (gradient - wide * along[:, None])
    return gradient


@triton.jit
def bf16_pair(x):
    """Split x into two bf16 tensors whose sum keeps 16 bits of x."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def wide_dot(a, b, PRECISION: tl.constexpr):
    """Return the product a b in fp32, where at least one factor is a computed tensor (see the module's docstring).

    If an entry of a factor is infinite, its low part is ∞ − ∞ = NaN. In the product of the low part and the other
    factor, the function therefore replaces each NaN by 0, as Triton's "bf16x3" does.
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
