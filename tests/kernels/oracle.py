"""Definitions of the operators in fp64. They are dense and slow, and share no code with the package.

Symbols are those of the article. K̃ is the matrix of the landmark keys. L, W and R are the softmax blocks. X is the
solution of the landmark system, and Y = L X is the output. `agree` checks the tolerance rule of the tests that compare
values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FP64 = torch.float64


def agree(actual: Tensor, exact: Tensor, plain: Tensor | None = None, *, rtol: float = 1e-10) -> None:
    """Assert that a result satisfies the tolerance rule.

    The error of a result is its largest absolute difference from `exact`, computed in fp64. The scale is the largest
    absolute value of `exact`.

    - Without `plain`, for fp64 results: the error is at most `rtol` times the scale.
    - With `plain`: the error is at most twice the error of `plain`, plus half a machine epsilon of the dtype of
      `actual` times the scale. `plain` is the result of plain PyTorch with the same storage dtype and with intermediate
      results in fp32.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    size = exact.abs().max().item()
    error = (actual.detach().double() - exact).abs().max().item()
    if plain is None:
        bound = rtol * size
    else:
        reference = (plain.detach().double() - exact).abs().max().item()
        bound = 2 * reference + torch.finfo(actual.dtype).eps / 2 * size
    assert error <= bound, f"error {error:.3e} over {bound:.3e} (largest value {size:.3e})"


# Inputs


