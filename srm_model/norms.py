"""The norms that attacks' budgets are given in. All that depends on a norm is here: another one needs this file alone.

Command line, study files, configs and results have a norm by its name, `NORMS` has the objects. Methods import torch
themselves: `srm-iqa --help` need not wait for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REFERENCE_SIDE = 512  # L2 budgets are stated for 512×512 images
_PROJECTION_ROUNDS = 2


class Norm(ABC):
    """A norm of perturbations (B, 3, H, W), per image.

    Attributes:
        name: In files and on the command line.
        symbol: In tables and figures.
        largest: The largest radius that makes sense, since pixels lie in [0, 1].
        step: A step of PGD is this times the radius over the number of steps.
        step_words: Along what it goes.
        budgets: Those of a sweep. tables: Those of the tables. A config's `eps_NAME`, `eps_NAME_tables` and
            `attack_step_NAME`, where it has them, are taken instead.
        axis: The label of an axis of budgets.
        bumps: Whether the square attack moves Euclidean length between squares instead of setting them to ±eps.
    """

    name: ClassVar[str]
    symbol: ClassVar[str]
    largest: ClassVar[float] = math.inf
    step: ClassVar[float] = 1.0
    step_words: ClassVar[str]
    budgets: ClassVar[tuple[float, ...]] = ()
    tables: ClassVar[tuple[float, ...]] = ()
    axis: ClassVar[str] = "ε"
    bumps: ClassVar[bool] = False

    def sweep_of(self, config: Any) -> tuple[float, ...]:
        """The budgets of a sweep."""
        return tuple(getattr(config, f"eps_{self.name}", self.budgets))

    def tables_of(self, config: Any) -> tuple[float, ...]:
        """The budgets of the tables."""
        return tuple(getattr(config, f"eps_{self.name}_tables", self.tables))

    def step_of(self, config: Any) -> float:
        """The factor of a step."""
        return float(getattr(config, f"attack_step_{self.name}", self.step))

    def radius(self, stated: float, image: Tensor) -> float:
        """What a stated budget means for an image (3, H, W)."""
        return stated

    @abstractmethod
    def length(self, delta: Tensor) -> Tensor:
        """The norm of each perturbation, (B,)."""

    def diameter(self, image: Tensor) -> float:
        """A radius within which every image of this size lies."""
        return float(self.length(image.new_ones(1, *image.shape)))

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The perturbation of unit length that raises a linear function of this gradient; `gradient` is overwritten."""

    @abstractmethod
    def noise(self, shape: torch.Size, radius: float, source: dict[str, Any]) -> Tensor:
        """Drawn uniformly from the ball; `source` are arguments of torch.rand."""

    @abstractmethod
    def projection(self, images: Tensor, radius: float) -> Callable[[Tensor], Tensor]:
        """A function that takes points (n, B, 3, H, W) to points of the ball around `images` that lie in [0, 1].

        Rounding never takes a point out of either.
        """

    def shown(self, eps: float) -> float:
        """A budget in the unit of `axis`."""
        return eps

    def brief(self, eps: float) -> str:
        """A budget as the command line takes it."""
        return f"{eps:.4g}"

    def text(self, eps: float) -> str:
        """A budget as tables have it."""
        return f"{self.symbol} ε = {float(f'{self.shown(eps):.4g}'):g}"


class LInf(Norm):
    """The largest change of a pixel value."""

    name = "linf"
    symbol = "L∞"
    largest = 1.0
    step = 2.5
    step_words = "along the sign"
    axis = "ε, in 1/255"

    def length(self, delta: Tensor) -> Tensor:
        return delta.abs().amax((1, 2, 3))

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign_()

    def noise(self, shape: torch.Size, radius: float, source: dict[str, Any]) -> Tensor:
        import torch

        return (torch.rand(shape, **source) * 2 - 1) * radius

    def projection(self, images: Tensor, radius: float) -> Callable[[Tensor], Tensor]:
        import torch

        exact = images.double()
        low, high = (exact - radius).clamp_min(0), (exact + radius).clamp_max(1)
        lower, upper = low.to(images.dtype), high.to(images.dtype)
        # Rounded inwards, so that the distance is at most the radius exactly.
        lower = torch.where(lower < low, lower.nextafter(torch.ones_like(lower)), lower)
        upper = torch.where(upper > high, upper.nextafter(torch.zeros_like(upper)), upper)
        return lambda points: points.clamp(lower, upper)

    def shown(self, eps: float) -> float:
        return eps * 255

    def brief(self, eps: float) -> str:
        return f"{self.shown(eps):.4g}/255"

    def text(self, eps: float) -> str:
        return f"{super().text(eps)}/255"


