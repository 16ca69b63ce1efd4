"""Triton kernels of the query side of Nyström attention: Y = softmax(Q K̃ᵀ s) X, its scale statistic and its gradients.

A program holds K̃ and X of one image b and head h, and loops over a share of the queries in tiles. It reads each query
once, and writes each row of Y once. The probabilities L stay in registers. X and the probabilities are fp32.

The backward pass computes the probabilities again instead of reading them from memory. For its share of the
queries, every program writes partial sums of dX and dK̃. A last launch adds the partial sums of all programs
in a fixed order.

If a program cannot hold all of K̃ and X (see `launch_rules.held`), it reads K̃ and X in pieces for every tile
of queries, with an online softmax, as in attention with the keys K̃ and the values X. In this case, the
backward pass has three launches. The first launch computes dQ, and stores two numbers per query: the
logsumexp and δ (see `_queries_backward_kernel`). The second launch computes the partial sums of dX and dK̃.
The third launch adds the partial sums. The first two launches use functions of `key_kernels`. In that module,
K̃ attends to the keys K with the values V; in this module, Q attends to the keys K̃ with the values X.

The stored Y is L X, multiplied by τ and then rounded to the dtype of Y. For the scale statistic, the
kernels also compute the mean of the rows y of L X, and M₂ = Σ‖y − mean‖². The mean and M₂ describe the rows
before the multiplication by τ and the rounding. A program computes the mean and M₂ of each tile of queries,
and merges the tiles with Chan's formula. `_statistics_kernel` then merges the results of all programs with
the same formula. Let two sets of rows have the sizes n₁ and n₂, the means mean₁ and mean₂, and the sums M₂₁
and M₂₂. With n = n₁ + n₂, the union of the two sets has:

    mean = (n₁ mean₁ + n₂ mean₂)/n      M₂ = M₂₁ + M₂₂ + ‖mean₂ − mean₁‖² n₁n₂/n

Unlike Σ‖y‖² − n‖mean‖², the formula for M₂ has no cancellation when the mean is large.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import devices
from ..parts import (
    INFINITY,
    LOG2E,
    empty,
    empty_like,
    load_tokens,
    on_device,
    padded,
    precision,
    readable,
    rms_factor,
    rms_factor_product,
    strides,
    token_offsets,
    wide_dot,
)
from . import launch_rules
from .key_kernels import (
    landmark_gradient,
    load_keys,
    load_matrix,
    load_rows,
    mix_values,
    softmax_gradient,
    store_matrix,
)


@triton.jit
def probabilities(
    query,
    keys,
    column_scale,
    rank: tl.constexpr,
    R: tl.constexpr,
    d: tl.constexpr,
    NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return L [BLOCK, R] of one tile of queries, with zeros in the columns from `rank` on."""
    logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * column_scale[None, :]
    logits = logits * rms_factor(query, d, NORMALISE)[:, None]
    logits = tl.where((tl.arange(0, R) < rank)[None, :], logits, -INFINITY)
    weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def streamed(
    query, row_scale, keys_ptr, x_ptr, rank: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    NORMALISE_KEYS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return L X [BLOCK, D] of one tile of queries, and the base-2 logsumexp [BLOCK] of each query's logits.

    K̃ and X are read in pieces.
    """
    mixed, top, total = mix_values(
        query, row_scale, keys_ptr, x_ptr, 0, rank, d, 1, d, 1, BLOCK, d, D, NORMALISE_KEYS, PIECE, PRECISION
    )
    return mixed / total[:, None], top + tl.log2(total)


@triton.jit(do_not_specialize=["N", "share"])
def _forward_kernel(
    query_ptr, keys_ptr, x_ptr, tau_ptr, y_ptr, mean_ptr, spread_ptr, N, share, parts, heads, query_stride_b,
    query_stride_h, query_stride_n, query_stride_d, y_stride_b, y_stride_h, y_stride_n, y_stride_d, scale,
    rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, NORMALISE_QUERY: tl.constexpr,
    NORMALISE_KEYS: tl.constexpr, TAU: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute Y for one share of the queries of one (b, h), and the mean [d] and M₂ of the rows of L X in this share.

    R is the padded number of landmarks. If PIECE is R, the program loads K̃ and X once and holds all their rows.
    Otherwise, it reads K̃ and X again for every tile of queries, in pieces of PIECE rows.
    """
    program = tl.program_id(0).to(tl.int64)
    head, part = program // parts, (program % parts).to(tl.int32)
    b, h = head // heads, head % heads
    query_ptr += b * query_stride_b + h * query_stride_h
    y_ptr += b * y_stride_b + h * y_stride_h
    keys_ptr += head * rank * d
    x_ptr += head * rank * d
    if PIECE == R:
        keys = load_keys(keys_ptr, query_ptr, rank, R, d, D)
        x = load_matrix(x_ptr, rank, R, d, D)
        column_scale = rms_factor(keys, d, NORMALISE_KEYS) * (scale * LOG2E)
    columns = tl.arange(0, D)
    tau = 1.0
    if TAU:
        tau = tl.load(tau_ptr + h)
    count = 0.0
    mean = tl.zeros([D], tl.float32)
    spread = 0.0
    stop = tl.minimum((part + 1) * share, N)
    for first in range(part * share, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < stop
        query = load_tokens(query_ptr, rows, inside, query_stride_n, query_stride_d, d, D)
        if PIECE == R:
            weights = probabilities(query, keys, column_scale, rank, R, d, NORMALISE_QUERY, PRECISION)
            y = wide_dot(weights, x, PRECISION)  # [BLOCK, D]
        else:
            row_scale = rms_factor(query, d, NORMALISE_QUERY) * (scale * LOG2E)
            y, _ = streamed(
                query, row_scale, keys_ptr, x_ptr, rank, d, D, NORMALISE_KEYS, BLOCK, PIECE, PRECISION
            )
        offsets = token_offsets(rows, columns, y_stride_n, y_stride_d)
        mask = inside[:, None] & (columns < d)[None, :]
        tl.store(y_ptr + offsets, (y * tau).to(y_ptr.dtype.element_ty), mask=mask)
        if STATISTICS:
            tile_count = tl.minimum(stop - first, BLOCK).to(tl.float32)
            tile_mean = tl.sum(tl.where(mask, y, 0.0), 0) / tile_count
            centred = tl.where(mask, y - tile_mean[None, :], 0.0)
            tile_spread = tl.sum(tl.sum(centred * centred, 1), 0)
            together = count + tile_count
            between = tile_mean - mean
            spread += tile_spread + tl.sum(between * between, 0) * (count * tile_count / together)
            mean += between * (tile_count / together)
            count = together
    if STATISTICS:
        tl.store(mean_ptr + program * d + columns, mean, mask=columns < d)
        tl.store(spread_ptr + program, spread)


@triton.jit(do_not_specialize=["N", "share"])
def _statistics_kernel(
    part_mean_ptr, part_spread_ptr, mean_ptr, spread_ptr, N, share, parts, d: tl.constexpr, D: tl.constexpr
):
    """Merge the statistics of all parts of the queries of one (b, h), in order, into the mean [d] and M₂."""
    head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    count = 0.0
    mean = tl.zeros([D], tl.float32)
    spread = 0.0
    for part in range(parts):
        part_count = tl.minimum(N - part * share, share).to(tl.float32)
        index = head * parts + part
        between = tl.load(part_mean_ptr + index * d + columns, mask=columns < d, other=0.0) - mean
        together = count + part_count
        added = tl.sum(between * between, 0) * (count * part_count / together)
        spread += tl.load(part_spread_ptr + index) + added
        mean += between * (part_count / together)
        count = together
    tl.store(mean_ptr + head * d + columns, mean, mask=columns < d)
    tl.store(spread_ptr + head, spread)


@triton.jit(do_not_specialize=["N", "share"])
def _backward_kernel(
    query_ptr, keys_ptr, x_ptr, tau_ptr, dy_ptr, dquery_ptr, dx_ptr, dkeys_ptr, N, share, parts, heads,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d, dy_stride_b, dy_stride_h, dy_stride_n,
    dy_stride_d, scale, rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    NORMALISE_QUERY: tl.constexpr, NORMALISE_KEYS: tl.constexpr, TAU: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dQ of one share of the queries, and the partial sums of Lᵀ dY and of the gradient of normalised K̃."""
    program = tl.program_id(0).to(tl.int64)
    head, part = program // parts, (program % parts).to(tl.int32)
    b, h = head // heads, head % heads
    query_ptr += b * query_stride_b + h * query_stride_h
    dy_ptr += b * dy_stride_b + h * dy_stride_h
    keys = load_keys(keys_ptr + head * rank * d, query_ptr, rank, R, d, D)
    x = load_matrix(x_ptr + head * rank * d, rank, R, d, D)
    factor = rms_factor(keys, d, NORMALISE_KEYS)
    if TAU:
        x *= tl.load(tau_ptr + h)
    columns = tl.arange(0, D)
    i = tl.arange(0, R)
    dx = tl.zeros([R, D], tl.float32)
    dkeys = tl.zeros([R, D], tl.float32)
    stop = tl.minimum((part + 1) * share, N)
    for first in range(part * share, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < stop
        query = load_tokens(query_ptr, rows, inside, query_stride_n, query_stride_d, d, D)
        dy = load_tokens(dy_ptr, rows, inside, dy_stride_n, dy_stride_d, d, D)
        weights = probabilities(query, keys, factor * (scale * LOG2E), rank, R, d, NORMALISE_QUERY, PRECISION)
        dweights = wide_dot(dy, tl.trans(x), PRECISION)
        dlogits = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])  # [BLOCK, R]
        dx += wide_dot(tl.trans(weights), dy, PRECISION)
        row_factor = rms_factor(query, d, NORMALISE_QUERY)
        dkeys += wide_dot(tl.trans(dlogits * (row_factor * scale)[:, None]), query, PRECISION)
        dquery = wide_dot(dlogits * (factor * scale)[None, :], keys, PRECISION)
        dquery = rms_factor_product(dquery, query, d, NORMALISE_QUERY)
        offsets = head * N * d + token_offsets(rows, columns, d, 1)
        mask = inside[:, None] & (columns < d)[None, :]
        tl.store(dquery_ptr + offsets, dquery.to(dquery_ptr.dtype.element_ty), mask=mask)
    store_matrix(dx_ptr + program * rank * d, dx, i, rank, R, d, D)
    store_matrix(dkeys_ptr + program * rank * d, dkeys, i, rank, R, d, D)


@triton.jit(do_not_specialize=["N", "tiles"])
def _queries_backward_kernel(
    query_ptr, keys_ptr, x_ptr, tau_ptr, dy_ptr, dquery_ptr, lse_ptr, delta_ptr, N, tiles, heads,
    query_stride_b, query_stride_h, query_stride_n, query_stride_d, dy_stride_b, dy_stride_h, dy_stride_n,
    dy_stride_d, scale, rank: tl.constexpr, d: tl.constexpr, D: tl.constexpr, NORMALISE_QUERY: tl.constexpr,
    NORMALISE_KEYS: tl.constexpr, TAU: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dQ, the logsumexp of the logits, and δ_n = Σ_e τ dY_ne (L X)_ne of one tile of queries.

    K̃ and X are read in pieces.
    """
    program = tl.program_id(0).to(tl.int64)
    head, tile = program // tiles, program % tiles
    b, h = head // heads, head % heads
    keys_ptr += head * rank * d
    x_ptr += head * rank * d
    rows = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside = rows < N
    query_ptr += b * query_stride_b + h * query_stride_h
    dy_ptr += b * dy_stride_b + h * dy_stride_h
    query = load_tokens(query_ptr, rows, inside, query_stride_n, query_stride_d, d, D)
    dy = load_tokens(dy_ptr, rows, inside, dy_stride_n, dy_stride_d, d, D).to(tl.float32)
    if TAU:
        dy *= tl.load(tau_ptr + h)
    row_scale = rms_factor(query, d, NORMALISE_QUERY) * (scale * LOG2E)
    y, lse = streamed(query, row_scale, keys_ptr, x_ptr, rank, d, D, NORMALISE_KEYS, BLOCK, PIECE, PRECISION)
    delta = tl.sum(dy * y, 1)
    tl.store(lse_ptr + head * N + rows, lse, mask=inside)
    tl.store(delta_ptr + head * N + rows, delta, mask=inside)
    dquery = landmark_gradient(
        tl.zeros([BLOCK, D], tl.float32), query, row_scale, lse, dy, delta, keys_ptr, x_ptr, 0, rank, d, 1, d,
        1, scale, d, D, NORMALISE_KEYS, PIECE, PRECISION,
    )  # fmt: skip
    dquery = rms_factor_product(dquery, query, d, NORMALISE_QUERY)
    columns = tl.arange(0, D)
    offsets = head * N * d + token_offsets(rows, columns, d, 1)
    mask = inside[:, None] & (columns < d)[None, :]
    tl.store(dquery_ptr + offsets, dquery.to(dquery_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "share"])
def _pieces_backward_kernel(
    query_ptr, keys_ptr, x_ptr, tau_ptr, dy_ptr, lse_ptr, delta_ptr, dx_ptr, dkeys_ptr, N, share, parts,
    pieces, heads, query_stride_b, query_stride_h, query_stride_n, query_stride_d, dy_stride_b, dy_stride_h,
    dy_stride_n, dy_stride_d, scale, rank: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    NORMALISE_QUERY: tl.constexpr, NORMALISE_KEYS: tl.constexpr, TAU: tl.constexpr, BLOCK: tl.constexpr,
    PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute PIECE rows of Lᵀ dY and of the gradient of normalised K̃, as sums over one share of the queries."""
    program = tl.program_id(0).to(tl.int64)
    first_landmark = (program % pieces).to(tl.int32) * PIECE
    program = program // pieces
    head, part = program // parts, (program % parts).to(tl.int32)
    b, h = head // heads, head % heads
    query_ptr += b * query_stride_b + h * query_stride_h
    dy_ptr += b * dy_stride_b + h * dy_stride_h
    i = first_landmark + tl.arange(0, PIECE)
    keys = load_rows(keys_ptr + head * rank * d, first_landmark, rank, PIECE, d, D)
    keys = keys.to(query_ptr.dtype.element_ty)
    x = load_rows(x_ptr + head * rank * d, first_landmark, rank, PIECE, d, D)
    if TAU:
        x *= tl.load(tau_ptr + h)
    dx = tl.zeros([PIECE, D], tl.float32)
    dkeys = tl.zeros([PIECE, D], tl.float32)
    stop = tl.minimum((part + 1) * share, N)
    for first in range(part * share, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < stop
        query = load_tokens(query_ptr, rows, inside, query_stride_n, query_stride_d, d, D)
        dy = load_tokens(dy_ptr, rows, inside, dy_stride_n, dy_stride_d, d, D)
        lse = tl.load(lse_ptr + head * N + rows, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + head * N + rows, mask=inside, other=0.0)
        row_factor = rms_factor(query, d, NORMALISE_QUERY)
        weights, dlogits, _ = softmax_gradient(
            query, row_factor * (scale * LOG2E), lse, dy, delta, keys, x, i < rank, d, NORMALISE_KEYS,
            PRECISION,
        )  # [BLOCK, PIECE]  # fmt: skip
        dx += wide_dot(tl.trans(weights), dy, PRECISION)
        dkeys += wide_dot(tl.trans(dlogits * (row_factor * scale)[:, None]), query, PRECISION)
    store_matrix(dx_ptr + program * rank * d, dx, i, rank, PIECE, d, D)
    store_matrix(dkeys_ptr + program * rank * d, dkeys, i, rank, PIECE, d, D)


@triton.jit
def _sum_kernel(
    part_dx_ptr, part_dkeys_ptr, keys_ptr, x_ptr, tau_ptr, dx_ptr, dkeys_ptr, dtau_ptr, parts, heads,
    rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, NORMALISE_KEYS: tl.constexpr,
    TAU: tl.constexpr,
):  # fmt: skip
    """Add all partial sums of one (b, h), in a fixed order; compute its dX, its dK̃ and its contribution to dτ."""
    head = tl.program_id(0).to(tl.int64)
    small = head * rank * d
    i = tl.arange(0, R)
    dx = tl.zeros([R, D], tl.float32)
    dkeys = tl.zeros([R, D], tl.float32)
    for part in range(parts):
        index = (head * parts + part) * rank * d
        dx += load_matrix(part_dx_ptr + index, rank, R, d, D)
        dkeys += load_matrix(part_dkeys_ptr + index, rank, R, d, D)
    if TAU:
        product = dx * load_matrix(x_ptr + small, rank, R, d, D)
        tl.store(dtau_ptr + head, tl.sum(tl.sum(product, 1), 0))
        dx *= tl.load(tau_ptr + head % heads)
    store_matrix(dx_ptr + small, dx, i, rank, R, d, D)
    dkeys = rms_factor_product(dkeys, load_matrix(keys_ptr + small, rank, R, d, D), d, NORMALISE_KEYS)
    store_matrix(dkeys_ptr + small, dkeys, i, rank, R, d, D)


def landmark_attention(
    query: Tensor,
    keys: Tensor,
    x: Tensor,
    tau: Tensor | None,
    scale: float,
    qk_norm: str | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Y, mean and M₂ as `reference.landmark_attention` does."""
    dtype, query = query.dtype, readable(query)
    B, H, N, d = query.shape
    rank = keys.shape[-2]
    y = empty_like(query)
    tile = launch_rules.query_forward(rank, d, query.dtype, devices.capability(query))
    share, parts = launch_rules.divide(N, tile.block, launch_rules.LEAST_QUERIES_OF_A_PART)
    division = {"N": N, "share": share, "parts": parts}
    mean, spread, part_mean, part_spread = (
        empty(size if statistics else (0,), query, torch.float32)
        for size in ((B, H, d), (B, H), (B, H, parts, d), (B, H, parts))
    )
    with on_device(query):
        _forward_kernel[(B * H * parts,)](
            query_ptr=query, keys_ptr=keys.contiguous(), x_ptr=x.contiguous(),
            tau_ptr=x if tau is None else tau.float().contiguous(), y_ptr=y, mean_ptr=part_mean,
            spread_ptr=part_spread, **division, heads=H, **strides(query=query, y=y), scale=scale, rank=rank,
            R=padded(rank), d=d, D=padded(d), NORMALISE_QUERY=qk_norm == "both",
            NORMALISE_KEYS=qk_norm is not None, TAU=tau is not None, STATISTICS=statistics, BLOCK=tile.block,
            PIECE=launch_rules.landmarks_of_a_program(rank, d), PRECISION=precision(query.dtype),
            **tile.options(),
        )  # fmt: skip
        if statistics:
            _statistics_kernel[(B * H,)](
                part_mean, part_spread, mean, spread, **division, d=d, D=padded(d), num_warps=1
            )
    return y.to(dtype), mean, spread


def landmark_attention_backward(
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
    query: Tensor,
    keys: Tensor,
    x: Tensor,
    tau: Tensor | None,
    scale: float,
    qk_norm: str | None,
    statistics: bool,
) -> list[Tensor]:
    """Return [dQ, dK̃, dX] and, with τ, dτ."""
    (dy,) = grads
    dtype, query, dy = query.dtype, readable(query), readable(dy)
    B, H, N, d = query.shape
    rank = keys.shape[-2]
    keys, x = keys.contiguous(), x.contiguous()
    target = devices.capability(query)
    tile = launch_rules.query_backward(rank, d, query.dtype, target)
    share, parts = launch_rules.divide(N, tile.block, launch_rules.LEAST_QUERIES_OF_A_GRADIENT)
    dquery = empty((B, H, N, d), query, query.dtype)
    dkeys, dx = (empty((B, H, rank, d), query, torch.float32) for _ in range(2))
    part_dkeys, part_dx = (empty((B, H, parts, rank, d), query, torch.float32) for _ in range(2))
    dtau = x if tau is None else empty((B, H), query, torch.float32)
    held = {"keys_ptr": keys, "x_ptr": x, "tau_ptr": x if tau is None else tau.float().contiguous()}
    tokens = {"query_ptr": query, "dy_ptr": dy, "N": N, "scale": scale, **strides(query=query, dy=dy)}
    size = {"heads": H, "rank": rank, "d": d, "D": padded(d)}
    form = {"NORMALISE_KEYS": qk_norm is not None, "TAU": tau is not None}
    exact = launch_rules.query_backward_exact(rank, d, query.dtype, target)
    walk = form | {
        "NORMALISE_QUERY": qk_norm == "both",
        "BLOCK": tile.block,
        "PRECISION": "ieee" if exact else precision(query.dtype),
        **tile.options(),
    }
    sums = {"dx_ptr": part_dx, "dkeys_ptr": part_dkeys, "share": share, "parts": parts}
    with on_device(query):
        if launch_rules.held(rank, d):
            _backward_kernel[(B * H * parts,)](
                **tokens, **held, **sums, dquery_ptr=dquery, **size, R=padded(rank), **walk
            )
        else:
            lse, delta = (empty((B, H, N), query, torch.float32) for _ in range(2))
            piece = launch_rules.landmarks_of_a_program(rank, d)
            tiles, pieces = -(-N // tile.block), -(-rank // piece)
            tokens |= {"lse_ptr": lse, "delta_ptr": delta, "PIECE": piece}
            _queries_backward_kernel[(B * H * tiles,)](
                **tokens, **held, dquery_ptr=dquery, tiles=tiles, **size, **walk
            )
            _pieces_backward_kernel[(B * H * parts * pieces,)](
                **tokens, **held, **sums, pieces=pieces, **size, **walk
            )
        _sum_kernel[(B * H,)](
            part_dx, part_dkeys, **held, dx_ptr=dx, dkeys_ptr=dkeys, dtau_ptr=dtau, parts=parts, **size,
            R=padded(rank), **form, **tile.options(),
        )  # fmt: skip
    gradients = [dquery.to(dtype), dkeys, dx]
    return gradients if tau is None else [*gradients, dtau.sum(0).to(tau.dtype)]
