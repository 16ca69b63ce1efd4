"""The optimisation problem of an attack: a batch, the ball around it, and the loss to maximise."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from srm_model.attacks.guard import (
    NoGradientError,
    as_found,
    check_finite,
    check_images,
    check_model,
    gradient_of,
    scores_of,
    to_model,
)
from srm_model.attacks.objectives import Objective
from srm_model.norms import Norm, check_radius, norm_of

_BACKWARD_EXPONENT = 8  # scale of the scores' gradient, for models that run in fp16 inside


def check_budget(norm: str, eps: float) -> float:
    """Return `eps` as a Python float; raise TypeError or ValueError if `norm` is unknown or rejects `eps`."""
    found, radius = norm_of(norm), check_number("eps", eps)
    check_radius(found, eps)
    return radius


def parse_budget(text: str) -> float:
    """Parse a decimal number or a fraction such as 4/255 or 0.5/255; raise ValueError for other text."""
    above, slash, below = text.partition("/")
    try:
        return float(Fraction(above) / Fraction(below if slash else 1))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is neither a number nor a fraction such as 4/255") from None


def check_number(name: str, value: float) -> float:
    """Return a real number, such as a NumPy scalar, as a Python float; raise TypeError for other values."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: expected a number")
    return float(value)


def check_objective(objective: Objective) -> None:
    """Raise TypeError unless the objective is callable and not a class."""
    if isinstance(objective, type) or not callable(objective):
        given = f"the class {objective.__name__}" if isinstance(objective, type) else repr(objective)
        raise TypeError(
            f"objective is {given}; expected a callable (scores, mos, clean_scores) such as MSE(), Drift() or "
            "PairInversion()"
        )


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return `value` as a Python int.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r}: expected an integer")
    if value < least:
        raise ValueError(f"{name}={value!r}: expected at least {least}")
    return int(value)


@contextmanager
def attacking(
    model: nn.Module,
    images: Tensor,
    mos: Tensor | Sequence[float],
    objective: Objective,
    norm: str,
    eps: float,
    eot: int,
    generator: torch.Generator | None,
) -> Iterator[Problem]:
    """Check the arguments of an attack and yield its `Problem`.

    In the `with` block, the model is in evaluation mode and autocast is off. At the end of the block, `as_found`
    restores the model's state.
    """
    check_model(model)
    check_images(images)
    check_objective(objective)
    eps, eot = check_budget(norm, eps), check_count("eot", eot)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator or None")
    mos = _numbers(mos)
    if mos.shape != (len(images),):
        raise ValueError(
            f"mos has shape {tuple(mos.shape)} for {len(images)} images; expected one value per image"
        )
    if not mos.isfinite().all():
        raise ValueError("mos holds a value that is not finite; expected one finite value per image")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    images, mos = to_model(model, images.detach()), mos.detach()
    with as_found(model, images, seed=seed):
        # Tensors that were made under an outer inference_mode cannot be saved for backward, so clone them.
        images, mos = images.clone(), mos.to(images.device).clone()
        yield Problem(model, images, mos, objective, norm_of(norm), eps, eot, generator)


