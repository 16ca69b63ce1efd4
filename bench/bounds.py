"""Search for sets of keys that violate the bounds of docs/CONDITIONING.md.

`search` draws sets of 2r keys. If `normalised` is True, the keys are also normalised. The first r keys of a set are
the landmarks K̃ (r, d). Let W = softmax(K̃K̃ᵀ/√d), λ = λ₀ tr(W)/r and W_λ = W + λI. D is the diagonal matrix of the
row sums of exp(K̃K̃ᵀ/√d), and S = D^½ W D^-½ is symmetric. For every set, these `Figures` are computed in fp64:

- `symmetric`: κ₂(S + λI) divided by its bound (1 + λ)/λ;
- `certificate`: κ₂(W_λ) divided by its bound ϱ(1 + λ)/λ, where ϱ is the largest diagonal entry of D divided by the
  smallest;
- `landmark`: κ₂(W_λ) divided by r (1 + λ)/λ, the bound on κ₂(W_λ) for keys of equal norm;
- `kappa`: κ₂(W_λ);
- `gain`: max|Y| / max|V|, where Y is the output of Nyström attention with Q = K and random V. Exact attention averages
  the values, so its gain is at most 1.

Half of the sets are drawn from families (random, duplicated, collinear, graded, outlier, smooth, vanishing). The other
half are drawn in the same way and then changed by gradient ascent. The ascent maximises the logarithm of `kappa`, of
`landmark` or of `gain`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FAMILIES = ("random", "duplicated", "collinear", "graded", "outlier", "smooth", "vanishing")
OBJECTIVES = ("kappa", "landmark", "gain")
SIZES = ((4, 3), (8, 4), (12, 16), (16, 32))  # r, d
RIDGES = (1e-5, 1e-3, 1e-1)
NORM_FLOOR = 1e-6


class Case(NamedTuple):
    """Description of a batch of key sets: r, d, λ₀, the family, and the objective of the ascent (None: no ascent)."""

    rank: int
    width: int
    ridge: float
    family: str
    optimised: str | None


class Figures(NamedTuple):
    """Results for n key sets: five tensors (n,), with one value per set. The module docstring defines each result."""

    symmetric: Tensor
    certificate: Tensor
    landmark: Tensor
    kappa: Tensor
    gain: Tensor


def draw_keys(case: Case, count: int, generator: torch.Generator) -> Tensor:
    """Draw sets of keys of a family, and multiply each set by a random scale.

    Args:
        case: r, d and the family.
        count: Number of sets.
        generator: Source of the random numbers.

    Returns:
        Keys (count, 2r, d). In each set, the first r keys are the landmarks.
    """
    r, d = case.rank, case.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    keys = normal(count, 2 * r, d)
    place = torch.linspace(0, 1, 2 * r, dtype=torch.float64)[:, None]
    if case.family == "duplicated":
        odd = place[1:r:2]
        keys[:, 1:r:2] = keys[:, 0 : r - 1 : 2] + 10 ** (-8 * odd) * (odd > 0.3) * keys[:, 1:r:2]
    elif case.family == "collinear":
        keys = normal(count, 2 * r, 1) * normal(count, 1, d)
    elif case.family == "graded":
        keys = keys * 10 ** (3 * place - 2)
    elif case.family == "outlier":
        keys[:, 0] *= 10 ** (2 * uniform(count, 1))
    elif case.family == "smooth":
        keys = torch.cos(3 * place * normal(count, 1, d) + normal(count, 1, d))
    elif case.family == "vanishing":
        keys[:, : max(1, r // 4)] *= 10 ** (-8 * uniform(count, 1, 1))
    return keys * 2 ** (4 * uniform(count, 1, 1) - 2)


def normalise(keys: Tensor) -> Tensor:
    """Return k √d / (‖k‖ + 1e-6) for keys (…, d) (docs/METHOD.md §1.2)."""
    return keys * math.sqrt(keys.shape[-1]) / (keys.norm(dim=-1, keepdim=True) + NORM_FLOOR)


def evaluate(keys: Tensor, ridge: float, generator: torch.Generator) -> Figures:
    """Compute the `Figures` of n key sets.

    All figures are differentiable with respect to the keys.

    Args:
        keys: Keys (n, 2r, d).
        ridge: λ₀.
        generator: Source of the random values V.
    """
    count, both, d = keys.shape
    r = both // 2
    landmarks = keys[:, :r]
    logits = landmarks @ landmarks.mT / math.sqrt(d)
    W = logits.softmax(-1)
    lam = (ridge * W.diagonal(dim1=-2, dim2=-1).sum(-1) / r)[..., None, None]
    eye = torch.eye(r, dtype=keys.dtype)
    A = W + lam * eye
    rows = logits.logsumexp(-1)
    half = rows / 2
    S = (logits - half[..., :, None] - half[..., None, :]).exp()
    sigma, spectrum = torch.linalg.svdvals(A), torch.linalg.eigvalsh(S + lam * eye)
    lam = lam[..., 0, 0]
    bound = (1 + lam) / lam
    kappa = sigma[..., 0] / sigma[..., -1]
    values = torch.randn(count, both, 4, generator=generator, dtype=keys.dtype)
    R = (landmarks @ keys.mT / math.sqrt(d)).softmax(-1)
    L = (keys @ landmarks.mT / math.sqrt(d)).softmax(-1)
    Y = L @ torch.linalg.solve(A, R @ values)
    gain = Y.abs().amax((-2, -1)) / values.abs().amax((-2, -1))
    spread = (rows.amax(-1) - rows.amin(-1)).exp()
    symmetric = spectrum[..., -1] / spectrum[..., 0] / bound
    return Figures(symmetric, kappa / (spread * bound), kappa / (r * bound), kappa, gain)


def ascend(keys: Tensor, case: Case, normalised: bool, steps: int, seed: int) -> Tensor:
    """Maximise the logarithm of the case's objective by gradient ascent with Adam.

    Args:
        keys: Keys (n, 2r, d) to start from.
        case: Case with an objective.
        normalised: Whether the keys are normalised before their `Figures` are computed.
        steps: Number of steps of Adam.
        seed: Seed of the random values V.

    Returns:
        Keys (n, 2r, d). For each set, these are the last keys at which the gradient was finite.
    """
    variable = keys.clone().requires_grad_()
    optimiser = torch.optim.Adam([variable], lr=0.1)
    best = keys.clone()
    for _ in range(steps):
        used = normalise(variable) if normalised else variable
        figures = evaluate(used, case.ridge, torch.Generator().manual_seed(seed))
        objective = getattr(figures, str(case.optimised)).clamp(min=1e-300).log()
        (gradient,) = torch.autograd.grad(-objective.sum(), variable)
        finite = gradient.isfinite().all(-1).all(-1)[:, None, None]
        best = torch.where(finite, variable.detach(), best)
        variable.grad = torch.where(finite, gradient, 0)
        optimiser.step()
        with torch.no_grad():  # keeps logits within the range of exp
            variable.clamp_(-60, 60)
    return best


def cases(count: int) -> Iterator[tuple[Case, int]]:
    """Yield (case, number of key sets); the numbers add up to `count`. Half of the cases have an objective."""
    combined = [Case(r, d, ridge, family, None) for r, d in SIZES for ridge in RIDGES for family in FAMILIES]
    combined += [
        case._replace(optimised=OBJECTIVES[index % len(OBJECTIVES)]) for index, case in enumerate(combined)
    ]
    for index, case in enumerate(combined):
        share = count // len(combined) + (index < count % len(combined))
        if share:
            yield case, share


def search(count: int, *, normalised: bool, steps: int = 25, seed: int = 0) -> Iterator[tuple[Case, Figures]]:
    """Yield each case with the `Figures` of its key sets.

    Args:
        count: Number of key sets of all cases together.
        normalised: Whether the keys are normalised before their `Figures` are computed.
        steps: Number of steps of the gradient ascent.
        seed: Seed of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for case, share in cases(count):
        keys = draw_keys(case, share, generator)
        if case.optimised:
            keys = ascend(keys, case, normalised, steps, seed)
        with torch.no_grad():
            used = normalise(keys) if normalised else keys
            yield case, evaluate(used, case.ridge, torch.Generator().manual_seed(seed))
