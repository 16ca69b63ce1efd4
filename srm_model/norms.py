"""Norms of perturbations (docs/METHOD.md §6). To add a norm, only this file has to change.

Other modules refer to a norm by its name, which is its key in `NORMS`. Functions and methods of this module import
torch only when they are called, so that `srm-iqa --help` does not import torch.
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
    """A norm, which measures the perturbation of each image in a batch (B, 3, H, W).

    A config can override three attributes of the norm. If the config has the field `attack_step_NAME`, where NAME is
    the norm's `name`, this field overrides `step`. In the same way, `eps_NAME` overrides `budgets`, and
    `eps_NAME_tables` overrides `tables`.

    Attributes:
        name: Name in files and on the command line.
        symbol: Symbol in tables and figures.
        largest: Largest accepted radius, for pixels in [0, 1].
        step: Factor of PGD's step size. The step size is `step` · radius / (number of steps).
        step_words: Direction of a step, in words.
        budgets: Budgets of a sweep over budgets.
        tables: Budgets in the tables of a report, and the default of --eps. For audits, the default is only the last of
            these budgets. If `tables` is empty, --eps is required.
        stated: Note for the help of --eps: the image size for which a budget is given. Empty if budgets do not depend
            on the image size.
        axis: Label of the budget axis in charts.
        bumps: How the square attack changes δ. If True, as for the Euclidean norm, the attack sets δ to zero in one
            square, and uses the freed budget for a bump in another square. If False, as for the maximum norm, the
            attack sets δ to ±ε in one square. For a norm other than the maximum norm, False makes the attack weaker,
            because the projection then shrinks the squares.
    """

    name: ClassVar[str]
    symbol: ClassVar[str]
    largest: ClassVar[float] = math.inf
    step: ClassVar[float] = 1.0
    step_words: ClassVar[str]
    budgets: ClassVar[tuple[float, ...]] = ()
    tables: ClassVar[tuple[float, ...]] = ()
    stated: ClassVar[str] = ""
    axis: ClassVar[str] = "ε"
    bumps: ClassVar[bool] = False

    def sweep_of(self, config: Any) -> tuple[float, ...]:
        """Return the budgets of a sweep."""
        return tuple(getattr(config, f"eps_{self.name}", self.budgets))

    def tables_of(self, config: Any) -> tuple[float, ...]:
        """Return the budgets of the tables."""
        return tuple(getattr(config, f"eps_{self.name}_tables", self.tables))

    def step_of(self, config: Any) -> float:
        """Return the factor `step`."""
        return float(getattr(config, f"attack_step_{self.name}", self.step))

    def radius(self, stated: float, image: Tensor) -> float:
        """Convert the budget `stated` to the radius for an image (3, H, W)."""
        return stated

    @abstractmethod
    def length(self, delta: Tensor) -> Tensor:
        """Return the norm of each perturbation, (B,)."""

    def diameter(self, image: Tensor) -> float:
        """Return the largest possible distance between two images in [0, 1] that have the size of `image`."""
        return float(self.length(image.new_ones(1, *image.shape)))

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """Return the steepest ascent direction of unit norm. This method may overwrite `gradient`."""

    @abstractmethod
    def noise(self, shape: torch.Size, radius: float, source: dict[str, Any]) -> Tensor:
        """Draw uniformly from the ball of this radius. `source` contains keyword arguments of `torch.rand`."""

    @abstractmethod
    def projection(self, images: Tensor, radius: float) -> Callable[[Tensor], Tensor]:
        """Return a function that projects each point into the ball around its image and into [0, 1].

        The points have the shape (n, B, 3, H, W): n points for each of the B images.
        Rounding never moves a result out of the ball or out of [0, 1].
        """

    def shown(self, eps: float) -> float:
        """Return a budget in the unit of `axis`."""
        return eps

    def brief(self, eps: float) -> str:
        """Format a budget in the form that the command line accepts."""
        return f"{eps:.4g}"

    def text(self, eps: float) -> str:
        """Format a budget for tables."""
        return f"{self.symbol} ε = {float(f'{self.shown(eps):.4g}'):g}"


class LInf(Norm):
    """The maximum norm."""

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
        # Round inwards, so that the distance never exceeds the radius.
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
    """The Euclidean norm of an image's 3×H×W tensor.

    A budget is stated for images of 512×512 pixels. For an image of H×W pixels, it is multiplied by √(HW)/512.
    """

    name = "l2"
    symbol = "L2"
    step = 4.0
    step_words = "along the normalised gradient"
    stated = "an L2 budget is stated for 512×512 pixels and scaled to other sizes"
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
        """Return a function that projects points, as in `Norm.projection`.

        A result is close to the nearest point that is in the ball and in [0, 1], but is not always equal to this point.

        Let δ be the difference between a point and its image x. The result is clip(x + s·δ), where clip limits the
        pixels to [0, 1], and the factor s is at most 1. At first, s is the smaller of 1 and radius/‖δ‖. Clipping can
        move the result closer to x, so a larger s may also keep the result in the ball. Each of `_PROJECTION_ROUNDS`
        rounds therefore increases s towards the largest s that keeps the result in the ball. The distance between the
        result and x never exceeds the radius.
        """
        import torch

        # Margin for rounding: each pixel of x + δ has an error of at most eps_machine / 4.
        precision, size = torch.finfo(images.dtype).eps, images[0].numel()
        # A sum of n squares has a relative error of at most n · eps_machine / 2. Its root has half of this error.
        row = images[0, :, 0].numel() * precision / 4
        limit = max(0.0, (1 - row) * (radius * (1 - 4 * precision) - math.sqrt(size) * precision / 2))
        lower, upper = -images, 1 - images  # bounds of δ, so that x + δ is in [0, 1]

        def share(delta: Tensor) -> Tensor:
            """Return limit / ‖δ‖ for each point.

            The squares of each row are summed in the dtype of δ, which is fast. The sums of the rows are added in fp64.
            """
            together = (2, 4) if delta.stride(2) == 1 else 4  # axes that are contiguous in memory
            rows = torch.linalg.vector_norm(delta, dim=together, keepdim=True)
            length = torch.linalg.vector_norm(rows, dim=(2, 3, 4), keepdim=True, dtype=torch.float64)
            return limit / length.clamp_min(torch.finfo(torch.float64).tiny)

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
    """Return the norm with this name; raise ValueError if the name is unknown."""
    if name not in NORMS:
        raise ValueError(f"norm={name!r}: expected one of {', '.join(map(repr, NORMS))}")
    return NORMS[name]


def check_radius(norm: Norm, eps: float) -> None:
    """Raise ValueError unless the norm accepts this radius."""
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps!r}: expected a finite number, zero or more")
    if eps > norm.largest:
        raise ValueError(
            f"eps={eps!r} for norm {norm.name!r}: expected at most {norm.largest:g}, as pixels lie in [0, 1] "
            "(for example 4/255)"
        )


def place_of(name: str) -> int:
    """Return the position of a norm in tables. Unknown norms come last."""
    return [*NORMS, name].index(name)


def unit(vectors: Tensor) -> Tensor:
    """Divide each image's tensor by its Euclidean norm, without over- or underflow. Zero stays zero."""
    import torch

    largest = vectors.abs().amax((1, 2, 3), keepdim=True)
    vectors = vectors / torch.where(largest > 0, largest, 1)
    return vectors.div_(torch.linalg.vector_norm(vectors, dim=(1, 2, 3), keepdim=True).clamp_min(1))
