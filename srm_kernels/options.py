"""Options that several operators pass on, checked by the public functions that take them as keyword arguments.

An operator that torch knows has a flat signature: `registration` writes an object out there, as its `SCHEMA` names it,
and hands implementations the object again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class LandmarkOptions:
    """How landmarks are chosen (SPEC 2).

    Attributes:
        rank: r, at least 1.
        method: A name of `landmarks.METHODS`.
        gamma: γ of the ridge leverage scores.
        generator: The source of a random method's numbers; None means seed 0. No operator sees it.
    """

    SCHEMA: ClassVar[str] = "SymInt rank, str method, float gamma"
    rank: int
    method: str = "leverage"
    gamma: float = 1e-3
    generator: torch.Generator | None = None

    def clamped(self, keys: int) -> LandmarkOptions:
        """Return the same options with at most as many landmarks as there are keys."""
        return LandmarkOptions(min(self.rank, keys), self.method, self.gamma, self.generator)

    def flat(self) -> tuple[Any, ...]:
        """Return the values in the order of `SCHEMA`."""
        return self.rank, self.method, self.gamma


@dataclass(frozen=True)
class SolveOptions:
    """How X = (W + λI)⁻¹ R V is solved (SPEC 2.1).

    Attributes:
        ridge: λ₀.
        solver: A name of `conditioning.SOLVERS`.
        equilibrate: Whether rows and columns of W are scaled first.
        kappa_max: The κ below which "auto" takes LU.
        neumann_order: m of the series of "neumann".
        neumann_gate: Whether the series is taken only where it is shown to converge.
    """

    SCHEMA: ClassVar[str] = (
        "float ridge, str solver, bool equilibrate, float kappa_max, int neumann_order, bool neumann_gate"
    )
    ridge: float = 1e-3
    solver: str = "cholesky"
    equilibrate: bool = False
    kappa_max: float = 1e6
    neumann_order: int = 3
    neumann_gate: bool = True

    @property
    def default(self) -> bool:
        """Whether the kernels and the C++ core that solve along with other work serve these options."""
        return self.solver == "cholesky" and not self.equilibrate

    def flat(self) -> tuple[Any, ...]:
        """Return the values in the order of `SCHEMA`."""
        return (
            self.ridge,
            self.solver,
            self.equilibrate,
            self.kappa_max,
            self.neumann_order,
            self.neumann_gate,
        )


@dataclass(frozen=True)
class AttentionOptions:
    """How Nyström attention is computed, whatever its tensors.

    Attributes:
        choice: How landmarks are chosen, where they are not given.
        solve: How their system is solved.
        scale: s, the factor of the logits.
        qk_norm: What is RMS-normalised: None, "keys" or "both".
        solve_dtype: "fp32", or "model" for blocks in the dtype of the inputs.
    """

    choice: LandmarkOptions
    solve: SolveOptions
    scale: float
    qk_norm: str | None = None
    solve_dtype: str = "fp32"


OPTIONS: dict[str, Any] = {kind.__name__: kind for kind in (LandmarkOptions, SolveOptions)}
