"""Triton kernels of the scale statistic, DyT and the τ loss.

Scale statistic: for each head of each image, the tokens y are divided into shares. In the first launch, each program
computes the mean and M₂ = Σ‖y − mean‖² of one share. The program reads the share tile by tile, and combines the mean
and M₂ of each tile with the mean and M₂ of the previous tiles by Chan's formula. In the second launch, each program
computes μ and σ of one head over all images. It computes σ from the M₂ of all shares and from the distance of each
share's mean to μ. For σ, both launches add only squared distances, so there is no cancellation when the mean is large.

DyT: the backward pass divides the rows into shares and has two launches. The first launch computes dx, and
the contribution of each share to dα, dw and db. The second launch adds the contributions of all shares.

All sums have a fixed order, and the kernels use no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..parts import LOG2E, empty, load_tokens, on_device, padded, power_of_two, readable, token_offsets

TOKENS = 64  # tokens of a tile
LEAST_TOKENS_OF_A_SHARE = 512
ROWS, COLUMNS = 32, 64  # sides of a tile of DyT
LEAST_ROWS_OF_A_SHARE = 128
MOST_SHARES = 128


@triton.jit
def add_tile(count, mean, spread, y, inside):
    """Update a running count, mean [D] and M₂ (`spread`) with the rows of a tile y [BLOCK, D].

    Only the rows where the mask `inside` is true are used. If the head dimension d is less than D, the last D − d
    columns of y are padding and must be 0.
    """
    tile_count = tl.sum(inside.to(tl.float32), 0)
    tile_mean = tl.sum(tl.where(inside[:, None], y, 0.0), 0) / tl.maximum(tile_count, 1.0)
    centred = tl.where(inside[:, None], y - tile_mean[None, :], 0.0)
    together = tl.maximum(count + tile_count, 1.0)
    between = tile_mean - mean
    spread += tl.sum(tl.sum(centred * centred, 1), 0)
    spread += tl.sum(between * between, 0) * (count * tile_count / together)
    return count + tile_count, mean + between * (tile_count / together), spread


@triton.jit(do_not_specialize=["N", "share"])
def _moments_kernel(
    y_ptr, mean_ptr, spread_ptr, N, share, shares, heads, y_stride_b, y_stride_h, y_stride_n, y_stride_d,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the mean [d] and M₂ of one share of the tokens, for one head of one image."""
    program = tl.program_id(0).to(tl.int64)
    head, part = program // shares, (program % shares).to(tl.int32)
    y_ptr += head // heads * y_stride_b + head % heads * y_stride_h
    columns = tl.arange(0, D)
    count = 0.0
    mean = tl.zeros([D], tl.float32)
    spread = 0.0
    stop = tl.minimum((part + 1) * share, N)
    for first in range(part * share, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        y = load_tokens(y_ptr, rows, rows < stop, y_stride_n, y_stride_d, d, D).to(tl.float32)
        count, mean, spread = add_tile(count, mean, spread, y, rows < stop)
    tl.store(mean_ptr + program * d + columns, mean, mask=columns < d)
    tl.store(spread_ptr + program, spread)


@triton.jit(do_not_specialize=["N", "share", "batch"])
def _merge_kernel(
    part_mean_ptr, part_spread_ptr, mean_ptr, rms_ptr, N, share, shares, batch, heads, d: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute μ_h [d] and σ_h of one head from the shares of all images: one loop for μ_h, another for σ_h."""
    h = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    total = batch.to(tl.float32) * N.to(tl.float32)
    mean = tl.zeros([D], tl.float32)
    for first in range(0, batch * shares, BLOCK):
        part = first + tl.arange(0, BLOCK)
        count = tl.minimum(N - part % shares * share, share).to(tl.float32)
        index = (part // shares * heads + h) * shares + part % shares
        inside = (part < batch * shares)[:, None] & (columns < d)[None, :]
        means = tl.load(part_mean_ptr + index[:, None] * d + columns[None, :], mask=inside, other=0.0)
        mean += tl.sum(means * (count / total)[:, None], 0)
    spread = 0.0
    for first in range(0, batch * shares, BLOCK):
        part = first + tl.arange(0, BLOCK)
        count = tl.minimum(N - part % shares * share, share).to(tl.float32)
        index = (part // shares * heads + h) * shares + part % shares
        inside = (part < batch * shares)[:, None] & (columns < d)[None, :]
        means = tl.load(part_mean_ptr + index[:, None] * d + columns[None, :], mask=inside, other=0.0)
        between = tl.where(inside, means - mean[None, :], 0.0)
        within = tl.load(part_spread_ptr + index, mask=part < batch * shares, other=0.0)
        spread += tl.sum(within + count * tl.sum(between * between, 1), 0)
    tl.store(mean_ptr + h * d + columns, mean, mask=columns < d)
    tl.store(rms_ptr + h, tl.sqrt(spread / total))


@triton.jit(do_not_specialize=["N", "tiles", "batch"])
def _rms_backward_kernel(
    y_ptr, mean_ptr, rms_ptr, dmean_ptr, drms_ptr, dy_ptr, N, tiles, batch, heads, y_stride_b, y_stride_h,
    y_stride_n, y_stride_d, d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dY = dμ/(B N) + dσ (y − μ)/(B N σ) of one tile."""
    program = tl.program_id(0).to(tl.int64)
    head, tile = program // tiles, (program % tiles).to(tl.int32)
    h = head % heads
    y_ptr += head // heads * y_stride_b + h * y_stride_h
    columns = tl.arange(0, D)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    y = load_tokens(y_ptr, rows, rows < N, y_stride_n, y_stride_d, d, D).to(tl.float32)
    mean = tl.load(mean_ptr + h * d + columns, mask=columns < d, other=0.0)
    dmean = tl.load(dmean_ptr + h * d + columns, mask=columns < d, other=0.0)
    total = batch.to(tl.float32) * N.to(tl.float32)
    slope = tl.load(drms_ptr + h) / (tl.load(rms_ptr + h) * total)
    dy = (dmean / total)[None, :] + slope * (y - mean[None, :])
    offsets = head * N * d + token_offsets(rows, columns, d, 1)
    mask = (rows < N)[:, None] & (columns < d)[None, :]
    tl.store(dy_ptr + offsets, dy.to(dy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tau_loss_kernel(
    theta_ptrs, sigma_ptrs, out_ptr, reference, floor, LINKS: tl.constexpr, H: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, HEADS)
    total = 0.0
    for link in tl.static_range(LINKS):
        tau = tl.exp(tl.load(theta_ptrs[link] + h, mask=h < H, other=0.0).to(tl.float32))
        sigma = tl.load(sigma_ptrs[link] + h, mask=h < H, other=0.0).to(tl.float32)
        logs = tl.log((tau * sigma + floor) / reference)
        total += tl.sum(tl.where(h < H, logs * logs, 0.0), 0)
    tl.store(out_ptr, total / (LINKS * H))


def rms_scale(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the results of `reference.rms_scale`."""
    y = readable(y)
    B, H, N, d = y.shape
    share, shares = divide(N, TOKENS, LEAST_TOKENS_OF_A_SHARE)
    part_mean, part_spread = (
        empty((B, H, shares, d), y, torch.float32),
        empty((B, H, shares), y, torch.float32),
    )
    mean, rms = empty((H, d), y, torch.float32), empty((H,), y, torch.float32)
    shape = {"d": d, "D": padded(d), "BLOCK": TOKENS, "num_warps": 4}
    with on_device(y):
        _moments_kernel[(B * H * shares,)](
            y, part_mean, part_spread, N, share, shares, H, *y.stride(), **shape
        )
        _merge_kernel[(H,)](part_mean, part_spread, mean, rms, N, share, shares, B, H, **shape)
    return mean, rms


def rms_scale_backward(grads: Sequence[Tensor], results: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    """Return [dY] from `grads` = (dμ, dσ), the gradients of the results μ and σ of `rms_scale`."""
    (dmean, drms), (mean, rms) = grads, results
    dtype, y = y.dtype, readable(y)
    B, H, N, d = y.shape
    dy = empty((B, H, N, d), y, y.dtype)
    tiles = -(-N // TOKENS)
    with on_device(y):
        _rms_backward_kernel[(B * H * tiles,)](
            y, mean, rms, dmean.contiguous(), drms.contiguous(), dy, N, tiles, B, H, *y.stride(), d=d,
            D=padded(d), BLOCK=TOKENS, num_warps=4,
        )  # fmt: skip
    return [dy.to(dtype)]


@triton.jit
def tanh(x):
    """Return tanh(x) in fp32, accurate to 2 ulp: an odd polynomial for |x| below 0.55, else 1 − 2/(1 + e^{2|x|})."""
    size = tl.abs(x)
    square = x * x
    small = 0.0164107 * square - 0.05265554
    small = small * square + 0.13320422
    small = (small * square - 0.3333293) * square * x + x
    large = 1.0 - 2.0 / (1.0 + tl.exp2(size * (2.0 * LOG2E)))
    return tl.where(size < 0.55, small, tl.where(x < 0.0, -large, large))


@triton.jit
def row_offsets(rows, inner, outer_stride, inner_stride):
    """Return the 64-bit offsets of rows of a tensor (outer, inner, C).

    Row r has the index r // inner along the outer axis, and r % inner along the inner axis.
    """
    return (rows // inner).to(tl.int64) * outer_stride + (rows % inner).to(tl.int64) * inner_stride


@triton.jit(do_not_specialize=["M", "inner"])
def _dyt_kernel(
    x_ptr, alpha_ptr, weight_ptr, bias_ptr, out_ptr, M, inner, x_outer, x_inner, x_column, C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute w tanh(αx) + b of one tile."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < M)[:, None] & (columns < C)[None, :]
    offsets = row_offsets(rows, inner, x_outer, x_inner)[:, None] + columns.to(tl.int64)[None, :] * x_column
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    out = weight[None, :] * tanh(alpha * x) + bias[None, :]
    tl.store(out_ptr + token_offsets(rows, columns, C, 1), out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "inner", "share"])
def _dyt_backward_kernel(
    x_ptr, alpha_ptr, weight_ptr, dout_ptr, dx_ptr, parts_ptr, M, inner, share, x_outer, x_inner, x_column,
    dout_outer, dout_inner, dout_column, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute dx of one share of the rows, and the contribution of the share to dα, dw and db.

    The contributions to dα, dw and db are stored in `parts` [shares, 3, C], at the indices 0, 1 and 2 of the second
    axis. Although dα is a scalar, a share has one contribution to dα for each column.
    """
    part = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    alpha = tl.load(alpha_ptr).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    dalpha = tl.zeros([COLUMNS], tl.float32)
    dweight = tl.zeros([COLUMNS], tl.float32)
    dbias = tl.zeros([COLUMNS], tl.float32)
    stop = tl.minimum((part + 1) * share, M)
    for first in range(part * share, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < stop)[:, None] & (columns < C)[None, :]
        along = columns.to(tl.int64)[None, :]
        x_offsets = row_offsets(rows, inner, x_outer, x_inner)[:, None] + along * x_column
        dout_offsets = row_offsets(rows, inner, dout_outer, dout_inner)[:, None] + along * dout_column
        x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + dout_offsets, mask=mask, other=0.0).to(tl.float32)
        bounded = tanh(alpha * x)
        slope = dout * weight[None, :] * (1.0 - bounded * bounded)  # the gradient of αx
        tl.store(
            dx_ptr + token_offsets(rows, columns, C, 1),
            (slope * alpha).to(dx_ptr.dtype.element_ty),
            mask=mask,
        )
        dalpha += tl.sum(slope * x, 0)
        dweight += tl.sum(dout * bounded, 0)
        dbias += tl.sum(dout, 0)
    base = parts_ptr + part.to(tl.int64) * 3 * C + columns
    tl.store(base, dalpha, mask=columns < C)
    tl.store(base + C, dweight, mask=columns < C)
    tl.store(base + 2 * C, dbias, mask=columns < C)


@triton.jit(do_not_specialize=["shares"])
def _dyt_sum_kernel(
    parts_ptr, dalpha_ptr, dweight_ptr, dbias_ptr, shares, C: tl.constexpr, SHARES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute dα, dw and db by adding the contributions of all shares.

    The launch has only one program, because dα is a sum over all columns.
    """
    dalpha = 0.0
    for first in range(0, C, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        alphas = tl.zeros([COLUMNS], tl.float32)
        weights = tl.zeros([COLUMNS], tl.float32)
        biases = tl.zeros([COLUMNS], tl.float32)
        for other in range(0, shares, SHARES):
            part = other + tl.arange(0, SHARES)
            mask = (part < shares)[:, None] & (columns < C)[None, :]
            base = parts_ptr + part[:, None] * 3 * C + columns[None, :]
            alphas += tl.sum(tl.load(base, mask=mask, other=0.0), 0)
            weights += tl.sum(tl.load(base + C, mask=mask, other=0.0), 0)
            biases += tl.sum(tl.load(base + 2 * C, mask=mask, other=0.0), 0)
        dalpha += tl.sum(alphas, 0)
        tl.store(dweight_ptr + columns, weights.to(dweight_ptr.dtype.element_ty), mask=columns < C)
        tl.store(dbias_ptr + columns, biases.to(dbias_ptr.dtype.element_ty), mask=columns < C)
    tl.store(dalpha_ptr, dalpha)


def tau_loss(thetas: Sequence[Tensor], sigmas: Sequence[Tensor], reference: float, floor: float) -> Tensor:
    """Return the result of `reference.tau_loss`."""
    thetas, sigmas = ([readable(t).contiguous() for t in group] for group in (thetas, sigmas))
    H = thetas[0].shape[0]
    out = empty((), thetas[0], torch.float32)
    with on_device(out):
        _tau_loss_kernel[(1,)](
            tuple(thetas), tuple(sigmas), out, reference, floor, LINKS=len(thetas), H=H,
            HEADS=power_of_two(H), num_warps=1,
        )  # fmt: skip
    return out


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the result of `reference.dyt`, contiguous."""
    dtype, x = x.dtype, readable(x)
    rows = as_rows(x)
    outer, inner, C = rows.shape
    out = empty(tuple(x.shape), x, x.dtype)
    alpha, weight, bias = (readable(p).contiguous() for p in (alpha, weight, bias))
    with on_device(x):
        _dyt_kernel[(-(-outer * inner // ROWS), -(-C // COLUMNS))](
            rows, alpha, weight, bias, out, outer * inner, inner, **_row_strides(x=rows), C=C, ROWS=ROWS,
            COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return out.to(dtype)


def dyt_backward(
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> list[Tensor]:
    """Return [dx, dα, dw, db] from [dout]."""
    (dout,) = grads
    dtypes = x.dtype, alpha.dtype, weight.dtype, bias.dtype
    shape, rows, upstream = x.shape, as_rows(readable(x)), as_rows(readable(dout))
    if upstream.shape != rows.shape:  # `as_rows` split the axes of x and dout differently
        rows, upstream = (t.reshape(1, -1, t.shape[-1]) for t in (rows, upstream))
    outer, inner, C = rows.shape
    M = outer * inner
    share, shares = divide(M, ROWS, LEAST_ROWS_OF_A_SHARE, MOST_SHARES)
    parameters = [readable(p).contiguous() for p in (alpha, weight)]
    dx = empty((M, C), rows, rows.dtype)
    parts = empty((shares, 3, C), rows, torch.float32)
    dalpha, dweight, dbias = (empty(tuple(p.shape), rows, readable(p).dtype) for p in (alpha, weight, bias))
    with on_device(x):
        _dyt_backward_kernel[(shares, -(-C // COLUMNS))](
            rows, *parameters, upstream, dx, parts, M, inner, share, **_row_strides(x=rows, dout=upstream), C=C,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        _dyt_sum_kernel[(1,)](
            parts, dalpha, dweight, dbias, shares, C=C, SHARES=32, COLUMNS=COLUMNS, num_warps=4
        )
    gradients = (dx.view(shape), dalpha, dweight, dbias)
    return [gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)]


def _row_strides(**rows: Tensor) -> dict[str, int]:
    """Return the strides of tensors (outer, inner, C) as keyword arguments of a kernel.

    A tensor passed as `x=` gives the keyword arguments "x_outer", "x_inner" and "x_column".
    """
    return {
        f"{name}_{axis}": stride
        for name, tensor in rows.items()
        for axis, stride in zip(("outer", "inner", "column"), tensor.stride(), strict=True)
    }


def divide(count: int, block: int, least: int, most: int = 32) -> tuple[int, int]:
    """Divide `count` items into at most `most` shares. Return the number of items of a share and the number of shares.

    The number of items of a share is a multiple of `block` and at least `least`. Only the last share can be smaller.
    """
    share = max(least, -(-count // most))
    share = -(-share // block) * block
    return share, -(-count // share)


def as_rows(x: Tensor) -> Tensor:
    """Reshape x (…, C) to (outer, inner, C): as a view if the strides of x allow this, else as a copy."""
    for split in range(max(x.dim() - 1, 1)):
        outer, inner = x.shape[:split].numel(), x.shape[split:-1].numel()
        try:
            return x.view(outer, inner, x.shape[-1])
        except RuntimeError:
            continue
    return x.reshape(1, -1, x.shape[-1])
