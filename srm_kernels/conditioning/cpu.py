"""The default landmark solver (Cholesky without equilibration) in C++, for CPU tensors.

`reference.landmark_solve` runs the calls that the C++ code does not support, and solves the matrices for which the C++
code fails.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..checks import wide_dtype
from ..options import SolveOptions
from . import reference

LARGEST = 128  # r, as in the kernels for GPUs


def landmark_solve(logits: Tensor, rhs: Tensor, options: SolveOptions) -> tuple[Tensor, Tensor]:
    """Solve the landmark systems; return the same values as `reference.landmark_solve`.

    Returns:
        The solutions X (…, r, d), and an integer tensor (…,) with the `Solver` that was used for each matrix.
    """
    default = options.default and logits.shape[-1] <= LARGEST
    recorded = torch.is_grad_enabled() and (logits.requires_grad or rhs.requires_grad)
    if not native.BUILT or logits.device.type != "cpu" or not default or recorded:
        return reference.landmark_solve(logits, rhs, options)
    native.load()
    wide = wide_dtype(logits.dtype)
    x = rhs.to(wide, copy=True, memory_format=torch.contiguous_format)
    served = torch.empty(rhs.shape[:-2], dtype=torch.bool)
    missed = torch.ops.srm_cpu.symmetric_solve(logits.to(wide).contiguous(), x, served, options.ridge)
    used = torch.full(served.shape, int(reference.Solver.CHOLESKY))
    if missed:
        left = ~served
        x[left], used[left] = reference.landmark_solve(logits[left], rhs[left], options)
    return x, used
