"""The fused neck in plain PyTorch, all links at once (docs/METHOD.md §1 and 3; section 3.2 of the article).

    T = A F + a   Q = DyT(T) W_Q   L = softmax(Q K̃ᵀ s)   P̄ = pool(L)

F (B, C_i, h, w) is a map of the backbone, and T (B, N, C) are its tokens. Q is (B, H, N, d).
L is (B, H, N, r). P̄ (B, H, P², r) holds the means of L over the cells of a P×P grid.

The links ℓ into a stage t update the map of this stage. Pooling is linear, so the average of the updated map over each
cell of the grid can be computed from pool(F_t) and P̄, without the updated map at full resolution:

    pool(A_t F_t + a_t + β_t Σ_ℓ τ_ℓ L_ℓ X_ℓ W_O,ℓ) = A_t pool(F_t) + a_t + β_t Σ_ℓ τ_ℓ P̄_ℓ X_ℓ W_O,ℓ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.reference import normalised_key, normalised_query
from ..checks import wide_dtype
from ..options import QuerySides
from ..pool.reference import adaptive_pool
from ..scale import reference as scaling


def project_sources(
    tokens: Tensor,
    key_weights: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    alphas: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return K and V (L, B, N, C) of all links from the tokens (B, N, C) of their source.

    If `shift` is given, it is added to the tokens first.
    """
    keys, values = [], []
    if shift is not None:
        tokens = tokens + shift.to(tokens.dtype)
    for link, (key_weight, value_weight) in enumerate(zip(key_weights, value_weights, strict=True)):
        T = scaling.dyt(tokens, alphas[link], weights[link], biases[link]) if alphas else tokens
        keys.append(F.linear(T, key_weight.to(T.dtype)))
        values.append(F.linear(T, value_weight.to(T.dtype)))
    return torch.stack(keys), torch.stack(values)


def pooled_links(sides: QuerySides) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return P̄, pool(F), the mean of the rows y of Y = L X, and the spread Σ‖y − mean‖².

    P̄ is (links, B, H, P², r) in fp32 (fp64 for fp64 inputs). Its r is the largest r of all links; entries beyond a
    link's own r are 0. pool(F) is (B, P², ΣC_i). Y has one row y for each of the N positions of a link's target map.
    The mean of these rows is (links, B, H, d), and their spread is (links, B, H). If `sides.xs` (X) is empty, the mean
    and the spread are empty tensors. T, DyT(T) and Q have the dtype of F, as in the modules of the unfused neck.
    """
    most, size = max(k.shape[2] for k in sides.keys), sides.size
    probabilities, means, spreads = [], [], []
    for link, (target, K) in enumerate(zip(sides.targets, sides.keys, strict=True)):
        features = sides.maps[target]
        L = landmark_probabilities(features.flatten(2), sides.parameters(link), K, sides)
        folded = L.mT.flatten(0, 1).unflatten(-1, features.shape[2:])  # (B·H, r, h, w)
        P = F.adaptive_avg_pool2d(folded, size).flatten(2).mT.unflatten(0, K.shape[:2])
        probabilities.append(F.pad(P, (0, most - K.shape[2])))
        if sides.xs:
            Y = L.detach() @ sides.xs[link]
            means.append(Y.mean(-2))
            spreads.append((Y - means[-1][..., None, :]).square().sum((-1, -2)))
    pooled = pooled_maps(sides)
    wide = wide_dtype(pooled.dtype)
    mean, spread = (
        torch.stack(parts) if parts else pooled.new_empty(0, dtype=wide) for parts in (means, spreads)
    )
    return torch.stack(probabilities), pooled, mean, spread


def landmark_probabilities(
    features: Tensor, parameters: Sequence[Tensor], K: Tensor, sides: QuerySides
) -> Tensor:
    """Return L (B, H, M, r) from F (B, C_i, M) of M positions, a link's parameters and K̃ (B, H, r, d)."""
    align_weight, align_bias, query_weight = (t.to(features.dtype) for t in parameters[:3])
    T = F.linear(features.mT, align_weight, align_bias)
    if len(parameters) > 3:
        T = scaling.dyt(T, *parameters[3:])
    Q = F.linear(T, query_weight).unflatten(-1, (K.shape[1], K.shape[3])).transpose(1, 2)
    logits = normalised_query(Q, sides.qk_norm) @ normalised_key(K, sides.qk_norm).mT
    return (logits * sides.scale).softmax(-1)


def pooled_maps(sides: QuerySides) -> Tensor:
    """Return pool(F) (B, P², ΣC_i)."""
    return torch.cat([adaptive_pool(m, sides.size).flatten(2).mT for m in sides.maps], -1)


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
    """Compute the updated maps of S stages, averaged to P×P, from pool(F) and P̄.

    The result (S, B, C, P, P) has the dtype of pool(F). `betas` has one entry for each link: the β of its target.
    """
    dtype = pooled.dtype
    bases = pooled.split([weight.shape[1] for weight in align_weights], -1)
    maps = [
        F.linear(base, weight.to(dtype), bias.to(dtype))
        for base, weight, bias in zip(bases, align_weights, align_biases, strict=True)
    ]
    for link, (target, X) in enumerate(zip(targets, xs, strict=True)):
        y = (probabilities[link, ..., : X.shape[2]] @ X).to(dtype)  # P̄ X in fp32: X may be far larger than Y
        if thetas:
            y = (y * thetas[link].exp()[:, None, None]).to(dtype)
        update = F.linear(y.transpose(1, 2).flatten(2), output_weights[link].to(dtype))
        # Because β has an axis here, β U has the dtype of β, and the terms of dβ are summed in this dtype.
        maps[target] = (maps[target] + betas[link].reshape(1) * update).to(dtype)
    size = round(pooled.shape[1] ** 0.5)
    return torch.stack(maps).mT.unflatten(-1, (size, size))
