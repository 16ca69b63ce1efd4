"""Triton kernels that choose landmarks: leverage scores, search for the largest scores, and pivoted Cholesky.

One program processes one image b and head h, and loops over the keys of this (b, h) in chunks. The result of an image
does not depend on the other images of the batch. Implementation:

- Leverage: KᵀK + γI is factorised as L P Lᵀ, with L unit lower triangular and P diagonal. The score of a key k
  is ‖P^-½ L⁻¹ k‖², which is never negative. The kernels apply L⁻¹ to a key by a triangular solve, in chunks
  of 16 columns. They do not compute the matrix L⁻¹, because a product with L⁻¹ has 2 to 10 times the error of
  the triangular solve if the keys span fewer than d directions.
- The r largest scores are found without sorting all scores. If the bits of non-negative floating-point
  numbers are read as integers, these integers have the same order as the numbers. The r-th largest score,
  called the threshold, can therefore be found bit by bit. The threshold starts as 0. For each bit, from the
  highest to the lowest, the candidate is the threshold with this bit set. If r or more scores are greater
  than or equal to the candidate, the candidate becomes the new threshold.
- Among equal scores, the lower index is chosen. NaN counts as infinity, as in torch. The chosen indices are
  therefore always distinct and in range, even if keys contain NaN.
- Pivoted Cholesky stores its factor, r rows of N numbers, in global memory. The residual of a chosen key is
  set to −∞, so that the key is not chosen again.
- Uniform landmarks need no scores. A kernel that uses them computes their indices itself, which saves launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import register_limit
from ..options import LandmarkOptions
from ..parts import (
    INFINITY,
    empty,
    finest_precision,
    load_tokens,
    on_device,
    padded,
    readable,
    rms_factor,
    strides,
    wide_dot,
)

TIE_TOLERANCE = tl.constexpr(1e-5)
EPSILON = tl.constexpr(2.0**-23)
BLOCK = 32  # keys in a chunk
CHUNK = tl.constexpr(16)  # columns that are eliminated and applied to keys together
TILE = tl.constexpr(1024)  # scores that are compared together


@triton.jit
def add_gram(
    gram, key_ptr, rows, valid, n_stride, d_stride, d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return gram [D, D] plus KᵀK of one chunk of keys."""
    key = load_tokens(key_ptr, rows, valid, n_stride, d_stride, d, D)
    key = key.to(tl.float32) * rms_factor(key, d, NORMALISE)[:, None]
    return gram + wide_dot(tl.trans(key), key, PRECISION)


