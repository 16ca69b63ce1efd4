"""Triton kernels of the key side of Nyström attention: K̃ and X from K and V, and the gradients of K and V.

In this module, (b, h) is one head h of one image b. With at most 512 keys and r, d ≤ 64, the forward pass is
one launch, with one program per (b, h). The program chooses the landmarks, gathers K̃, computes W and R V (by
an online softmax) and solves (W + λI) X = R V.

With more than 512 keys, or with r or d above 64, the forward pass has several launches. The keys of each image and
head are divided into parts. In the launches for the leverage scores and for R V, each part has its own program. If r·d
is too large for one program, several programs compute what a part adds to R V, each for `launch_rules.PIECE` landmarks.
Further launches choose the landmarks and solve the system.

The backward pass first solves the transposed system and computes the gradient of K̃. It then computes dK and
dV of every tile of keys.

The solve is Gauss–Jordan elimination of A = W + λI without pivoting. The matrix A is D^-½ (S + λI) D^½, where S + λI is
symmetric positive definite and D is diagonal (docs/METHOD.md §2.1). A, Aᵀ and S + λI therefore have the same pivots,
which are positive in exact arithmetic. Rounding errors as large as λ can make a pivot zero or negative. In this case,
the program computes A again and eliminates with partial pivoting, as the reference does. If a logit of W is not finite,
X of the same image and head is NaN. Other images and heads are not affected.

K̃ is stored without normalisation. Its entries are then entries of K, which are exact in the dtype of the tokens, so
Q K̃ᵀ can be computed in this dtype. The normalisation is applied to the product: each column belongs to one landmark k,
and is multiplied by the factor √d / (‖k‖ + 1e-6) of this landmark. The disadvantage is that tokens above about 10¹⁸
overflow in the product and give NaN. The reference has no such overflow, because it normalises before the product.

The kernels multiply logits by log₂ e and use exp2 in place of exp. With A = W + λI and U = R V, the system is A X = U.
The gradients are dU = A⁻ᵀ dX, dA = −dU Xᵀ and dR = dU Vᵀ. Sums over keys are computed in a fixed order,
without atomics, so the results are bitwise reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import devices
from ..landmarks.kernels import (
    add_gram,
    choose,
    factorise,
    selected,
    store_largest,
    store_scores,
    workspace,
)
from ..options import KeySide
from ..parts import (
    INFINITY,
    LN2,
    LOG2E,
    empty,
    finest_precision,
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

CHUNK = 16  # entries of the inner axis of a product that are read together


@triton.jit
def gather(
    key_ptr, landmarks_ptr, first, N, n_stride, d_stride, rank: tl.constexpr, R: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return R rows of K̃, starting at row `first`, as [R, D], in the dtype in which the keys are stored.

    Landmark indices on a GPU are not checked in Python. Instead, this function returns a row of NaN for each
    index that is out of range.
    """
    i = first + tl.arange(0, R)
    index = tl.load(landmarks_ptr + i, mask=i < rank, other=0)
    inside = (index >= 0) & (index < N)
    keys = load_tokens(key_ptr, tl.where(inside, index, 0), i < rank, n_stride, d_stride, d, D)
    return tl.where(inside[:, None], keys, float("nan")).to(keys.dtype)


@triton.jit
def load_matrix(ptr, rows: tl.constexpr, R: tl.constexpr, columns: tl.constexpr, D: tl.constexpr):
    """Load a contiguous rows×columns matrix as [R, D], padded with zeros."""
    i, j = tl.arange(0, R), tl.arange(0, D)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(ptr + i[:, None] * columns + j[None, :], mask=inside, other=0.0)


@triton.jit
def load_columns(ptr, first, rows: tl.constexpr, R: tl.constexpr, columns: tl.constexpr, CHUNK: tl.constexpr):
    """Load CHUNK columns of a contiguous rows×columns matrix, starting at column `first`, as [R, CHUNK].

    Kernels use this function to compute a product chunk by chunk, because the whole factors may not fit in
    registers.
    """
    i, j = tl.arange(0, R), first + tl.arange(0, CHUNK)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(ptr + i[:, None] * columns + j[None, :], mask=inside, other=0.0)


@triton.jit
def load_rows(ptr, first, rows: tl.constexpr, CHUNK: tl.constexpr, columns: tl.constexpr, D: tl.constexpr):
    """Load CHUNK rows of a contiguous rows×columns matrix, starting at row `first`, as [CHUNK, D]."""
    i, j = first + tl.arange(0, CHUNK), tl.arange(0, D)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(ptr + i[:, None] * columns + j[None, :], mask=inside, other=0.0)


@triton.jit
def store_matrix(
    ptr, matrix, place, rows: tl.constexpr, R: tl.constexpr, columns: tl.constexpr, D: tl.constexpr
):
    """Store [R, D] to a contiguous rows×columns matrix; row i goes to row place[i]."""
    j = tl.arange(0, D)
    inside = (place < rows)[:, None] & (j < columns)[None, :]
    tl.store(ptr + place[:, None] * columns + j[None, :], matrix, mask=inside)