@dataclass(eq=False)
class Problem:
    """One batch under attack.

    n restarts run at the same time, and each restart has its own copy of the batch. The images that a search
    evaluates are called points. The points of all copies are one tensor (n·B, 3, H, W). Their losses have the
    shape (n, B). If the objective returns one loss for the whole batch, each copy has one loss, and the losses have
    the shape (n,).
    """

    model: nn.Module
    images: Tensor  # clean, (B, 3, H, W), on the model's device
    mos: Tensor  # normalised, (B,)
    objective: Objective
    norm: Norm
    eps: float  # radius of the ball
    eot: int  # number of passes over which losses and gradients are averaged
    generator: torch.Generator  # generator of the random starts

    def __post_init__(self) -> None:
        self.zero_gradients: int | Tensor = 0
        self.nonfinite_gradients: int | Tensor = 0
        self._project = self.norm.projection(self.images, self.eps)
        if getattr(self.objective, "uses_clean_scores", True):
            self.clean_scores = self.scores(self.images).mean(0)
            check_finite(self.clean_scores)
        else:
            self.clean_scores = self.images.new_full((len(self.images),), math.nan)

    def check_losses(self, losses: Tensor) -> None:
        """Check the clean scores if an image, or the whole batch, has no finite loss.

        Args:
            losses: Losses of all iterates, (restarts, iterates, B) or (restarts, iterates).

        Raises:
            ValueError: A clean score is not finite.
        """
        if not losses.isfinite().flatten(0, 1).any(0).all():
            check_finite(self.scores(self.images).mean(0))

    def random_starts(self, copies: int = 1) -> Tensor:
        """Draw the starting points of `copies` restarts uniformly from the ball, and clip them to [0, 1].

        The restarts draw their points one after another, so the points of the first restart do not depend on `copies`.
        """
        starts = [self._random_start() for _ in range(copies)]
        return starts[0] if copies == 1 else torch.cat(starts)

    def _random_start(self) -> Tensor:
        shape, dtype = self.images.shape, self.images.dtype
        source: Any = {"generator": self.generator, "device": self.generator.device, "dtype": dtype}
        noise = self.norm.noise(shape, self.eps, source)
        return self.project(self.images + noise.to(self.images.device))

    def project(self, x: Tensor) -> Tensor:
        """Project points to the ball and to [0, 1]."""
        return self._project(x.unflatten(0, (-1, len(self.images)))).flatten(0, 1)

    def per_image(self, values: Tensor) -> Tensor:
        """Expand values from the shape of the losses, (n, B) or (n,), to (n·B, 1, 1, 1).

        The result has one value for each point, and broadcasts with the points (n·B, 3, H, W).
        """
        spread = values.reshape(len(values), -1).expand(-1, len(self.images))
        return spread.reshape(-1, 1, 1, 1).to(self.images.dtype)

    def choose(self, where: Tensor, points: Tensor, others: Tensor) -> Tensor:
        """Select points as `torch.where` does, but in half the time on a CPU.

        The mask `where` has the shape of the losses, (n, B) or (n,).
        """
        return torch.lerp(others, points, self.per_image(where))  # exact for weights 0 and 1

    def loss(self, x: Tensor) -> Tensor:
        """Return the objective at x, (n, B) or (n,), averaged over `eot` passes."""
        return self.loss_of(self.scores(x))

    def scores(self, x: Tensor) -> Tensor:
        """Return the model's scores (eot, n·B) of the points x, from `eot` forward passes without gradient."""
        with torch.no_grad():
            return torch.stack([scores_of(self.model, x) for _ in range(self.eot)])

    def loss_of(self, scores: Tensor) -> Tensor:
        """Evaluate the objective for each of the `eot` forward passes; return the mean of the losses over the passes.

        `scores` is (eot, n·B). The result has the shape of the losses, (n, B) or (n,).
        """
        return torch.stack([self._judge(sample) for sample in scores]).mean(0)

    def ascend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective at x, averaged over `eot` passes, and the direction of its steepest ascent.

        The direction is `Norm.direction` of the gradient, which is summed over the passes.
        """
        x = x.detach().requires_grad_()
        losses: list[Tensor] = []
        gradient = None
        scale = None
        for _ in range(self.eot):
            scores = differentiable_scores(self.model, x)
            loss = self._judge(scores)
            losses.append(loss.detach())
            pull = _gradient(loss, scores)
            if pull is None:
                continue
            # The factor prevents underflow in fp16. It is the same power of two for every pass, so the direction of
            # the summed gradient does not change.
            scale = _power_of_two(pull) if scale is None else scale
            sample = gradient_of(scores, x, pull * scale)
            if sample is not None:
                # Only the direction is used, so the sum replaces the mean.
                gradient = sample if gradient is None else gradient + sample
        if gradient is None:
            gradient = torch.zeros_like(x, requires_grad=False)
        return torch.stack(losses).mean(0), self._direction(gradient)

    def _judge(self, scores: Tensor) -> Tensor:
        size = len(self.images)
        losses = []
        for copy in scores.unflatten(0, (-1, size)):
            loss = self.objective(copy, self.mos, self.clean_scores)
            if not isinstance(loss, Tensor) or loss.shape not in ((size,), ()):
                tensor = isinstance(loss, Tensor)
                given = f"shape {tuple(loss.shape)}" if tensor else f"a {type(loss).__name__}"
                raise ValueError(
                    f"the objective returned {given}; expected losses of shape ({size},) or one 0-d loss"
                )
            losses.append(loss)
        return torch.stack(losses)

    def _direction(self, gradient: Tensor) -> Tensor:
        largest = gradient.abs().amax((1, 2, 3))
        self.zero_gradients += (largest == 0).sum()
        self.nonfinite_gradients += (~largest.isfinite()).sum()
        gradient = gradient.nan_to_num(nan=0, posinf=0, neginf=0)
        return self.norm.direction(gradient)


class Best:
    """The evaluated images with the highest loss so far, for each copy of the batch.

    For each image of a copy, the point (see `Problem`) with the highest loss is kept. If the objective returns one loss
    for the whole batch, a copy has only one loss, so the points of all its images are replaced together.
    """

    points: Tensor
    loss: Tensor

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._empty = True

    def offer(self, points: Tensor, loss: Tensor) -> Tensor:
        """Keep points whose loss is the highest so far; return a mask of these points, shaped like `loss`.

        NaN counts as the highest loss.
        """
        if self._empty:
            self.points, self.loss, self._empty = points, loss, False
            return torch.ones_like(loss, dtype=torch.bool)
        better = exceeds(loss, self.loss)
        self.points = self._problem.choose(better, points, self.points)
        self.loss = torch.where(better, loss, self.loss)
        return better

    def offer_copies(self, other: Best) -> None:
        """Call `offer` once for each restart of `other`, in order.

        The restarts of `other` ran at the same time, each on its own copy of the batch. This method keeps the same
        points as one run of the restarts after another would keep.
        """
        copies = other.points.unflatten(0, (len(other.loss), -1))
        for points, loss in zip(copies, other.loss, strict=True):
            self.offer(points, loss[None])


def exceeds(loss: Tensor, before: Tensor) -> Tensor:
    """Return the mask of elements where `loss` is higher than `before`. NaN counts as higher than any number."""
    return (loss > before) | (loss.isnan() & ~before.isnan())


def like(images: Tensor, adversarial: Tensor) -> Tensor:
    """Return `adversarial` as a contiguous tensor on the device of `images`."""
    return adversarial.to(images.device).contiguous()


def differentiable_scores(model: nn.Module, images: Tensor) -> Tensor:
    """Return scores (B,) of images that require a gradient; raise NoGradientError if the scores have no gradient."""
    scores = scores_of(model, images)
    if not scores.requires_grad:
        raise NoGradientError
    return scores


def _numbers(mos: Tensor | Sequence[float]) -> Tensor:
    try:
        values = torch.as_tensor(mos)
        if not values.is_complex():
            return values
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"mos is a {type(mos).__name__}; expected a tensor or a sequence of numbers") from None


def _gradient(loss: Tensor, scores: Tensor) -> Tensor | None:
    if not loss.requires_grad:
        return None
    # The model's graph is used only afterwards, by `gradient_of`.
    return torch.autograd.grad(loss.sum(), scores, retain_graph=True, allow_unused=True)[0]


def _power_of_two(pull: Tensor) -> Tensor:
    """Return the power of two that scales the largest finite element of |pull| to about 2⁸.

    The result stays on the device, so that the call does not synchronise with the device.
    """
    largest = pull.abs().nan_to_num(nan=0, posinf=0, neginf=0).max()
    return torch.ldexp(
        torch.ones_like(largest), (_BACKWARD_EXPONENT - largest.frexp().exponent).clamp_max(100)
    )
