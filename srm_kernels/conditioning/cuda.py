"""The reference's solve with the one-sided Jacobi of csrc for its SVD, so that the host is asked nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..options import SolveOptions
from . import reference

SOLVERS = ("svd", "auto")


def landmark_solve(logits: Tensor, rhs: Tensor, options: SolveOptions) -> tuple[Tensor, Tensor]:
    """X (…, r, d) fp32 and the `Solver` (…,) that served each matrix, for `SOLVERS`, r ≤ 128, no fp64."""
    native.load("cuda")
    return reference.landmark_solve(logits, rhs, options, svd=_jacobi)


def _jacobi(A: Tensor, ridge: float, mask: Tensor | None) -> reference.Solve:
    matrix = A.contiguous()
    wanted = torch.ones_like(A[..., 0, 0], dtype=torch.uint8) if mask is None else mask.to(torch.uint8)

    def solve(rhs: Tensor, transposed: bool) -> Tensor:
        x = torch.empty(rhs.shape, dtype=rhs.dtype, device=rhs.device).copy_(rhs)
        torch.ops.srm_cuda.jacobi_solve(matrix, x, wanted, transposed, ridge > 0)
        return x

    return solve
