"""Nyström attention by two calls of scaled_dot_product_attention (docs/METHOD.md §2; section 3.3 of the article).

R V = SDPA(K̃, K, V) and Y = SDPA(Q, K̃, X), where SDPA is scaled_dot_product_attention. torch's fused kernels do not
store the matrices R and L. If this package's C++ library is built, it solves the landmark
system on the CPU (see `conditioning/cpu.py`).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..conditioning import cpu as conditioning
from ..options import SolveOptions
from . import reference
from .reference import normalised_key, normalised_query, take_landmarks

FEWEST_KEYS = 16  # with fewer keys, torch's CPU kernel gives zeros for a NaN query


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
    """Return Y (B, H, N_q, d) in the query's dtype; intermediate results are fp32 (fp64 for fp64 inputs)."""
    if landmarks.shape[-1] < FEWEST_KEYS:
        return reference.nystrom_attention(query, key, value, landmarks, scale, qk_norm, solve_dtype, solve)
    Q, K = normalised_query(query, qk_norm), normalised_key(key, qk_norm)
    keys = take_landmarks(K, landmarks)
    rhs = scaled_dot_product_attention(keys, K, value.to(K.dtype), scale=scale)
    X, _ = conditioning.landmark_solve(keys @ keys.mT * scale, rhs, solve)
    # The reference's solver returns X in column-major order. With this order, attention is four times slower.
    return scaled_dot_product_attention(Q, keys, X.contiguous(), scale=scale).to(query.dtype)


landmark_context = partial(reference.landmark_context, solve=conditioning.landmark_solve)
