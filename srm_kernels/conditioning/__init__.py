"""The small landmark solve and its diagnostics (docs/METHOD.md §2.1, article 3.4)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..checks import check_choice, check_count, check_flag, check_number, check_tensors, wide_dtype
from ..options import SolveOptions
from ..registration import later, register_operator
from ..runtime import choose_backend, kept, triton_refusal
from . import cpu, reference
from .reference import SOLVERS, Solver

DIAGNOSTICS = (True, False, "estimate")
# Kernels of a GPU are in front only where a verdict puts them there.
_IMPLEMENTATIONS = ("torch", "reference", "triton")
# Not equilibrated. The other solvers are torch.linalg's on every device.
SOLVERS_OF_KERNELS = ("cholesky", "lu")
_LARGEST = 128  # r and d of the kernels
_KERNELS = f"{__name__}.kernels"


class LandmarkSolution(NamedTuple):
    """X and, with `diagnostics=True`, what is known about each system; None otherwise."""

    x: Tensor  # (…, r, d)
    kappa: Tensor | None  # (…,) σ_max/σ_min of W_λ, or of W̃ + λI where equilibrated; or its estimate
    residual: Tensor | None  # (…,) ‖A Z − G‖_F / (‖G‖_F + 1e-12) of the system that was solved
    gain: Tensor | None  # (…,) ‖X‖_F / ‖RV‖_F
    solver: Tensor | None  # (…,) int64, the `Solver` that served the matrix


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
    dict.fromkeys(_IMPLEMENTATIONS, reference.landmark_diagnostics),
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
    """X = (W + λI)⁻¹ G for W = softmax(logits), λ = ridge · tr(W)/r, every matrix for itself (docs/METHOD.md §2.1).

    logits: (…, r, r), l = K̃K̃ᵀs. rhs: (…, r, d), G = R V, of the same leading axes, dtype and device;
    float64, float32, bfloat16 or float16. X is fp32 (fp64 for fp64). Solvers:

    - "cholesky": the similar symmetric system, κ₂ ≤ (1 + λ)/λ always. Acts on the symmetric part of the
      logits and needs ridge > 0. A matrix that breaks down, whose logits are not symmetric within
      1e-3·(1 + max|l|), or whose rows' logsumexp lie so far apart (41 in fp32) that the symmetric form
      underflows, goes to "lu", that matrix alone.
    - "lu": partial pivoting. With ridge 0 a singular matrix gives NaN, never a plausible number.
    - "svd": pseudo-inverse; with ridge 0, singular values up to r·eps·σ_max are dropped (minimum norm) and
      the derivative is not defined where any was. The article's default; the least accurate in fp32 at
      high κ, offered for parity. Waits for the device (torch.linalg.svd).
    - "auto": "lu" where κ(W_λ) < kappa_max, else "svd", per matrix; κ is estimated from the LU factors by
      `estimate_condition`: never above κ₂ but for rounding, measured never below 0.5 of it. Waits for the
      device once, to learn which matrices need an SVD, and for those.
    - "neumann": α Σ_{k≤m} (I − αW_λ)^k G, α = 1/(1 + λ), m = `neumann_order`, per matrix where a power
      iteration puts the spectral radius below 0.95 and the residual is below 1e-2, else the default solve
      ("lu" where ridge is 0); `neumann_gate=False` applies it always.

    equilibrate: solve D_r W D_c + λI with D_r, D_c = (row or column norm + 1e-12)^-½ instead; same X up to λ.
    "cholesky", "lu" and "neumann" never wait for the device.
    diagnostics: True fills κ, residual, gain and solver; κ takes exact singular values and waits for the
    device. "estimate" fills the same with κ estimated as in "auto", and does not wait.
    A non-finite logit makes its own matrix's X NaN and no other's. Gradients are exact, by the implicit
    formula (through the polynomial for "neumann"); diagnostics carry none.
    backend="triton" is one launch for "cholesky" and "lu", not equilibrated, r, d ≤ 128 and anything but float64,
    forward and backward; a singular matrix has NaN gradients. backend="torch", which None takes, has csrc's C++ for
    "cholesky" on the CPU, r ≤ 128, not equilibrated, where it is built; else the reference's.
    Raises ValueError for shapes, an unknown solver, ridge < 0, or "cholesky" with ridge 0; TypeError for dtypes.
    """
    logits, rhs = autocast.promoted(logits, rhs)
    check_tensors(logits=logits, rhs=rhs)
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected (…, r, r)")
    if rhs.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"rhs has shape {tuple(rhs.shape)}; expected {tuple(logits.shape[:-1])} and one more axis"
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
    """X, the `Solver` that served each matrix, and the implementation; arguments are not checked."""
    variant, call = _variant(options), (rhs.shape,)
    chosen = kept(backend, rhs, "landmark_solve", variant, call) or choose_backend(
        backend,
        _IMPLEMENTATIONS,
        "landmark_solve",
        partial(_refusal, rhs, options),
        tensor=rhs,
        sizes=lambda: (rhs.shape[-2], rhs.shape[-1]),
        variant=variant,
        call=call,
    )
    x, used = _solve(logits, rhs, *options.flat(), chosen)
    return x, used, chosen


def diagnosed(
    logits: Tensor, rhs: Tensor, options: SolveOptions, *, estimate: bool, backend: str | None
) -> LandmarkSolution:
    """X and what is known about each system; `estimate` gives κ as "auto" has it. Arguments are not checked."""
    x, used, chosen = solved(logits, rhs, options, backend)
    with torch.no_grad():
        kappa, residual, gain = _diagnose(
            logits,
            rhs,
            x,
            used,
            options.ridge,
            options.equilibrate,
            estimate,
            "reference" if chosen == "triton" else chosen,  # it has no kernels
        )
    return LandmarkSolution(x, kappa, residual, gain, used)


def _variant(options: SolveOptions) -> str:
    return f"{options.solver}, equilibrated" if options.equilibrate else options.solver


def _refusal(rhs: Tensor, options: SolveOptions, name: str) -> str | None:
    if name != "triton":
        return None
    reason = triton_refusal(rhs)
    r, d = rhs.shape[-2:]
    if reason is None and max(r, d) > _LARGEST:
        return f"its kernels take r and d up to {_LARGEST}, and they are {r} and {d}"
    if reason is None and not has_kernels(options):
        kernels = " and ".join(SOLVERS_OF_KERNELS)
        return f"it has kernels for {kernels}, not equilibrated, not for {_variant(options)}"
    return reason


def has_kernels(options: SolveOptions) -> bool:
    """Whether the Triton kernels have a form of this solve."""
    return options.solver in SOLVERS_OF_KERNELS and not options.equilibrate


def solve_options(
    ridge: float = 1e-3,
    solver: str = "cholesky",
    equilibrate: bool = False,
    kappa_max: float = 1e6,
    neumann_order: int = 3,
    neumann_gate: bool = True,
) -> SolveOptions:
    """The solver's own arguments as an object; ValueError or TypeError."""
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
