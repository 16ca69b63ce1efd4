"""Landmark keys in plain PyTorch (SPEC 2, article 3.3). All functions take keys K (B, H, N, d)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import nowhere, wide_dtype

LLOYD_STEPS = 5
TIE_TOLERANCE = 1e-5


def ridge_leverage_scores(key: Tensor, gamma: float) -> Tensor:
    """τ_i = k_iᵀ (KᵀK + γI)⁻¹ k_i, (B, H, N), by a Cholesky of the d×d matrix."""
    K = key.to(wide_dtype(key.dtype))
    d = K.shape[-1]
    gram = K.mT @ K
    eye = torch.eye(d, dtype=K.dtype, device=K.device)
    factor, info = torch.linalg.cholesky_ex(gram + gamma * eye)
    failed = info > 0
    if not nowhere(failed):
        # Keys that span fewer than d directions leave pivots of rounding size, which a γ below them cannot
        # lift: only a Gram matrix that breaks down gets the ridge its own rounding asks for.
        rounding = d * torch.finfo(K.dtype).eps * gram.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
        ridge = torch.where(failed, gamma + rounding, gamma)[..., None, None]
        factor, _ = torch.linalg.cholesky_ex(gram + ridge * eye)
    whitened = torch.linalg.solve_triangular(factor.mT, K, upper=True, left=False)  # K C⁻ᵀ, (B, H, N, d)
    return whitened.square().sum(-1)


def select_landmarks(
    key: Tensor, random: Tensor | None, rank: int, method: str, gamma: float, scale: float
) -> Tensor:
    """Indices (B, H, r) of the landmark keys.

    `random`: the uniform numbers of a random method, shared by every (b, h); None draws them with seed 0.
    """
    B, H, N, _ = key.shape
    if method == "uniform":
        index = ((torch.arange(rank, device=key.device) * 2 + 1) * N) // (2 * rank)
        return index.expand(B, H, rank).clone()
    if method == "pivoted_cholesky":
        return _pivoted_cholesky(key, rank, scale)
    scores = ridge_leverage_scores(key, gamma)
    if method == "leverage":
        return _largest(scores, rank)
    if random is None:
        random = uniform_numbers(numbers_needed(method, rank, N), torch.Generator().manual_seed(0))
    random = random.to(scores)
    if method == "leverage_sample":
        # The r smallest of E_i / τ_i, E_i exponential: r draws without replacement, probability ∝ τ_i.
        return _largest(scores / -random.log(), rank)
    candidates = _largest(scores, min(2 * rank, N))
    return _kmeans(key.to(scores.dtype), candidates, random, rank)


def numbers_needed(method: str, rank: int, keys: int) -> int:
    """How many uniform numbers a landmark method draws."""
    return {"leverage_sample": keys, "kmeans++": rank}.get(method, 0)


def uniform_numbers(count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in (0, 1), fp64, on the generator's device."""
    numbers = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    return numbers.clamp(min=1e-12)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest scores in descending order, ties to the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows (B, H, n, d) of (B, H, N, d) at (B, H, n)."""
    return tokens.gather(-2, index[..., None].expand(*index.shape, tokens.shape[-1]))


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _kmeans(keys: Tensor, candidates: Tensor, random: Tensor, rank: int) -> Tensor:
    """k-means++ seeding and Lloyd steps on the candidates, then the nearest free key of each centre."""
    points = _take(keys, candidates)  # (B, H, m, d)
    m = points.shape[-2]
    first = (random[0] * m).long().clamp(max=m - 1).expand(*points.shape[:2], 1)
    ones = torch.ones(m, m, dtype=points.dtype, device=points.device).triu()
    chosen = [first]
    nearest = _squared_distance(points, _take(points, first)).squeeze(-1)
    for draw in random[1:rank]:
        cumulative = nearest @ ones  # cumsum has no deterministic form on CUDA
        target = draw * cumulative[..., -1:]
        pick = (cumulative <= target).sum(-1, keepdim=True).clamp(max=m - 1)
        chosen.append(pick)
        nearest = torch.minimum(nearest, _squared_distance(points, _take(points, pick)).squeeze(-1))
    centres = _take(points, torch.cat(chosen, -1))
    for _ in range(LLOYD_STEPS):
        label = _squared_distance(points, centres).argmin(-1)  # (B, H, m)
        member = torch.nn.functional.one_hot(label, rank).to(points.dtype)
        count = member.sum(-2)[..., None]
        mean = (member.mT @ points) / count.clamp(min=1)
        centres = torch.where(count > 0, mean, centres)  # an empty cluster keeps its centre
    distance = _squared_distance(centres, keys)  # (B, H, r, N)
    picked: list[Tensor] = []
    for row in distance.unbind(-2):
        taken = torch.cat(picked, -1) if picked else None
        free = row if taken is None else row.scatter(-1, taken, math.inf)
        # A centre midway between two keys must not leave the choice to rounding.
        nearest_free = free <= free.amin(-1, keepdim=True) * (1 + TIE_TOLERANCE)
        picked.append(nearest_free.to(torch.uint8).argmax(-1, keepdim=True))
    return torch.cat(picked, -1)


def _pivoted_cholesky(key: Tensor, rank: int, scale: float) -> Tensor:
    """Greedy: r times the key with the largest residual diagonal of exp(K Kᵀ s), ties to the lower index."""
    K = key.to(wide_dtype(key.dtype))
    diagonal = K.square().sum(-1) * scale
    # One factor for the whole kernel keeps exp in range and changes no comparison.
    shift = diagonal.amax(-1, keepdim=True)
    residual = (diagonal - shift).exp()  # (B, H, N)
    factor = K.new_zeros(*residual.shape, rank)
    picked: list[Tensor] = []
    for step in range(rank):
        free = residual.clamp(min=0).nan_to_num(nan=math.inf)
        if picked:
            free = free.scatter(-1, torch.cat(picked, -1), -math.inf)
        # Normalised keys start with equal diagonals: rounding must not choose among them.
        largest = free >= free.amax(-1, keepdim=True) * (1 - TIE_TOLERANCE)
        pivot = largest.to(torch.uint8).argmax(-1, keepdim=True)
        picked.append(pivot)
        column = ((_take(K, pivot) @ K.mT).squeeze(-2) * scale - shift).exp()
        column = column - (_take(factor, pivot) @ factor.mT).squeeze(-2)
        pivot_value = residual.gather(-1, pivot)
        column = torch.where(pivot_value > 0, column / pivot_value.sqrt(), 0)
        factor[..., step] = column
        residual = residual - column.square()
    return torch.cat(picked, -1)
