"""The landmark methods in plain PyTorch, for keys K (B, H, N, d) (docs/METHOD.md §2.0; section 3.3 of the article).

- "leverage": the r keys with the largest ridge leverage scores, in descending order of the scores; ties go to
  the lower index.
- "leverage_sample": r keys drawn without replacement, with probability proportional to the ridge leverage
  score. The choice is random. Models use this method in training only; in evaluation, they use "leverage"
  instead.
- "uniform": the keys with the indices ⌊(i + 0.5) N / r⌋, i = 0, …, r − 1.
- "kmeans++": k-means++ seeding and five Lloyd steps on the 2r keys with the largest leverage scores give r centres.
  The centres are then processed one after the other: each centre takes, of all N keys, the nearest key that no
  earlier centre has taken. The r keys that were taken are the landmarks. The seeding is random, so the choice is
  random too.
- "pivoted_cholesky": r steps of a pivoted Cholesky factorisation of the kernel matrix exp(K Kᵀ s). The residual is
  the kernel matrix minus its approximation by the steps so far. Each step chooses the key with the largest diagonal
  entry of the residual. Entries that are smaller than the largest entry by a relative difference of at most 1e-5
  count as equal to it; of these keys, the key with the lowest index is chosen. The cost is O(N r (d + r)).

To add a method, write its function, add an entry to `LANDMARK_METHODS`, and add a line to this list. Configs,
the command line, reports and studies read the entries of `LANDMARK_METHODS`, so they need no change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import wide_dtype
from ..options import LandmarkOptions
from .reference import leverage_macs, ridge_leverage_scores

LLOYD_STEPS = 5
TIE_TOLERANCE = 1e-5


class Keys(NamedTuple):
    """The input of a landmark method.

    Attributes:
        key: K (B, H, N, d).
        options: The options r (at most N) and γ.
        scale: s of the kernel exp(K Kᵀ s).
        random: The uniform numbers in (0, 1) that the method draws, the same for every (b, h).
    """

    key: Tensor
    options: LandmarkOptions
    scale: float
    random: Tensor

    @property
    def scores(self) -> Tensor:
        """Return the ridge leverage scores τ (B, H, N)."""
        return ridge_leverage_scores(self.key, self.options.gamma)


class LandmarkMethod(NamedTuple):
    """A way of choosing landmarks.

    Attributes:
        choose: Returns indices (B, H, r).
        title: Name in reports.
        macs: (r, N, d) → multiply-accumulates of one (b, h). Default: the cost of the leverage scores.
        draws: (r, N) → number of uniform numbers that the method draws.
        evaluated: The method that models use instead of this one in evaluation. None if they use this one.
        kernels: Whether there are Triton kernels for the method.
    """

    choose: Callable[[Keys], Tensor]
    title: str
    macs: Callable[[int, int, int], int] = lambda rank, keys, d: leverage_macs(keys, d)
    draws: Callable[[int, int], int] = lambda rank, keys: 0
    evaluated: str | None = None
    kernels: bool = False


def select_landmarks(key: Tensor, random: Tensor | None, options: LandmarkOptions, scale: float) -> Tensor:
    """Return the indices (B, H, r) of the landmark keys.

    If `random` is None, a method that needs random numbers draws them with seed 0.
    """
    method = LANDMARK_METHODS[options.method]
    count = method.draws(options.rank, key.shape[2])
    if random is None:
        random = uniform_numbers(count, torch.Generator().manual_seed(0)) if count else key.new_empty(0)
    random = random.to(key.device, wide_dtype(key.dtype))
    return method.choose(Keys(key, options, scale, random))


def uniform_numbers(count: int, generator: torch.Generator) -> Tensor:
    """Return uniform numbers in (0, 1), fp64, on the generator's device."""
    numbers = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    return numbers.clamp(min=1e-12)


def _leverage(keys: Keys) -> Tensor:
    return _largest(keys.scores, keys.options.rank)


def _leverage_sample(keys: Keys) -> Tensor:
    """Draw r keys without replacement, with probability proportional to the ridge leverage score τ_i.

    The drawn keys are the keys with the r smallest E_i / τ_i. The E_i are independent random numbers with an
    exponential distribution.
    """
    return _largest(keys.scores / -keys.random.log(), keys.options.rank)


def _uniform(keys: Keys) -> Tensor:
    (B, H, N, _), rank = keys.key.shape, keys.options.rank
    index = ((torch.arange(rank, device=keys.key.device) * 2 + 1) * N) // (2 * rank)
    return index.expand(B, H, rank).clone()


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the largest scores in descending order; ties go to the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the rows (B, H, n, d) of `tokens` (B, H, N, d) at the indices (B, H, n)."""
    return tokens.gather(-2, index[..., None].expand(*index.shape, tokens.shape[-1]))


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _kmeans(chosen_from: Keys) -> Tensor:
    """Run k-means++ seeding and Lloyd steps on the 2r keys with the largest leverage scores.

    After the Lloyd steps, the centres are processed one after the other: each centre takes, of all N keys, the nearest
    key that no earlier centre has taken. The keys that were taken are the landmarks.
    """
    scores, random, rank = chosen_from.scores, chosen_from.random, chosen_from.options.rank
    keys = chosen_from.key.to(scores.dtype)
    points = _take(keys, _largest(scores, min(2 * rank, scores.shape[-1])))  # (B, H, m, d)
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
        # The tolerance makes the choice independent of rounding if two keys are equally near to a centre.
        nearest_free = free <= free.amin(-1, keepdim=True) * (1 + TIE_TOLERANCE)
        picked.append(nearest_free.to(torch.uint8).argmax(-1, keepdim=True))
    return torch.cat(picked, -1)


def _pivoted_cholesky(keys: Keys) -> Tensor:
    """Choose in each of r steps the key with the largest diagonal entry of the residual of exp(K Kᵀ s).

    Ties go to the lower index.
    """
    K, rank, scale = keys.key.to(wide_dtype(keys.key.dtype)), keys.options.rank, keys.scale
    diagonal = K.square().sum(-1) * scale
    # A common factor exp(−shift) of all entries keeps exp in range and changes no comparison.
    shift = diagonal.amax(-1, keepdim=True)
    residual = (diagonal - shift).exp()  # (B, H, N)
    factor = K.new_zeros(*residual.shape, rank)
    picked: list[Tensor] = []
    for step in range(rank):
        free = residual.clamp(min=0).nan_to_num(nan=math.inf)
        if picked:
            free = free.scatter(-1, torch.cat(picked, -1), -math.inf)
        # Normalised keys have equal diagonals at the start. The tolerance makes the choice independent of rounding.
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


LANDMARK_METHODS = {
    "leverage": LandmarkMethod(_leverage, "leverage", kernels=True),
    "leverage_sample": LandmarkMethod(
        _leverage_sample, "leverage sampling", draws=lambda rank, keys: keys, evaluated="leverage"
    ),
    "uniform": LandmarkMethod(_uniform, "uniform", lambda rank, keys, d: 0, kernels=True),
    "kmeans++": LandmarkMethod(_kmeans, "k-means++", draws=lambda rank, keys: rank),
    "pivoted_cholesky": LandmarkMethod(  # each step computes a row of the kernel and a row of the factor
        _pivoted_cholesky,
        "pivoted Cholesky",
        lambda rank, keys, d: rank * keys * (d + rank // 2),
        kernels=True,
    ),
}
