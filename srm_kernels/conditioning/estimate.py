"""Estimate the condition number κ₂ of a matrix A from a factorisation of A, without an SVD (docs/METHOD.md §2.1).

The computation does not make the host wait for the device. κ₂ is σ_max · (1/σ_min), where σ_max and σ_min are the
largest and the smallest singular value of A. Power iteration gives a lower bound for each of the two factors, because
‖A u‖/‖u‖ is at most σ_max and ‖A⁻¹ u‖/‖u‖ is at most 1/σ_min for every vector u. The estimate is the product of the two
lower bounds. Except for rounding, the estimate is therefore never larger than κ₂. The following list states how much
smaller than σ_max and 1/σ_min the lower bounds can be:

- Lower bound for σ_max: the iteration starts from the vector of ones and multiplies by A and Aᵀ alternately, k = 8
  times in total. The entries of A are non-negative, so the entries of its leading singular vector are non-negative too.
  The cosine of the angle between this singular vector and the vector of ones is at least 1/√r, so the k products
  multiply the norm of the vector by at least σ_max^k/√r. The lower bound is the factor of the last product. No product
  has a smaller factor than the product before it, so the lower bound is at least the k-th root of the whole factor. For
  every matrix, this is at least r^(−1/(2k)) σ_max: 0.77 σ_max at r = 64.
- Lower bound for 1/σ_min: the iteration starts from a random normal vector and multiplies by A⁻¹ and A⁻ᵀ alternately,
  k = 3 times in total. For every t > 1, the lower bound is less than 1/(t σ_min) with probability at most 0.8 √r t⁻³
  (Dixon 1983, SIAM J. Numer. Anal. 20). The iteration runs from 8 independent start vectors, and the estimate uses the
  largest of the 8 lower bounds. At r = 64, the largest one is less than 1/(10 σ_min) with probability at most 3e-18,
  and less than 1/(3 σ_min) with probability at most 1e-5.

The 8 start vectors for 1/σ_min must not be vectors of random signs (±1), for the following reason. Each landmark is
one index of the vectors, so each landmark would have 8 signs, one in each vector. There are only 2⁸ = 256 combinations
of 8 signs. With r = 64 landmarks, two landmarks i and j would therefore almost certainly have the same 8 signs. If the
keys of i and j are also equal, the singular vector of σ_min is a multiple of eᵢ − eⱼ, where eᵢ is the i-th unit vector.
All start vectors are orthogonal to eᵢ − eⱼ, because their entries i and j are equal. The iteration would then not
find σ_min, and the estimate could be far below κ₂.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

PROBES = 8
INVERSE_STEPS = 3
POWER_STEPS = 8


def estimate_condition(A: Tensor, solve: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """Return an estimate (…,) of κ₂ of matrices with non-negative entries.

    Except for rounding, the estimate is at most κ₂.

    Args:
        A: Matrices (…, r, r) with non-negative entries.
        solve: Function `(rhs, transposed)` that returns A⁻¹ rhs, or A⁻ᵀ rhs if `transposed` is true.

    Returns:
        The estimate (…,). It is NaN or infinite for a matrix if `solve` returns NaN or infinity for this matrix.
    """
    probes = normal_probes(A.shape[-1], A.dtype, A.device).expand(*A.shape[:-1], PROBES)
    shrinkage = _growth(solve, probes, INVERSE_STEPS)
    ones = torch.ones_like(A[..., :1])
    growth = _growth(lambda u, transposed: (A.mT if transposed else A) @ u, ones, POWER_STEPS)
    return growth.amax(-1) * shrinkage.amax(-1)


def _growth(apply: Callable[[Tensor, bool], Tensor], u: Tensor, steps: int) -> Tensor:
    """Multiply u by B and Bᵀ alternately, `steps` times in total; return the growth of each column in the last step.

    A step is one call `apply(u, transposed)`, which returns B u, or Bᵀ u if `transposed` is true. The growth of a
    column of u is the norm of the column after the step, divided by the norm of the column before the step.
    """
    ratio = torch.ones_like(u[..., 0, :])
    for step in range(steps):
        u = u / torch.linalg.vector_norm(u, dim=-2, keepdim=True)
        u = apply(u, step % 2 == 1)
        ratio = torch.linalg.vector_norm(u, dim=-2)
    return ratio


def normal_probes(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 8 standard normal vectors of length r as the columns of a tensor (r, 8).

    The Box–Muller transform computes the vectors from hashed counters. The vectors are therefore the same on
    every device and in every call.
    """
    counter = torch.arange(2 * r * PROBES, device=device).view(2, r, PROBES)
    uniform = (_hash(counter + 1).double() + 0.5) / 2**32
    normal = (-2 * uniform[0].log()).sqrt() * (2 * math.pi * uniform[1]).cos()
    return normal.to(dtype)


def _hash(x: Tensor) -> Tensor:
    """Return a 32-bit hash of each int64 counter, computed by the finaliser of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