@triton.jit
def eliminate_below(matrix, d: tl.constexpr, D: tl.constexpr):
    """Factorise a symmetric matrix as L P Lᵀ, with L unit lower triangular and P diagonal, by forward elimination.

    Row operations eliminate one column after the other. CHUNK neighbouring columns form a chunk. The row
    operations of a chunk are combined into one update of a vector k: k += F[:, chunk] k[chunk], where F is a
    strictly lower triangular matrix. To compute L⁻¹ k, apply the updates of all chunks, from the first chunk
    to the last. F is stored in place of the entries below the diagonal, which the elimination would set to zero.

    After each step, the part of the matrix that still has to be eliminated is bitwise symmetric. The error of
    the factorisation is therefore about as large as the rounding error of the matrix.

    Returns:
        The matrix F [D, D] of the row operations, 1/√P [D], and whether every pivot is positive and finite.
    """
    i = tl.arange(0, D)
    good = 1
    for step in range(d):
        row = tl.sum(tl.where(i[:, None] == step, matrix, 0.0), 0)  # [D]
        column = tl.sum(tl.where(i[None, :] == step, matrix, 0.0), 1)  # [D]
        scale = tl.rsqrt(tl.sum(tl.where(i == step, row, 0.0), 0))
        good = tl.where((scale > 0) & (scale < INFINITY), good, 0)
        column = tl.where(i > step, column * scale, 0.0)
        row = tl.where(i >= step // CHUNK * CHUNK, row * scale, 0.0)
        reduced = matrix - column[:, None] * row[None, :]
        matrix = tl.where((i[None, :] == step) & (i[:, None] > step), column[:, None] * -scale, reduced)
    pivots = tl.sum(tl.where(i[:, None] == i[None, :], matrix, 0.0), 1)
    return tl.where(i[:, None] > i[None, :], matrix, 0.0), tl.rsqrt(pivots), good


@triton.jit
def factorise(gram, gamma, d: tl.constexpr, D: tl.constexpr):
    """Apply `eliminate_below` to gram + γI.

    If the keys span fewer than d directions, some pivots are as small as the rounding error, and the
    factorisation can fail. If it fails, the function increases γ by an estimate of the rounding error,
    d·2⁻²³·tr(gram), and factorises again.
    """
    i = tl.arange(0, D)
    diagonal = i[:, None] == i[None, :]
    # Products in three tf32 passes are not bitwise symmetric, so the lower triangle replaces the upper one.
    gram = tl.where(i[:, None] >= i[None, :], gram, tl.trans(gram))
    factor, scales, good = eliminate_below(tl.where(diagonal, gram + gamma, gram), d, D)
    if good == 0:
        trace = tl.sum(tl.sum(tl.where(diagonal, gram, 0.0), 1), 0)
        matrix = tl.where(diagonal, gram + (gamma + d * EPSILON * trace), gram)
        factor, scales, _ = eliminate_below(matrix, d, D)
    return factor, scales


@triton.jit
def chunk_of_columns(matrix, chunk, ROWS: tl.constexpr, D: tl.constexpr):
    """Return the columns of one chunk, [ROWS, CHUNK], of a matrix [ROWS, D]."""
    chunks = tl.reshape(matrix, [ROWS, D // CHUNK, CHUNK])
    here = (tl.arange(0, D // CHUNK) == chunk)[None, :, None]
    return tl.sum(tl.where(here, chunks, 0.0), 1)


@triton.jit
def store_scores(
    scores_ptr, factor, scales, key_ptr, rows, valid, n_stride, d_stride, d: tl.constexpr, D: tl.constexpr,
    NORMALISE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store ‖P^-½ L⁻¹ k‖² of one chunk of keys."""
    key = load_tokens(key_ptr, rows, valid, n_stride, d_stride, d, D)
    key = key.to(tl.float32) * rms_factor(key, d, NORMALISE)[:, None]
    for chunk in range((d + CHUNK - 1) // CHUNK):
        columns = chunk_of_columns(factor, chunk, D, D)
        key += wide_dot(chunk_of_columns(key, chunk, BLOCK, D), tl.trans(columns), PRECISION)
    key *= scales[None, :]
    tl.store(scores_ptr + rows, tl.sum(key * key, 1), mask=valid)


@triton.jit
def store_leverage(
    scores_ptr, key_ptr, N, n_stride, d_stride, gamma, d: tl.constexpr, D: tl.constexpr,
    NORMALISE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the leverage scores of all keys of one (b, h)."""
    gram = tl.zeros([D, D], tl.float32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        gram = add_gram(gram, key_ptr, rows, rows < N, n_stride, d_stride, d, D, NORMALISE, PRECISION)
    factor, scales = factorise(gram, gamma, d, D)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        store_scores(
            scores_ptr, factor, scales, key_ptr, rows, rows < N, n_stride, d_stride, d, D, NORMALISE, BLOCK,
            PRECISION,
        )  # fmt: skip


@triton.jit
def load_bits(scores_ptr, start, N):
    """Load a tile of scores [TILE] as integers, so that a larger score gives a larger integer.

    NaN is loaded as infinity. The padding after the last score is -1, which is less than every score.
    """
    rows = start + tl.arange(0, TILE)
    score = tl.load(scores_ptr + rows, mask=rows < N, other=0.0)
    bits = tl.where(score == score, score, INFINITY).to(tl.int32, bitcast=True)
    return tl.where(rows < N, bits, -1)


@triton.jit
def count_from(first, scores_ptr, N, least):
    """Count the scores greater than or equal to `least`. `first` is the first tile of scores, already loaded."""
    count = (first >= least).to(tl.int32)
    for start in range(TILE, N, TILE):
        count += (load_bits(scores_ptr, start, N) >= least).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def store_largest(landmarks_ptr, scores_ptr, N, rank: tl.constexpr, R: tl.constexpr):
    """Store the indices of the `rank` largest scores, in descending order of the scores. No score may be negative."""
    first = load_bits(scores_ptr, 0, N)
    threshold = 0  # becomes the smallest of the `rank` largest scores
    for step in range(31):
        candidate = threshold | (1 << (30 - step))
        threshold = tl.where(count_from(first, scores_ptr, N, candidate) >= rank, candidate, threshold)
    ties = rank - count_from(first, scores_ptr, N, threshold + 1)
    above, equal = 0, 0  # counts of scores above the threshold and equal to it, in the tiles before this one
    for start in range(0, N, TILE):
        bits = load_bits(scores_ptr, start, N)
        both = (bits > threshold).to(tl.int32) * 65536 + (bits == threshold).to(tl.int32)
        before = tl.cumsum(both, 0) - both
        ties_before = equal + (before & 65535)
        chosen = (bits > threshold) | ((bits == threshold) & (ties_before < ties))
        slot = above + (before >> 16) + tl.minimum(ties_before, ties)
        tl.store(landmarks_ptr + slot, (start + tl.arange(0, TILE)).to(tl.int64), mask=chosen)
        total = tl.sum(both, 0)
        above += total >> 16
        equal += total & 65535
    tl.debug_barrier()
    # The chosen indices are ascending here. Sort them by score; among equal scores, the lower index comes first.
    i = tl.arange(0, R)
    index = tl.load(landmarks_ptr + i, mask=i < rank, other=0)
    score = load_scores(scores_ptr, index, i < rank)
    other = load_scores(scores_ptr, tl.load(landmarks_ptr + i, mask=i < rank, other=0), i < rank)[None, :]
    earlier = (other == score[:, None]) & (i[None, :] < i[:, None])
    place = tl.sum(((other > score[:, None]) | earlier).to(tl.int32), 1)
    tl.debug_barrier()
    tl.store(landmarks_ptr + place, index, mask=i < rank)


@triton.jit
def load_scores(scores_ptr, index, valid):
    score = tl.load(scores_ptr + index, mask=valid, other=-INFINITY)
    return tl.where(score == score, score, INFINITY)


@triton.jit
def store_pivots(
    landmarks_ptr, residual_ptr, factor_ptr, key_ptr, N, n_stride, d_stride, scale, rank: tl.constexpr,
    R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the pivots of pivoted Cholesky of exp(K Kᵀ s), with s = `scale`, for one (b, h).

    `residual_ptr` points to memory for N fp32 numbers. `factor_ptr` points to memory for rank × N fp32 numbers.
    """
    columns = tl.arange(0, D)
    steps = tl.arange(0, R)
    shift = -INFINITY
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        key = load_tokens(key_ptr, rows, rows < N, n_stride, d_stride, d, D).to(tl.float32)
        norm = tl.sum(key * key, 1) * scale
        factor = rms_factor(key, d, NORMALISE)
        norm = tl.where(rows < N, norm * factor * factor, -INFINITY)
        shift = tl.maximum(shift, tl.max(norm, 0))
        tl.store(residual_ptr + rows, norm, mask=rows < N)
    tl.debug_barrier()
    # A common factor exp(−shift) of all entries keeps exp in range and changes no comparison.
    largest = -INFINITY
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        residual = tl.exp(tl.load(residual_ptr + rows, mask=rows < N, other=-INFINITY) - shift)
        tl.debug_barrier()
        tl.store(residual_ptr + rows, residual, mask=rows < N)
        largest = tl.maximum(largest, tl.max(tl.where(rows < N, _free(residual), -INFINITY), 0))
    for step in range(rank):
        tl.debug_barrier()
        # Normalised keys have equal residuals at the start. The tolerance makes the choice independent of rounding.
        least = largest * (1.0 - TIE_TOLERANCE)
        pivot = N
        for start in range(0, N, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            free = _free(tl.load(residual_ptr + rows, mask=rows < N, other=-INFINITY))
            pivot = tl.minimum(pivot, tl.min(tl.where(free >= least, rows, N), 0))
        pivot = tl.minimum(pivot, N - 1)
        tl.store(landmarks_ptr + step, pivot.to(tl.int64))
        value = tl.load(residual_ptr + pivot)
        pivot_offsets = pivot.to(tl.int64) * n_stride + columns.to(tl.int64) * d_stride
        chosen = tl.load(key_ptr + pivot_offsets, mask=columns < d, other=0.0).to(tl.float32)  # [D]
        chosen = chosen * rms_factor(chosen[None, :], d, NORMALISE)
        done = tl.load(factor_ptr + steps.to(tl.int64) * N + pivot, mask=steps < step, other=0.0)  # [R]
        tl.debug_barrier()
        largest = -INFINITY
        for start in range(0, N, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            key = load_tokens(key_ptr, rows, rows < N, n_stride, d_stride, d, D).to(tl.float32)
            product = tl.sum(key * chosen[None, :], 1) * rms_factor(key, d, NORMALISE)
            before = tl.load(
                factor_ptr + steps.to(tl.int64)[:, None] * N + rows[None, :],
                mask=(steps < step)[:, None] & (rows < N)[None, :],
                other=0.0,
            )  # [R, BLOCK]
            column = tl.exp(product * scale - shift) - tl.sum(before * done[:, None], 0)
            column = tl.where(value > 0, column / tl.sqrt(value), 0.0)
            tl.store(factor_ptr + tl.cast(step, tl.int64) * N + rows, column, mask=rows < N)
            residual = tl.load(residual_ptr + rows, mask=rows < N, other=-INFINITY)
            taken = (residual == -INFINITY) | (rows == pivot)
            residual = tl.where(taken, -INFINITY, residual - column * column)
            tl.debug_barrier()
            tl.store(residual_ptr + rows, residual, mask=rows < N)
            largest = tl.maximum(largest, tl.max(_free(residual), 0))


@triton.jit
def _free(residual):
    """Convert the residual of a key to the value that the search for the next pivot compares.

    The result is −∞ for a key that was already chosen, infinity for a NaN residual, and max(residual, 0) otherwise.
    """
    known = tl.where(residual == residual, tl.maximum(residual, 0.0), INFINITY)
    return tl.where(residual == -INFINITY, -INFINITY, known)


@triton.jit(do_not_specialize=["N"])
def _leverage_kernel(
    key_ptr, scores_ptr, N, heads, key_stride_b, key_stride_h, key_stride_n, key_stride_d, gamma,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    key_ptr += head // heads * key_stride_b + head % heads * key_stride_h
    store_leverage(
        scores_ptr + head * N, key_ptr, N, key_stride_n, key_stride_d, gamma, d, D, False, BLOCK, PRECISION
    )


@triton.jit(do_not_specialize=["N"])
def _select_kernel(
    key_ptr, landmarks_ptr, residual_ptr, factor_ptr, N, heads, key_stride_b, key_stride_h, key_stride_n,
    key_stride_d, gamma, scale, rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    NORMALISE: tl.constexpr, METHOD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Choose the landmarks of one (b, h)."""
    head = tl.program_id(0).to(tl.int64)
    key_ptr += head // heads * key_stride_b + head % heads * key_stride_h
    choose(
        key_ptr, landmarks_ptr + head * rank, residual_ptr + head * N, factor_ptr + head * rank * N, N,
        key_stride_n, key_stride_d, gamma, scale, rank, R, d, D, NORMALISE, METHOD, BLOCK, PRECISION,
    )  # fmt: skip


@triton.jit
def choose(
    key_ptr, landmarks_ptr, residual_ptr, factor_ptr, N, n_stride, d_stride, gamma, scale, rank: tl.constexpr,
    R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr, METHOD: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the landmarks of one (b, h). The caller needs a barrier before it reads the landmarks.

    For leverage, `residual_ptr` points to memory for the scores.
    """
    if METHOD == "uniform":
        i = tl.arange(0, R)
        index = (2 * i + 1).to(tl.int64) * N // (2 * rank)
        tl.store(landmarks_ptr + i, index, mask=i < rank)
    elif METHOD == "pivoted_cholesky":
        store_pivots(
            landmarks_ptr, residual_ptr, factor_ptr, key_ptr, N, n_stride, d_stride, scale, rank, R, d, D,
            NORMALISE, BLOCK,
        )  # fmt: skip
    else:
        store_leverage(residual_ptr, key_ptr, N, n_stride, d_stride, gamma, d, D, NORMALISE, BLOCK, PRECISION)
        tl.debug_barrier()
        store_largest(landmarks_ptr, residual_ptr, N, rank, R)


def ridge_leverage_scores(key: Tensor, gamma: float) -> Tensor:
    """Return the scores (B, H, N), fp32, of keys (B, H, N, d) of any strides."""
    B, H, N, d = key.shape
    keys = readable(key)
    scores = empty((B, H, N), key, torch.float32)
    with on_device(key):
        _leverage_kernel[(B * H,)](
            key_ptr=keys, scores_ptr=scores, N=N, heads=H, **strides(key=keys), gamma=gamma, d=d, D=padded(d),
            BLOCK=BLOCK, PRECISION=finest_precision(keys.dtype, d), **launch(d),
        )  # fmt: skip
    return scores


def select_landmarks(key: Tensor, random: Tensor | None, options: LandmarkOptions, scale: float) -> Tensor:
    """Return the indices (B, H, r) of landmarks chosen by `options.method`, a method of `METHODS_OF_KERNELS`."""
    return selected(key, options, scale, normalise=False)


def selected(key: Tensor, options: LandmarkOptions, scale: float, *, normalise: bool) -> Tensor:
    """RMS-normalise the keys if `normalise` is true, then choose landmarks as `select_landmarks` does."""
    B, H, N, d = key.shape
    keys, rank = readable(key), options.rank
    landmarks = empty((B, H, rank), key, torch.int64)
    residual, factor = workspace(key, options)
    with on_device(key):
        _select_kernel[(B * H,)](
            key_ptr=keys, landmarks_ptr=landmarks, residual_ptr=residual, factor_ptr=factor, N=N, heads=H,
            **strides(key=keys), gamma=options.gamma, scale=scale, rank=rank, R=padded(rank), d=d, D=padded(d),
            NORMALISE=normalise, METHOD=options.method, BLOCK=BLOCK,
            PRECISION=finest_precision(keys.dtype, d), **launch(d),
        )  # fmt: skip
    return landmarks


def workspace(key: Tensor, options: LandmarkOptions) -> tuple[Tensor, Tensor]:
    """Allocate memory for scores or residuals (B, H, N), and for the factor of pivoted Cholesky (B, H, r, N)."""
    B, H, N, _ = key.shape
    if options.method == "uniform":
        unused = empty((1,), key, torch.float32)
        return unused, unused
    residual = empty((B, H, N), key, torch.float32)
    if options.method != "pivoted_cholesky":
        return residual, residual
    return residual, empty((B, H, options.rank, N), key, torch.float32)


def launch(d: int) -> dict[str, int]:
    """Return the launch options of a program that holds a d×d tile."""
    return {"num_warps": 4 if d <= 64 else 8, **register_limit()}
