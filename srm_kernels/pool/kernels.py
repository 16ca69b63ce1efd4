"""Triton kernels of adaptive average pooling.

The fused neck also uses the functions of this module that compute which rows are in which cell (`cell_start`,
`cell_stop`, `first_cell`, `last_cell` and `most_cells`).

Forward pass, from a map to P×P cells: a program computes one row of cells for some channels. For each column of the
map, it first sums the map rows that these cells contain. Then, for each cell, it sums the results of the cell's columns
and divides by the number of positions in the cell. If the height of the map is a multiple of P, every map row is read
once.

Backward pass: the gradient of a position is a sum over the cells that contain the position. If the height and the width
of the map are multiples of P, every position is in exactly one cell. Otherwise, a position is in up to two cells along
each axis, or in more than two if the grid of P×P cells is finer than the map.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..parts import empty, on_device, power_of_two, readable

ELEMENTS = 2048  # elements of a tile of channels and columns; a longer row has a tile with one channel
BLOCK = 1024


@triton.jit
def cell_start(i, length, cells):
    """Return the first row of cell i. The functions `cell_start` to `most_cells` are used for columns too."""
    return i * length // cells


@triton.jit
def cell_stop(i, length, cells):
    """Return the last row of cell i plus 1."""
    return ((i + 1) * length + cells - 1) // cells


@triton.jit
def first_cell(y, length, cells):
    """Return the first cell that contains row y."""
    return y * cells // length


@triton.jit
def last_cell(y, length, cells):
    """Return the last cell that contains row y."""
    return ((y + 1) * cells - 1) // length


def most_cells(length: int, cells: int) -> int:
    """Return the largest number of cells that a row belongs to."""
    return max(((y + 1) * cells - 1) // length - y * cells // length + 1 for y in range(length))


@triton.jit
def _pool_kernel(
    x_ptr, out_ptr, C, h, w, stride_b, stride_c, stride_h, stride_w, SIZE: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute one row of cells for some channels of an image."""
    b, i = tl.program_id(2).to(tl.int64), tl.program_id(1)
    channels, columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, WIDTH)
    inside = (channels < C)[:, None] & (columns < w)[None, :]
    offsets = channels.to(tl.int64)[:, None] * stride_c + columns.to(tl.int64)[None, :] * stride_w
    start, stop = cell_start(i, h, SIZE), cell_stop(i, h, SIZE)
    total = tl.zeros([CHANNELS, WIDTH], tl.float32)
    for y in range(start, stop):
        row_ptr = x_ptr + b * stride_b + tl.cast(y, tl.int64) * stride_h
        total += tl.load(row_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    for j in range(SIZE):
        left, right = cell_start(j, w, SIZE), cell_stop(j, w, SIZE)
        held = (columns >= left) & (columns < right)
        mean = tl.sum(tl.where(held[None, :], total, 0.0), 1) / ((stop - start) * (right - left))
        place = ((b * C + channels) * SIZE + i) * SIZE + j
        tl.store(out_ptr + place, mean.to(out_ptr.dtype.element_ty), mask=channels < C)


@triton.jit
def _pool_backward_kernel(
    dout_ptr, dx_ptr, elements, h, w, stride_b, stride_c, stride_h, stride_w, SIZE: tl.constexpr,
    MOST_ROWS: tl.constexpr, MOST_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dx of some elements of an image."""
    b = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, y, x = element // (h * w), element // w % h, element % w
    total = tl.zeros([BLOCK], tl.float32)
    for down in tl.static_range(MOST_ROWS):
        i = first_cell(y, h, SIZE) + down
        rows = cell_stop(i, h, SIZE) - cell_start(i, h, SIZE)
        for right in tl.static_range(MOST_COLUMNS):
            j = first_cell(x, w, SIZE) + right
            columns = cell_stop(j, w, SIZE) - cell_start(j, w, SIZE)
            held = (i <= last_cell(y, h, SIZE)) & (j <= last_cell(x, w, SIZE)) & (element < elements)
            offsets = c.to(tl.int64) * stride_c + i * stride_h + j * stride_w
            dout = tl.load(dout_ptr + b * stride_b + offsets, mask=held, other=0.0).to(tl.float32)
            total += dout / (rows * columns)
    tl.store(dx_ptr + b * elements + element, total.to(dx_ptr.dtype.element_ty), mask=element < elements)


def adaptive_pool(x: Tensor, size: int) -> Tensor:
    """Return the result of `reference.adaptive_pool` as a contiguous tensor."""
    dtype, x = x.dtype, readable(x)
    B, C, h, w = x.shape
    out = empty((B, C, size, size), x, x.dtype)
    width = power_of_two(w)
    channels = max(1, min(ELEMENTS // width, power_of_two(C)))
    with on_device(x):
        _pool_kernel[(-(-C // channels), size, B)](
            x, out, C, h, w, *x.stride(), SIZE=size, CHANNELS=channels, WIDTH=width, num_warps=4
        )
    return out.to(dtype)


def adaptive_pool_backward(
    grads: Sequence[Tensor], results: Sequence[Tensor], x: Tensor, size: int
) -> list[Tensor]:
    """Return [dx] from the gradient of the result."""
    dout = readable(grads[0])
    B, C, h, w = x.shape
    dx = empty((B, C, h, w), x, dout.dtype)
    with on_device(x):
        _pool_backward_kernel[(-(-C * h * w // BLOCK), B)](
            dout, dx, C * h * w, h, w, *dout.stride(), SIZE=size, MOST_ROWS=most_cells(h, size),
            MOST_COLUMNS=most_cells(w, size), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return [dx.to(x.dtype)]
