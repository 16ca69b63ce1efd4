"""Nyström cross-attention in plain PyTorch (docs/METHOD.md §2; section 3.3 of the article).

    K̃ = K[I]                  (r × d)
    L = softmax(Q K̃ᵀ s)       (N_q × r)
    W = softmax(K̃ K̃ᵀ s)       (r × r)
    R = softmax(K̃ Kᵀ s)       (r × N_k)
    X = (W + λI)⁻¹ (R V)      (r × d)
    Y = L X                   (N_q × d)

The shapes are (B, H, N_q, d) for Q, (B, H, N_k, d) for K and V, and (B, H, r) for the landmark indices I. In
λI, I is the identity matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import may_ask, wide_dtype
from ..conditioning import reference as conditioning
from ..landmarks import methods as landmark_methods
from ..options import KeySide, SolveOptions

Solve = Callable[[Tensor, Tensor, SolveOptions], tuple[Tensor, Tensor]]
NORM_FLOOR = 1e-6


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    scale: float,
    qk_norm: str | None,
    solve_dtype: str,
    solve: SolveOptions,
) -> Tensor:
    """Return Y (B, H, N_q, d) in the query's dtype; intermediate results are fp32 (fp64 for fp64 inputs).

    With `solve_dtype="model"`, each softmax is computed in the query's dtype.
    """
    Q = normalised_query(query, qk_norm)
    block_dtype = query.dtype if solve_dtype == "model" else Q.dtype
    keys, logits, rhs = _key_side(key, value, landmarks, scale, qk_norm, block_dtype)
    X, _ = conditioning.landmark_solve(logits, rhs, solve)
    L = _block(Q, keys, scale, block_dtype)
    return (L @ X).to(query.dtype)


def landmark_system(
    key: Tensor, value: Tensor, landmarks: Tensor, scale: float, qk_norm: str | None, solve_dtype: str
) -> tuple[Tensor, Tensor]:
    """Return the two inputs of `landmark_solve`.

    The first input is K̃K̃ᵀs (B, H, r, r), the logits of W. The second input is the product R V (B, H, r, d).
    """
    block_dtype = key.dtype if solve_dtype == "model" else wide_dtype(key.dtype)
    _, logits, rhs = _key_side(key, value, landmarks, scale, qk_norm, block_dtype)
    return logits, rhs


def landmark_context(
    side: KeySide, ridge: float, *, solve: Solve | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return K̃ without normalisation, X, the base-2 logsumexp of each row of K̃ Kᵀ s, and I.

    K̃ and X are (B, H, r, d). The logsumexp is (B, H, r). All three are fp32 (fp64 for fp64 inputs). `solve` computes X.
    If `solve` is None, `conditioning.landmark_solve` computes X.
    """
    keys, logits, rhs, lse, landmarks = landmark_blocks(side)
    X, _ = (solve or conditioning.landmark_solve)(logits, rhs, SolveOptions(ridge))
    return keys, X, lse, landmarks


def landmark_blocks(side: KeySide) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return K̃, the logits of W, the product R V, the base-2 logsumexp of each row of K̃ Kᵀ s, and I.

    The returned K̃ is not normalised. The other results are computed with normalised K̃ and K, unless `qk_norm` is None.
    I contains the indices of the landmarks.

    The logsumexp of a row is computed as the largest logit minus the logarithm of the largest probability. This needs
    one pass less over the r×N_k logits than `torch.logsumexp`.
    """
    K, landmarks = normalised_key(side.key, side.qk_norm), side.landmarks
    if landmarks is None:
        landmarks = landmark_methods.select_landmarks(K.detach(), None, side.choice, side.scale)
    normalised = take_landmarks(K, landmarks)
    scores = normalised @ K.mT * side.scale
    R = scores.softmax(-1)
    lse = (scores.detach().amax(-1) - R.detach().amax(-1).log()) / math.log(2)
    rhs, logits = R @ side.value.to(K.dtype), normalised @ normalised.mT * side.scale
    return take_landmarks(side.key.to(K.dtype), landmarks), logits, rhs, lse, landmarks.clone()


def landmark_attention(
    query: Tensor,
    keys: Tensor,
    x: Tensor,
    tau: Tensor | None,
    scale: float,
    qk_norm: str | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return τ Y, with Y = softmax(Q K̃ᵀ s) X, in the query's dtype, and two moments of Y.

    The first moment is the mean (B, H, d) of the rows of Y. The second moment is Σ‖y − mean‖² (B, H) over the rows y of
    Y. Without `statistics`, both moments are empty tensors. `keys` is K̃ without normalisation. `tau` is τ (H,), or None
    for τ = 1.
    """
    Q, K = normalised_query(query, qk_norm), normalised_key(keys, qk_norm)
    Y = _block(Q, K, scale, Q.dtype) @ x
    mean, spread = Y.new_empty(0), Y.new_empty(0)
    if statistics:
        mean = Y.detach().mean(-2)
        spread = (Y.detach() - mean[..., None, :]).square().sum((-1, -2))
    if tau is not None:
        Y = Y * tau.to(Y.dtype)[:, None, None]
    return Y.to(query.dtype), mean, spread


