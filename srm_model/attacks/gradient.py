"""FGSM and PGD on a regressor of image quality, SPEC section 6 (article section 3.8.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from srm_model.attacks.guard import as_found, check_images, check_model, scores_of, to_model
from srm_model.attacks.objectives import Objective
from srm_model.config import SRMConfig

NORMS = ("linf", "l2")
_DEFAULTS = SRMConfig()


class PGDTrace(NamedTuple):
    """What `pgd_trace` found, and what happened on the way."""

    images: Tensor  # (B, 3, H, W), the kept iterates
    loss: Tensor  # their losses: (B,), or 0-d for an objective defined on the batch
    losses: Tensor  # of every iterate, random start first: (restarts, steps + 1, B) or (restarts, steps + 1)
    zero_gradients: (
        float  # share of the gradients (one per image, step and restart) that were zero everywhere
    )
    nonfinite_gradients: float  # share of them with a NaN or infinite element; such elements count as zero


def fgsm(
    model: nn.Module,
    images: Tensor,
    mos: Tensor | Sequence[float],
    objective: Objective,
    *,
    eps: float,
    norm: str = "linf",
    eot: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One step of size `eps` from the images along the gradient's sign ("linf") or its direction ("l2").

    Arguments, result, errors and promises are those of `pgd`. An objective whose gradient is zero at the
    images themselves (`Drift`) is a ValueError.
    """
    if getattr(objective, "flat_at_clean", False):
        raise ValueError(
            f"{type(objective).__name__} has zero gradient at the clean images, where FGSM takes its step: "
            "use pgd, which starts elsewhere"
        )
    with _attacking(model, images, mos, objective, norm, eps, eot, generator) as attack:
        _, direction = attack.ascend(attack.images)
        adversarial = attack.project(attack.images.add(direction, alpha=eps))
    return _like(images, adversarial)


