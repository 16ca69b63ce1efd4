"""Pooled landmark probabilities on the device: from a map of the backbone to P̄, and back.

Forward. A program takes one row of cells, some columns and one (b, h), adds up the probabilities of its positions and
sums them cell by cell at the end; L and Y are never written. Two roads lead to the logits:

- absorbed, without DyT and query normalisation: Q K̃ᵀ s = F·G + g with G = (W_Q A)ᵀ K̃ᵀ s (C_i×r per head), so that
  neither T nor Q exists. G is fp32; in half precision it enters as a pair, high + low, in two products: one rounding
  of G would cost 4e-3 of the result, which pooling cannot average.
- otherwise T and Q are library products, alive during this call alone.

The statistic is that of y = L X, tile by tile by Chan's formula, not tr Xᵀ(LᵀL)X from second moments of L: X may be
many times larger than Y, what cancels in L X would have to cancel in squares, and r×r moments cost more products than
r×d. X is then needed at the start, where the launch that makes K̃ has left it; evaluation asks for no statistic.

Backward. Everything between F and L is formed again, Q by library products on either road, so that what a training
step keeps of a link is F, K̃ and P̄. Every position gathers its gradient from the cells that hold it. Positions belong to
one program each; its sums for dK̃ are written and added in their order. Nothing is accumulated by atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.kernels import probabilities
from ..attention.key_kernels import load_keys, load_matrix, store_matrix
from ..parts import (
    INFINITY,
    LOG2E,
    NORM_FLOOR,
    empty,
    on_device,
    padded,
    precision,
    readable,
    rms_factor,
    rms_factor_product,
    wide_dot,
)
from ..pool.kernels import cell_start, cell_stop, first_cell, last_cell, most_cells
from ..scale.kernels import add_tile, dyt, dyt_backward


class Tile(NamedTuple):
    """Positions of a tile, columns among them, and how many blocks of columns a map has."""

    positions: int
    columns: int
    blocks: int


def tile_of(width: int, positions: int) -> Tile:
    """A tile is as wide as the map, up to `positions` columns, and as high as that leaves."""
    columns = min(positions, triton.next_power_of_2(width))
    return Tile(positions, columns, -(-width // columns))


def forward_positions(rank: int, d: int, dtype: torch.dtype, statistics: bool) -> int:
    """What fits in registers beside [r, d] tiles, as `python -m bench.resources` shows it."""
    if not statistics:
        return 64
    return 32 if dtype == torch.bfloat16 and padded(rank) * padded(d) <= 64 * 32 else 16


BACKWARD_POSITIONS = 16


def warps(rank: int, d: int) -> int:
    """Warps of a program that holds [positions, r] and [r, d] tiles."""
    return 4 if padded(rank) * padded(d) <= 64 * 32 else 8


@triton.jit
def place(program, blocks, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(b·H + h, row of cells, row of each position within the tile [BLOCK], its column [BLOCK])."""
    head = program // (SIZE * blocks)
    i = (program // blocks % SIZE).to(tl.int32)
    block = (program % blocks).to(tl.int32)
    m = tl.arange(0, BLOCK)
    return head, i, m // COLUMNS, block * COLUMNS + m % COLUMNS


@triton.jit
def load_positions(ptr, offsets, inside, stride, d: tl.constexpr, D: tl.constexpr):
    """The d channels of every position, [BLOCK, D]; zeros outside."""
    channels = tl.arange(0, D)
    mask = inside[:, None] & (channels < d)[None, :]
    return tl.load(ptr + offsets[:, None] + channels.to(tl.int64)[None, :] * stride, mask=mask, other=0.0)


@triton.jit
def absorbed_probabilities(
    map_ptr, offsets, inside, stride, matrix_ptr, shift, channels: tl.constexpr, CHUNK: tl.constexpr,
    rank: tl.constexpr, R: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """L [BLOCK, R] = softmax(F·G + g) of one tile; G is [r, channels] in units of log 2."""
    i = tl.arange(0, R)
    logits = tl.zeros([offsets.shape[0], R], tl.float32) + shift[None, :]
    for first in range(0, channels, CHUNK):
        c = first + tl.arange(0, CHUNK)
        mask = inside[:, None] & (c < channels)[None, :]
        values = tl.load(map_ptr + offsets[:, None] + c.to(tl.int64)[None, :] * stride, mask=mask, other=0.0)
        known = (i < rank)[:, None] & (c < channels)[None, :]
        matrix = tl.load(matrix_ptr + i[:, None] * channels + c[None, :], mask=known, other=0.0)
        high = matrix.to(values.dtype)
        logits = tl.dot(values, tl.trans(high), logits, input_precision=PRECISION)
        if PAIR:
            low = (matrix - high.to(tl.float32)).to(values.dtype)
            logits = tl.dot(values, tl.trans(low), logits, input_precision=PRECISION)
    logits = tl.where((i < rank)[None, :], logits, -INFINITY)
    weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _forward_kernel(
    token_ptr, keys_ptr, shift_ptr, x_ptr, out_ptr, mean_ptr, spread_ptr, heads, h, w, blocks, stride_b,
    stride_head, stride_h, stride_w, stride_c, scale, rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr,
    D: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, ABSORBED: tl.constexpr, PAIR: tl.constexpr,
    NORMALISE_QUERY: tl.constexpr, NORMALISE_KEYS: tl.constexpr, STATISTICS: tl.constexpr,
    SIZE: tl.constexpr, CELLS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of columns adds to one row of cells of a (b, h), [SIZE, r], and the mean and M₂ of its own y.

    Where the grid does not divide the map, neighbouring rows of cells share positions: each takes them for itself,
    and the statistic counts them in the later one.
    """
    program = tl.program_id(0).to(tl.int64)
    head, i, down, column = place(program, blocks, SIZE, COLUMNS, BLOCK)
    token_ptr += head // heads * stride_b + head % heads * stride_head
    shift = tl.zeros([R], tl.float32)
    keys = shift
    column_scale = shift
    if ABSORBED:
        shift += tl.load(shift_ptr + head * rank + tl.arange(0, R), mask=tl.arange(0, R) < rank, other=0.0)
    else:
        keys = load_keys(keys_ptr + head * rank * d, token_ptr, rank, R, d, D)
        column_scale = rms_factor(keys, d, NORMALISE_KEYS) * (scale * LOG2E)
    if STATISTICS:
        x = load_matrix(x_ptr + head * rank * d, rank, R, d, D)
    count = 0.0
    mean = tl.zeros([D], tl.float32)
    spread = 0.0
    total = tl.zeros([BLOCK, R], tl.float32)
    start, stop = cell_start(i, h, SIZE), cell_stop(i, h, SIZE)
    for top in range(start, stop, BLOCK // COLUMNS):
        row = top + down
        inside = (row < stop) & (column < w)
        offsets = row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
        if ABSORBED:
            weights = absorbed_probabilities(
                token_ptr, offsets, inside, stride_c, keys_ptr + head * rank * CHANNELS, shift, CHANNELS,
                CHUNK, rank, R, PAIR, PRECISION,
            )  # fmt: skip
        else:
            query = load_positions(token_ptr, offsets, inside, stride_c, d, D)
            weights = probabilities(query, keys, column_scale, rank, R, d, NORMALISE_QUERY, PRECISION)
        total += tl.where(inside[:, None], weights, 0.0)
        if STATISTICS:
            own = inside & (row < cell_start(i + 1, h, SIZE))
            count, mean, spread = add_tile(
                count, mean, spread, tl.trans(wide_dot(tl.trans(x), tl.trans(weights), PRECISION)), own
            )
    j = tl.arange(0, CELLS)
    left, right = cell_start(j, w, SIZE), cell_stop(j, w, SIZE)
    held = (column[None, :] >= left[:, None]) & (column[None, :] < right[:, None]) & (j < SIZE)[:, None]
    pooled = wide_dot(held.to(tl.float32), total, PRECISION) / ((stop - start) * (right - left))[:, None]
    store_matrix(out_ptr + program * SIZE * rank, pooled, j, SIZE, CELLS, rank, R)
    if STATISTICS:
        columns = tl.arange(0, D)
        tl.store(mean_ptr + program * d + columns, mean, mask=columns < d)
        tl.store(spread_ptr + program, spread)


@triton.jit
def _gather_kernel(
    part_ptr, part_mean_ptr, part_spread_ptr, out_ptr, mean_ptr, spread_ptr, h, w, blocks,
    rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    CELLS: tl.constexpr, COLUMNS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """P̄ of one (b, h) from the blocks of columns, and the statistic from all programs about their common mean."""
    head = tl.program_id(0).to(tl.int64)
    for i in range(SIZE):
        total = tl.zeros([CELLS, R], tl.float32)
        for block in range(blocks):
            index = (head * SIZE + i) * blocks + block
            total += load_matrix(part_ptr + index * SIZE * rank, SIZE, CELLS, rank, R)
        store_matrix(
            out_ptr + (head * SIZE + i) * SIZE * rank, total, tl.arange(0, CELLS), SIZE, CELLS, rank, R
        )
    if STATISTICS:
        columns = tl.arange(0, D)
        positions = (h * w).to(tl.float32)
        mean = tl.zeros([D], tl.float32)
        for part in range(SIZE * blocks):
            rows = cell_start(part // blocks + 1, h, SIZE) - cell_start(part // blocks, h, SIZE)
            count = (rows * tl.minimum(w - part % blocks * COLUMNS, COLUMNS)).to(tl.float32)
            means = tl.load(
                part_mean_ptr + (head * SIZE * blocks + part) * d + columns, mask=columns < d, other=0.0
            )
            mean += means * (count / positions)
        spread = 0.0
        for part in range(SIZE * blocks):
            rows = cell_start(part // blocks + 1, h, SIZE) - cell_start(part // blocks, h, SIZE)
            count = (rows * tl.minimum(w - part % blocks * COLUMNS, COLUMNS)).to(tl.float32)
            index = head * SIZE * blocks + part
            between = tl.load(part_mean_ptr + index * d + columns, mask=columns < d, other=0.0) - mean
            spread += tl.load(part_spread_ptr + index) + count * tl.sum(between * between, 0)
        tl.store(mean_ptr + head * d + columns, mean, mask=columns < d)
        tl.store(spread_ptr + head, spread)


@triton.jit
def _backward_kernel(
    query_ptr, keys_ptr, dout_ptr, dquery_ptr, dkeys_ptr, heads, h, w, blocks, stride_b, stride_head,
    stride_h, stride_w, stride_c, scale, rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr,
    D: tl.constexpr, NORMALISE_QUERY: tl.constexpr, NORMALISE_KEYS: tl.constexpr, SIZE: tl.constexpr,
    MOST_ROWS: tl.constexpr, MOST_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ (B, h, w, H, d) of the positions of one row of cells and block of columns, and what they add to dK̃."""
    program = tl.program_id(0).to(tl.int64)
    head, i, down, column = place(program, blocks, SIZE, COLUMNS, BLOCK)
    b, head_of_image = head // heads, head % heads
    query_ptr += b * stride_b + head_of_image * stride_head
    keys = load_keys(keys_ptr + head * rank * d, query_ptr, rank, R, d, D)
    factor = rms_factor(keys, d, NORMALISE_KEYS)
    dkeys = tl.zeros([R, D], tl.float32)
    channels, r = tl.arange(0, D), tl.arange(0, R)
    stop = cell_start(i + 1, h, SIZE)
    for top in range(cell_start(i, h, SIZE), stop, BLOCK // COLUMNS):
        row = top + down
        inside = (row < stop) & (column < w)
        offsets = row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
        query = load_positions(query_ptr, offsets, inside, stride_c, d, D)
        weights = probabilities(query, keys, factor * (scale * LOG2E), rank, R, d, NORMALISE_QUERY, PRECISION)
        dweights = tl.zeros([BLOCK, R], tl.float32)
        for below in tl.static_range(MOST_ROWS):
            cell = first_cell(row, h, SIZE) + below
            rows = cell_stop(cell, h, SIZE) - cell_start(cell, h, SIZE)
            for beside in tl.static_range(MOST_COLUMNS):
                other = first_cell(column, w, SIZE) + beside
                area = rows * (cell_stop(other, w, SIZE) - cell_start(other, w, SIZE))
                held = inside & (cell <= last_cell(row, h, SIZE)) & (other <= last_cell(column, w, SIZE))
                cells = (head * SIZE + cell) * SIZE + other
                dpooled = tl.load(
                    dout_ptr + cells[:, None] * rank + r[None, :],
                    mask=held[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
                dweights += dpooled / area[:, None]
        dlogits = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        row_factor = rms_factor(query, d, NORMALISE_QUERY)
        dkeys += wide_dot(tl.trans(dlogits * (row_factor * scale)[:, None]), query, PRECISION)
        dquery = wide_dot(dlogits * (factor * scale)[None, :], keys, PRECISION)
        dquery = rms_factor_product(dquery, query, d, NORMALISE_QUERY)
        token = (b * h + row) * w + column
        mask = inside[:, None] & (channels < d)[None, :]
        tl.store(
            dquery_ptr + (token * heads + head_of_image)[:, None] * d + channels[None, :],
            dquery.to(dquery_ptr.dtype.element_ty),
            mask=mask,
        )
    store_matrix(dkeys_ptr + program * rank * d, dkeys, r, rank, R, d, D)


@triton.jit
def _keys_kernel(
    part_ptr, keys_ptr, dkeys_ptr, parts, rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr,
    D: tl.constexpr, NORMALISE_KEYS: tl.constexpr,
):  # fmt: skip
    """dK̃ of one (b, h), parts added in their order."""
    head = tl.program_id(0).to(tl.int64)
    dkeys = tl.zeros([R, D], tl.float32)
    for part in range(parts):
        dkeys += load_matrix(part_ptr + (head * parts + part) * rank * d, rank, R, d, D)
    keys = load_matrix(keys_ptr + head * rank * d, rank, R, d, D)
    dkeys = rms_factor_product(dkeys, keys, d, NORMALISE_KEYS)
    store_matrix(dkeys_ptr + head * rank * d, dkeys, tl.arange(0, R), rank, R, d, D)


def pooled_probabilities(
    features: Tensor,
    align_weight: Tensor,
    align_bias: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    query_weight: Tensor,
    keys: Tensor,
    x: Tensor | None,
    size: int,
    scale: float,
    qk_norm: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(P̄, mean, M₂) as `reference.pooled_probabilities` gives them."""
    B, channels, h, w = features.shape
    _, H, rank, d = keys.shape
    keys = keys.contiguous()
    absorbed = alpha is None and qk_norm != "both"
    if absorbed:
        tokens = readable(features)
        strides = (tokens.stride(0), 0, *tokens.stride()[2:], tokens.stride(1))
        composed, shift = _composed(align_weight, align_bias, query_weight)
        landmarks = keys * (scale * LOG2E.value)
        if qk_norm is not None:
            norm = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
            landmarks = landmarks * (d**0.5 / (norm + NORM_FLOOR.value))
        matrix = landmarks @ composed.view(H, d, channels)  # G (B, H, r, C_i)
        shift = (landmarks @ shift.view(H, d, 1)).contiguous()  # g (B, H, r)
    else:
        _, _, queries = _queries(features, align_weight, align_bias, alpha, weight, bias, query_weight)
        tokens = readable(queries)
        strides = _strides(h, w, H, d)
        matrix = shift = keys
    tile = tile_of(w, forward_positions(rank, d, tokens.dtype, x is not None))
    programs = B * H * size * tile.blocks
    statistics = x is not None
    gathered = statistics or tile.blocks > 1
    part = empty((B, H, size, tile.blocks, size, rank), keys, torch.float32)
    pooled = empty((B, H, size * size, rank), keys, torch.float32) if gathered else part.view(B, H, -1, rank)
    mean, spread, part_mean, part_spread = (
        empty(shape if statistics else (0,), keys, torch.float32)
        for shape in ((B, H, d), (B, H), (programs, d), (programs,))
    )
    shape = {"rank": rank, "R": padded(rank), "d": d, "D": padded(d), "STATISTICS": statistics}
    grid = {"SIZE": size, "CELLS": padded(size), "COLUMNS": tile.columns}
    with on_device(features):
        _forward_kernel[(programs,)](
            tokens, matrix, shift, keys if x is None else x.contiguous(), part, part_mean, part_spread, H, h,
            w, tile.blocks, *strides, scale, **shape, **grid, CHANNELS=channels,
            CHUNK=16 if channels <= 16 or rank > 64 else 32, ABSORBED=absorbed, PAIR=tokens.dtype != torch.float32,
            NORMALISE_QUERY=qk_norm == "both", NORMALISE_KEYS=qk_norm is not None, BLOCK=tile.positions,
            PRECISION=precision(tokens.dtype), num_warps=warps(rank, d), num_stages=2,
        )  # fmt: skip
        if gathered:
            _gather_kernel[(B * H,)](
                part, part_mean, part_spread, pooled, mean, spread, h, w, tile.blocks, **shape, **grid,
                num_warps=4,
            )  # fmt: skip
    return pooled, mean, spread


def pooled_probabilities_backward(
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
    features: Tensor,
    align_weight: Tensor,
    align_bias: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    query_weight: Tensor,
    keys: Tensor,
    x: Tensor | None,
    size: int,
    scale: float,
    qk_norm: str | None,
) -> list[Tensor]:
    """[dF, dA, da, the three of DyT where there is one, dW_Q, dK̃]."""
    B, _, h, w = features.shape
    if alpha is None and qk_norm != "both":
        composed, shift = (t.to(features.dtype) for t in _composed(align_weight, align_bias, query_weight))
        rows = _rows(features)
        queries = torch.addmm(shift, rows, composed.mT)
        dquery, dkeys = _attention_backward(grads[0], queries, keys, h, w, size, scale, qk_norm)
        dcomposed, dshift = (dquery.mT @ rows).float(), dquery.sum(0, dtype=torch.float32)
        wide = query_weight.float()
        products = [
            _image(dquery @ composed, B, h, w),
            wide.mT @ dcomposed,
            wide.mT @ dshift,
            dcomposed @ align_weight.float().mT + torch.outer(dshift, align_bias.float()),
        ]
        kinds = (features, align_weight, align_bias, query_weight)
        return [*(t.to(kind.dtype) for t, kind in zip(products, kinds, strict=True)), dkeys]
    aligned, bounded, queries = _queries(
        features, align_weight, align_bias, alpha, weight, bias, query_weight
    )
    dquery, dkeys = _attention_backward(grads[0], queries, keys, h, w, size, scale, qk_norm)
    dquery_weight = dquery.mT @ bounded
    dtokens = dquery @ query_weight
    of_dyt: list[Tensor] = []
    if alpha is not None and weight is not None and bias is not None:
        dtokens, *of_dyt = dyt_backward([dtokens], [], aligned, alpha, weight, bias)
    dalign, dshift = dtokens.mT @ _rows(features), dtokens.sum(0, dtype=torch.float32).to(align_bias.dtype)
    return [_image(dtokens @ align_weight, B, h, w), dalign, dshift, *of_dyt, dquery_weight, dkeys]


def _attention_backward(
    dpooled: Tensor,
    queries: Tensor,
    keys: Tensor,
    h: int,
    w: int,
    size: int,
    scale: float,
    qk_norm: str | None,
) -> tuple[Tensor, Tensor]:
    """(dQ (B·N, C) in the queries' dtype, dK̃) from the gradient of P̄ and Q (B·N, C)."""
    B, H, rank, d = keys.shape
    dtype, keys = queries.dtype, keys.contiguous()
    queries = readable(queries)
    tile = tile_of(w, BACKWARD_POSITIONS)
    parts = size * tile.blocks
    dquery = empty((B * h * w, H * d), queries, queries.dtype)
    part = empty((B * H * parts, rank, d), keys, torch.float32)
    dkeys = empty((B, H, rank, d), keys, torch.float32)
    shape = {"rank": rank, "R": padded(rank), "d": d, "D": padded(d), "NORMALISE_KEYS": qk_norm is not None}
    launch = {"num_warps": warps(rank, d), "num_stages": 1}
    with on_device(queries):
        _backward_kernel[(B * H * parts,)](
            queries, keys, dpooled.contiguous(), dquery, part, H, h, w, tile.blocks, *_strides(h, w, H, d),
            scale, **shape, NORMALISE_QUERY=qk_norm == "both", SIZE=size, MOST_ROWS=most_cells(h, size),
            MOST_COLUMNS=most_cells(w, size), COLUMNS=tile.columns, BLOCK=tile.positions,
            PRECISION=precision(queries.dtype), **launch,
        )  # fmt: skip
        _keys_kernel[(B * H,)](part, keys, dkeys, parts, **shape, **launch)
    return dquery.to(dtype), dkeys


def _queries(
    features: Tensor,
    align_weight: Tensor,
    align_bias: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    query_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, DyT(T), Q), (B·N, C) each, by library products."""
    aligned = torch.addmm(align_bias, _rows(features), align_weight.mT)
    bounded = aligned
    if alpha is not None and weight is not None and bias is not None:
        bounded = dyt(aligned, alpha, weight, bias)
    return aligned, bounded, bounded @ query_weight.mT


def _composed(align_weight: Tensor, align_bias: Tensor, query_weight: Tensor) -> tuple[Tensor, Tensor]:
    """W_Q A (C, C_i) and W_Q a (C,), fp32."""
    wide = query_weight.float()
    return wide @ align_weight.float(), wide @ align_bias.float()


def _rows(features: Tensor) -> Tensor:
    """A map as tokens (B·N, C_i): a view of a channels-last map, a copy of another."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _image(rows: Tensor, B: int, h: int, w: int) -> Tensor:
    return rows.view(B, h, w, -1).permute(0, 3, 1, 2)


def _strides(h: int, w: int, H: int, d: int) -> tuple[int, int, int, int, int]:
    """Strides of Q (B, h, w, H, d) in the order in which kernels ask: image, head, row, column, channel."""
    return h * w * H * d, d, w * H * d, H * d, 1
