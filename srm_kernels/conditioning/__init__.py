"""Solve the landmark system, and compute diagnostics (docs/METHOD.md §2.1; section 3.4 of the article)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..checks import check_choice, check_count, check_flag, check_number, check_tensors, wide_dtype
from ..dispatch import choose_kernels
from ..options import SolveOptions
from ..registration import later, register_operator
from . import cpu, reference
from .reference import SOLVERS, Solver

DIAGNOSTICS = (True, False, "estimate")
SOLVERS_OF_KERNELS = (
    "cholesky",
    "lu",
)  # without equilibration; torch.linalg runs the other solvers on every device
_LARGEST = 128  # r and d of the kernels
_KERNELS = f"{__name__}.kernels"


class LandmarkSolution(NamedTuple):
    """The solution X of the landmark system, and diagnostics of each matrix.

    All attributes except `x` are None if no diagnostics were requested. The diagnostics describe the system A Z = G
    that was solved. Without equilibration, this system is (W + λI) X = R V. docs/METHOD.md §2.1 has the system with
    equilibration.

    Attributes:
        x: X (…, r, d).
        kappa: κ (…,), the condition number σ_max/σ_min of A. With `diagnostics="estimate"`, an estimate of κ.
        residual: ρ (…,), ‖A Z − G‖_F / (‖G‖_F + 1e-12).
        gain: (…,), ‖X‖_F / ‖R V‖_F.
        solver: (…,) int64, the `Solver` that was used for each matrix.
    """

    x: Tensor
    kappa: Tensor | None
    residual: Tensor | None
    gain: Tensor | None
    solver: Tensor | None


_solve = register_operator(
    "landmark_solve",
    "Tensor logits, Tensor rhs, SolveOptions solve",
    "(Tensor, Tensor)",
    {
        "reference": reference.landmark_solve,
        "torch": cpu.landmark_solve,
        "triton": later(_KERNELS, "landmark_solve"),
    },
    fake=lambda logits, rhs, *_: (
        rhs.new_empty(rhs.shape, dtype=wide_dtype(rhs.dtype)),
        rhs.new_empty(rhs.shape[:-2], dtype=torch.int64),
    ),
    differentiable=("logits", "rhs"),
    derivatives={"triton": later(_KERNELS, "landmark_solve_backward")},
    autocast=lambda logits, rhs, *rest: (*autocast.promoted(logits, rhs), *rest),
)

_diagnose = register_operator(
    "landmark_diagnostics",
    "Tensor logits, Tensor rhs, Tensor x, Tensor used, float ridge, bool equilibrate, bool estimate",
    "(Tensor, Tensor, Tensor)",
    dict.fromkeys(("reference", "torch"), reference.landmark_diagnostics),
    fake=lambda logits, rhs, x, *_: tuple(x.new_empty(x.shape[:-2]) for _ in range(3)),
)


def landmark_solve(
    logits: Tensor,
    rhs: Tensor,
    *,
    ridge: float = 1e-3,
    solver: str = "cholesky",
    equilibrate: bool = False,
    kappa_max: float = 1e6,
    neumann_order: int = 3,
    neumann_gate: bool = True,
    diagnostics: bool | str = False,
    backend: str | None = None,
) -> LandmarkSolution:
    """Solve the landmark system A X = G for each matrix of logits l (docs/METHOD.md §2.1).

    A = W + λI with W = softmax(l) and λ = λ₀ tr(W)/r.

    Solvers:

    - "cholesky": Cholesky factorisation of S + λI, where S is symmetric and similar to W. κ₂(S + λI) is at most
      (1 + λ)/λ. The solver needs ridge > 0. If the logits of a matrix are symmetric within 1e-3·(1 + max|l|), their
      symmetric part (l + lᵀ)/2 is used. If the logits are less symmetric, or if the factorisation fails, "lu" solves
      this matrix with the original logits. In fp32, "lu" also solves a matrix if the logsumexp values of two rows of l
      differ by more than 41, because S could underflow. The backend "triton" does not compute S, so the limit of 41
      does not apply to it.
    - "lu": LU with partial pivoting. With ridge 0, a singular matrix gives NaN.
    - "svd": pseudo-inverse, the article's default. With ridge 0, singular values up to r·eps·σ_max are dropped. If any
      are dropped, X is the minimum-norm solution, and its derivative is not defined. At large κ in fp32, "svd" is the
      least accurate solver. torch.linalg.svd waits for the device.
    - "auto": "lu" for each matrix whose estimate of κ₂(A) is below kappa_max, "svd" for the others.
      `estimate_condition` computes the estimate from the LU factors. Except for rounding errors, the estimate
      is at most κ₂. In all measurements, the estimate was at least 0.5 κ₂. To find the matrices that need an
      SVD, "auto" waits for the device.
    - "neumann": the series α Σ_{k≤m} (I − αA)^k G with α = 1/(1 + λ). A matrix uses the series if two conditions hold:
      the residual of the series is below 1e-2, and a power iteration gives a spectral radius of I − αA below 0.95.
      "cholesky" solves the other matrices ("lu" if ridge is 0).

    "lu" never waits for the device. "cholesky" does not wait with the backend "triton". With the other backends on a
    GPU, "cholesky" and "neumann" wait for the device, to find the matrices that need "lu". They do not wait during the
    capture of a CUDA graph.

    A non-finite logit gives NaN in the X of its own matrix only. Gradients are the exact gradients of X. For a matrix
    that uses the series of "neumann", X is the truncated series, so the gradients are those of this series. For other
    matrices, X solves A X = G, and the gradients are computed by implicit differentiation.

    Backends:

    - "torch", the default, uses this package's C++ library for "cholesky" on the CPU if the library is built. The C++
      library supports r up to 128, and does not support equilibration. In all other cases, "torch" runs the reference.
    - "triton" solves all matrices in one launch. The kernels support "cholesky" and "lu" without equilibration, r and d
      up to 128, and all dtypes except float64. If a matrix is singular, its gradients are NaN.

    Args:
        logits: l = K̃K̃ᵀs (…, r, r); float64, float32, bfloat16 or float16.
        rhs: G = R V (…, r, d), with the leading axes, dtype and device of `logits`.
        ridge: Factor λ₀ of the ridge λ = λ₀ tr(W)/r, at least 0.
        solver: A key of `conditioning.SOLVERS`.
        equilibrate: Whether to scale W to D_r W D_c before the ridge is added (docs/METHOD.md §2.1). D_r and D_c are
            diagonal, with the entries (row or column norm + 1e-12)^-½. With ridge 0, equilibration does not change X.
        kappa_max: Limit of "auto", above 0: a matrix whose estimate of κ is below `kappa_max` is solved by "lu".
        neumann_order: Highest power m in the series of "neumann", at least 0.
        neumann_gate: Whether "neumann" checks for each matrix that the series converges. If False, every matrix uses
            the series.
        diagnostics: True computes κ from singular values, and waits for the device. "estimate" estimates κ by
            `estimate_condition`, and does not wait. False computes no diagnostics.
        backend: A name of `backends()`, or None.

    Returns:
        X in fp32 (in fp64 for fp64 inputs). With diagnostics, also κ, residual, gain and solver. The diagnostics carry
        no gradient.

    Raises:
        TypeError: A dtype or type is not accepted.
        ValueError: Shapes or devices do not match, the solver is unknown, a number is outside its range, or ridge is
            0 with "cholesky".
        NotImplementedError: The requested backend cannot run the call.
    """
    logits, rhs = autocast.promoted(logits, rhs)
    check_tensors(logits=logits, rhs=rhs)
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected (…, r, r)")
    if rhs.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"rhs has shape {tuple(rhs.shape)}; expected {tuple(logits.shape[:-1])} followed by one more axis"
        )
    options = solve_options(ridge, solver, equilibrate, kappa_max, neumann_order, neumann_gate)
    check_choice("diagnostics", diagnostics, DIAGNOSTICS)
    if diagnostics:
        return diagnosed(logits, rhs, options, estimate=diagnostics == "estimate", backend=backend)
    x, _, _ = solved(logits, rhs, options, backend)
    return LandmarkSolution(x, None, None, None, None)


def solved(
    logits: Tensor, rhs: Tensor, options: SolveOptions, backend: str | None
) -> tuple[Tensor, Tensor, str]:
    """Return X, the `Solver` of each matrix, and the backend that ran; arguments are not checked."""
    chosen = choose_kernels(
        backend,
        rhs,
        "landmark_solve",
        lambda: _refusal(rhs, options),
        plain=("torch", "reference"),
        sizes=lambda: (rhs.shape[-2], rhs.shape[-1]),
        variant=_variant(options),
        call=(rhs.shape,),
    )
    x, used = _solve(logits, rhs, *options.flat(), chosen)
    return x, used, chosen


def diagnosed(
    logits: Tensor, rhs: Tensor, options: SolveOptions, *, estimate: bool, backend: str | None
) -> LandmarkSolution:
    """Return X with diagnostics; arguments are not checked.

    If `estimate` is True, κ is estimated as for the solver "auto".
    """
    x, used, chosen = solved(logits, rhs, options, backend)
    chosen = "reference" if chosen == "triton" else chosen  # diagnostics have no kernels
    with torch.no_grad():
        kappa, residual, gain = _diagnose(
            logits, rhs, x, used, options.ridge, options.equilibrate, estimate, chosen
        )
    return LandmarkSolution(x, kappa, residual, gain, used)


def _variant(options: SolveOptions) -> str:
    return f"{options.solver}, equilibrated" if options.equilibrate else options.solver


def _refusal(rhs: Tensor, options: SolveOptions) -> str | None:
    r, d = rhs.shape[-2:]
    if max(r, d) > _LARGEST:
        return f"its kernels support r and d up to {_LARGEST}, and r is {r} and d {d}"
    if not has_kernels(options):
        kernels = " and ".join(SOLVERS_OF_KERNELS)
        return f"it has kernels for {kernels} without equilibration, not for {_variant(options)}"
    return None


def has_kernels(options: SolveOptions) -> bool:
    """Return whether Triton kernels support these options."""
    return options.solver in SOLVERS_OF_KERNELS and not options.equilibrate


def solve_options(
    ridge: float = 1e-3,
    solver: str = "cholesky",
    equilibrate: bool = False,
    kappa_max: float = 1e6,
    neumann_order: int = 3,
    neumann_gate: bool = True,
) -> SolveOptions:
    """Check the options of the solver, and return them; raise ValueError or TypeError if one is not valid."""
    check_choice("solver", solver, tuple(SOLVERS))
    check_number("ridge", ridge, at_least=0)
    check_number("kappa_max", kappa_max, above=0)
    check_count("neumann_order", neumann_order, at_least=0)
    check_flag("equilibrate", equilibrate)
    check_flag("neumann_gate", neumann_gate)
    if solver == "cholesky" and ridge == 0:
        raise ValueError("ridge=0 with solver='cholesky': expected a ridge above 0, or solver='lu' or 'svd'")
    return SolveOptions(float(ridge), solver, equilibrate, float(kappa_max), int(neumann_order), neumann_gate)


__all__ = ["SOLVERS", "LandmarkSolution", "Solver", "landmark_solve"]
