"""Triton kernels of `pooled_links`: one main launch computes P̄ of all links, and pool(F).

The inputs are the backbone's maps F, and the parameters and K̃ of each link.

If X is given, the kernels also compute the scale statistic of Y = L X (docs/METHOD.md §3.1): for each image and head,
the mean of the rows y of Y, and M₂ = Σ‖y − mean‖². The neck gives X in training only.

There are two ways to compute the logits. Neither writes T, Q, L or Y to memory.

- Absorbed queries are used if there is neither DyT nor query normalisation. The logits are computed without
  Q: Q K̃ᵀ s = F·G + g, with G = (W_Q A)ᵀ K̃ᵀ s (C_i×r per head) and g = (W_Q a)ᵀ K̃ᵀ s. A separate launch
  computes G and g of all links in fp32. In half precision, G is split into a high and a low part, and F is
  multiplied by both. Without the low part, the relative error of the result would be 4e-3, and pooling would
  not average out this error.

  A map is pooled over a grid of P×P cells. A strip is a group of neighbouring cells in one row of cells. A
  program computes P̄ of one strip for one image and head. It reads the strip in tiles of the same shape, and
  adds the probabilities of all tiles elementwise, so it keeps one sum for each position within a tile. At the
  end, for each cell, the program adds the sums of the positions that lie in the cell's columns of the map, and
  divides by the number of positions of the cell.
- Queries from tokens are used if there is DyT or query normalisation. A program computes one cell of an image,
  tile by tile. For each tile, it computes T = A F + a in groups of channels. If the link has DyT, the program
  applies DyT to each group. It then multiplies the group by W_Q and adds the product to Q of all heads. After
  the last group, it computes the logits and probabilities of one head after the other. A and W_Q are read in
  pieces. From tile to tile, the program keeps only the sums of the probabilities of all heads, [H, r], and the
  mean and M₂ of the rows of Y. Neighbouring cells overlap unless P divides both the height and the width of the
  map. If several cells contain a position, the position is computed once for each of these cells.

The same launch also has programs that compute pool(F).

If X is given, a program also computes y = L X for each tile. By Chan's formula, it merges the mean and M₂ of
the tile with those of its earlier tiles. Another launch merges the results of the programs. The mean and M₂
could also be computed without Y, from X and the moments of the rows of L (their sum and the matrix LᵀL). But
this alternative has two disadvantages. First, X can be many times larger than Y, and large squares would then
cancel. Second, the r×r matrix LᵀL needs more multiplications than L X if r > d.

The number of programs per image is a compile-time constant. It does not depend on the batch size, so a new
batch size needs no compilation. Programs are ordered by link, then by image. The first program of a link has
the index n·B, where n is the number of programs that all earlier links together need for one image.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import devices
from ..attention.key_kernels import load_columns, load_keys, load_matrix
from ..attention.query_kernels import probabilities
from ..options import QuerySides
from ..parts import (
    INFINITY,
    LOG2E,
    contiguous,
    empty,
    on_device,
    padded,
    power_of_two,
    precision,
    readable,
    rms_factor,
    strides_of,
    wide_dot,
)
from ..pool.kernels import cell_start, cell_stop
from ..scale.kernels import add_tile, tanh
from . import launch_rules


@triton.jit
def pick(values: tl.constexpr, index, COUNT: tl.constexpr):
    """Return values[index] for compile-time values and a run-time index."""
    chosen = index * 0 + values[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def pick_pointer(pointers, index, COUNT: tl.constexpr):
    """Return pointers[index]; all pointers must have the same element type."""
    chosen = pointers[0]
    for i in tl.static_range(1, COUNT):
        if index == i:
            chosen = pointers[i]
    return chosen


@triton.jit
def place(program, blocks, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Return (b·H + h, i, rows, columns) of a program that computes one tile, a part of the i-th row of cells.

    b is the image and h the head. The program computes BLOCK positions of the tile at a time. `rows` [BLOCK] has their
    rows, counted from the first of these rows. `columns` [BLOCK] has their columns, counted from the left edge of the
    map.
    """
    head = program // (SIZE * blocks)
    i = (program // blocks % SIZE).to(tl.int32)
    block = (program % blocks).to(tl.int32)
    m = tl.arange(0, BLOCK)
    return head, i, m // COLUMNS, block * COLUMNS + m % COLUMNS


@triton.jit
def load_positions(ptr, offsets, inside, stride, d: tl.constexpr, D: tl.constexpr):
    """Load the d channels of every position, padded with zeros to [BLOCK, D].

    Positions for which the mask `inside` is False are also 0.
    """
    channels = tl.arange(0, D)
    mask = inside[:, None] & (channels < d)[None, :]
    return tl.load(ptr + offsets[:, None] + channels.to(tl.int64)[None, :] * stride, mask=mask, other=0.0)


@triton.jit
def load_block(ptr, rows, row_limit, columns, column_limit, stride):
    """Load the given rows and columns of a matrix whose rows are `stride` elements apart.

    Rows from `row_limit` on and columns from `column_limit` on are 0.
    """
    inside = (rows < row_limit)[:, None] & (columns < column_limit)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def softmax(logits, rank: tl.constexpr, R: tl.constexpr):
    """Return the row-wise softmax [BLOCK, R] of logits that contain the factor log₂ e.

    Padding (the columns from `rank` on) is 0.
    """
    logits = tl.where((tl.arange(0, R) < rank)[None, :], logits, -INFINITY)
    weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def mixed_values(x, weights, PRECISION: tl.constexpr):
    """Return y = L X of a tile, [BLOCK, D], from X [R, D] and L [BLOCK, R]."""
    return tl.trans(wide_dot(tl.trans(x), tl.trans(weights), PRECISION))


@triton.jit
def pool_rows(
    program, map_ptr, pooled_ptr, stride_b, stride_c, stride_h, stride_w, channels: tl.constexpr,
    h: tl.constexpr, w: tl.constexpr, offset: tl.constexpr, total_channels: tl.constexpr, SIZE: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute pool(F) for one row of cells and GROUP channels of a map.

    `pooled_ptr` points to pool(F) of all maps, (B, P², ΣC_i). On the last axis, the channels of this map begin
    at index `offset`.
    """
    groups: tl.constexpr = (channels + GROUP - 1) // GROUP
    b, i = program // (groups * SIZE), (program // groups % SIZE).to(tl.int32)
    c, columns = (program % groups).to(tl.int32) * GROUP + tl.arange(0, GROUP), tl.arange(0, WIDTH)
    inside = (c < channels)[:, None] & (columns < w)[None, :]
    offsets = c.to(tl.int64)[:, None] * stride_c + columns.to(tl.int64)[None, :] * stride_w
    start, stop = cell_start(i, h, SIZE), cell_stop(i, h, SIZE)
    total = tl.zeros([GROUP, WIDTH], tl.float32)
    for y in range(start, stop):
        row_ptr = map_ptr + b * stride_b + tl.cast(y, tl.int64) * stride_h
        total += tl.load(row_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    for j in range(SIZE):
        left, right = cell_start(j, w, SIZE), cell_stop(j, w, SIZE)
        held = (columns >= left) & (columns < right)
        mean = tl.sum(tl.where(held[None, :], total, 0.0), 1) / ((stop - start) * (right - left))
        cell = (b * SIZE + i) * SIZE + j
        tl.store(
            pooled_ptr + cell * total_channels + offset + c,
            mean.to(pooled_ptr.dtype.element_ty),
            mask=c < channels,
        )


@triton.jit
def absorbed_probabilities(
    map_ptr, offsets, inside, stride, matrix_ptr, shift, channels: tl.constexpr, CHUNK: tl.constexpr,
    rank: tl.constexpr, R: tl.constexpr, PAIR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return L = softmax(F·G + g) [BLOCK, R] of one tile.

    G and g contain the factor log₂ e. `matrix_ptr` points to Gᵀ [r, channels].
    """
    i = tl.arange(0, R)
    logits = tl.zeros([offsets.shape[0], R], tl.float32) + shift[None, :]
    for first in range(0, channels, CHUNK):
        c = first + tl.arange(0, CHUNK)
        mask = inside[:, None] & (c < channels)[None, :]
        values = tl.load(map_ptr + offsets[:, None] + c.to(tl.int64)[None, :] * stride, mask=mask, other=0.0)
        matrix = load_block(matrix_ptr, i, rank, c, channels, channels)
        high = matrix.to(values.dtype)
        logits = tl.dot(values, tl.trans(high), logits, input_precision=PRECISION)
        if PAIR:
            low = (matrix - high.to(tl.float32)).to(values.dtype)
            logits = tl.dot(values, tl.trans(low), logits, input_precision=PRECISION)
    return softmax(logits, rank, R)


@triton.jit
def strip(
    program, index, heads_before, map_ptr, matrix_ptr, shift_ptr, x_ptr, out_ptr, mean_ptr, spread_ptr,
    stride_b, stride_c, stride_h, stride_w, channels: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    cells: tl.constexpr, strips: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, rank: tl.constexpr, most: tl.constexpr, R: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, PAIR: tl.constexpr, STATISTICS: tl.constexpr, SIZE: tl.constexpr,
    CELLS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute P̄ of the cells of one strip, and the strip's part of the scale statistic, for one image and head.

    The map is divided into P×P cells. Neighbouring cells and strips share positions unless P divides both the
    height and the width of the map. P̄ of a cell uses all positions of the cell. But the scale statistic (mean
    and M₂ of the rows of Y = L X) must count each position once. If several strips contain a position, only the
    last of them counts it.
    """
    head = program // (SIZE * strips)
    i = (program // strips % SIZE).to(tl.int32)
    first = (program % strips).to(tl.int32) * cells
    last = tl.minimum(first + cells, SIZE)
    m = tl.arange(0, BLOCK)
    map_ptr += head // HEADS * stride_b
    ranks = tl.arange(0, R)
    shift = tl.load(shift_ptr + head * rank + ranks, mask=ranks < rank, other=0.0)
    if STATISTICS:
        x = load_matrix(x_ptr + head * rank * d, rank, R, d, D)
    count = 0.0
    mean = tl.zeros([D], tl.float32)
    spread = 0.0
    total = tl.zeros([BLOCK, R], tl.float32)
    top, bottom = cell_start(i, h, SIZE), cell_stop(i, h, SIZE)
    left, right = cell_start(first, w, SIZE), cell_stop(last - 1, w, SIZE)
    column = left + m % COLUMNS
    for tile in range(tl.cdiv(bottom - top, BLOCK // COLUMNS) * ACROSS):
        row = top + tile // ACROSS * (BLOCK // COLUMNS) + m // COLUMNS
        along = column + tile % ACROSS * COLUMNS
        inside = (row < bottom) & (along < right)
        offsets = row.to(tl.int64) * stride_h + along.to(tl.int64) * stride_w
        weights = absorbed_probabilities(
            map_ptr, offsets, inside, stride_c, matrix_ptr + head * rank * channels, shift, channels, CHUNK,
            rank, R, PAIR, PRECISION,
        )  # fmt: skip
        total += tl.where(inside[:, None], weights, 0.0)
        if STATISTICS:
            own = inside & (row < cell_start(i + 1, h, SIZE)) & (along < cell_start(last, w, SIZE))
            count, mean, spread = add_tile(count, mean, spread, mixed_values(x, weights, PRECISION), own)
    j = tl.arange(0, CELLS)
    start, stop = cell_start(j, w, SIZE), cell_stop(j, w, SIZE)
    real = (j >= first) & (j < last)
    held = real[:, None] & (column >= left)[None, :]
    if ACROSS == 1:  # otherwise the strip is one cell
        held = held & (column[None, :] >= start[:, None]) & (column[None, :] < stop[:, None])
    pooled = wide_dot(held.to(tl.float32), total, PRECISION) / ((bottom - top) * (stop - start))[:, None]
    place = ((heads_before + head) * SIZE + i) * SIZE + j
    mask = real[:, None] & (ranks < most)[None, :]
    tl.store(out_ptr + place[:, None] * most + ranks[None, :], pooled, mask=mask)
    if STATISTICS:
        columns = tl.arange(0, D)
        tl.store(mean_ptr + index * d + columns, mean, mask=columns < d)
        tl.store(spread_ptr + index, spread)


@triton.jit(do_not_specialize=["batch"])
def _absorbed_kernel(
    map_ptrs, matrix_ptrs, shift_ptrs, x_ptrs, out_ptr, mean_ptr, spread_ptr, pooled_ptr, batch, strides_b,
    strides_c, strides_h, strides_w, LINKS: tl.constexpr, MAPS: tl.constexpr, TARGETS: tl.constexpr,
    FIRSTS: tl.constexpr, POOLS: tl.constexpr, TOGETHER: tl.constexpr, STRIPS: tl.constexpr,
    COLUMNS: tl.constexpr, ACROSS: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
    POOL_WIDTHS: tl.constexpr, CHANNELS: tl.constexpr, OFFSETS: tl.constexpr, HEIGHTS: tl.constexpr,
    WIDTHS: tl.constexpr, RANKS: tl.constexpr, HEADS: tl.constexpr, most: tl.constexpr, R: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, PAIR: tl.constexpr, STATISTICS: tl.constexpr, SIZE: tl.constexpr,
    CELLS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    for link in tl.static_range(LINKS):
        if (program >= batch * FIRSTS[link]) & (program < batch * FIRSTS[link + 1]):
            strip(
                program - batch * FIRSTS[link], program, batch.to(tl.int64) * (link * HEADS),
                map_ptrs[TARGETS[link]], matrix_ptrs[link], shift_ptrs[link], x_ptrs[link], out_ptr, mean_ptr,
                spread_ptr, strides_b[TARGETS[link]], strides_c[TARGETS[link]], strides_h[TARGETS[link]],
                strides_w[TARGETS[link]], CHANNELS[TARGETS[link]], HEIGHTS[TARGETS[link]],
                WIDTHS[TARGETS[link]], TOGETHER[link], STRIPS[link], COLUMNS[link], ACROSS[link],
                CHUNKS[link], HEADS, RANKS[link], most, R, d, D, PAIR, STATISTICS, SIZE,
                CELLS, BLOCK, PRECISION,
            )  # fmt: skip
    for m in tl.static_range(MAPS):
        if (program >= batch * POOLS[m]) & (program < batch * POOLS[m + 1]):
            pool_rows(
                program - batch * POOLS[m], map_ptrs[m], pooled_ptr, strides_b[m], strides_c[m], strides_h[m],
                strides_w[m], CHANNELS[m], HEIGHTS[m], WIDTHS[m], OFFSETS[m], OFFSETS[MAPS], SIZE, GROUPS[m],
                POOL_WIDTHS[m],
            )  # fmt: skip


@triton.jit
def queries_of(
    map_ptr, offsets, inside, stride, align_ptr, bias_ptr, alpha_ptr, dyt_weight_ptr, dyt_bias_ptr, query_ptr,
    channels: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    HP: tl.constexpr, d: tl.constexpr, D: tl.constexpr, DYT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return Q of one tile, [BLOCK, HP·D], in the dtype of the map.

    Each step of a loop computes TOKENS channels of DyT(A F + a), multiplies them by W_Q, and adds the product
    to Q. Q is padded with zeros to HP heads, and each head to D channels. Values are rounded at the same
    points as in the modules of the unfused neck.
    """
    dtype = map_ptr.dtype.element_ty
    n = tl.arange(0, HP * D)
    real = (n // D < HEADS) & (n % D < d)
    queries = tl.zeros([offsets.shape[0], HP * D], tl.float32)
    for start in range(0, C, TOKENS):
        t = start + tl.arange(0, TOKENS)
        aligned = tl.zeros([offsets.shape[0], TOKENS], tl.float32)
        for first in range(0, channels, CHUNK):
            c = first + tl.arange(0, CHUNK)
            mask = inside[:, None] & (c < channels)[None, :]
            place_of = map_ptr + offsets[:, None] + c.to(tl.int64)[None, :] * stride
            align = load_block(align_ptr, t, C, c, channels, channels).to(dtype)
            values = tl.load(place_of, mask=mask, other=0.0)
            aligned = tl.dot(values, tl.trans(align), aligned, input_precision=PRECISION)
        bias = tl.load(bias_ptr + t, mask=t < C, other=0.0).to(dtype).to(tl.float32)
        tokens = (aligned + bias[None, :]).to(dtype)
        if DYT:
            alpha = tl.load(alpha_ptr).to(tl.float32)
            weight = tl.load(dyt_weight_ptr + t, mask=t < C, other=0.0).to(tl.float32)
            bias = tl.load(dyt_bias_ptr + t, mask=t < C, other=0.0).to(tl.float32)
            tokens = (weight[None, :] * tanh(alpha * tokens.to(tl.float32)) + bias[None, :]).to(dtype)
        place_of = query_ptr + (n // D * d + n % D)[:, None] * C + t[None, :]
        weight = tl.load(place_of, mask=real[:, None] & (t < C)[None, :], other=0.0).to(dtype)
        queries = tl.dot(tokens, tl.trans(weight), queries, input_precision=PRECISION)
    return queries.to(dtype)


@triton.jit
def cell_probabilities(
    program, batch_index, map_ptr, align_ptr, bias_ptr, alpha_ptr, dyt_weight_ptr, dyt_bias_ptr, query_ptr,
    keys_ptr, x_ptr, out_ptr, mean_ptr, spread_ptr, stride_b, stride_c, stride_h, stride_w, scale,
    channels: tl.constexpr, h: tl.constexpr, w: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    HP: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr, rank: tl.constexpr, most: tl.constexpr,
    R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, DYT: tl.constexpr,
    NORMALISE_QUERY: tl.constexpr, NORMALISE_KEYS: tl.constexpr, STATISTICS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute P̄ of one cell of an image, and the cell's part of the scale statistic, for every head.

    The scale statistic (mean and M₂ of the rows of Y = L X) must count each position once. If several cells contain a
    position, only the last of them counts it. `batch_index` is link · B + b, one index per pair of link and image.
    """
    b, cell = program // (SIZE * SIZE), (program % (SIZE * SIZE)).to(tl.int32)
    i, j = cell // SIZE, cell % SIZE
    top, left = cell_start(i, h, SIZE), cell_start(j, w, SIZE)
    rows = cell_stop(i, h, SIZE) - top
    width = w // SIZE if w % SIZE == 0 else cell_stop(j, w, SIZE) - left
    count = rows * width
    map_ptr += b * stride_b
    heads, r, e = tl.arange(0, HP), tl.arange(0, R), tl.arange(0, D)
    # In two cases, the two halves of the columns of y are computed one after the other. EXACT: for fp32 products of
    # large tiles, this leaves more registers for the queries. SQUARE: if y is square, Triton would distribute all warps
    # along the columns of y, but there are too few columns for all warps.
    EXACT: tl.constexpr = R * D > 2048 and map_ptr.dtype.element_ty == tl.float32
    SQUARE: tl.constexpr = BLOCK == D and D > 16 and map_ptr.dtype.element_ty == tl.bfloat16
    PARTS: tl.constexpr = 2 if EXACT or SQUARE else 1
    total = tl.zeros([HP, R], tl.float32)
    seen = 0.0
    means = tl.zeros([HP, D], tl.float32)
    spreads = tl.zeros([HP], tl.float32)
    for first in range(0, count, BLOCK):
        position = first + tl.arange(0, BLOCK)
        inside = position < count
        row, column = top + position // width, left + position % width
        offsets = row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
        queries = queries_of(
            map_ptr, offsets, inside, stride_c, align_ptr, bias_ptr, alpha_ptr, dyt_weight_ptr, dyt_bias_ptr,
            query_ptr, channels, C, CHUNK, TOKENS, HEADS, HP, d, D, DYT, PRECISION,
        )  # fmt: skip
        queries = tl.reshape(queries, [BLOCK, HP, D])
        own = inside & (row < cell_start(i + 1, h, SIZE)) & (column < cell_start(j + 1, w, SIZE))
        for head in range(HEADS):
            here = heads == head
            small = (b * HEADS + head) * rank * d
            query = tl.sum(tl.where(here[None, :, None], queries, 0.0), 1).to(queries.dtype)
            keys = load_keys(keys_ptr + small, map_ptr, rank, R, d, D)
            factor = rms_factor(keys, d, NORMALISE_KEYS) * (scale * LOG2E)
            weights = probabilities(query, keys, factor, rank, R, d, NORMALISE_QUERY, PRECISION)
            sums = tl.sum(tl.where(inside[:, None], weights, 0.0), 0)
            total = tl.where(here[:, None], total + sums[None, :], total)
            if STATISTICS:
                mean = tl.sum(tl.where(here[:, None], means, 0.0), 0)
                spread = tl.sum(tl.where(here, spreads, 0.0), 0)
                if PARTS == 1:
                    y = mixed_values(load_matrix(x_ptr + small, rank, R, d, D), weights, PRECISION)
                    _, mean, spread = add_tile(seen, mean, spread, y, own)
                else:
                    by_part = tl.reshape(mean, [PARTS, D // PARTS])
                    for part in tl.static_range(PARTS):
                        this = (tl.arange(0, PARTS) == part)[:, None]
                        x = load_columns(x_ptr + small, part * (D // PARTS), rank, R, d, D // PARTS)
                        y = mixed_values(x, weights, PRECISION)
                        before = tl.sum(tl.where(this, by_part, 0.0), 0)
                        _, after, spread = add_tile(seen, before, spread, y, own)
                        by_part = tl.where(this, after[None, :], by_part)
                    mean = tl.reshape(by_part, [D])
                means = tl.where(here[:, None], mean[None, :], means)
                spreads = tl.where(here, spread, spreads)
        seen += tl.sum(own.to(tl.float32), 0)
    index = ((batch_index * HEADS + heads) * SIZE + i) * SIZE + j  # [HP]
    real = heads < HEADS
    tl.store(
        out_ptr + index[:, None] * most + r[None, :], total / count, mask=real[:, None] & (r < most)[None, :]
    )
    if STATISTICS:
        tl.store(mean_ptr + index[:, None] * d + e[None, :], means, mask=real[:, None] & (e < d)[None, :])
        tl.store(spread_ptr + index, spreads, mask=real)


@triton.jit(do_not_specialize=["batch"])
def _tokens_kernel(
    map_ptrs, align_ptrs, bias_ptrs, alpha_ptrs, dyt_weight_ptrs, dyt_bias_ptrs, query_ptrs, keys_ptrs,
    x_ptrs, out_ptr, mean_ptr, spread_ptr, pooled_ptr, batch, strides_b, strides_c, strides_h, strides_w,
    scale, LINKS: tl.constexpr, MAPS: tl.constexpr, TARGETS: tl.constexpr, POOLS: tl.constexpr,
    CHUNK: tl.constexpr, GROUPS: tl.constexpr, POOL_WIDTHS: tl.constexpr, CHANNELS: tl.constexpr,
    OFFSETS: tl.constexpr, HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr, RANKS: tl.constexpr,
    HEADS: tl.constexpr, HP: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr, most: tl.constexpr,
    R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, DYT: tl.constexpr,
    NORMALISE_QUERY: tl.constexpr, NORMALISE_KEYS: tl.constexpr, STATISTICS: tl.constexpr,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    for link in tl.static_range(LINKS):
        if (program >= batch * (link * SIZE * SIZE)) & (program < batch * ((link + 1) * SIZE * SIZE)):
            within = program - batch * (link * SIZE * SIZE)
            cell_probabilities(
                within, link * batch + within // (SIZE * SIZE), map_ptrs[TARGETS[link]], align_ptrs[link],
                bias_ptrs[link], alpha_ptrs[link], dyt_weight_ptrs[link], dyt_bias_ptrs[link],
                query_ptrs[link], keys_ptrs[link], x_ptrs[link], out_ptr, mean_ptr, spread_ptr,
                strides_b[TARGETS[link]], strides_c[TARGETS[link]], strides_h[TARGETS[link]],
                strides_w[TARGETS[link]], scale, CHANNELS[TARGETS[link]], HEIGHTS[TARGETS[link]],
                WIDTHS[TARGETS[link]], CHUNK, HEADS, HP, C, TOKENS, RANKS[link], most, R, d, D, DYT,
                NORMALISE_QUERY, NORMALISE_KEYS, STATISTICS, SIZE, BLOCKS[link], PRECISION,
            )  # fmt: skip
    for m in tl.static_range(MAPS):
        if (program >= batch * POOLS[m]) & (program < batch * POOLS[m + 1]):
            pool_rows(
                program - batch * POOLS[m], map_ptrs[m], pooled_ptr, strides_b[m], strides_c[m], strides_h[m],
                strides_w[m], CHANNELS[m], HEIGHTS[m], WIDTHS[m], OFFSETS[m], OFFSETS[MAPS], SIZE, GROUPS[m],
                POOL_WIDTHS[m],
            )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def _gather_kernel(
    part_mean_ptr, part_spread_ptr, mean_ptr, spread_ptr, batch, LINKS: tl.constexpr, FIRSTS: tl.constexpr,
    TOGETHER: tl.constexpr, STRIPS: tl.constexpr, HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr,
    HEADS: tl.constexpr, d: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of all strips or cells for one image, head and link.

    The kernel computes first the mean, then M₂ about this mean.
    """
    program = tl.program_id(0).to(tl.int64)
    link = (program // (batch * HEADS)).to(tl.int32)
    head = program % (batch * HEADS)
    h, w = pick(HEIGHTS, link, LINKS), pick(WIDTHS, link, LINKS)
    cells, strips = pick(TOGETHER, link, LINKS), pick(STRIPS, link, LINKS)
    first = batch * pick(FIRSTS, link, LINKS).to(tl.int64) + head * SIZE * strips
    columns = tl.arange(0, D)
    positions = (h * w).to(tl.float32)
    mean = tl.zeros([D], tl.float32)
    for part in range(SIZE * strips):
        count = own_positions(part, cells, strips, h, w, SIZE)
        means = tl.load(part_mean_ptr + (first + part) * d + columns, mask=columns < d, other=0.0)
        mean += means * (count / positions)
    spread = 0.0
    for part in range(SIZE * strips):
        count = own_positions(part, cells, strips, h, w, SIZE)
        between = tl.load(part_mean_ptr + (first + part) * d + columns, mask=columns < d, other=0.0) - mean
        spread += tl.load(part_spread_ptr + first + part) + count * tl.sum(between * between, 0)
    tl.store(mean_ptr + program * d + columns, mean, mask=columns < d)
    tl.store(spread_ptr + program, spread)


@triton.jit
def own_positions(part, cells, strips, h, w, SIZE: tl.constexpr):
    """Return the number of positions that a strip owns (see `strip`)."""
    i, j = part // strips, part % strips * cells
    rows = cell_start(i + 1, h, SIZE) - cell_start(i, h, SIZE)
    columns = cell_start(tl.minimum(j + cells, SIZE), w, SIZE) - cell_start(j, w, SIZE)
    return (rows * columns).to(tl.float32)


@triton.jit(do_not_specialize=["batch"])
def _absorb_kernel(
    align_ptrs, bias_ptrs, query_ptrs, keys_ptrs, matrix_ptrs, shift_ptrs, kind_ptr, batch, scale,
    LINKS: tl.constexpr, FIRSTS: tl.constexpr, CHANNELS: tl.constexpr, RANKS: tl.constexpr,
    HEADS: tl.constexpr, C: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    NORMALISE_KEYS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute COLUMNS channels of Gᵀ [r, C_i], and g [r], for one image, head and link.

    G and g contain the factor log₂ e, because the softmax uses exp2. W_Q A and W_Q a are the same for all images, but
    this kernel computes them again for every image. A separate launch, which computes them only once, would not save
    time: the launch would take at least as long as the repeated computation.
    """
    program = tl.program_id(0).to(tl.int64)
    for link in tl.static_range(LINKS):
        if (program >= batch * FIRSTS[link]) & (program < batch * FIRSTS[link + 1]):
            absorb(
                program - batch * FIRSTS[link], align_ptrs[link], bias_ptrs[link], query_ptrs[link],
                keys_ptrs[link], matrix_ptrs[link], shift_ptrs[link], kind_ptr, scale, CHANNELS[link], HEADS,
                C, RANKS[link], R, d, D, NORMALISE_KEYS, COLUMNS, CHUNK, PRECISION,
            )  # fmt: skip


@triton.jit
def absorb(
    program, align_ptr, bias_ptr, query_ptr, keys_ptr, matrix_ptr, shift_ptr, kind_ptr, scale,
    channels: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, rank: tl.constexpr, R: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, NORMALISE_KEYS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store COLUMNS channels of Gᵀ, and g.

    Weights are rounded to the maps' dtype, which is the element type of `kind_ptr`.
    """
    dtype = kind_ptr.dtype.element_ty
    groups: tl.constexpr = (channels + COLUMNS - 1) // COLUMNS
    head, group = program // groups, (program % groups).to(tl.int32)
    query_ptr += head % HEADS * d * C
    e, i = tl.arange(0, D), tl.arange(0, R)
    columns = group * COLUMNS + tl.arange(0, COLUMNS)
    composed = tl.zeros([D, COLUMNS], tl.float32)
    shift = tl.zeros([D], tl.float32)
    for first in range(0, C, CHUNK):
        c = first + tl.arange(0, CHUNK)
        query = load_block(query_ptr, e, d, c, C, C).to(dtype)
        align = load_block(align_ptr, c, C, columns, channels, channels).to(dtype)
        composed = tl.dot(query, align, composed, input_precision=PRECISION)
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(dtype).to(tl.float32)
        shift += tl.sum(query.to(tl.float32) * bias[None, :], 1)
    keys = load_matrix(keys_ptr + head * rank * d, rank, R, d, D)
    keys *= (rms_factor(keys, d, NORMALISE_KEYS) * (scale * LOG2E))[:, None]
    matrix = wide_dot(keys, composed, PRECISION)
    inside = (i < rank)[:, None] & (columns < channels)[None, :]
    tl.store(matrix_ptr + (head * rank + i[:, None]) * channels + columns[None, :], matrix, mask=inside)
    if group == 0:
        tl.store(shift_ptr + head * rank + i, tl.sum(keys * shift[None, :], 1), mask=i < rank)


class Sizes:
    """The compile-time constants of the launches for one set of shapes."""

    def __init__(self, sides: QuerySides) -> None:
        self.batch, self.heads, _, self.d = sides.keys[0].shape
        self.size, self.targets = sides.size, tuple(sides.targets)
        self.channels, self.heights, self.widths = zip(*(m.shape[1:] for m in sides.maps), strict=True)
        self.ranks = tuple(k.shape[2] for k in sides.keys)
        self.most = max(self.ranks)
        self.offsets = firsts_of(self.channels)

    def of_heads(self) -> dict[str, Any]:
        return {
            "RANKS": self.ranks,
            "HEADS": self.heads, "most": self.most, "R": padded(self.most), "d": self.d, "D": padded(self.d),
            "SIZE": self.size,
        }  # fmt: skip

    def of_links(self) -> dict[str, Any]:
        return {
            name: tuple(values[t] for t in self.targets)
            for name, values in (("HEIGHTS", self.heights), ("WIDTHS", self.widths))
        }

    def of_maps(self) -> dict[str, Any]:
        return {
            "MAPS": len(self.channels), "CHANNELS": self.channels, "OFFSETS": self.offsets,
            "HEIGHTS": self.heights, "WIDTHS": self.widths,
        }  # fmt: skip

    def of_pooling(self) -> dict[str, Any]:
        widths = tuple(map(power_of_two, self.widths))
        return self.of_maps() | {"POOL_WIDTHS": widths, "GROUPS": self._groups()}

    def _groups(self) -> tuple[int, ...]:
        return tuple(
            max(1, min(launch_rules.POOLED_ELEMENTS // power_of_two(w), power_of_two(c)))
            for w, c in zip(self.widths, self.channels, strict=True)
        )

    def pool_firsts(self, before: int) -> tuple[int, ...]:
        """Return the index of the first pooling program of each map, counted among the programs of one image.

        `before` is the number of programs of one image that precede the pooling programs. The last entry of the result
        is the number of all programs of one image.
        """
        counts = (self.size * -(-c // g) for c, g in zip(self.channels, self._groups(), strict=True))
        return tuple(before + first for first in firsts_of(counts))

    def chunks(self) -> tuple[int, ...]:
        """Return, for each link, the number of channels in one step of the product F·G."""
        return tuple(16 if self.channels[t] <= 16 or self.most > 64 else 32 for t in self.targets)

    def cell_blocks(self, most: int) -> tuple[int, ...]:
        """Return, for each link, the number of positions per tile: at least 16, and at most `most`.

        A program computes a cell in one or more tiles, each with this number of positions.
        """
        areas = (
            self._longest_cell(self.heights[t]) * self._longest_cell(self.widths[t]) for t in self.targets
        )
        return tuple(max(16, min(most, power_of_two(area))) for area in areas)

    def _longest_cell(self, length: int) -> int:
        return -(-length // self.size) + (length % self.size > 0)


def firsts_of(counts: Any) -> tuple[int, ...]:
    """Return the starts of consecutive ranges whose lengths are `counts`, and the end of the last range."""
    firsts = [0]
    for count in counts:
        firsts.append(firsts[-1] + count)
    return tuple(firsts)


def pooled_links(sides: QuerySides) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the results of `reference.pooled_links` with Triton kernels."""
    sizes, size, scale, qk_norm = Sizes(sides), sides.size, sides.scale, sides.qk_norm
    dtype, maps = sides.maps[0].dtype, [readable(m) for m in sides.maps]
    alphas, statistics = sides.alphas, bool(sides.xs)
    pooled = empty((sizes.batch, size * size, sizes.offsets[-1]), maps[0], maps[0].dtype)
    groups = {
        "align": sides.align_weights,
        "bias": sides.align_biases,
        "query": sides.query_weights,
        "keys": sides.keys,
    }
    parameters = {f"{name}_ptrs": contiguous(group) for name, group in groups.items()}
    tensors = {
        "map_ptrs": tuple(maps),
        "x_ptrs": contiguous(sides.xs or sides.keys),
        "pooled_ptr": pooled,
        **strides_of(maps),
    }
    with on_device(maps[0]):
        if not alphas and qk_norm != "both":
            found = _by_strips(sizes, tensors, parameters, scale, qk_norm, statistics)
        else:
            groups = {"alpha": alphas, "dyt_weight": sides.weights, "dyt_bias": sides.biases}
            for name, group in groups.items():
                parameters[f"{name}_ptrs"] = contiguous(group) if alphas else parameters["bias_ptrs"]
            found = _by_cells(
                sizes, {**tensors, **parameters, "DYT": bool(alphas)}, scale, qk_norm, statistics
            )
    probabilities, mean, spread = found
    return probabilities, pooled.to(dtype), mean, spread


def _by_strips(
    sizes: Sizes,
    tensors: dict[str, Any],
    parameters: dict[str, tuple[Tensor, ...]],
    scale: float,
    qk_norm: str | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P̄, mean and M₂, computed with absorbed queries, and write pool(F)."""
    B, H, d, size, pooled = sizes.batch, sizes.heads, sizes.d, sizes.size, tensors["pooled_ptr"]
    dtype = pooled.dtype
    positions = launch_rules.forward_positions(sizes.most, d, dtype, statistics, devices.capability(pooled))
    divided = [launch_rules.strips_of(sizes.widths[t], size, positions) for t in sizes.targets]
    together, strips, columns, across = zip(*divided, strict=True)
    firsts = firsts_of(H * size * count for count in strips)
    probabilities, mean, spread, part_mean, part_spread = _outputs(sizes, pooled, B * firsts[-1], statistics)
    matrices, shifts = _absorbed(sizes, pooled, parameters, scale, qk_norm)
    pools = sizes.pool_firsts(firsts[-1])
    _absorbed_kernel[(B * pools[-1],)](
        **tensors, matrix_ptrs=matrices, shift_ptrs=shifts, out_ptr=probabilities, mean_ptr=part_mean,
        spread_ptr=part_spread, batch=B, **sizes.of_pooling(), **sizes.of_heads(), LINKS=len(sizes.ranks),
        TARGETS=sizes.targets, FIRSTS=firsts, POOLS=pools, TOGETHER=together, STRIPS=strips, COLUMNS=columns,
        ACROSS=across, CHUNKS=sizes.chunks(), PAIR=dtype != torch.float32, STATISTICS=statistics, CELLS=padded(size),
        BLOCK=positions, PRECISION=precision(dtype), num_stages=devices.stages(pooled),
        num_warps=launch_rules.strip_warps(sizes.most, d, dtype, statistics),
    )  # fmt: skip
    if statistics:
        _gather(sizes, (part_mean, part_spread), (mean, spread), firsts, together, strips)
    return probabilities, mean, spread


def _by_cells(
    sizes: Sizes, tensors: dict[str, Any], scale: float, qk_norm: str | None, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P̄, mean and M₂, computed with queries from tokens, and write pool(F)."""
    B, H, L, size, pooled = sizes.batch, sizes.heads, len(sizes.ranks), sizes.size, tensors["pooled_ptr"]
    dtype, firsts = pooled.dtype, firsts_of([H * size * size] * L)
    probabilities, mean, spread, part_mean, part_spread = _outputs(sizes, pooled, B * firsts[-1], statistics)
    pools = sizes.pool_firsts(L * size * size)
    tile = launch_rules.token_tile(sizes.most, sizes.d, dtype, statistics, devices.capability(pooled))
    _tokens_kernel[(B * pools[-1],)](
        **tensors, out_ptr=probabilities, mean_ptr=part_mean, spread_ptr=part_spread, batch=B, scale=scale,
        **sizes.of_pooling(), **sizes.of_heads(), LINKS=L, TARGETS=sizes.targets, POOLS=pools, CHUNK=tile.chunk,
        HP=power_of_two(H), C=H * sizes.d, TOKENS=tile.channels, NORMALISE_QUERY=qk_norm == "both",
        NORMALISE_KEYS=qk_norm is not None, STATISTICS=statistics, BLOCKS=sizes.cell_blocks(tile.positions),
        PRECISION=precision(dtype), num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    if statistics:
        _gather(sizes, (part_mean, part_spread), (mean, spread), firsts, (1,) * L, (size,) * L)
    return probabilities, mean, spread


def _outputs(sizes: Sizes, kind: Tensor, parts: int, statistics: bool) -> tuple[Tensor, ...]:
    """Allocate memory for P̄, for the final mean and M₂, and for the mean and M₂ of every strip or cell."""
    B, H, L, d = sizes.batch, sizes.heads, len(sizes.ranks), sizes.d
    shapes = ((L, B, H, d), (L, B, H), (parts, d), (parts,))
    probabilities = empty((L, B, H, sizes.size**2, sizes.most), kind, torch.float32)
    return probabilities, *(empty(shape if statistics else (0,), kind, torch.float32) for shape in shapes)


def _gather(
    sizes: Sizes,
    parts: tuple[Tensor, Tensor],
    wholes: tuple[Tensor, Tensor],
    firsts: tuple[int, ...],
    together: tuple[int, ...],
    strips: tuple[int, ...],
) -> None:
    heads = sizes.of_heads()
    del heads["RANKS"], heads["most"], heads["R"]
    # The kernel uses one warp, so that its result is reproducible. If each lane holds one square, the compiler can turn
    # a² + b², with b² from another lane, into fma(a, a, b²). The sums of the lanes then differ in the last bit. With
    # several warps, Triton 3.8 would let all lanes write their sums to one address.
    _gather_kernel[(len(strips) * sizes.batch * sizes.heads,)](
        *parts, *wholes, sizes.batch, **heads, LINKS=len(strips), FIRSTS=firsts, TOGETHER=together,
        STRIPS=strips, **sizes.of_links(), num_warps=1,
    )  # fmt: skip


def _absorbed(
    sizes: Sizes,
    kind: Tensor,
    parameters: dict[str, tuple[Tensor, ...]],
    scale: float,
    qk_norm: str | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return Gᵀ (B, H, r, C_i) and g (B, H, r) of every link."""
    B, H = sizes.batch, sizes.heads
    channels = tuple(sizes.channels[t] for t in sizes.targets)
    shapes = [(B, H, rank, c) for rank, c in zip(sizes.ranks, channels, strict=True)]
    matrices = tuple(empty(shape, kind, torch.float32) for shape in shapes)
    shifts = tuple(empty(shape[:3], kind, torch.float32) for shape in shapes)
    columns = 32 if launch_rules.heavy(sizes.most, sizes.d) else 64  # channels of a program
    firsts = firsts_of(H * -(-c // columns) for c in channels)
    heads = sizes.of_heads()
    del heads["most"], heads["SIZE"]
    _absorb_kernel[(B * firsts[-1],)](
        **parameters, matrix_ptrs=matrices, shift_ptrs=shifts, kind_ptr=kind, batch=B, scale=scale, **heads,
        LINKS=len(sizes.ranks), FIRSTS=firsts, CHANNELS=channels, C=H * sizes.d,
        NORMALISE_KEYS=qk_norm is not None, COLUMNS=columns, CHUNK=32, PRECISION=precision(torch.float32),
        num_warps=launch_rules.warps(sizes.most, sizes.d), num_stages=devices.stages(kind),
    )  # fmt: skip
    return matrices, shifts