def _key_side(
    key: Tensor, value: Tensor, landmarks: Tensor, scale: float, qk_norm: str | None, block_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return K̃ (B, H, r, d), the logits of W (B, H, r, r) and R V (B, H, r, d)."""
    K = normalised_key(key, qk_norm)
    keys = take_landmarks(K, landmarks)
    R = _block(keys, K, scale, block_dtype)
    logits = keys @ keys.mT * scale
    if block_dtype != K.dtype:
        # Round W to the model's dtype. The solvers need symmetric logits: log W plus the logsumexp of each row.
        rounded = logits.to(block_dtype)
        W = rounded.softmax(-1).to(K.dtype)
        tiny = torch.finfo(block_dtype).smallest_normal
        logits = W.clamp(min=tiny).log() + rounded.to(K.dtype).logsumexp(-1, keepdim=True)
    return keys, logits, R @ value.to(K.dtype)


def take_landmarks(K: Tensor, landmarks: Tensor) -> Tensor:
    """Return K̃ = K[I], (B, H, r, d).

    Raises:
        ValueError: An index is out of range. Indices on a GPU or under torch.func are not checked (see `may_ask`).
    """
    if may_ask(landmarks):
        low, high = int(landmarks.min()), int(landmarks.max())
        if low < 0 or high >= K.shape[-2]:
            raise ValueError(f"landmarks holds indices {low}..{high}; expected 0..{K.shape[-2] - 1}")
    return K.gather(-2, landmarks[..., None].expand(*landmarks.shape, K.shape[-1]))


def normalised_query(query: Tensor, qk_norm: str | None) -> Tensor:
    """Return queries in fp32 (fp64 stays fp64), RMS-normalised per head and token if `qk_norm` is "both"."""
    wide = query.to(wide_dtype(query.dtype))
    return rms_normalise(wide) if qk_norm == "both" else wide


def normalised_key(key: Tensor, qk_norm: str | None) -> Tensor:
    """Return keys in fp32 (fp64 stays fp64), RMS-normalised per head and token if `qk_norm` is "keys" or "both"."""
    wide = key.to(wide_dtype(key.dtype))
    return wide if qk_norm is None else rms_normalise(wide)


def rms_normalise(x: Tensor) -> Tensor:
    """Return x·√d / (‖x‖ + 1e-6) along the last axis."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (x.shape[-1] ** 0.5 / (norm + NORM_FLOOR))


def _block(rows: Tensor, columns: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return softmax(rows columnsᵀ s) in the dtype of `rows`; only the softmax is computed in `dtype`."""
    logits = rows @ columns.mT * scale
    return logits.to(dtype).softmax(-1).to(rows.dtype)


def full_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return softmax(Q Kᵀ s) V in the query's dtype; intermediate results are fp32 (fp64 for fp64 inputs)."""
    Q, K, V = (tokens.to(wide_dtype(tokens.dtype)) for tokens in (query, key, value))
    return ((Q @ K.mT * scale).softmax(-1) @ V).to(query.dtype)
