"""Nyström cross-attention in plain PyTorch (docs/METHOD.md §2, article 3.3).

    K̃ = K[I]   L = softmax(Q K̃ᵀ s)   R = softmax(K̃ Kᵀ s)   X = (W + λI)⁻¹ (R V)   Y = L X
    N_q×r      r×N_k                  W = softmax(K̃ K̃ᵀ s), r×r

Q (B, H, N_q, d); K, V (B, H, N_k, d); I (B, H, r).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import may_ask, wide_dtype
from ..conditioning import reference as conditioning
from ..landmarks import reference as landmark_choice
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
    """Y (B, H, N_q, d) in the query's dtype; everything in between is fp32 (fp64 for fp64)."""
    Q = normalised_query(query, qk_norm)
    block_dtype = query.dtype if solve_dtype == "model" else Q.dtype
    keys, logits, rhs = _key_side(key, value, landmarks, scale, qk_norm, block_dtype)
    X, _ = conditioning.landmark_solve(logits, rhs, solve)
    L = _block(Q, keys, scale, block_dtype)
    return (L @ X).to(query.dtype)


def landmark_system(
    key: Tensor, value: Tensor, landmarks: Tensor, scale: float, qk_norm: str | None, solve_dtype: str
) -> tuple[Tensor, Tensor]:
    """What `landmark_solve` is given: the logits K̃K̃ᵀs of W (B, H, r, r) and R V (B, H, r, d)."""
    block_dtype = key.dtype if solve_dtype == "model" else wide_dtype(key.dtype)
    _, logits, rhs = _key_side(key, value, landmarks, scale, qk_norm, block_dtype)
    return logits, rhs


def landmark_context(
    side: KeySide, ridge: float, *, solve: Solve | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The key side: K̃ as it was stored, X by the default solver, the logsumexp of R's rows over log 2 (B, H, r), and I.

    The first three are in the wide dtype. `solve` may stand in for the reference's.
    """
    keys, logits, rhs, lse, landmarks = landmark_blocks(side)
    X, _ = (solve or conditioning.landmark_solve)(logits, rhs, SolveOptions(ridge))
    return keys, X, lse, landmarks


def landmark_blocks(side: KeySide) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The key side up to the solve: K̃ as it was stored, the logits of W, R V, the logsumexp of R's rows, and I.

    The logsumexp of a row is its largest score less the logarithm of its largest probability: one pass over R fewer.
    """
    K, landmarks = normalised_key(side.key, side.qk_norm), side.landmarks
    if landmarks is None:
        landmarks = landmark_choice.select_landmarks(K.detach(), None, side.choice, side.scale)
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
    """The query side: τ softmax(Q K̃ᵀ s) X in the query's dtype, K̃ as it was stored, τ (H,) or None.

    With `statistics`, the mean (B, H, d) over tokens of what τ multiplies and Σ‖y − mean‖² (B, H); else two empty ones.
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
    """K̃ (B, H, r, d), logits (B, H, r, r) and R V (B, H, r, d)."""
    K = normalised_key(key, qk_norm)
    keys = take_landmarks(K, landmarks)
    R = _block(keys, K, scale, block_dtype)
    logits = keys @ keys.mT * scale
    if block_dtype != K.dtype:
        # W as the model's dtype holds it; its rows' logsumexp brings back the symmetry of the logits.
        rounded = logits.to(block_dtype)
        W = rounded.softmax(-1).to(K.dtype)
        tiny = torch.finfo(block_dtype).smallest_normal
        logits = W.clamp(min=tiny).log() + rounded.to(K.dtype).logsumexp(-1, keepdim=True)
    return keys, logits, R @ value.to(K.dtype)


def take_landmarks(K: Tensor, landmarks: Tensor) -> Tensor:
    """K̃ = K[I], (B, H, r, d); an index out of range is a ValueError where Python may ask."""
    if may_ask(landmarks):
        low, high = int(landmarks.min()), int(landmarks.max())
        if low < 0 or high >= K.shape[-2]:
            raise ValueError(f"landmarks holds indices {low}..{high}; expected 0..{K.shape[-2] - 1}")
    return K.gather(-2, landmarks[..., None].expand(*landmarks.shape, K.shape[-1]))


def normalised_query(query: Tensor, qk_norm: str | None) -> Tensor:
    """Queries in the wide dtype, RMS-normalised per head and token where "both" asks for it."""
    wide = query.to(wide_dtype(query.dtype))
    return rms_normalise(wide) if qk_norm == "both" else wide


def normalised_key(key: Tensor, qk_norm: str | None) -> Tensor:
    """Keys in the wide dtype, RMS-normalised per head and token where "keys" or "both" asks for it."""
    wide = key.to(wide_dtype(key.dtype))
    return wide if qk_norm is None else rms_normalise(wide)


def rms_normalise(x: Tensor) -> Tensor:
    """x·√d / (‖x‖ + 1e-6) along the last axis."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (x.shape[-1] ** 0.5 / (norm + NORM_FLOOR))


def _block(rows: Tensor, columns: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(rows columnsᵀ s), formed in `dtype` and returned in the dtype of `rows`."""
    logits = rows @ columns.mT * scale
    return logits.to(dtype).softmax(-1).to(rows.dtype)


def full_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(Q Kᵀ s) V in the query's dtype, fp32 (fp64 for fp64) in between."""
    Q, K, V = (tokens.to(wide_dtype(tokens.dtype)) for tokens in (query, key, value))
    return ((Q @ K.mT * scale).softmax(-1) @ V).to(query.dtype)