@triton.jit
def landmark_logits(
    keys_ptr, key_ptr, factor, scale, rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the logits of W for exp2: K̃K̃ᵀ s log₂ e [R, R], with normalised K̃.

    `keys_ptr` points to K̃ without normalisation, stored in fp32. The function casts this K̃ to the dtype of K, computes
    the product, and then multiplies row i and column i of the product by factor[i], the factor that normalises row i
    of K̃.
    """
    product = tl.zeros([R, R], tl.float32)
    for first in range(0, d, CHUNK):
        keys = load_columns(keys_ptr, first, rank, R, d, CHUNK).to(key_ptr.dtype.element_ty)
        product += tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    return product * (factor * (scale * LOG2E))[:, None] * factor[None, :]


@triton.jit
def landmark_softmax(logits, rank: tl.constexpr, R: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return W [R, R], the softmax of each row of the logits, or Wᵀ with TRANSPOSED.

    The logits are symmetric, so Wᵀ is the softmax of each column. Padding is zero.
    """
    i = tl.arange(0, R)
    inside = (i < rank)[:, None] & (i < rank)[None, :]
    logits = tl.where(inside, logits, -INFINITY)
    if TRANSPOSED:
        weights = tl.exp2(logits - tl.max(logits, 0)[None, :])
        weights = weights / tl.sum(weights, 0)[None, :]
    else:
        weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
    return tl.where(inside, weights, 0.0)


@triton.jit
def add_ridge(weights, ridge, rank: tl.constexpr, R: tl.constexpr):
    """Return A = W + λI with λ = ridge · tr(W)/r. The padding has ones on the diagonal."""
    i = tl.arange(0, R)
    diagonal = i[:, None] == i[None, :]
    lam = ridge * tl.sum(tl.sum(tl.where(diagonal, weights, 0.0), 1), 0) / rank
    return tl.where(diagonal, tl.where((i < rank)[:, None], weights + lam, 1.0), weights)


@triton.jit
def eliminate(matrix, rhs, rank: tl.constexpr, R: tl.constexpr):
    """Return matrix⁻¹ rhs, by elimination without pivoting, and whether every pivot is positive and finite."""
    i = tl.arange(0, R)
    good = 1
    for step in range(rank):
        here = i == step
        column = tl.sum(tl.where(here[None, :], matrix, 0.0), 1)  # [R]
        pivot = tl.sum(tl.where(here, column, 0.0), 0)
        good = tl.where((pivot > 0) & (pivot < INFINITY), good, 0)
        row = tl.sum(tl.where(here[:, None], matrix, 0.0), 0) / pivot  # [R]
        row_rhs = tl.sum(tl.where(here[:, None], rhs, 0.0), 0) / pivot  # [D]
        matrix = tl.where(here[:, None], row[None, :], matrix - column[:, None] * row[None, :])
        rhs = tl.where(here[:, None], row_rhs[None, :], rhs - column[:, None] * row_rhs[None, :])
    return rhs, good


@triton.jit
def eliminate_pivoting(matrix, rhs, rank: tl.constexpr, R: tl.constexpr):
    """Eliminate with partial pivoting; return matrix⁻¹ rhs with permuted rows, and the permutation `place` [R].

    Row i of the returned matrix is row place[i] of matrix⁻¹ rhs. The search for a pivot treats NaN as infinity, so that
    it never chooses the same row twice, even if the matrix contains NaN.
    """
    i = tl.arange(0, R)
    place = tl.where(i < rank, -1, i)
    for step in range(rank):
        column = tl.sum(tl.where((i == step)[None, :], matrix, 0.0), 1)
        size = tl.where(column == column, tl.abs(column), INFINITY)
        here = i == tl.argmax(tl.where(place < 0, size, -1.0), 0)
        pivot = tl.sum(tl.where(here, column, 0.0), 0)
        row = tl.sum(tl.where(here[:, None], matrix, 0.0), 0) / pivot
        row_rhs = tl.sum(tl.where(here[:, None], rhs, 0.0), 0) / pivot
        matrix = tl.where(here[:, None], row[None, :], matrix - column[:, None] * row[None, :])
        rhs = tl.where(here[:, None], row_rhs[None, :], rhs - column[:, None] * row_rhs[None, :])
        place = tl.where(here, step, place)
    return rhs, place


@triton.jit
def solve(
    solution_ptr, rhs_ptr, keys_ptr, key_ptr, factor, scale, ridge, rank: tl.constexpr, R: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store A⁻¹ rhs [r, d], or A⁻ᵀ rhs with TRANSPOSED.

    If a logit is not finite, all stored entries are NaN. `solution_ptr` and `rhs_ptr` can be equal.
    """
    i = tl.arange(0, R)
    logits = landmark_logits(keys_ptr, key_ptr, factor, scale, rank, R, d, CHUNK, PRECISION)
    broken = tl.sum(tl.sum(tl.where(tl.abs(logits) < INFINITY, 0, 1), 1), 0) > 0
    matrix = add_ridge(landmark_softmax(logits, rank, R, TRANSPOSED), ridge, rank, R)
    solution, good = eliminate(matrix, load_matrix(rhs_ptr, rank, R, d, D), rank, R)
    place = i
    if good == 0:
        logits = landmark_logits(keys_ptr, key_ptr, factor, scale, rank, R, d, CHUNK, PRECISION)
        matrix = add_ridge(landmark_softmax(logits, rank, R, TRANSPOSED), ridge, rank, R)
        solution, place = eliminate_pivoting(matrix, load_matrix(rhs_ptr, rank, R, d, D), rank, R)
    tl.debug_barrier()
    store_matrix(solution_ptr, tl.where(broken, float("nan"), solution), place, rank, R, d, D)


@triton.jit
def mix_values(
    keys, row_scale, key_ptr, value_ptr, start, stop, key_stride_n, key_stride_d, value_stride_n,
    value_stride_d, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return Σ exp2(logit − top) v [R, D], top [R] and Σ exp2(logit − top) [R] over the keys from start to stop − 1.

    The logits have one row for each row of `keys` [R, D]. `top` is the largest logit of each row. The key
    side passes landmarks as `keys`, and pointers to K and V as `key_ptr` and `value_ptr`. The query side
    passes queries as `keys`, and pointers to K̃ and X as `key_ptr` and `value_ptr`. K̃ and X are stored in
    fp32. The function casts K̃ to the dtype of the queries.
    """
    mixed = tl.zeros([R, D], tl.float32)
    top = tl.full([R], -INFINITY, tl.float32)
    total = tl.zeros([R], tl.float32)
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        key = load_tokens(key_ptr, rows, rows < stop, key_stride_n, key_stride_d, d, D)
        value = load_tokens(value_ptr, rows, rows < stop, value_stride_n, value_stride_d, d, D)
        key = key.to(keys.dtype)
        logits = tl.dot(keys, tl.trans(key), input_precision=PRECISION) * row_scale[:, None]
        logits = logits * rms_factor(key, d, NORMALISE)[None, :]
        logits = tl.where((rows < stop)[None, :], logits, -INFINITY)  # [R, BLOCK]
        new_top = tl.maximum(top, tl.max(logits, 1))
        finite_top = tl.where(new_top == -INFINITY, 0.0, new_top)
        weights = tl.exp2(logits - finite_top[:, None])
        kept = tl.exp2(top - finite_top)
        total = total * kept + tl.sum(weights, 1)
        mixed = mixed * kept[:, None] + wide_dot(weights, value, PRECISION)
        top = new_top
    return mixed, top, total


@triton.jit
def finish(
    x_ptr, lse_ptr, logits_ptr, mixed, top, total, keys_ptr, key_ptr, factor, scale, ridge,
    rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, SOLVE: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute X from the sums over all keys.

    Without SOLVE, compute R V and the logits of W instead, so that another solver can compute X.
    """
    i = tl.arange(0, R)
    tl.store(lse_ptr + i, top + tl.log2(total), mask=i < rank)
    store_matrix(x_ptr, mixed / total[:, None], i, rank, R, d, D)
    tl.debug_barrier()
    if SOLVE:
        solve(x_ptr, x_ptr, keys_ptr, key_ptr, factor, scale, ridge, rank, R, d, D, False, CHUNK, PRECISION)
    else:
        logits = landmark_logits(keys_ptr, key_ptr, factor, scale, rank, R, d, CHUNK, PRECISION) * LN2
        store_matrix(logits_ptr, logits, i, rank, R, rank, R)


@triton.jit(do_not_specialize=["N"])
def _context_kernel(
    key_ptr, value_ptr, landmarks_ptr, residual_ptr, pivot_factor_ptr, keys_ptr, x_ptr, lse_ptr, logits_ptr,
    N, heads, key_stride_b, key_stride_h, key_stride_n, key_stride_d, value_stride_b, value_stride_h,
    value_stride_n, value_stride_d, gamma, scale, ridge, rank: tl.constexpr, R: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr, CHOOSE: tl.constexpr, METHOD: tl.constexpr,
    SOLVE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    CHOICE: tl.constexpr,
):  # fmt: skip
    """Compute the whole key side of one (b, h)."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // heads, head % heads
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    landmarks_ptr += head * rank
    if CHOOSE:
        choose(
            key_ptr, landmarks_ptr, residual_ptr + head * N, pivot_factor_ptr + head * rank * N, N,
            key_stride_n, key_stride_d, gamma, scale, rank, R, d, D, NORMALISE, METHOD, BLOCK, CHOICE,
        )  # fmt: skip
        tl.debug_barrier()
    i = tl.arange(0, R)
    keys = gather(key_ptr, landmarks_ptr, 0, N, key_stride_n, key_stride_d, rank, R, d, D)
    store_matrix(keys_ptr + head * rank * d, keys.to(tl.float32), i, rank, R, d, D)
    factor = rms_factor(keys, d, NORMALISE)
    mixed, top, total = mix_values(
        keys, factor * (scale * LOG2E), key_ptr, value_ptr, 0, N, key_stride_n, key_stride_d, value_stride_n,
        value_stride_d, R, d, D, NORMALISE, BLOCK, PRECISION,
    )  # fmt: skip
    finish(
        x_ptr + head * rank * d, lse_ptr + head * rank, logits_ptr + head * rank * rank, mixed, top, total,
        keys_ptr + head * rank * d, key_ptr, factor, scale, ridge, rank, R, d, D, SOLVE, CHUNK, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "span"])
def _gram_kernel(
    key_ptr, gram_ptr, N, span, parts, heads, key_stride_b, key_stride_h, key_stride_n, key_stride_d,
    d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute KᵀK [d, d] of one part of the keys."""
    program = tl.program_id(0).to(tl.int64)
    head, part = program // parts, (program % parts).to(tl.int32)
    key_ptr += head // heads * key_stride_b + head % heads * key_stride_h
    stop = tl.minimum((part + 1) * span, N)
    gram = tl.zeros([D, D], tl.float32)
    for first in range(part * span, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        gram = add_gram(
            gram, key_ptr, rows, rows < stop, key_stride_n, key_stride_d, d, D, NORMALISE, PRECISION
        )
    store_matrix(gram_ptr + program * d * d, gram, tl.arange(0, D), d, D, d, D)


@triton.jit(do_not_specialize=["N", "span"])
def _scores_kernel(
    key_ptr, gram_ptr, scores_ptr, N, span, parts, heads, key_stride_b, key_stride_h, key_stride_n,
    key_stride_d, gamma, d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the leverage scores of one part of the keys.

    Every program sums the Gram matrices of all parts in the same order, so all programs use the same sum.
    """
    program = tl.program_id(0).to(tl.int64)
    head, part = program // parts, (program % parts).to(tl.int32)
    key_ptr += head // heads * key_stride_b + head % heads * key_stride_h
    gram = tl.zeros([D, D], tl.float32)
    for other in range(parts):
        gram += load_matrix(gram_ptr + (head * parts + other) * d * d, d, D, d, D)
    factor, scales = factorise(gram, gamma, d, D)
    stop = tl.minimum((part + 1) * span, N)
    for first in range(part * span, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        store_scores(
            scores_ptr + head * N, factor, scales, key_ptr, rows, rows < stop, key_stride_n, key_stride_d, d,
            D, NORMALISE, BLOCK, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _largest_kernel(scores_ptr, landmarks_ptr, N, rank: tl.constexpr, R: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    store_largest(landmarks_ptr + head * rank, scores_ptr + head * N, N, rank, R)


@triton.jit(do_not_specialize=["N", "span"])
def _mix_kernel(
    key_ptr, value_ptr, landmarks_ptr, mixed_ptr, top_ptr, total_ptr, N, span, parts, pieces, heads,
    key_stride_b, key_stride_h, key_stride_n, key_stride_d, value_stride_b, value_stride_h, value_stride_n,
    value_stride_d, scale, rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    NORMALISE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute what one part of the keys adds to R V, for one piece of the landmarks.

    The softmax is not normalised yet: `_solve_kernel` merges the parts and divides by the sum of the exponentials.
    """
    program = tl.program_id(0).to(tl.int64)
    first = (program % pieces).to(tl.int32) * R
    program = program // pieces
    head, part = program // parts, (program % parts).to(tl.int32)
    b, h = head // heads, head % heads
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    i = first + tl.arange(0, R)
    keys = gather(key_ptr, landmarks_ptr + head * rank, first, N, key_stride_n, key_stride_d, rank, R, d, D)
    row_scale = rms_factor(keys, d, NORMALISE) * (scale * LOG2E)
    mixed, top, total = mix_values(
        keys, row_scale, key_ptr, value_ptr, part * span, tl.minimum((part + 1) * span, N), key_stride_n,
        key_stride_d, value_stride_n, value_stride_d, R, d, D, NORMALISE, BLOCK, PRECISION,
    )  # fmt: skip
    store_matrix(mixed_ptr + program * rank * d, mixed, i, rank, R, d, D)
    tl.store(top_ptr + program * rank + i, top, mask=i < rank)
    tl.store(total_ptr + program * rank + i, total, mask=i < rank)


@triton.jit(do_not_specialize=["N"])
def _solve_kernel(
    key_ptr, landmarks_ptr, mixed_ptr, top_ptr, total_ptr, keys_ptr, x_ptr, lse_ptr, logits_ptr, N, parts,
    heads, key_stride_b, key_stride_h, key_stride_n, key_stride_d, scale, ridge, rank: tl.constexpr,
    R: tl.constexpr, d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr, SOLVE: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Merge what the parts of the keys add to R V, then compute the same results as `_context_kernel`.

    There is one program for each head of each image. It merges the parts in the order of the keys.
    """
    head = tl.program_id(0).to(tl.int64)
    key_ptr += head // heads * key_stride_b + head % heads * key_stride_h
    i = tl.arange(0, R)
    mixed = tl.zeros([R, D], tl.float32)
    top = tl.full([R], -INFINITY, tl.float32)
    total = tl.zeros([R], tl.float32)
    for part in range(parts):
        index = head * parts + part
        part_top = tl.load(top_ptr + index * rank + i, mask=i < rank, other=0.0)
        new_top = tl.maximum(top, part_top)
        finite_top = tl.where(new_top == -INFINITY, 0.0, new_top)
        kept, added = tl.exp2(top - finite_top), tl.exp2(part_top - finite_top)
        total = total * kept + tl.load(total_ptr + index * rank + i, mask=i < rank, other=1.0) * added
        part_mixed = load_matrix(mixed_ptr + index * rank * d, rank, R, d, D)
        mixed = mixed * kept[:, None] + part_mixed * added[:, None]
        top = new_top
    keys = gather(key_ptr, landmarks_ptr + head * rank, 0, N, key_stride_n, key_stride_d, rank, R, d, D)
    store_matrix(keys_ptr + head * rank * d, keys.to(tl.float32), i, rank, R, d, D)
    finish(
        x_ptr + head * rank * d, lse_ptr + head * rank, logits_ptr + head * rank * rank, mixed, top, total,
        keys_ptr + head * rank * d, key_ptr, rms_factor(keys, d, NORMALISE), scale, ridge, rank, R, d, D,
        SOLVE, CHUNK, PRECISION,
    )  # fmt: skip


@triton.jit
def load_keys(keys_ptr, key_ptr, rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr):
    """Load K̃ [R, D], which is stored in fp32, and cast it to the dtype of `key_ptr`.

    The cast is exact, because the entries of K̃ are entries of K, and K has this dtype.
    """
    return load_matrix(keys_ptr, rank, R, d, D).to(key_ptr.dtype.element_ty)


@triton.jit
def softmax_gradient(
    keys, row_scale, lse, du, delta, key, value, inside, d: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return probabilities, the gradient of their logits, and the factors [BLOCK] that normalise the rows of `key`.

    The probabilities and the gradient have one row for each row of `keys`, and one column for each row of `key`. The
    key side passes landmarks as `keys` and a tile of K as `key`. The query side passes queries and a tile of K̃.
    """
    columns = rms_factor(key, d, NORMALISE)
    logits = tl.dot(keys, tl.trans(key), input_precision=PRECISION) * row_scale[:, None] * columns[None, :]
    weights = tl.where(inside[None, :], tl.exp2(logits - lse[:, None]), 0.0)
    gradient = weights * (wide_dot(du, tl.trans(value), PRECISION) - delta[:, None])
    return weights, gradient, columns


@triton.jit
def landmark_gradient(
    gradient, keys, row_scale, lse, du, delta, key_ptr, value_ptr, start, stop, key_stride_n, key_stride_d,
    value_stride_n, value_stride_d, scale, d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `gradient` plus the gradient with respect to normalised K̃ through columns start to stop − 1 of R.

    R has one column for each key. The query side uses this function for the gradient with respect to normalised Q
    through L: it passes queries as `keys`, and pointers to K̃ and X as `key_ptr` and `value_ptr`.
    """
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        key = load_tokens(key_ptr, rows, rows < stop, key_stride_n, key_stride_d, d, D).to(keys.dtype)
        value = load_tokens(value_ptr, rows, rows < stop, value_stride_n, value_stride_d, d, D)
        _, dlogits, columns = softmax_gradient(
            keys, row_scale, lse, du, delta, key, value, rows < stop, d, NORMALISE, PRECISION
        )
        gradient += wide_dot(dlogits * (columns * scale)[None, :], key, PRECISION)
    return gradient


@triton.jit(do_not_specialize=["N"])
def _system_backward_kernel(
    key_ptr, value_ptr, keys_ptr, x_ptr, lse_ptr, dkeys_ptr, dx_ptr, dlogits_ptr, du_ptr, delta_ptr,
    gathered_ptr, N, heads, key_stride_b, key_stride_h, key_stride_n, key_stride_d, value_stride_b,
    value_stride_h, value_stride_n, value_stride_d, scale, ridge, rank: tl.constexpr, R: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr, SOLVE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dU, δ_i = Σ_e dU_ie U_ie and the gradient of the gathered keys K̃ of one (b, h).

    U is R V. The gradient of K̃ has three terms: the gradient through the matrix W, the gradient through the matrix R,
    and the gradient that the query side has computed (`dkeys_ptr`). With WHOLE, this kernel stores the sum of the three
    terms. Without WHOLE, it stores only the first term, as the gradient with respect to the normalised K̃.
    `_gathered_kernel` then computes the sum of the three terms.
    """
    head = tl.program_id(0).to(tl.int64)
    b, h = head // heads, head % heads
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    small = head * rank * d
    i = tl.arange(0, R)
    keys_ptr += small
    keys = load_keys(keys_ptr, key_ptr, rank, R, d, D)
    factor = rms_factor(keys, d, NORMALISE)
    du_ptr += small
    dlogits_ptr += head * rank * rank
    if SOLVE:
        solve(
            du_ptr, dx_ptr + small, keys_ptr, key_ptr, factor, scale, ridge, rank, R, d, D, True, CHUNK, PRECISION
        )  # fmt: skip
        tl.debug_barrier()
        dmatrix = tl.zeros([R, R], tl.float32)
        for first in range(0, d, CHUNK):
            du = load_columns(du_ptr, first, rank, R, d, CHUNK)
            dmatrix -= wide_dot(
                du, tl.trans(load_columns(x_ptr + small, first, rank, R, d, CHUNK)), PRECISION
            )
        weights = landmark_softmax(
            landmark_logits(keys_ptr, key_ptr, factor, scale, rank, R, d, CHUNK, PRECISION), rank, R, False
        )
        delta = -tl.sum(add_ridge(weights, ridge, rank, R) * dmatrix, 1)  # U = A X
        trace = tl.sum(tl.sum(tl.where(i[:, None] == i[None, :], dmatrix, 0.0), 1), 0)
        dmatrix = tl.where(i[:, None] == i[None, :], dmatrix + ridge / rank * trace, dmatrix)
        dlogits = weights * (dmatrix - tl.sum(weights * dmatrix, 1)[:, None])
        store_matrix(dlogits_ptr, dlogits, i, rank, R, rank, R)
    else:
        du = load_matrix(dx_ptr + small, rank, R, d, D)
        store_matrix(du_ptr, du, i, rank, R, d, D)
        delta = tl.sum(du * load_matrix(x_ptr + small, rank, R, d, D), 1)
    tl.store(delta_ptr + head * rank + i, delta, mask=i < rank)
    tl.debug_barrier()
    gradient = tl.zeros([R, D], tl.float32)
    for first in range(0, rank, CHUNK):
        both = load_columns(dlogits_ptr, first, rank, R, rank, CHUNK)
        both += tl.trans(load_rows(dlogits_ptr, first, rank, CHUNK, rank, R))
        chunk = load_rows(keys_ptr, first, rank, CHUNK, d, D)  # [CHUNK, D]
        normalised = chunk * (rms_factor(chunk, d, NORMALISE) * scale)[:, None]
        gradient += wide_dot(both, normalised, PRECISION)
    if WHOLE:
        du = load_matrix(du_ptr, rank, R, d, D)
        lse = tl.load(lse_ptr + head * rank + i, mask=i < rank, other=0.0)
        gradient = landmark_gradient(
            gradient, keys, factor * (scale * LOG2E), lse, du, delta, key_ptr, value_ptr, 0, N, key_stride_n,
            key_stride_d, value_stride_n, value_stride_d, scale, d, D, NORMALISE, BLOCK, PRECISION,
        )  # fmt: skip
        gradient = rms_factor_product(gradient, keys, d, NORMALISE)
        gradient += load_matrix(dkeys_ptr + small, rank, R, d, D)
    store_matrix(gathered_ptr + small, gradient, i, rank, R, d, D)


@triton.jit(do_not_specialize=["N", "span"])
def _landmarks_backward_kernel(
    key_ptr, value_ptr, keys_ptr, lse_ptr, du_ptr, delta_ptr, partial_ptr, N, span, parts, pieces, heads,
    key_stride_b, key_stride_h, key_stride_n, key_stride_d, value_stride_b, value_stride_h, value_stride_n,
    value_stride_d, scale, rank: tl.constexpr, R: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    NORMALISE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute what one part of the keys adds to the gradient of normalised K̃ through R, for one piece of landmarks.

    Only the columns of R that belong to this part of the keys are used. `_gathered_kernel` adds the results of all
    parts.
    """
    program = tl.program_id(0).to(tl.int64)
    first = (program % pieces).to(tl.int32) * R
    program = program // pieces
    head, part = program // parts, (program % parts).to(tl.int32)
    b, h = head // heads, head % heads
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    small = head * rank * d
    i = first + tl.arange(0, R)
    keys = load_rows(keys_ptr + small, first, rank, R, d, D).to(key_ptr.dtype.element_ty)
    du = load_rows(du_ptr + small, first, rank, R, d, D)
    lse = tl.load(lse_ptr + head * rank + i, mask=i < rank, other=0.0)
    delta = tl.load(delta_ptr + head * rank + i, mask=i < rank, other=0.0)
    row_scale = rms_factor(keys, d, NORMALISE) * (scale * LOG2E)
    gradient = landmark_gradient(
        tl.zeros([R, D], tl.float32), keys, row_scale, lse, du, delta, key_ptr, value_ptr, part * span,
        tl.minimum((part + 1) * span, N), key_stride_n, key_stride_d,
        value_stride_n, value_stride_d, scale, d, D, NORMALISE, BLOCK, PRECISION,
    )  # fmt: skip
    store_matrix(partial_ptr + program * rank * d, gradient, i, rank, R, d, D)


@triton.jit
def _gathered_kernel(
    keys_ptr, dkeys_ptr, partial_ptr, gathered_ptr, parts, rank: tl.constexpr, R: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Complete the gradient of the gathered keys K̃ of one (b, h).

    `_system_backward_kernel` has stored the gradient of the normalised K̃ through W. This kernel adds the gradients
    through R, which `_landmarks_backward_kernel` has computed for each part of the keys. It then applies the derivative
    of the normalisation, and adds the gradient of K̃ from the query side.
    """
    head = tl.program_id(0).to(tl.int64)
    small = head * rank * d
    gradient = load_matrix(gathered_ptr + small, rank, R, d, D)
    for part in range(parts):
        gradient += load_matrix(partial_ptr + (head * parts + part) * rank * d, rank, R, d, D)
    gradient = rms_factor_product(gradient, load_matrix(keys_ptr + small, rank, R, d, D), d, NORMALISE)
    gradient += load_matrix(dkeys_ptr + small, rank, R, d, D)
    tl.debug_barrier()
    store_matrix(gathered_ptr + small, gradient, tl.arange(0, R), rank, R, d, D)


@triton.jit(do_not_specialize=["N", "tiles"])
def _tokens_backward_kernel(
    key_ptr, value_ptr, landmarks_ptr, keys_ptr, lse_ptr, du_ptr, delta_ptr, gathered_ptr, dkey_ptr,
    dvalue_ptr, N, tiles, heads, key_stride_b, key_stride_h, key_stride_n, key_stride_d, value_stride_b,
    value_stride_h, value_stride_n, value_stride_d, scale, rank: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV of one tile of keys.

    If a key of the tile is a landmark, its row of dK also includes the gradient of the landmark's row of K̃.
    """
    program = tl.program_id(0).to(tl.int64)
    head, tile = program // tiles, program % tiles
    b, h = head // heads, head % heads
    small = head * rank * d
    rows = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside = rows < N
    key_ptr += b * key_stride_b + h * key_stride_h
    value_ptr += b * value_stride_b + h * value_stride_h
    key = load_tokens(key_ptr, rows, inside, key_stride_n, key_stride_d, d, D)
    value = load_tokens(value_ptr, rows, inside, value_stride_n, value_stride_d, d, D)
    dvalue = tl.zeros([BLOCK, D], tl.float32)
    dkey = tl.zeros([BLOCK, D], tl.float32)  # gradient of the normalised keys, through R
    gathered = tl.zeros([BLOCK, D], tl.float32)
    for first in range(0, rank, CHUNK):
        i = first + tl.arange(0, CHUNK)
        keys = load_rows(keys_ptr + small, first, rank, CHUNK, d, D).to(key_ptr.dtype.element_ty)
        du = load_rows(du_ptr + small, first, rank, CHUNK, d, D)
        lse = tl.load(lse_ptr + head * rank + i, mask=i < rank, other=0.0)
        delta = tl.load(delta_ptr + head * rank + i, mask=i < rank, other=0.0)
        factor = rms_factor(keys, d, NORMALISE)
        weights, dlogits, _ = softmax_gradient(
            keys, factor * (scale * LOG2E), lse, du, delta, key, value, inside, d, NORMALISE, PRECISION
        )  # [CHUNK, BLOCK]
        dvalue += wide_dot(tl.trans(weights), du, PRECISION)
        dkey += wide_dot(tl.trans(dlogits * (factor * scale)[:, None]), keys, PRECISION)
        index = tl.load(landmarks_ptr + head * rank + i, mask=i < rank, other=-1)
        chosen = (rows[:, None] == index[None, :]).to(tl.float32)  # [BLOCK, CHUNK]
        gathered += wide_dot(chosen, load_rows(gathered_ptr + small, first, rank, CHUNK, d, D), PRECISION)
    columns = tl.arange(0, D)
    offsets = head * N * d + token_offsets(rows, columns, d, 1)
    mask = inside[:, None] & (columns < d)[None, :]
    tl.store(dvalue_ptr + offsets, dvalue.to(dvalue_ptr.dtype.element_ty), mask=mask)
    dkey = rms_factor_product(dkey, key, d, NORMALISE) + gathered
    tl.store(dkey_ptr + offsets, dkey.to(dkey_ptr.dtype.element_ty), mask=mask)


def landmark_context(side: KeySide, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return K̃, X, the logsumexp and the landmark indices I, as `reference.landmark_context` does."""
    return _context(side, ridge)[:4]


def landmark_blocks(side: KeySide) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the same results as `reference.landmark_blocks`, computed by the kernels.

    The results are K̃, the logits of W, the product R V, the logsumexp and the landmark indices I.
    """
    keys, rhs, lse, landmarks, logits = _context(side, None)
    return keys, logits, rhs, lse, landmarks


def _context(side: KeySide, ridge: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return K̃, X or R V, the base-2 logsumexp of each row of K̃ Kᵀ s, the landmark indices I, and the logits of W.

    If `ridge` is a number, the system is solved: the second result is X, and the fifth result is an empty tensor. If
    `ridge` is None, the system is not solved: the second result is R V, and the fifth result holds the logits of W.
    """
    key, value, given, choice, scale = side.key, side.value, side.landmarks, side.choice, side.scale
    (B, H, N, d), rank, normalise = key.shape, choice.rank, side.qk_norm is not None
    key, value = readable(key), readable(value)
    landmarks = empty((B, H, rank), key, torch.int64) if given is None else given.contiguous().clone()
    keys, x = (empty((B, H, rank, d), key, torch.float32) for _ in range(2))
    lse = empty((B, H, rank), key, torch.float32)
    logits = empty((B, H, rank, rank) if ridge is None else (0,), key, torch.float32)
    shape = {"rank": rank, "R": padded(rank), "d": d, "D": padded(d), "NORMALISE": normalise}
    tile = launch_rules.key_side(rank, d, key.dtype, devices.capability(key))
    run = {"BLOCK": tile.block, "PRECISION": precision(key.dtype), **tile.options()}
    results = {"keys_ptr": keys, "x_ptr": x, "lse_ptr": lse, "logits_ptr": logits}
    system = {"scale": scale, "ridge": ridge or 0.0, "SOLVE": ridge is not None, "CHUNK": CHUNK}
    tokens = {"key_ptr": key, "value_ptr": value, **strides(key=key, value=value)}
    with on_device(key):
        if launch_rules.one_launch(N, rank, d):
            residual, factor = workspace(key, choice) if given is None else (x, x)
            _context_kernel[(B * H,)](
                **tokens, landmarks_ptr=landmarks, residual_ptr=residual, pivot_factor_ptr=factor, **results, N=N,
                heads=H, gamma=choice.gamma, **system, **shape, CHOOSE=given is None,
                METHOD=choice.method, CHOICE=finest_precision(key.dtype, d), **run,
            )  # fmt: skip
            return keys, x, lse, landmarks, logits
        span, parts = launch_rules.divide(N, tile.block, launch_rules.LEAST_KEYS_OF_A_PART)
        division = {"N": N, "parts": parts, "heads": H}
        if given is None and choice.method == "leverage":
            _choose_by_leverage(key, landmarks, choice.gamma, division | {"span": span}, shape, run)
        elif given is None:
            landmarks = selected(key, choice, scale, normalise=normalise)
        mixed = empty((B, H, parts, rank, d), key, torch.float32)
        top, total = (empty((B, H, parts, rank), key, torch.float32) for _ in range(2))
        sums = {"mixed_ptr": mixed, "top_ptr": top, "total_ptr": total, "landmarks_ptr": landmarks}
        piece = launch_rules.landmarks_of_a_program(rank, d)
        pieces = -(-rank // piece)
        _mix_kernel[(B * H * parts * pieces,)](
            **tokens, **sums, **division, span=span, pieces=pieces, scale=scale, **shape | {"R": piece}, **run
        )
        del run["BLOCK"]
        _solve_kernel[(B * H,)](
            key_ptr=key, **sums, **results, **division, **strides(key=key), **system, **shape, **run
        )
    return keys, x, lse, landmarks, logits


def _choose_by_leverage(
    key: Tensor,
    landmarks: Tensor,
    gamma: float,
    division: dict[str, int],
    shape: dict[str, Any],
    run: dict[str, Any],
) -> None:
    (B, H, N, d), rank, parts = key.shape, landmarks.shape[-1], division["parts"]
    gram = empty((B, H, parts, d, d), key, torch.float32)
    scores = empty((B, H, N), key, torch.float32)
    form = shape | run | division | {"PRECISION": finest_precision(key.dtype, d)} | strides(key=key)
    form = {name: value for name, value in form.items() if name not in ("rank", "R")}
    _gram_kernel[(B * H * parts,)](key_ptr=key, gram_ptr=gram, **form)
    _scores_kernel[(B * H * parts,)](key_ptr=key, gram_ptr=gram, scores_ptr=scores, gamma=gamma, **form)
    options = {name: value for name, value in run.items() if name not in ("BLOCK", "PRECISION")}
    _largest_kernel[(B * H,)](scores, landmarks, N, rank=rank, R=padded(rank), **options)


def landmark_context_backward(
    grads: Sequence[Tensor], results: Sequence[Tensor], side: KeySide, ridge: float
) -> list[Tensor]:
    """Return [dK, dV] from the gradients of K̃ and X."""
    return _context_backward((*grads, None), results, side, ridge)


def landmark_blocks_backward(
    grads: Sequence[Tensor], results: Sequence[Tensor], side: KeySide
) -> list[Tensor]:
    """Return [dK, dV] from the gradients of K̃, the logits and R V."""
    keys, _, *others = results
    dkeys, dlogits, drhs = grads
    return _context_backward((dkeys, drhs, dlogits), (keys, *others), side, 0.0)


def _context_backward(
    grads: Sequence[Tensor | None], results: Sequence[Tensor], side: KeySide, ridge: float
) -> list[Tensor]:
    """Return [dK, dV] from the gradients of the results of `_context`.

    If `_context` computed X, `grads` is dK̃, dX and None. If `_context` computed R V and the logits of W (for another
    solver), `grads` is dK̃, d(R V) and the gradient of the logits.
    """
    dkeys, dx, dlogits = (None if grad is None else grad.contiguous() for grad in grads)
    keys, x, lse, landmarks = results
    dtype, (B, H, N, d), rank = side.key.dtype, side.key.shape, landmarks.shape[-1]
    key, value = readable(side.key), readable(side.value)
    du, gathered = (empty((B, H, rank, d), key, torch.float32) for _ in range(2))
    delta = empty((B, H, rank), key, torch.float32)
    dkey, dvalue = (empty((B, H, N, d), key, key.dtype) for _ in range(2))
    tokens = {"key_ptr": key, "value_ptr": value, "N": N, "heads": H, **strides(key=key, value=value)}
    system = {"keys_ptr": keys, "lse_ptr": lse, "du_ptr": du, "delta_ptr": delta, "scale": side.scale}
    shape = {"rank": rank, "R": padded(rank), "d": d, "D": padded(d), "NORMALISE": side.qk_norm is not None}
    target = devices.capability(key)
    tile = launch_rules.key_side(rank, d, key.dtype, target)
    run = {"BLOCK": tile.block, "PRECISION": precision(key.dtype), **tile.options()}
    whole = launch_rules.one_launch_backward(N, rank, d, key.dtype)
    solved = dlogits is None
    dlogits = empty((B, H, rank, rank), key, torch.float32) if dlogits is None else dlogits
    with on_device(key):
        _system_backward_kernel[(B * H,)](
            **tokens, **system, x_ptr=x, dkeys_ptr=dkeys, dx_ptr=dx, dlogits_ptr=dlogits, gathered_ptr=gathered,
            ridge=ridge, **shape, SOLVE=solved, WHOLE=whole, CHUNK=CHUNK, **run,
        )  # fmt: skip
        if not whole:
            span, parts = launch_rules.divide(N, tile.block, launch_rules.LEAST_KEYS_OF_A_PART)
            partial = empty((B, H, parts, rank, d), key, torch.float32)
            piece = launch_rules.landmarks_of_a_gradient(rank, d, key.dtype)
            pieces = -(-rank // piece)
            _landmarks_backward_kernel[(B * H * parts * pieces,)](
                **tokens, **system, partial_ptr=partial, span=span, parts=parts, pieces=pieces,
                **shape | {"R": piece}, **run,
            )  # fmt: skip
            _gathered_kernel[(B * H,)](keys, dkeys, partial, gathered, parts, **shape, **tile.options())
        tile = launch_rules.key_tokens(rank, d, key.dtype, target)
        tiles = -(-N // tile.block)
        del shape["R"]
        _tokens_backward_kernel[(B * H * tiles,)](
            **tokens, **system, landmarks_ptr=landmarks, gathered_ptr=gathered, dkey_ptr=dkey, dvalue_ptr=dvalue,
            tiles=tiles, **shape, BLOCK=tile.block, CHUNK=CHUNK, PRECISION=run["PRECISION"], **tile.options(),
        )  # fmt: skip
    return [dkey.to(dtype), dvalue.to(dtype)]
