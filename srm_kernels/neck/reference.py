"""The query side of a link with its probabilities pooled, in plain PyTorch (SPEC 1, article 3.2).

    T = A F + a   Q = W_Q DyT(T)   L = softmax(Q K̃ᵀ s)   P̄ = pool(L)

F (B, C_i, h, w) is a map of the backbone, T its tokens (B, N, C), Q and L are (B, H, N, d) and (B, H, N, r), and P̄
(B, H, P², r) holds the mean of L over every cell of a P×P grid. Pooling is linear: pool(L X) = P̄ X.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..attention.reference import normalised_key, normalised_query
from ..scale import reference as scaling


def pooled_probabilities(
    features: Tensor,
    align_weight: Tensor,
    align_bias: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    query_weight: Tensor,
    keys: Tensor,
    x: Tensor | None,
    size: int,
    scale: float,
    qk_norm: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """P̄ in the wide dtype; with X the mean (B, H, d) over all N of Y = L X and Σ‖y − mean‖² (B, H), else empty.

    T, DyT(T) and Q are in the dtype of F, as the modules of the unfused neck make them.
    """
    height, width = features.shape[2:]
    T = F.linear(features.flatten(2).mT, align_weight, align_bias)
    if alpha is not None and weight is not None and bias is not None:
        T = scaling.dyt(T, alpha, weight, bias)
    Q = F.linear(T, query_weight).unflatten(-1, (keys.shape[1], keys.shape[3])).transpose(1, 2)
    logits = normalised_query(Q, qk_norm) @ normalised_key(keys, qk_norm).mT * scale
    L = logits.softmax(-1)
    folded = L.mT.flatten(0, 1).unflatten(-1, (height, width))  # (B·H, r, h, w)
    P = F.adaptive_avg_pool2d(folded, size).flatten(2).mT.unflatten(0, keys.shape[:2])
    mean, spread = P.new_empty(0), P.new_empty(0)
    if x is not None:
        Y = L.detach() @ x
        mean = Y.mean(-2)
        spread = (Y - mean[..., None, :]).square().sum((-1, -2))
    return P.contiguous(), mean, spread
