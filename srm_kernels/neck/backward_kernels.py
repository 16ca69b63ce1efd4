"""Triton kernels for the gradients of the pooled links.

The forward pass does not save Q and L. The backward pass computes them again from F, K̃ and the parameters.
Without DyT, matrix products of torch compute Q. With DyT, `squash_kernels` computes Q. During the backward
pass, Q and dQ of all links are in memory at full resolution. This module launches three kernels:

1. The first launch computes dQ of all links. Each of its programs also computes a partial sum of dK̃.
2. The second launch adds the partial sums of dK̃.
3. The third launch computes dF of all maps: the gradient through pool(F) plus the gradient through Q. The gradient
   through Q is computed between the second and the third launch.

Each element of dQ and dF is computed by one program. This program reads and adds the gradients of all cells
that contain the position of the element. No launch uses atomics: the first launch writes the partial sums of
dK̃ to memory, and the second launch adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.key_kernels import load_keys, load_matrix, store_matrix
from ..attention.query_kernels import probabilities
from ..options import QuerySides
from ..parts import (
    LOG2E,
    empty,
    on_device,
    precision,
    readable,
    rms_factor,
    rms_factor_product,
    wide_dot,
)
from ..pool.kernels import cell_start, cell_stop, first_cell, last_cell, most_cells
from . import launch_rules
from .forward_kernels import Sizes, firsts_of, load_positions, place
from .squash_kernels import Squash

GRADIENT_TILE = 32  # positions and channels of a tile of dF


@triton.jit
def strip_gradients(
    program, index, query_ptr, keys_ptr, dpooled_ptr, dquery_ptr, dkeys_ptr, scale, h: tl.constexpr,
    w: tl.constexpr, blocks: tl.constexpr, COLUMNS: tl.constexpr, MOST_ROWS: tl.constexpr,
    MOST_COLUMNS: tl.constexpr, HEADS: tl.constexpr, rank: tl.constexpr, most: tl.constexpr, R: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, NORMALISE_QUERY: tl.constexpr, NORMALISE_KEYS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dQ of one tile of positions for one image and head, and the contribution of this tile to dK̃.

    The tile contains COLUMNS columns of the map. It contains the map rows from the top of one row of cells
    down to the top of the next row of cells, so tiles never overlap. `dquery_ptr` points to dQ of the whole
    map, (B, h, w, H, d).
    """
    head, i, down, column = place(program, blocks, SIZE, COLUMNS, BLOCK)
    b, head_of_image = head // HEADS, head % HEADS
    keys = load_keys(keys_ptr + head * rank * d, query_ptr, rank, R, d, D)
    factor = rms_factor(keys, d, NORMALISE_KEYS)
    dkeys = tl.zeros([R, D], tl.float32)
    channels, r = tl.arange(0, D), tl.arange(0, R)
    stop = cell_start(i + 1, h, SIZE)
    for top in range(cell_start(i, h, SIZE), stop, BLOCK // COLUMNS):
        row = top + down
        inside = (row < stop) & (column < w)
        offsets = ((b * h + row) * w + column) * (HEADS * d) + head_of_image * d
        query = load_positions(query_ptr, offsets, inside, 1, d, D)
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
                    dpooled_ptr + cells[:, None] * most + r[None, :],
                    mask=held[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
                dweights += dpooled / area[:, None]
        dlogits = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        row_factor = rms_factor(query, d, NORMALISE_QUERY)
        dkeys += wide_dot(tl.trans(dlogits * (row_factor * scale)[:, None]), query, PRECISION)
        dquery = wide_dot(dlogits * (factor * scale)[None, :], keys, PRECISION)
        dquery = rms_factor_product(dquery, query, d, NORMALISE_QUERY)
        mask = inside[:, None] & (channels < d)[None, :]
        place_of = dquery_ptr + offsets[:, None] + channels[None, :]
        tl.store(place_of, dquery.to(dquery_ptr.dtype.element_ty), mask=mask)
    store_matrix(dkeys_ptr + index * most * d, dkeys, r, rank, R, d, D)


@triton.jit(do_not_specialize=["batch"])
def _attention_backward_kernel(
    query_ptrs, keys_ptrs, dpooled_ptr, dquery_ptrs, dkeys_ptr, batch, scale, LINKS: tl.constexpr,
    FIRSTS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHTS: tl.constexpr,
    WIDTHS: tl.constexpr, MOST_ROWS: tl.constexpr, MOST_COLUMNS: tl.constexpr, RANKS: tl.constexpr,
    HEADS: tl.constexpr, most: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    NORMALISE_QUERY: tl.constexpr, NORMALISE_KEYS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    for link in tl.static_range(LINKS):
        if (program >= batch * FIRSTS[link]) & (program < batch * FIRSTS[link + 1]):
            strip_gradients(
                program - batch * FIRSTS[link], program, query_ptrs[link], keys_ptrs[link],
                dpooled_ptr + link * batch.to(tl.int64) * (HEADS * SIZE * SIZE * most), dquery_ptrs[link],
                dkeys_ptr, scale, HEIGHTS[link], WIDTHS[link], BLOCKS[link], COLUMNS[link], MOST_ROWS[link],
                MOST_COLUMNS[link], HEADS, RANKS[link], most, R, d, D, NORMALISE_QUERY, NORMALISE_KEYS, SIZE,
                BLOCK, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def _keys_kernel(
    part_ptr, keys_ptrs, dkeys_ptrs, batch, LINKS: tl.constexpr, FIRSTS: tl.constexpr, PARTS: tl.constexpr,
    RANKS: tl.constexpr, HEADS: tl.constexpr, most: tl.constexpr, R: tl.constexpr, d: tl.constexpr,
    D: tl.constexpr, NORMALISE_KEYS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of dK̃ for one image, head and link, in a fixed order."""
    program = tl.program_id(0).to(tl.int64)
    for link in tl.static_range(LINKS):
        if (program >= batch * (link * HEADS)) & (program < batch * ((link + 1) * HEADS)):
            head = program - batch * (link * HEADS)
            dkeys = tl.zeros([R, D], tl.float32)
            for part in range(PARTS[link]):
                index = batch * FIRSTS[link] + head * PARTS[link] + part
                dkeys += load_matrix(part_ptr + index * most * d, RANKS[link], R, d, D)
            small = head * RANKS[link] * d
            keys = load_matrix(keys_ptrs[link] + small, RANKS[link], R, d, D)
            dkeys = rms_factor_product(dkeys, keys, d, NORMALISE_KEYS)
            store_matrix(dkeys_ptrs[link] + small, dkeys, tl.arange(0, R), RANKS[link], R, d, D)


@triton.jit
def map_gradient(
    program, rows_ptr, dpooled_ptr, dmap_ptr, channels: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    offset: tl.constexpr, total_channels: tl.constexpr, LINKED: tl.constexpr, MOST_ROWS: tl.constexpr,
    MOST_COLUMNS: tl.constexpr, SIZE: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute dF of one map for a tile of positions and channels.

    dF is the sum of the gradient through Q and the gradient through pool(F). `rows_ptr` points to the gradient through
    Q, a matrix with a row of C_i channels for each position of each image.
    """
    tiles: tl.constexpr = (h * w + POSITIONS - 1) // POSITIONS
    groups: tl.constexpr = (channels + COLUMNS - 1) // COLUMNS
    b, tile = program // (tiles * groups), (program % (tiles * groups)).to(tl.int32)
    position = tile // groups * POSITIONS + tl.arange(0, POSITIONS)
    c = tile % groups * COLUMNS + tl.arange(0, COLUMNS)
    inside = (position < h * w)[:, None] & (c < channels)[None, :]
    total = tl.zeros([POSITIONS, COLUMNS], tl.float32)
    if LINKED:
        rows = (b * (h * w) + position)[:, None] * channels + c[None, :]
        total += tl.load(rows_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    y, x = position // w, position % w
    for down in tl.static_range(MOST_ROWS):
        i = first_cell(y, h, SIZE) + down
        height = cell_stop(i, h, SIZE) - cell_start(i, h, SIZE)
        for right in tl.static_range(MOST_COLUMNS):
            j = first_cell(x, w, SIZE) + right
            area = height * (cell_stop(j, w, SIZE) - cell_start(j, w, SIZE))
            held = (i <= last_cell(y, h, SIZE)) & (j <= last_cell(x, w, SIZE))
            cell = ((b * SIZE + i) * SIZE + j)[:, None] * total_channels + offset + c[None, :]
            dpooled = tl.load(dpooled_ptr + cell, mask=inside & held[:, None], other=0.0).to(tl.float32)
            total += dpooled / area[:, None]
    place_of = (b * channels + c)[None, :] * (h * w) + position[:, None]
    tl.store(dmap_ptr + place_of, total.to(dmap_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def _maps_backward_kernel(
    rows_ptrs, dpooled_ptr, dmap_ptrs, batch, MAPS: tl.constexpr, FIRSTS: tl.constexpr,
    CHANNELS: tl.constexpr, OFFSETS: tl.constexpr, HEIGHTS: tl.constexpr, WIDTHS: tl.constexpr,
    LINKED: tl.constexpr, MOST_ROWS: tl.constexpr, MOST_COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    for m in tl.static_range(MAPS):
        if (program >= batch * FIRSTS[m]) & (program < batch * FIRSTS[m + 1]):
            map_gradient(
                program - batch * FIRSTS[m], rows_ptrs[m], dpooled_ptr, dmap_ptrs[m], CHANNELS[m], HEIGHTS[m],
                WIDTHS[m], OFFSETS[m], OFFSETS[MAPS], LINKED[m], MOST_ROWS[m], MOST_COLUMNS[m], SIZE,
                POSITIONS, COLUMNS,
            )  # fmt: skip


def pooled_links_backward(
    grads: Sequence[Tensor], results: Sequence[Tensor], sides: QuerySides
) -> list[Tensor]:
    """Return the gradients of the maps, of all links' parameters A, a, α, w, b and W_Q, and of the keys."""
    maps, keys, targets, dtype = sides.maps, sides.keys, sides.targets, sides.maps[0].dtype
    absorbed = not sides.alphas and sides.qk_norm != "both"
    links: list[_Composed | _Queries | _SquashedQueries] = []
    for number, target in enumerate(targets):
        parameters = sides.parameters(number)
        align, bias, query = (t.to(dtype) for t in parameters[:3])
        if sides.alphas:
            links.append(_SquashedQueries(maps[target], align, bias, query, parameters[3:]))
        else:
            links.append((_Composed if absorbed else _Queries)(maps[target], align, bias, query))
    sizes = Sizes(sides)
    queries = [link.queries for link in links]
    dqueries, dkeys = _attention_backward(grads[0], queries, keys, sizes, sides.scale, sides.qk_norm)
    rows: list[Tensor | None] = [None] * len(maps)
    products = []
    for link, dquery, target in zip(links, dqueries, targets, strict=True):
        through, *own = link.backward(dquery)
        earlier = rows[target]
        rows[target] = through if earlier is None else earlier + through
        products.append(own)
    rounded = [
        [grad.to(given.dtype) for grad, given in zip(own, sides.parameters(number), strict=True)]
        for number, own in enumerate(products)
    ]
    dalign, dbias, dquery_weights, *dsquashing = zip(*rounded, strict=True)
    small = [*dalign, *dbias, *(t for group in dsquashing for t in group), *dquery_weights]
    return [*_maps_backward(rows, grads[1], maps, sizes), *small, *dkeys]


def _attention_backward(
    dprobabilities: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    sizes: Sizes,
    scale: float,
    qk_norm: str | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return dQ (B·N, C) and dK̃ of every link, from dP̄, Q (B·N, C) and K̃.

    dQ has the dtype of Q. dK̃ is fp32.
    """
    dtype, L, H, d = queries[0].dtype, len(queries), sizes.heads, sizes.d
    queries = [readable(q) for q in queries]
    keys = [k.contiguous() for k in keys]
    positions, launch = launch_rules.backward_tile(sizes.most, d, queries[0].dtype)
    tiles = [launch_rules.tile_of(sizes.widths[t], positions) for t in sizes.targets]
    parts = tuple(sizes.size * tile.blocks for tile in tiles)  # partial sums of one image and head
    firsts = firsts_of(H * count for count in parts)
    dqueries = [empty(tuple(q.shape), q, q.dtype) for q in queries]
    part = empty((sizes.batch * firsts[-1], sizes.most, d), keys[0], torch.float32)
    dkeys = [empty(tuple(k.shape), k, torch.float32) for k in keys]
    heads = sizes.of_heads()
    normalise = {"NORMALISE_KEYS": qk_norm is not None}
    most = {
        name: tuple(most_cells(lengths[t], sizes.size) for t in sizes.targets)
        for name, lengths in (("MOST_ROWS", sizes.heights), ("MOST_COLUMNS", sizes.widths))
    }
    with on_device(queries[0]):
        _attention_backward_kernel[(sizes.batch * firsts[-1],)](
            tuple(queries), tuple(keys), dprobabilities.contiguous(), tuple(dqueries), part, sizes.batch, scale,
            LINKS=L, FIRSTS=firsts, BLOCKS=tuple(tile.blocks for tile in tiles),
            COLUMNS=tuple(tile.columns for tile in tiles), **sizes.of_links(), **most, **heads, **normalise,
            NORMALISE_QUERY=qk_norm == "both", BLOCK=positions, PRECISION=precision(queries[0].dtype),
            **launch,
        )  # fmt: skip
        del heads["SIZE"]
        _keys_kernel[(sizes.batch * H * L,)](
            part, tuple(keys), tuple(dkeys), sizes.batch, LINKS=L, FIRSTS=firsts, PARTS=parts, **heads,
            **normalise, num_warps=8,
        )  # fmt: skip
    return [dquery.to(dtype) for dquery in dqueries], dkeys


def _maps_backward(
    rows: Sequence[Tensor | None], dpooled: Tensor, maps: Sequence[Tensor], sizes: Sizes
) -> list[Tensor]:
    """Return dF of every map.

    `rows` has one entry per map: the gradient of F through Q, as a matrix (B·N, C_i), or None if the map is
    not the target of a link. `dpooled` is the gradient of pool(F).
    """
    dpooled = readable(dpooled).contiguous()
    through = tuple(dpooled if r is None else readable(r).contiguous() for r in rows)
    dmaps = [empty(tuple(m.shape), m, readable(m).dtype) for m in maps]
    areas = (h * w for h, w in zip(sizes.heights, sizes.widths, strict=True))
    firsts = firsts_of(
        -(-area // GRADIENT_TILE) * -(-c // GRADIENT_TILE)
        for area, c in zip(areas, sizes.channels, strict=True)
    )
    most = {
        name: tuple(most_cells(length, sizes.size) for length in lengths)
        for name, lengths in (("MOST_ROWS", sizes.heights), ("MOST_COLUMNS", sizes.widths))
    }
    with on_device(dpooled):
        _maps_backward_kernel[(sizes.batch * firsts[-1],)](
            through, dpooled, tuple(dmaps), sizes.batch, **sizes.of_maps(), FIRSTS=firsts,
            LINKED=tuple(r is not None for r in rows), **most, SIZE=sizes.size, POSITIONS=GRADIENT_TILE,
            COLUMNS=GRADIENT_TILE, num_warps=4,
        )  # fmt: skip
    return [dmap.to(m.dtype) for dmap, m in zip(dmaps, maps, strict=True)]


class _Composed:
    """Compute the queries of a link by one product, Q = F (W_Q A)ᵀ + W_Q a, and backpropagate through this product."""

    def __init__(self, features: Tensor, align: Tensor, bias: Tensor, query: Tensor) -> None:
        self.rows = _rows(features)
        self.align, self.bias, self.query = align.float(), bias.float(), query.float()
        self.composed = (self.query @ self.align).to(features.dtype)
        self.queries = torch.addmm((self.query @ self.bias).to(features.dtype), self.rows, self.composed.mT)

    def backward(self, dquery: Tensor) -> list[Tensor]:
        """Return [dF (B·N, C_i), dA, da, dW_Q]."""
        dcomposed, dshift = (dquery.mT @ self.rows).float(), dquery.sum(0, dtype=torch.float32)
        dquery_weight = dcomposed @ self.align.mT + torch.outer(dshift, self.bias)
        return [dquery @ self.composed, self.query.mT @ dcomposed, self.query.mT @ dshift, dquery_weight]


class _Queries:
    """Compute a link's queries Q = T W_Qᵀ from its tokens T, and backpropagate dQ to F and the parameters."""

    def __init__(self, features: Tensor, align: Tensor, bias: Tensor, query: Tensor) -> None:
        self.rows, self.align, self.query = _rows(features), align, query
        self.tokens = torch.addmm(bias, self.rows, align.mT)
        self.queries = self.tokens @ query.mT

    def backward(self, dquery: Tensor) -> list[Tensor]:
        """Return [dF (B·N, C_i), dA, da, dW_Q]."""
        daligned = dquery @ self.query
        dbias = daligned.sum(0, dtype=torch.float32)
        return [daligned @ self.align, daligned.mT @ self.rows, dbias, dquery.mT @ self.tokens]


class _SquashedQueries:
    """Compute the queries of a link from DyT(T), and backpropagate dQ to F and the parameters."""

    def __init__(
        self, features: Tensor, align: Tensor, bias: Tensor, query: Tensor, squashing: Sequence[Tensor]
    ) -> None:
        self.rows, self.align = _rows(features), align
        self.squash = Squash(self.rows, align, bias, query, squashing)
        self.squashed, self.queries = self.squash.forward()

    def backward(self, dquery: Tensor) -> list[Tensor]:
        """Return [dF (B·N, C_i), dA, da, dW_Q, dα, dw, db]."""
        dquery_weight = dquery.mT @ self.squashed
        daligned, (dalphas, dweight, dshift, dbias) = self.squash.backward(dquery)
        of_dyt = [dalphas.sum().reshape(1), dweight, dshift]
        return [daligned @ self.align, daligned.mT @ self.rows, dbias, dquery_weight, *of_dyt]


def _rows(features: Tensor) -> Tensor:
    """Return a map as rows (B·N, C_i). The result is a view of a channels-last map, and a copy of any other map."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