def tokens(seed: int, *shape: int, dtype: torch.dtype = FP64, scale: float = 1.0) -> Tensor:
    """Return standard normal numbers, such as tokens (B, H, N, d), multiplied by `scale` and rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=FP64)).to(dtype)


def landmark_family(name: str, seed: int, b: int, h: int, r: int, d: int) -> Tensor:
    """Return normalised landmark keys in fp64.

    The families are `random`, `duplicated` (each key occurs twice) and `smooth` (a smooth function of the index).
    """
    if name == "random":
        keys = tokens(seed, b, h, r, d)
    elif name == "duplicated":
        keys = tokens(seed, b, h, (r + 1) // 2, d).repeat(1, 1, 2, 1)[:, :, :r]
    else:
        frequency = 3 * tokens(seed, b, h, 1, d)
        keys = torch.cos(
            torch.linspace(0, 1, r, dtype=FP64)[:, None] * frequency + tokens(seed + 1, b, h, 1, d)
        )
    return normalise(keys)


# Landmarks


def normalise(x: Tensor) -> Tensor:
    return x * math.sqrt(x.shape[-1]) / (x.norm(dim=-1, keepdim=True) + 1e-6)


def leverage(key: Tensor, gamma: float = 1e-3) -> Tensor:
    """Return τ_i = k_iᵀ (KᵀK + γI)⁻¹ k_i, computed with the explicit inverse."""
    key = key.double()
    inverse = torch.linalg.inv(key.mT @ key + gamma * torch.eye(key.shape[-1], dtype=FP64))
    return (key @ inverse * key).sum(-1)


def top(scores: Tensor, rank: int) -> Tensor:
    """Return the indices of the `rank` largest scores in descending order; a tie goes to the lower index."""
    rows = scores.flatten(0, -2).tolist()
    chosen = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:rank] for row in rows]
    return torch.tensor(chosen).reshape(*scores.shape[:-1], rank)


def uniform(n: int, rank: int) -> Tensor:
    return torch.tensor([math.floor((2 * i + 1) * n / (2 * rank)) for i in range(rank)])


def pivoted_cholesky(key: Tensor, rank: int) -> Tensor:
    """Select landmarks greedily: each is the largest diagonal entry of the explicit residual of exp(K Kᵀ s).

    The matrix exp(K Kᵀ s) is divided by its largest entry, so that it does not overflow.
    """
    key = key.double()
    b, h, n, d = key.shape
    picks = torch.zeros(b, h, rank, dtype=torch.int64)
    for i in range(b):
        for j in range(h):
            logits = key[i, j] @ key[i, j].T / math.sqrt(d)
            residual = torch.exp(logits - logits.max())
            free = list(range(n))
            for t in range(rank):
                diagonal = residual.diagonal().tolist()
                pick = max(free, key=lambda p: (diagonal[p], -p))
                free.remove(pick)
                picks[i, j, t] = pick
                if diagonal[pick] > 0:
                    residual = residual - torch.outer(residual[:, pick], residual[pick]) / diagonal[pick]
    return picks


# Solving for X


def softmax(logits: Tensor) -> Tensor:
    e = torch.exp(logits.double() - logits.double().amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


class System(NamedTuple):
    """The system A Z = G, with X = scale·Z.

    A is W_λ, or W̃ + λI with equilibration. `ridge` is λ; the argument `ridge` of the functions below is λ₀, and
    λ = λ₀ · tr(W)/r, or λ₀ · tr(W̃)/r with equilibration.
    """

    matrix: Tensor
    right: Tensor
    scale: Tensor
    ridge: Tensor


def system(logits: Tensor, rhs: Tensor, ridge: float, equilibrate: bool = False) -> System:
    W = softmax(logits)
    r = W.shape[-1]
    rows = cols = torch.ones(W.shape[:-1], dtype=FP64)
    if equilibrate:
        rows = ((W**2).sum(-1).sqrt() + 1e-12) ** -0.5
        cols = ((W**2).sum(-2).sqrt() + 1e-12) ** -0.5
    W = rows[..., :, None] * W * cols[..., None, :]
    lam = ridge * W.diagonal(dim1=-2, dim2=-1).sum(-1) / r
    eye = torch.eye(r, dtype=FP64)
    return System(W + lam[..., None, None] * eye, rows[..., None] * rhs.double(), cols[..., None], lam)


def solve(logits: Tensor, rhs: Tensor, ridge: float = 1e-3, equilibrate: bool = False) -> Tensor:
    s = system(logits, rhs, ridge, equilibrate)
    return s.scale * torch.linalg.solve(s.matrix, s.right)


def pseudo_inverse_solve(
    logits: Tensor, rhs: Tensor, ridge: float, eps: float, equilibrate: bool = False
) -> Tensor:
    """Return the minimum-norm solution; without a ridge, singular values up to r·eps·σ_max are treated as zero."""
    s = system(logits, rhs, ridge, equilibrate)
    U, sigma, Vh = torch.linalg.svd(s.matrix)
    limit = 0.0 if ridge > 0 else sigma.shape[-1] * eps * sigma[..., :1]
    inverse = torch.where(sigma > limit, 1 / sigma, 0.0)
    return s.scale * (Vh.mT @ (inverse[..., None] * (U.mT @ s.right)))


def neumann(
    logits: Tensor, rhs: Tensor, ridge: float = 1e-3, order: int = 3, equilibrate: bool = False
) -> Tensor:
    """Compute X = scale·Z with the series Z = α Σ_{k=0..m} (I − αA)^k G, where α = 1/(1 + λ) and m is `order`."""
    s = system(logits, rhs, ridge, equilibrate)
    alpha = 1 / (1 + s.ridge)[..., None, None]
    step = torch.eye(s.matrix.shape[-1], dtype=FP64) - alpha * s.matrix
    total = sum(torch.linalg.matrix_power(step, k) @ s.right for k in range(order + 1))
    return s.scale * alpha * total


def condition(matrix: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(matrix.double())
    return sigma[..., 0] / sigma[..., -1]


def frobenius(x: Tensor) -> Tensor:
    return (x.double() ** 2).sum((-2, -1)).sqrt()


def plain_solve(
    logits: Tensor, rhs: Tensor, ridge: float, equilibrate: bool = False, solver: str = "lu"
) -> Tensor:
    """Solve the landmark system in plain fp32 PyTorch, as a careful user would with `torch.linalg`."""
    W = torch.softmax(logits.float(), -1)
    rhs = rhs.float()
    rows = cols = torch.ones_like(W[..., 0])
    if equilibrate:
        rows, cols = (W.norm(dim=-1) + 1e-12) ** -0.5, (W.norm(dim=-2) + 1e-12) ** -0.5
        W = rows[..., :, None] * W * cols[..., None, :]
    r = W.shape[-1]
    lam = ridge * W.diagonal(dim1=-2, dim2=-1).sum(-1) / r
    A, G = W + lam[..., None, None] * torch.eye(r), rows[..., None] * rhs
    if solver == "svd":
        U, sigma, Vh = torch.linalg.svd(A)
        Z = Vh.mT @ ((U.mT @ G) / sigma[..., None])
    else:
        Z = torch.linalg.solve(A, G)
    return cols[..., None] * Z


# Attention


def gather(key: Tensor, landmarks: Tensor) -> Tensor:
    b, h, r = landmarks.shape
    rows = [key[i, j, landmarks[i, j]] for i in range(b) for j in range(h)]
    return torch.stack(rows).reshape(b, h, r, key.shape[-1])


def _prepare(
    query: Tensor, key: Tensor, qk_norm: str | None, scale: float | None
) -> tuple[Tensor, Tensor, float]:
    query, key = query.double(), key.double()
    if qk_norm is not None:
        key = normalise(key)
    if qk_norm == "both":
        query = normalise(query)
    return query, key, 1 / math.sqrt(key.shape[-1]) if scale is None else scale


def nystrom(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    *,
    ridge: float = 1e-3,
    equilibrate: bool = False,
    qk_norm: str | None = None,
    scale: float | None = None,
) -> Tensor:
    query, key, s = _prepare(query, key, qk_norm, scale)
    chosen = gather(key, landmarks)
    L = softmax(query @ chosen.mT * s)
    R = softmax(chosen @ key.mT * s)
    return L @ solve(chosen @ chosen.mT * s, R @ value.double(), ridge, equilibrate)


def full(
    query: Tensor, key: Tensor, value: Tensor, *, qk_norm: str | None = None, scale: float | None = None
) -> Tensor:
    query, key, s = _prepare(query, key, qk_norm, scale)
    return softmax(query @ key.mT * s) @ value.double()


def plain_nystrom(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    *,
    ridge: float = 1e-3,
    equilibrate: bool = False,
    qk_norm: str | None = None,
    scale: float | None = None,
    solver: str = "lu",
) -> Tensor:
    """Compute Nyström attention in plain PyTorch in fp32, and round the result to the dtype of the query."""
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    if qk_norm is not None:
        key = normalise(key)
    if qk_norm == "both":
        query = normalise(query)
    s = 1 / math.sqrt(key.shape[-1]) if scale is None else scale
    chosen = key.gather(2, landmarks[..., None].expand(*landmarks.shape, key.shape[-1]))
    L = torch.softmax(query @ chosen.mT * s, -1)
    R = torch.softmax(chosen @ key.mT * s, -1)
    return (L @ plain_solve(chosen @ chosen.mT * s, R @ value, ridge, equilibrate, solver)).to(dtype)


# Scale and gate


def rms(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return μ (H, d) and σ (H,) of each head, over the batch and the tokens."""
    y = y.double()
    mean = torch.stack(
        [y[:, h].reshape(-1, y.shape[-1]).sum(0) / (y.shape[0] * y.shape[2]) for h in range(y.shape[1])]
    )
    sigma = [((y[:, h] - mean[h]) ** 2).sum(-1).mean().sqrt() for h in range(y.shape[1])]
    return mean, torch.stack(sigma)