class L2(Norm):
    """The Euclidean norm on an image's whole 3×H×W tensor; budgets are stated at 512², scaled by √(HW)/512."""

    name = "l2"
    symbol = "L2"
    step = 4.0
    step_words = "along the normalised gradient"
    axis = "ε, as stated at 512×512"
    bumps = True

    def radius(self, stated: float, image: Tensor) -> float:
        return stated * math.sqrt(image[0].numel()) / REFERENCE_SIDE

    def length(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).norm(dim=1)

    def direction(self, gradient: Tensor) -> Tensor:
        return unit(gradient)

    def noise(self, shape: torch.Size, radius: float, source: dict[str, Any]) -> Tensor:
        import torch

        noise = unit(torch.randn(shape, **source))
        noise *= radius * torch.rand((len(noise), 1, 1, 1), **source) ** (1 / noise[0].numel())
        return noise

    def projection(self, images: Tensor, radius: float) -> Callable[[Tensor], Tensor]:
        """All but the nearest point, which is clip(s·δ) with the factor s ≤ 1 that spends the budget.

        Clipping shortens δ, so scaling δ to the radius first leaves some of the budget unspent; each round takes s
        closer, and never past the radius.
        """
        import torch

        # Room for rounding: each pixel of x + δ is off by eps_machine / 4 at most, when measured and in the end.
        precision, size = torch.finfo(images.dtype).eps, images[0].numel()
        # And for lengths: n squares of a row are summed to n · eps_machine / 2 of theirs, the root to half that.
        row = images[0, :, 0].numel() * precision / 4
        room = max(0.0, (1 - row) * (radius * (1 - 4 * precision) - math.sqrt(size) * precision / 2))
        lower, upper = -images, 1 - images  # of δ, so that x + δ is in [0, 1]

        def share(delta: Tensor) -> Tensor:
            """The radius over each length: summed by rows in its own dtype, which is fast, then in fp64."""
            together = (2, 4) if delta.stride(2) == 1 else 4  # what lies together in memory
            rows = torch.linalg.vector_norm(delta, dim=together, keepdim=True)
            length = torch.linalg.vector_norm(rows, dim=(2, 3, 4), keepdim=True, dtype=torch.float64)
            return room / length.clamp_min(torch.finfo(torch.float64).tiny)

        def project(points: Tensor) -> Tensor:
            delta = points - images
            shrink = share(delta).clamp_max(1)
            buffer = torch.empty_like(delta)
            for _ in range(_PROJECTION_ROUNDS):
                clipped = torch.mul(delta, shrink.to(delta.dtype), out=buffer).clamp_(lower, upper)
                shrink = (shrink * share(clipped)).clamp_max(1)
            scaled = torch.mul(delta, shrink.to(delta.dtype), out=buffer)
            return scaled.add_(images).clamp_(0, 1)

        return project

    def text(self, eps: float) -> str:
        return f"{super().text(eps)} at 512²"


NORMS: dict[str, Norm] = {norm.name: norm for norm in (LInf(), L2())}


def norm_of(name: str) -> Norm:
    """The norm of a name; ValueError."""
    if name not in NORMS:
        raise ValueError(f"norm={name!r}: expected one of {', '.join(map(repr, NORMS))}")
    return NORMS[name]


def check_radius(norm: Norm, eps: float) -> None:
    """ValueError unless the norm allows this radius."""
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps!r}: expected a finite number, zero or more")
    if eps > norm.largest:
        raise ValueError(
            f"eps={eps!r} for norm {norm.name!r}: expected at most {norm.largest:g}, as pixels lie in [0, 1] "
            "(4/255, say)"
        )


def place_of(name: str) -> int:
    """Where a norm stands among others in tables; behind them where it is not known."""
    return [*NORMS, name].index(name)


def unit(vectors: Tensor) -> Tensor:
    """Each image's tensor divided by its Euclidean norm; zero stays zero, and nothing over- or underflows."""
    import torch

    largest = vectors.abs().amax((1, 2, 3), keepdim=True)
    vectors = vectors / torch.where(largest > 0, largest, 1)
    return vectors.div_(torch.linalg.vector_norm(vectors, dim=(1, 2, 3), keepdim=True).clamp_min(1))
