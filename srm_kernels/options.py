"""Groups of arguments that several operators, or several implementations of one operator, share.

torch does not accept a group (a dataclass) as an argument of an operator. The `SCHEMA` of a group therefore
lists the fields of the group as separate arguments. Before `registration` calls an implementation, it
rebuilds the group from these arguments. The groups do not check the values of their fields, because the
public functions check them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


class Written:
    """A group of arguments, which `SCHEMA` lists in the syntax of torch's operator schemas."""

    SCHEMA: ClassVar[str]
    NAMES: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        cls.NAMES = tuple(argument.split()[1] for argument in cls.SCHEMA.split(", "))

    def flat(self) -> tuple[Any, ...]:
        """Return the values in the order of `SCHEMA`."""
        return tuple(getattr(self, name) for name in self.NAMES)


@dataclass(frozen=True)
class LandmarkOptions(Written):
    """How landmarks are chosen (docs/METHOD.md §2).

    Attributes:
        rank: r, at least 1.
        method: A key of `landmarks.LANDMARK_METHODS`.
        gamma: γ of the ridge leverage scores.
        generator: Generator for the methods that need random numbers; None means seed 0. An operator receives
            the numbers that were drawn from the generator, not the generator itself.
    """

    SCHEMA: ClassVar[str] = "SymInt rank, str method, float gamma"
    rank: int
    method: str = "leverage"
    gamma: float = 1e-3
    generator: torch.Generator | None = None

    def clamped(self, keys: int) -> LandmarkOptions:
        """Return the options with `rank` limited to `keys`, the number of keys."""
        return LandmarkOptions(min(self.rank, keys), self.method, self.gamma, self.generator)


@dataclass(frozen=True)
class SolveOptions(Written):
    """How X = (W + λI)⁻¹ R V is solved (docs/METHOD.md §2.1).

    Attributes:
        ridge: λ₀, the factor in λ = λ₀ · tr(W)/r.
        solver: A key of `conditioning.SOLVERS`.
        equilibrate: Whether rows and columns of W are scaled before λI is added.
        kappa_max: Limit of κ for the solver "auto". It uses LU for matrices whose estimated κ is below this limit,
            and SVD for other matrices.
        neumann_order: m, the largest exponent in the series of "neumann".
        neumann_gate: Whether "neumann" uses the series only for matrices that pass the convergence checks.
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
        """Whether the solver is Cholesky without equilibration.

        The C++ solver supports only this combination. The same is true of the kernels that fuse solving the landmark
        system with other steps.
        """
        return self.solver == "cholesky" and not self.equilibrate


@dataclass(frozen=True)
class AttentionOptions:
    """How Nyström attention is computed.

    Attributes:
        choice: How landmarks are chosen if they are not given.
        solve: How the landmark system is solved.
        scale: s, the scale of the logits.
        qk_norm: Which tokens are RMS-normalised: None, "keys" or "both" (queries and keys).
        solve_dtype: "fp32" computes L, W and R in fp32. "model" computes L, W and R in the dtype of the inputs.
    """

    choice: LandmarkOptions
    solve: SolveOptions
    scale: float
    qk_norm: str | None = None
    solve_dtype: str = "fp32"


@dataclass(frozen=True)
class KeySide(Written):
    """The arguments of the key side of Nyström attention. If `landmarks` is None, the operator chooses them."""

    SCHEMA: ClassVar[str] = (
        "Tensor key, Tensor value, Tensor? landmarks, LandmarkOptions choice, float scale, str? qk_norm"
    )
    key: Tensor
    value: Tensor
    landmarks: Tensor | None
    choice: LandmarkOptions
    scale: float
    qk_norm: str | None


@dataclass(frozen=True)
class QuerySides(Written):
    """The arguments of `pooled_links`, whose docstring describes them.

    All lists except `maps` have one entry per link. `alphas`, `weights` and `biases` are empty if the links have no
    DyT. `xs` is empty if X was not given.
    """

    SCHEMA: ClassVar[str] = (
        "Tensor[] maps, Tensor[] align_weights, Tensor[] align_biases, Tensor[] alphas, Tensor[] weights, "
        "Tensor[] biases, Tensor[] query_weights, Tensor[] keys, Tensor[] xs, int[] targets, SymInt size, "
        "float scale, str? qk_norm"
    )
    maps: Sequence[Tensor]
    align_weights: Sequence[Tensor]
    align_biases: Sequence[Tensor]
    alphas: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    query_weights: Sequence[Tensor]
    keys: Sequence[Tensor]
    xs: Sequence[Tensor]
    targets: Sequence[int]
    size: int
    scale: float
    qk_norm: str | None

    def parameters(self, link: int) -> list[Tensor]:
        """Return the parameters of a link: A, a and W_Q, followed by α, w and b if the links have DyT."""
        groups = [self.align_weights, self.align_biases, self.query_weights]
        groups += [self.alphas, self.weights, self.biases]
        return [group[link] for group in groups if group]

    def links_to(self, number: int) -> list[int]:
        """Return the links whose target is the map `number`."""
        return [link for link, target in enumerate(self.targets) if target == number]


WRITTEN: dict[str, type[Written]] = {kind.__name__: kind for kind in Written.__subclasses__()}