def pgd(
    model: nn.Module,
    images: Tensor,
    mos: Tensor | Sequence[float],
    objective: Objective,
    *,
    norm: str = "linf",
    eps: float,
    steps: int = _DEFAULTS.attack_steps,
    step_size: float | None = None,
    restarts: int = _DEFAULTS.attack_restarts,
    eot: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent on `objective` within ‖x' − x‖ ≤ eps and [0, 1], from random starts.

    model: any module from (B, 3, H, W) in [0, 1] to scores (B,) or (B, 1). It runs on its own device, in
        evaluation mode and fp32, and is left exactly as found; so are all global random generators.
    images: (B, 3, H, W) float32 in [0, 1] (float64 for a float64 model). mos: (B,), finite.
    objective: `(scores, mos, clean_scores)` → losses (B,) or one 0-d loss of the batch, maximised.
    eps: radius, per image: largest change of a pixel value ("linf", at most 1) or Euclidean norm on the whole
        3×H×W tensor ("l2"). It is the actual radius here; `Suite` scales its L2 budgets by the image's size.
        Rounding never takes an image out of the ball or out of [0, 1].
    step_size: None is 2.5·eps/steps along the sign ("linf") or 4·eps/steps along each image's normalised
        gradient ("l2").
    restarts: each from its own start, uniform in the ball.
    eot: forward passes whose gradients and losses each step averages; above 1 for stochastic models.
    generator: for the starts and the model's own randomness; None is seed 0.

    Returns the best iterate over all steps and restarts, starts included, per image or, where the objective is
    defined on the batch, per batch; same shape, dtype and device as `images`. A NaN loss counts as the best there is:
    a model that can be driven to NaN is broken, and its correlations become NaN rather than flattering.

    Raises ValueError or TypeError, in one sentence, for arguments that are none of the above.
    """
    return pgd_trace(
        model,
        images,
        mos,
        objective,
        norm=norm,
        eps=eps,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        eot=eot,
        generator=generator,
    ).images


def pgd_trace(
    model: nn.Module,
    images: Tensor,
    mos: Tensor | Sequence[float],
    objective: Objective,
    *,
    norm: str = "linf",
    eps: float,
    steps: int = _DEFAULTS.attack_steps,
    step_size: float | None = None,
    restarts: int = _DEFAULTS.attack_restarts,
    eot: int = 1,
    generator: torch.Generator | None = None,
    on_step: Callable[[], object] | None = None,
) -> PGDTrace:
    """`pgd` with the losses of every iterate and counts of bad gradients; `on_step` is called after each step."""
    _check_count("steps", steps)
    _check_count("restarts", restarts)
    with _attacking(model, images, mos, objective, norm, eps, eot, generator) as attack:
        if step_size is None:
            step_size = default_step_size(norm, eps, steps)
        elif not (math.isfinite(step_size) and step_size > 0):
            raise ValueError(f"step_size={step_size!r}: expected a positive number or None")
        kept = _Best()
        losses = []
        for _ in range(restarts):
            x = attack.random_start()
            for _ in range(steps):
                loss, direction = attack.ascend(x)
                kept.offer(x, loss)
                losses.append(loss)
                x = attack.project(x.add(direction, alpha=step_size))
                if on_step is not None:
                    on_step()
            loss = attack.loss(x)
            kept.offer(x, loss)
            losses.append(loss)
    gradients = restarts * steps * len(images)
    return PGDTrace(
        _like(images, kept.images),
        kept.loss,
        torch.stack(losses).unflatten(0, (restarts, steps + 1)),
        float(attack.zero_gradients) / gradients,
        float(attack.nonfinite_gradients) / gradients,
    )


def default_step_size(norm: str, eps: float, steps: int, config: SRMConfig = _DEFAULTS) -> float:
    """2.5·eps/steps for "linf" and 4·eps/steps for "l2", SPEC section 6."""
    return (config.attack_step_linf if norm == "linf" else config.attack_step_l2) * eps / steps


def check_budget(norm: str, eps: float) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: expected one of {', '.join(map(repr, NORMS))}")
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps={eps!r}: expected a number")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps!r}: expected a finite number, zero or more")
    if norm == "linf" and eps > 1:
        raise ValueError(
            f"eps={eps!r} for norm 'linf': expected at most 1, as pixels lie in [0, 1] (4/255, say)"
        )


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an integer")
    if value < 1:
        raise ValueError(f"{name}={value!r}: expected at least 1")


def _like(images: Tensor, adversarial: Tensor) -> Tensor:
    return adversarial.to(images.device).contiguous()


@contextmanager
def _attacking(
    model: nn.Module,
    images: Tensor,
    mos: Tensor | Sequence[float],
    objective: Objective,
    norm: str,
    eps: float,
    eot: int,
    generator: torch.Generator | None,
) -> Iterator[_Attack]:
    """Check the arguments and open the attack on them, with the model as `as_found` has it."""
    check_model(model)
    check_images(images)
    check_budget(norm, eps)
    _check_count("eot", eot)
    mos = torch.as_tensor(mos)
    if mos.shape != (len(images),):
        raise ValueError(
            f"mos of shape {tuple(mos.shape)} for {len(images)} images: expected one value per image"
        )
    if not mos.isfinite().all():
        raise ValueError("mos holds a value that is not finite: expected one finite value per image")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    images = to_model(model, images)
    with as_found(model, images, seed=seed):
        # Clones, because tensors made under an outer inference_mode could not be saved for backward.
        yield _Attack(
            model, images.clone(), mos.to(images.device).clone(), objective, norm, eps, eot, generator
        )


class _Best:
    """The iterates of the highest loss so far, per image or per batch as the loss is."""

    images: Tensor
    loss: Tensor

    def __init__(self) -> None:
        self._empty = True

    def offer(self, images: Tensor, loss: Tensor) -> None:
        if self._empty:
            self.images, self.loss, self._empty = images, loss, False
            return
        better = (loss > self.loss) | (loss.isnan() & ~self.loss.isnan())
        self.images = torch.where(better.view(-1, 1, 1, 1), images, self.images)
        self.loss = torch.where(better, loss, self.loss)


class _Attack:
    """One batch under attack: the ball around it, the loss on it and the direction in which the loss grows."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        mos: Tensor,
        objective: Objective,
        norm: str,
        eps: float,
        eot: int,
        generator: torch.Generator,
    ) -> None:
        self.model, self.images, self.mos, self.objective = model, images, mos, objective
        self.norm, self.eps, self.eot, self.generator = norm, eps, eot, generator
        self.zero_gradients: int | Tensor = 0
        self.nonfinite_gradients: int | Tensor = 0
        if norm == "linf":
            self._lower, self._upper = _bounds(images, eps)
        else:
            # Room for rounding: each pixel of x + δ is off by eps_machine / 4 at most.
            precision, size = torch.finfo(images.dtype).eps, images[0].numel()
            self._radius = max(0.0, eps * (1 - 4 * precision) - math.sqrt(size) * precision / 4)
        if getattr(objective, "uses_clean_scores", True):
            with torch.no_grad():
                self.clean_scores = torch.stack([scores_of(model, images) for _ in range(eot)]).mean(0)
        else:
            self.clean_scores = images.new_full((len(images),), math.nan)

    def random_start(self) -> Tensor:
        """A point drawn uniformly from the ball, then clipped to [0, 1]."""
        shape, dtype = self.images.shape, self.images.dtype
        source: Any = {"generator": self.generator, "device": self.generator.device, "dtype": dtype}
        if self.norm == "linf":
            noise = (torch.rand(shape, **source) * 2 - 1) * self.eps
        else:
            noise = _unit(torch.randn(shape, **source))
            size = self.images[0].numel()
            noise *= self.eps * torch.rand((len(noise), 1, 1, 1), **source) ** (1 / size)
        return self.project(self.images + noise.to(self.images.device))

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the ball, clipped to [0, 1], which leads no further from the images."""
        if self.norm == "linf":
            return x.clamp(self._lower, self._upper)
        delta = x - self.images
        length = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
        shrink = (self._radius / length.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1)
        return (self.images + delta * shrink.to(delta.dtype)).clamp_(0, 1)

    def loss(self, x: Tensor) -> Tensor:
        """The objective at x, averaged over `eot` passes: (B,) or 0-d."""
        with torch.no_grad():
            return torch.stack([self._one_loss(x) for _ in range(self.eot)]).mean(0)

    def ascend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The objective at x and, from the same passes, the direction of steepest ascent in the norm."""
        x = x.detach().requires_grad_()
        losses: list[Tensor] = []
        gradient = torch.zeros_like(x)
        for _ in range(self.eot):
            loss = self._one_loss(x)
            if loss.requires_grad:
                (sample,) = torch.autograd.grad(loss.sum(), x, allow_unused=True)
                if sample is not None:
                    gradient += sample  # a sum serves as well as a mean: only its direction is used
            losses.append(loss.detach())
        return torch.stack(losses).mean(0), self._direction(gradient)

    def _one_loss(self, x: Tensor) -> Tensor:
        scores = scores_of(self.model, x)
        if x.requires_grad and not scores.requires_grad:
            raise ValueError(
                "the model's scores carry no gradient to the images: a gradient attack needs a differentiable model"
            )
        loss = self.objective(scores, self.mos, self.clean_scores)
        if not isinstance(loss, Tensor) or loss.shape not in ((len(x),), ()):
            given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(
                f"the objective returned {given}: expected losses of shape ({len(x)},) or one 0-d loss"
            )
        return loss

    def _direction(self, gradient: Tensor) -> Tensor:
        largest = gradient.abs().amax((1, 2, 3))
        self.zero_gradients += (largest == 0).sum()
        self.nonfinite_gradients += (~largest.isfinite()).sum()
        gradient = gradient.nan_to_num(nan=0, posinf=0, neginf=0)
        return gradient.sign_() if self.norm == "linf" else _unit(gradient)


def _bounds(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The interval of each pixel, rounded inwards, so that the distance is at most eps exactly."""
    exact = images.double()
    low, high = (exact - eps).clamp_min(0), (exact + eps).clamp_max(1)
    lower, upper = low.to(images.dtype), high.to(images.dtype)
    lower = torch.where(lower < low, lower.nextafter(torch.ones_like(lower)), lower)
    upper = torch.where(upper > high, upper.nextafter(torch.zeros_like(upper)), upper)
    return lower, upper


def _unit(vectors: Tensor) -> Tensor:
    """Each image's tensor divided by its Euclidean norm; zero stays zero, and nothing over- or underflows."""
    largest = vectors.abs().amax((1, 2, 3), keepdim=True)
    vectors = vectors / torch.where(largest > 0, largest, 1)
    return vectors / torch.linalg.vector_norm(vectors, dim=(1, 2, 3), keepdim=True).clamp_min(1)