def fusion(
    maps: Tensor,
    logits: Tensor,
    *,
    cap: float | None,
    temperature: float = 1.0,
    eps: float = 1e-6,
    unit: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (γM, a, γ, ‖M‖_F). `unit` is the unit roundoff u if the output has half precision, and 0 otherwise."""
    maps = maps.double()
    weights = softmax(logits.double() / temperature)
    M = torch.zeros_like(maps[:, 0])
    for stage in range(maps.shape[1]):
        M = M + weights[:, stage, None, None, None] * maps[:, stage]
    norm = (M**2).sum((1, 2, 3)).sqrt()
    gain = torch.ones_like(norm) if cap is None else torch.clamp(cap * (1 - 2 * unit) / (norm + eps), max=1.0)
    return gain[:, None, None, None] * M, weights, gain, norm


def losses(weights: Tensor, entropy_floor: float) -> tuple[float, float]:
    rows = weights.double().tolist()
    stages = len(rows[0])
    entropies = [-sum(a * math.log(a) for a in row if a > 0) for row in rows]
    entropy = sum(max(0.0, entropy_floor - e) for e in entropies) / len(rows)
    balance = sum((sum(row[s] for row in rows) / len(rows) - 1 / stages) ** 2 for s in range(stages))
    return entropy, balance
