"""Two Triton kernels for the backward pass of the pooled links with DyT.

The forward pass of the links does not save the queries Q. The backward pass therefore starts with the "forward kernel"
of this module, which computes Q again. After the gradient dQ is known, the "backward kernel" computes from dQ the
gradients of T, of DyT's parameters and of the bias a. Every row of F (M, C_i) is one position of a map. The kernels
compute:

    forward kernel:     T = F Aᵀ + a    D = w ∘ tanh(αT) + b    Q = D W_Qᵀ
    backward kernel:    dD = dQ W_Q     dT = α w ∘ (1 − tanh²(αT)) ∘ dD

A program of the forward kernel processes a block of positions, one group of channels after the other. For each group,
it computes T and D, and adds D W_Qᵀ to Q. It writes Q, and also D, because dW_Q = dQᵀ D needs D.

A program of the backward kernel processes a tile of positions and channels. It computes T again from F, and dD from
dQ. It writes dT, and the contribution of the tile to dα, dw, db and da. torch adds the contributions of all tiles.

Neither kernel writes T or dD to memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import devices
from ..parts import contiguous, empty, on_device, padded, precision, readable
from ..scale.kernels import tanh
from . import launch_rules
from .forward_kernels import load_block


@triton.jit
def aligned_tokens(
    rows_ptr, align_ptr, bias_ptr, row, M, t, channels: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return T for the rows `row` and the channels `t`: rounded to the dtype of F, then converted to fp32."""
    dtype = rows_ptr.dtype.element_ty
    aligned = tl.zeros([row.shape[0], t.shape[0]], tl.float32)
    for first in range(0, channels, CHUNK):
        c = first + tl.arange(0, CHUNK)
        values = load_block(rows_ptr, row, M, c, channels, channels)
        align = load_block(align_ptr, t, C, c, channels, channels)
        aligned = tl.dot(values, tl.trans(align), aligned, input_precision=PRECISION)
    bias = tl.load(bias_ptr + t, mask=t < C, other=0.0).to(tl.float32)
    return (aligned + bias[None, :]).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _squash_kernel(
    rows_ptr, align_ptr, bias_ptr, alpha_ptr, weight_ptr, dyt_bias_ptr, query_ptr, squashed_ptr, queries_ptr,
    M, channels: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute D and Q of a tile of positions."""
    dtype = rows_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, WIDTH)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    queries = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(0, C, TOKENS):
        t = start + tl.arange(0, TOKENS)
        tokens = aligned_tokens(rows_ptr, align_ptr, bias_ptr, row, M, t, channels, C, CHUNK, PRECISION)
        weight = tl.load(weight_ptr + t, mask=t < C, other=0.0).to(tl.float32)
        bias = tl.load(dyt_bias_ptr + t, mask=t < C, other=0.0).to(tl.float32)
        squashed = (weight[None, :] * tanh(alpha * tokens) + bias[None, :]).to(dtype)
        inside = (row < M)[:, None] & (t < C)[None, :]
        tl.store(squashed_ptr + row[:, None] * C + t[None, :], squashed, mask=inside)
        matrix = load_block(query_ptr, n, C, t, C, C)
        queries = tl.dot(squashed, tl.trans(matrix), queries, input_precision=PRECISION)
    inside = (row < M)[:, None] & (n < C)[None, :]
    tl.store(queries_ptr + row[:, None] * C + n[None, :], queries.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _squash_backward_kernel(
    rows_ptr, align_ptr, bias_ptr, alpha_ptr, weight_ptr, query_ptr, dqueries_ptr, daligned_ptr, parts_ptr, M,
    channels: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dT of a tile of positions and channels, and the contribution of the tile to dα, dw, db and da.

    The contributions are written per channel to `parts` [tiles of positions, 4, C]. The second index of `parts` is 0
    for dα, 1 for dw, 2 for db and 3 for da.
    """
    tile = tl.program_id(0).to(tl.int64)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    dsquashed = tl.zeros([BLOCK, TOKENS], tl.float32)
    for first in range(0, C, CHUNK):
        n = first + tl.arange(0, CHUNK)
        dqueries = load_block(dqueries_ptr, row, M, n, C, C)
        matrix = load_block(query_ptr, n, C, t, C, C)
        dsquashed = tl.dot(dqueries, matrix, dsquashed, input_precision=PRECISION)
    tokens = aligned_tokens(rows_ptr, align_ptr, bias_ptr, row, M, t, channels, C, CHUNK, PRECISION)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    weight = tl.load(weight_ptr + t, mask=t < C, other=0.0).to(tl.float32)
    bounded = tanh(alpha * tokens)
    slope = dsquashed * weight[None, :] * (1.0 - bounded * bounded)  # the gradient of αT
    daligned = slope * alpha
    inside = (row < M)[:, None] & (t < C)[None, :]
    tl.store(
        daligned_ptr + row[:, None] * C + t[None, :], daligned.to(daligned_ptr.dtype.element_ty), mask=inside
    )
    base = parts_ptr + tile * 4 * C + t
    tl.store(base, tl.sum(tl.where(inside, slope * tokens, 0.0), 0), mask=t < C)
    tl.store(base + C, tl.sum(tl.where(inside, dsquashed * bounded, 0.0), 0), mask=t < C)
    tl.store(base + 2 * C, tl.sum(tl.where(inside, dsquashed, 0.0), 0), mask=t < C)
    tl.store(base + 3 * C, tl.sum(tl.where(inside, daligned, 0.0), 0), mask=t < C)


class Squash:
    """Compute DyT's output D and the queries Q of a link from F, and backpropagate dQ.

    Args:
        rows: F (M, C_i).
        align: A (C, C_i), in F's dtype, with C up to 256.
        bias: a (C,), in F's dtype.
        query: W_Q (C, C), in F's dtype.
        dyt: (α, w, b), in F's dtype or a wider one.
    """

    def __init__(
        self, rows: Tensor, align: Tensor, bias: Tensor, query: Tensor, dyt: Sequence[Tensor]
    ) -> None:
        self.dtype = rows.dtype
        names = ("rows_ptr", "align_ptr", "bias_ptr", "query_ptr", "alpha_ptr", "weight_ptr")
        *given, self.shift = contiguous((rows, align, bias, query, *dyt))
        self.given = dict(zip(names, given, strict=True))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return D and Q, (M, C) each."""
        rows, C = self.given["rows_ptr"], len(self.shift)
        squashed, queries = (empty((len(rows), C), rows, rows.dtype) for _ in range(2))
        tile = launch_rules.squash_forward_tile(rows.dtype)
        with on_device(rows):
            _squash_kernel[(-(-len(rows) // tile.positions),)](
                **self.given, dyt_bias_ptr=self.shift, squashed_ptr=squashed, queries_ptr=queries, WIDTH=padded(C),
                **self._shape(tile), num_warps=8, num_stages=devices.stages(rows),
                **devices.register_limit(),  # otherwise the compiler spills to run two programs at once
            )  # fmt: skip
        return squashed.to(self.dtype), queries.to(self.dtype)

    def backward(self, dqueries: Tensor) -> tuple[Tensor, Tensor]:
        """Return dT (M, C), and an fp32 tensor (4, C).

        The sum of row 0 of the fp32 tensor is dα. Row 1 is dw, row 2 is db and row 3 is da.
        """
        rows, C = self.given["rows_ptr"], len(self.shift)
        tile = launch_rules.squash_backward_tile(rows.dtype)
        tiles = -(-len(rows) // tile.positions)
        daligned = empty((len(rows), C), rows, rows.dtype)
        parts = empty((tiles, 4, C), rows, torch.float32)
        with on_device(rows):
            _squash_backward_kernel[(tiles, -(-C // tile.channels))](
                **self.given, dqueries_ptr=readable(dqueries).contiguous(), daligned_ptr=daligned, parts_ptr=parts,
                **self._shape(tile), num_warps=8, num_stages=devices.stages(rows),
            )  # fmt: skip
        return daligned.to(self.dtype), parts.sum(0)

    def _shape(self, tile: launch_rules.SquashTile) -> dict[str, int | str]:
        rows = self.given["rows_ptr"]
        return {
            "M": len(rows),
            "channels": rows.shape[1],
            "C": len(self.shift),
            "CHUNK": tile.chunk,
            "BLOCK": tile.positions,
            "TOKENS": tile.channels,
            "PRECISION": precision(rows.dtype),
        }
