"""FGSM and PGD (docs/METHOD.md §6)."""

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
    """Result of `pgd_trace`, `apgd_trace` or `square_trace`."""

    images: Tensor  # best iterates, (B, 3, H, W)
    loss: Tensor  # losses of the best iterates, (B,), or 0-d if the objective returns one loss per batch
    losses: Tensor  # losses of all iterates, start first: (restarts, steps + 1, B) or (restarts, steps + 1)
    zero_gradients: float  # share of gradients (one per image, step and restart) that were zero
    nonfinite_gradients: float  # share of gradients with NaN or infinite elements, which are set to 0


def images_of(trace: Callable[_P, PGDTrace]) -> Callable[_P, Tensor]:
    """Convert an attack that returns a trace to one that returns only the images, with the same arguments."""

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
    if share >= 1:
        warnings.warn(
            "every gradient was zero or not finite, so the attack made no progress; its result is no evidence of "
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
    """Attack by one step of size `eps` along the sign ("linf") or the direction ("l2") of the gradient.

    Arguments, result and errors are those of `pgd`.

    Raises:
        ValueError: As in `pgd`. FGSM also rejects an objective whose `flat_at_clean` is True, such as `Drift`, because
            its gradient is zero at the clean images, where FGSM computes the gradient.
    """
    check_objective(objective)
    if getattr(objective, "flat_at_clean", False):
        raise ValueError(
            f"{type(objective).__name__} has zero gradient at the clean images, where FGSM takes its step; "
            "use pgd, which starts from another point"
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
    """Maximise an objective by projected gradient ascent within ‖x' − x‖ ≤ eps and [0, 1] (docs/METHOD.md §6).

    The model runs on its own device, in evaluation mode and without autocast. Its state, and the states of the global
    random generators, are the same after the attack as before. `pgd` returns only the attacked images. `pgd_trace`
    returns a `PGDTrace`, which contains these images and the losses.

    Args:
        model: Any module from images (B, 3, H, W) in [0, 1] to scores (B,) or (B, 1).
        images: Images (B, 3, H, W) in [0, 1], float32, or float64 for a float64 model.
        mos: Normalised MOS, (B,).
        objective: The objective to maximise, a callable from `(scores, mos, clean_scores)` to losses (B,) or one 0-d
            loss of the batch.
        norm: Norm of the perturbation x' − x of an image: "linf", the largest change of a pixel value, or "l2", the
            Euclidean norm over all 3·H·W values.
        eps: Radius of the ball around each image. Rounding never moves an image out of the ball or out of [0, 1].
            `Suite` scales L2 budgets by the image's size; this function does not.
        steps: Steps of each restart.
        step_size: Size of a step along the sign ("linf") or the normalised gradient ("l2"). Default: 2.5·eps/steps
            ("linf") or 4·eps/steps ("l2").
        restarts: Number of restarts, each from a point drawn uniformly from the ball.
        restart_batch: Number of restarts that run at once as one batch. None runs all restarts at once, or
            fewer if a GPU runs out of memory. The starts do not depend on `restart_batch`. Up to rounding,
            the results do not depend on it either, unless the model is stochastic or a score depends on the
            other images of the batch.
        eot: Number of forward passes per step. Their gradients and losses are averaged. Use more than 1 for stochastic
            models.
        generator: Generator of the starts and of the model's randomness. Default: seed 0.
        on_step: Called after each step of each restart.

    Returns:
        The best iterates, with the shape, dtype and device of `images`. For each image, the best iterate is the one
        with the highest loss over all steps and restarts, including the starting points. If the objective returns one
        loss for the whole batch, all images are taken from the step and restart with the highest loss. A NaN loss
        counts as the highest loss, so that a model with NaN scores does not look robust.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or a score of the clean images is not finite.
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
    """Run all restarts of an attack.

    Args:
        problem: The problem to solve.
        climb: Function `climb(copies, best)` that runs `copies` restarts at once. It passes every iterate to
            `best.offer`, and returns the losses of all iterates, (copies, iterates, B), or (copies, iterates) if the
            objective returns one loss for the whole batch.
        restarts: Number of restarts.
        restart_batch: As in `pgd`.

    Returns:
        A `Best` and a tensor. The `Best` has the iterates with the highest loss over all restarts. The tensor has the
        losses of all iterates, (restarts, iterates, B), or (restarts, iterates) if the objective returns one loss for
        the whole batch.
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
    """Return the trace of an attack that computed `gradients` gradients.

    If `gradients` is 0, the shares `zero_gradients` and `nonfinite_gradients` of the trace are NaN.
    """
    problem.check_losses(losses)
    zero, nonfinite = (
        float(count) / gradients if gradients else math.nan
        for count in (problem.zero_gradients, problem.nonfinite_gradients)
    )
    return PGDTrace(like(images, kept.points), kept.loss[0], losses, zero, nonfinite)


def default_step_size(norm: str, eps: float, steps: int, config: SRMConfig = _DEFAULTS) -> float:
    """Return the step size of docs/METHOD.md §6."""
    return norm_of(norm).step_of(config) * eps / steps
