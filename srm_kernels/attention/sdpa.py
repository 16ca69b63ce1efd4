"""The same attention through two calls of scaled_dot_product_attention.

R V = SDPA(K̃, K, V) and Y = SDPA(Q, K̃, X): torch's fused kernels then hold no N×r block at all. On the CPU csrc solves.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..checks import wide_dtype
from ..conditioning import cpu as conditioning
from ..landmarks import reference as landmark_choice
from . import reference
from .reference import normalised_key, normalised_query, take_landmarks

FEWEST_KEYS = 16  # with fewer, torch's CPU kernel turns a NaN query into a row of zeros


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    scale: float,
    qk_norm: str | None,
    solve_dtype: str,
    *solve: Any,
) -> Tensor:
    """Y (B, H, N_q, d) in the query's dtype; everything in between is fp32 (fp64 for fp64).

    `solve`: ridge, solver and the rest, as `conditioning.landmark_solve` takes them.
    """
    if landmarks.shape[-1] < FEWEST_KEYS:
        return reference.nystrom_attention(query, key, value, landmarks, scale, qk_norm, solve_dtype, *solve)
    Q, K = normalised_query(query, qk_norm), normalised_key(key, qk_norm)
    keys = take_landmarks(K, landmarks)
    rhs = scaled_dot_product_attention(keys, K, value.to(K.dtype), scale=scale)
    X, _ = conditioning.landmark_solve(keys @ keys.mT * scale, rhs, *solve)
    # The reference's solve returns column-major matrices, on which the attention is four times slower.
    return scaled_dot_product_attention(Q, keys, X.contiguous(), scale=scale).to(query.dtype)


def landmark_context(
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | None,
    rank: int,
    method: str,
    gamma: float,
    scale: float,
    qk_norm: str | None,
    ridge: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The key side as the reference has it, with fewer passes over R.

    The logsumexp of a row is its largest score less the logarithm of its largest probability.
    """
    K = normalised_key(key, qk_norm)
    if landmarks is None:
        landmarks = landmark_choice.select_landmarks(K.detach(), None, rank, method, gamma, scale)
    keys = take_landmarks(K, landmarks)
    scaled = keys * scale
    scores = scaled @ K.mT
    R = scores.softmax(-1)
    lse = (scores.detach().amax(-1) - R.detach().amax(-1).log()) / math.log(2)
    solve = ridge, "cholesky", False, 1.0, 0, False
    X, _ = conditioning.landmark_solve(scaled @ keys.mT, R @ value.to(K.dtype), *solve)
    return take_landmarks(key.to(wide_dtype(key.dtype)), landmarks), X, lse, landmarks.clone()
