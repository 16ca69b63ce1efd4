"""Ridge leverage scores in plain PyTorch, for keys K (B, H, N, d) (docs/METHOD.md §2.0; section 3.3 of the article)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import nowhere, wide_dtype


def ridge_leverage_scores(key: Tensor, gamma: float) -> Tensor:
    """Return τ_i = k_iᵀ (KᵀK + γI)⁻¹ k_i, (B, H, N), by a Cholesky factorisation of the d×d matrix."""
    K = key.to(wide_dtype(key.dtype))
    d = K.shape[-1]
    gram = K.mT @ K
    eye = torch.eye(d, dtype=K.dtype, device=K.device)
    factor, info = torch.linalg.cholesky_ex(gram + gamma * eye)
    failed = info > 0
    if not nowhere(failed):
        # If the keys span fewer than d directions, some pivots are as small as the rounding error, which can be larger
        # than γ. The ridge of a matrix whose factorisation fails is increased by the rounding error of this matrix.
        rounding = d * torch.finfo(K.dtype).eps * gram.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
        ridge = torch.where(failed, gamma + rounding, gamma)[..., None, None]
        factor, _ = torch.linalg.cholesky_ex(gram + ridge * eye)
    whitened = torch.linalg.solve_triangular(factor.mT, K, upper=True, left=False)  # K C⁻ᵀ, (B, H, N, d)
    return whitened.square().sum(-1)


def leverage_macs(keys: int, d: int) -> int:
    """Return the number of multiply-accumulates that the leverage scores of one image and head need.

    The Cholesky factorisation needs d³/3, and the other steps need 2 N d².
    """
    return 2 * keys * d**2 + d**3 // 3
