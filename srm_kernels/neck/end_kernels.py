"""Triton kernels of the first and the last operator of the fused neck, one launch each.

`project_sources` computes K and V of all links with the same source, from the tokens of this source. It multiplies in
the tokens' dtype. It rounds intermediate results at the same points as the modules of the unfused neck.

`merge_links` computes, from P̄ and pool(F), the maps that the gate reads. The product P̄ X is computed in
fp32: X can be many times larger than P̄ X, and if X were rounded to half precision, the error of P̄ X would
be large. In all other products, both factors have the dtype of pool(F), and the result is fp32. Two results are
rounded to the dtype of pool(F): τ P̄ X, because it is a factor of the next product, and the final maps.

Both operators read only small tensors, so their backward passes have no Triton kernels. In the backward pass,
autograd differentiates the code of the backend "reference". Its matrix products are therefore computed by
torch's libraries, such as cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .. import devices
from ..parts import contiguous, empty, on_device, padded, precision, readable, strides, wide_dot
from ..scale.kernels import row_offsets, tanh
from . import launch_rules
from .forward_kernels import firsts_of, load_block, pick_pointer

ROWS, COLUMNS, CHUNK = 32, 64, 32  # sizes of the tiles of a product


@triton.jit(do_not_specialize=["M", "N"])
def _project_kernel(
    tokens_ptr, shift_ptr, alpha_ptrs, dyt_weight_ptrs, dyt_bias_ptrs, key_ptrs, value_ptrs, keys_ptr, values_ptr, M,
    N, stride_b, stride_n, stride_c, LINKS: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr, DYT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile [ROWS, COLUMNS] of K or V of one link.

    `keys_ptr` and `values_ptr` point to K and V (L, M, C) of all links. M = B·N is the number of tokens in
    the batch.
    """
    tiles: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    dtype = tokens_ptr.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    of_values, link = tl.program_id(1) // tiles, tl.program_id(2)
    n = tl.program_id(1) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    weight_ptr = pick_pointer(key_ptrs, link, LINKS)
    out_ptr = keys_ptr
    if of_values == 1:
        weight_ptr = pick_pointer(value_ptrs, link, LINKS)
        out_ptr = values_ptr
    alpha_ptr = pick_pointer(alpha_ptrs, link, LINKS)
    dyt_weight_ptr = pick_pointer(dyt_weight_ptrs, link, LINKS)
    dyt_bias_ptr = pick_pointer(dyt_bias_ptrs, link, LINKS)
    starts = row_offsets(rows, N, stride_b, stride_n)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, C, CHUNK):
        c = first + tl.arange(0, CHUNK)
        inside = (rows < M)[:, None] & (c < C)[None, :]
        offsets = starts[:, None] + c.to(tl.int64)[None, :] * stride_c
        tokens = tl.load(tokens_ptr + offsets, mask=inside, other=0.0)
        if SHIFT:
            shift = tl.load(shift_ptr + c, mask=c < C, other=0.0).to(dtype)
            tokens = (tokens.to(tl.float32) + shift.to(tl.float32)[None, :]).to(dtype)
        if DYT:
            alpha = tl.load(alpha_ptr).to(tl.float32)
            weight = tl.load(dyt_weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
            bias = tl.load(dyt_bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
            bounded = weight[None, :] * tanh(alpha * tokens.to(tl.float32)) + bias[None, :]
            tokens = bounded.to(dtype)
        weights = load_block(weight_ptr, n, C, c, C, C).to(dtype)
        total = tl.dot(tokens, tl.trans(weights), total, input_precision=PRECISION)
    out = (link.to(tl.int64) * M + rows)[:, None] * C + n[None, :]
    mask = (rows < M)[:, None] & (n < C)[None, :]
    tl.store(out_ptr + out, total.to(dtype), mask=mask)


@triton.jit
def aligned(
    pooled_ptr, align_ptr, bias_ptr, cells, n, channels: tl.constexpr, offset: tl.constexpr,
    total_channels: tl.constexpr, SQUARE: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the tile [ROWS, COLUMNS] of A pool(F) + a for the cells `cells` and the channels `n`."""
    dtype = pooled_ptr.dtype.element_ty
    bias = tl.load(bias_ptr + n, mask=n < C, other=0.0).to(dtype).to(tl.float32)
    total = tl.zeros([cells.shape[0], n.shape[0]], tl.float32) + bias[None, :]
    for first in range(0, channels, CHUNK):
        c = first + tl.arange(0, CHUNK)
        values = load_block(pooled_ptr + offset, cells, SQUARE, c, channels, total_channels)
        align = load_block(align_ptr, n, C, c, channels, channels).to(dtype)
        total = tl.dot(values, tl.trans(align), total, input_precision=PRECISION)
    return total


@triton.jit
def update(
    probabilities_ptr, x_ptr, output_ptr, theta_ptr, kind_ptr, cells, n, heads: tl.constexpr,
    rank: tl.constexpr, most: tl.constexpr, PIECE: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    SQUARE: tl.constexpr, C: tl.constexpr, TAU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the tile [ROWS, COLUMNS] of τ P̄ X W_O of one link and image, for the cells `cells` and the channels `n`.

    P̄ X is computed in steps of PIECE landmarks.
    """
    dtype = kind_ptr.dtype.element_ty
    e = tl.arange(0, D)
    total = tl.zeros([cells.shape[0], n.shape[0]], tl.float32)
    for head in range(heads):
        y = tl.zeros([cells.shape[0], D], tl.float32)
        for first in range(0, rank, PIECE):
            r = first + tl.arange(0, PIECE)
            probabilities = load_block(probabilities_ptr + head * SQUARE * most, cells, SQUARE, r, rank, most)
            y += wide_dot(probabilities, load_block(x_ptr + head * rank * d, r, rank, e, d, d), PRECISION)
        if TAU:
            y *= tl.exp(tl.load(theta_ptr + head).to(tl.float32))
        output = load_block(output_ptr + head * d, n, C, e, d, C).to(dtype)
        total = tl.dot(y.to(dtype), tl.trans(output), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["batch"])
def _merge_links_kernel(
    pooled_ptr, probabilities_ptr, x_ptrs, align_ptrs, bias_ptrs, output_ptrs, theta_ptrs, beta_ptrs, out_ptr,
    batch, LINKS: tl.constexpr, MAPS: tl.constexpr, TARGETS: tl.constexpr, RANKS: tl.constexpr,
    OFFSETS: tl.constexpr, HEADS: tl.constexpr, most: tl.constexpr, PIECE: tl.constexpr, d: tl.constexpr,
    D: tl.constexpr, SQUARE: tl.constexpr, C: tl.constexpr, TAU: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of the pooled updated map of one stage and image.

    `out_ptr` points to the maps (S, B, C, P²) of all stages and images.
    """
    b, stage = (tl.program_id(0) // MAPS).to(tl.int64), tl.program_id(0) % MAPS
    cells = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    pooled_ptr += b * SQUARE * OFFSETS[MAPS]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for m in tl.static_range(MAPS):
        if stage == m:
            total = aligned(
                pooled_ptr, align_ptrs[m], bias_ptrs[m], cells, n, OFFSETS[m + 1] - OFFSETS[m], OFFSETS[m],
                OFFSETS[MAPS], SQUARE, C, CHUNK, PRECISION,
            )  # fmt: skip
    for link in tl.static_range(LINKS):
        if stage == TARGETS[link]:
            image = (link * batch + b) * HEADS
            beta = tl.load(beta_ptrs[link]).to(tl.float32)
            total += beta * update(
                probabilities_ptr + image * SQUARE * most, x_ptrs[link] + b * HEADS * RANKS[link] * d,
                output_ptrs[link], theta_ptrs[link], out_ptr, cells, n, HEADS, RANKS[link], most, PIECE, d,
                D, SQUARE, C, TAU, PRECISION,
            )  # fmt: skip
    out = ((stage.to(tl.int64) * batch + b) * C + n)[None, :] * SQUARE + cells[:, None]
    mask = (cells < SQUARE)[:, None] & (n < C)[None, :]
    tl.store(out_ptr + out, total.to(out_ptr.dtype.element_ty), mask=mask)


def project_sources(
    tokens: Tensor,
    key_weights: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    alphas: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the results of `reference.project_sources`."""
    dtype, tokens = tokens.dtype, readable(tokens)
    B, N, C = tokens.shape
    L = len(key_weights)
    keys, values = (empty((L, B, N, C), tokens, tokens.dtype) for _ in range(2))
    groups = {
        "alpha": alphas,
        "dyt_weight": weights,
        "dyt_bias": biases,
        "key": key_weights,
        "value": value_weights,
    }
    parameters = {f"{name}_ptrs": contiguous(group or key_weights) for name, group in groups.items()}
    with on_device(tokens):
        _project_kernel[(-(-B * N // ROWS), 2 * -(-C // COLUMNS), L)](
            tokens_ptr=tokens, shift_ptr=contiguous([tokens if shift is None else shift])[0], **parameters,
            keys_ptr=keys, values_ptr=values, M=B * N, N=N, **strides(tokens, axes="bnc"), LINKS=L, C=C,
            SHIFT=shift is not None, DYT=bool(alphas), ROWS=ROWS, COLUMNS=COLUMNS, CHUNK=CHUNK,
            PRECISION=precision(tokens.dtype), num_warps=4, num_stages=devices.stages(tokens),
        )  # fmt: skip
    return keys.to(dtype), values.to(dtype)


def merge_links(
    pooled: Tensor,
    probabilities: Tensor,
    xs: Sequence[Tensor],
    align_weights: Sequence[Tensor],
    align_biases: Sequence[Tensor],
    output_weights: Sequence[Tensor],
    thetas: Sequence[Tensor],
    betas: Sequence[Tensor],
    targets: Sequence[int],
) -> Tensor:
    """Return the result of `reference.merge_links`."""
    dtype, pooled = pooled.dtype, readable(pooled).contiguous()
    L, B, H, square, most = probabilities.shape
    C, d, S = output_weights[0].shape[0], xs[0].shape[3], len(align_weights)
    size = round(square**0.5)
    out = empty((S, B, C, size, size), pooled, pooled.dtype)
    rows, columns = min(ROWS, padded(square)), 32 if launch_rules.heavy(most, d) else COLUMNS
    piece = 32 if launch_rules.heavy(most, d) else 64  # landmarks that are read together
    groups = {"x": xs, "align": align_weights, "bias": align_biases, "output": output_weights, "beta": betas}
    parameters = {f"{name}_ptrs": contiguous(g) for name, g in (groups | {"theta": thetas or betas}).items()}
    with on_device(pooled):
        _merge_links_kernel[(B * S, -(-square // rows), -(-C // columns))](
            pooled_ptr=pooled, probabilities_ptr=probabilities.contiguous(), **parameters, out_ptr=out, batch=B,
            LINKS=L, MAPS=S, TARGETS=tuple(targets),
            RANKS=tuple(x.shape[2] for x in xs), OFFSETS=firsts_of(w.shape[1] for w in align_weights), HEADS=H,
            most=most, PIECE=min(piece, padded(most)), d=d, D=padded(d), SQUARE=square, C=C, TAU=bool(thetas),
            ROWS=ROWS, COLUMNS=columns, CHUNK=CHUNK, PRECISION=precision(pooled.dtype),
            num_warps=launch_rules.warps(most, d), num_stages=devices.stages(pooled),
        )  # fmt: skip
    return out.to(dtype)
