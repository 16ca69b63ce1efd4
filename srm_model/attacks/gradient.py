"""FGSM and PGD on a regressor of image quality, docs/METHOD.md §6 (article section 3.8.4)."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor, nn

from srm_model.attacks.objectives import Objective
from srm_model.attacks.problem import (
    Best,
    Problem,
    attacking,
    check_count,
    check_number,
    check_objective,
    like,
)
from srm_model.config import SRMConfig
from srm_model.norms import norm_of

_DEFAULTS = SRMConfig()
_P = ParamSpec("_P")


class PGDTrace(NamedTuple):
    """What `pgd_trace`, `apgd_trace` or `square_trace` found, and what happened on the way."""

    images: Tensor  # (B, 3, H, W), the kept iterates
    loss: Tensor  # their losses: (B,), or 0-d for an objective defined on the batch
    losses: Tensor  # of every iterate, random start first: (restarts, steps + 1, B) or (restarts, steps + 1)
    # Shares of the gradients (one per image, step and restart) that were zero everywhere, and that had a NaN or
    # infinite element, which counts as zero.
    zero_gradients: float
    nonfinite_gradients: float


def images_of(trace: Callable[_P, PGDTrace]) -> Callable[_P, Tensor]:
    """The attack that returns the attacked images alone, of one that tells what happened: one signature for both."""

    @functools.wraps(trace)
    def attack(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        found = trace(*args, **kwargs)
        _warn_without_gradients(found.zero_gradients + found.nonfinite_gradients)
        return found.images

    attack.__name__ = attack.__qualname__ = trace.__name__.removesuffix("_trace")
    signature = inspect.signature(trace).replace(return_annotation="Tensor")
    attack.__signature__ = signature  # type: ignore[attr-defined]
    return attack


def _warn_without_gradients(share: float) -> None:
    """Warn where every gradient was zero or not finite: the attack then searched nothing."""
    if share >= 1:
        warnings.warn(
            "every gradient was zero or not finite, so the attack followed none: its result is no evidence of "
            "robustness",
            stacklevel=3,
        )


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
    check_objective(objective)
    if getattr(objective, "flat_at_clean", False):
        raise ValueError(
            f"{type(objective).__name__} has zero gradient at the clean images, where FGSM takes its step: "
            "use pgd, which starts elsewhere"
        )
    with attacking(model, images, mos, objective, norm, eps, eot, generator) as problem:
        loss, direction = problem.ascend(problem.images)
        problem.check_losses(loss[None])
        _warn_without_gradients(float(problem.zero_gradients + problem.nonfinite_gradients) / len(images))
        adversarial = problem.project(problem.images.add(direction, alpha=problem.eps))
    return like(images, adversarial)


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
    restart_batch: int | None = 1,
    eot: int = 1,
    generator: torch.Generator | None = None,
    on_step: Callable[[], object] | None = None,
) -> PGDTrace:
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
    restart_batch: so many of them run at once, as one large batch, from the same starts as one after another: the
        same attack for a model whose score of an image does not depend on its batch, but for rounding. None runs
        all, and half as many wherever a GPU's memory does not suffice.
    eot: forward passes whose gradients and losses each step averages; above 1 for stochastic models.
    generator: for the starts and the model's own randomness; None is seed 0.
    on_step: called after each step of each restart.

    Returns the best iterate over all steps and restarts, starts included, per image or, where the objective is
    defined on the batch, per batch; same shape, dtype and device as `images`. `pgd_trace` takes the same arguments
    and returns a `PGDTrace`: these images, and what happened on the way. A NaN loss counts as the best there is: a
    model that can be driven to NaN is broken, and its correlations become NaN rather than flattering.

    Raises ValueError or TypeError, in one sentence, for arguments that are none of the above, and for a model whose
    scores of the images as they are are not finite.
    """
    steps, restarts = check_count("steps", steps), check_count("restarts", restarts)
    with attacking(model, images, mos, objective, norm, eps, eot, generator) as problem:
        if step_size is None:
            step_size = default_step_size(norm, problem.eps, steps)
        else:
            step_size = check_number("step_size", step_size)
            if not (math.isfinite(step_size) and step_size > 0):
                raise ValueError(f"step_size={step_size!r}: expected a positive number or None")

        def climb(copies: int, best: Best) -> Tensor:
            x = problem.random_starts(copies)
            losses = []
            for _ in range(steps):
                loss, direction = problem.ascend(x)
                best.offer(x, loss)
                losses.append(loss)
                x = problem.project(x.add(direction, alpha=step_size))
                if on_step is not None:
                    for _ in range(copies):
                        on_step()
            loss = problem.loss(x)
            best.offer(x, loss)
            return torch.stack([*losses, loss], 1)

        kept, losses = run_restarts(problem, climb, restarts, restart_batch)
        return trace_of(images, problem, kept, losses, gradients=restarts * steps * len(images))


pgd = images_of(pgd_trace)


def run_restarts(
    problem: Problem, climb: Callable[[int, Best], Tensor], restarts: int, restart_batch: int | None
) -> tuple[Best, Tensor]:
    """The best points over all restarts, and the losses of all, (restarts, iterates, …).

    `climb(copies, best)` runs so many restarts at once, offers its points to `best`, and returns the losses
    (copies, iterates, …).
    """
    if restart_batch is not None:
        restart_batch = check_count("restart_batch", restart_batch)
    at_once = restarts if restart_batch is None else min(restart_batch, restarts)
    kept = Best(problem)
    losses: list[Tensor] = []
    done = 0
    while done < restarts:
        copies = min(at_once, restarts - done)
        found = Best(problem)
        before = problem.generator.get_state(), problem.zero_gradients, problem.nonfinite_gradients
        try:
            losses.append(climb(copies, found))
        except torch.OutOfMemoryError:
            if restart_batch is not None or copies == 1:
                raise
            state, problem.zero_gradients, problem.nonfinite_gradients = before
            problem.generator.set_state(state)
            at_once = copies // 2
            continue
        kept.offer_copies(found)
        done += copies
    return kept, torch.cat(losses)


def trace_of(images: Tensor, problem: Problem, kept: Best, losses: Tensor, *, gradients: int) -> PGDTrace:
    """What was kept, as the caller's images are, with shares of the gradients that were taken (NaN of none)."""
    problem.check_losses(losses)
    return PGDTrace(
        like(images, kept.points),
        kept.loss[0],
        losses,
        float(problem.zero_gradients) / gradients if gradients else math.nan,
        float(problem.nonfinite_gradients) / gradients if gradients else math.nan,
    )


def default_step_size(norm: str, eps: float, steps: int, config: SRMConfig = _DEFAULTS) -> float:
    """2.5·eps/steps for "linf" and 4·eps/steps for "l2", docs/METHOD.md §6."""
    return norm_of(norm).step_of(config) * eps / steps
