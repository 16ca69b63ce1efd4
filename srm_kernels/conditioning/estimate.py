"""κ₂ estimated from a factorisation, with no singular values and no wait for the device (docs/METHOD.md §2.1).

Power iterations bound both ends from one side: every ‖A u‖/‖u‖ is at most σ_max and every ‖A⁻¹ u‖/‖u‖ at most
1/σ_min, so the estimate never exceeds κ₂ by more than rounding. How far it can fall below:

- σ_max: A is non-negative, so its leading singular vector is too, and the ones vector has at least 1/√r of it:
  after k applications the ratio is at least r^(−1/(2k)) σ_max, whatever the matrix. k = 8 gives 0.77 at r = 64.
- 1/σ_min: k = 3 applications of A⁻¹ and A⁻ᵀ in turn to a normal vector fall short by more than a factor t with
  probability at most 0.8 √r t⁻³ (Dixon 1983, SIAM J. Numer. Anal. 20), and the largest of 8 independent ones
  decides: at r = 64, more than 10 times too low with probability 3e-18, more than 3 times 1e-5.

±1 vectors would not do: two equal rows of signs, and there are some among 64, miss the difference of two
duplicated landmarks entirely.
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
    """κ₂ (…,) of non-negative A (…, r, r), from below; NaN or infinite where the factors are.

    `solve(rhs, transposed)` gives A⁻¹ rhs or A⁻ᵀ rhs.
    """
    probes = normal_probes(A.shape[-1], A.dtype, A.device).expand(*A.shape[:-1], PROBES)
    shrinkage = _growth(solve, probes, INVERSE_STEPS)
    ones = torch.ones_like(A[..., :1])
    growth = _growth(lambda u, transposed: (A.mT if transposed else A) @ u, ones, POWER_STEPS)
    return growth.amax(-1) * shrinkage.amax(-1)


def _growth(apply: Callable[[Tensor, bool], Tensor], u: Tensor, steps: int) -> Tensor:
    """‖B u‖/‖u‖ of each column in the last of `steps` applications of B and Bᵀ in turn."""
    ratio = torch.ones_like(u[..., 0, :])
    for step in range(steps):
        u = u / torch.linalg.vector_norm(u, dim=-2, keepdim=True)
        u = apply(u, step % 2 == 1)
        ratio = torch.linalg.vector_norm(u, dim=-2)
    return ratio


def normal_probes(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal vectors (r, 8), the same for every matrix and device: hashed counters, Box and Muller."""
    counter = torch.arange(2 * r * PROBES, device=device).view(2, r, PROBES)
    uniform = (_hash(counter + 1).double() + 0.5) / 2**32
    normal = (-2 * uniform[0].log()).sqrt() * (2 * math.pi * uniform[1]).cos()
    return normal.to(dtype)


def _hash(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser: 32 well-mixed bits of int64 counters."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
