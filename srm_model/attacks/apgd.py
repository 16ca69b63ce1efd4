"""APGD: PGD with step sizes that follow the progress of the loss (Croce and Hein, ICML 2020), for any objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from srm_model.attacks.gradient import PGDTrace, images_of, run_restarts, trace_of
from srm_model.attacks.objectives import Objective
from srm_model.attacks.problem import Best, attacking, check_count, exceeds
from srm_model.config import SRMConfig

_DEFAULTS = SRMConfig()
# Constants of the paper. A window is the steps between two checkpoints; its length is a share of all steps.
_SUCCESS = 0.75  # the step size is halved if a smaller share of a window's steps raised the loss
_MOMENTUM = 0.75
_FIRST_WINDOW, _WINDOW_SHRINKS, _LEAST_WINDOW = 0.22, 0.03, 0.06


def apgd_trace(
    model: nn.Module,
    images: Tensor,
    mos: Tensor | Sequence[float],
    objective: Objective,
    *,
    norm: str = "linf",
    eps: float,
    steps: int = _DEFAULTS.attack_steps,
    restarts: int = _DEFAULTS.attack_restarts,
    restart_batch: int | None = 1,
    eot: int = 1,
    generator: torch.Generator | None = None,
    on_step: Callable[[], object] | None = None,
) -> PGDTrace:
    """Maximise an objective by PGD that adapts its step size η, which starts at 2·eps.

    Let x be the current point, and x_before the previous point. A step computes z = P(x + ηg), and then
    x ← P(x + 0.75 (z − x) + 0.25 (x − x_before)). g is the sign ("linf") or the direction ("l2") of the
    gradient at x. P is the projection to the ball and to [0, 1]. The first step has no previous point, so it
    is x ← z.

    The step size η can change only at checkpoints. The steps between two checkpoints are a window. The first window,
    which ends at the first checkpoint, contains 22 % of all steps. The next windows contain 19 %, 16 %, 13 %, 10 % and
    7 %, and each later window contains 6 %.

    At each checkpoint, η is halved if fewer than 75 % of the steps since the previous checkpoint (or since the start)
    raised the loss. From the second checkpoint on, η is also halved if the best loss has not risen since the previous
    checkpoint and η was not halved at the previous checkpoint. When η is halved, both x and x_before are set to the
    best point found so far, and the search continues from this point. Each image has its own η and its own best point.
    If the objective returns one loss for the whole batch, each batch has one η and one best point.

    Arguments, result and errors are those of `pgd`, without `step_size`.
    """
    steps, restarts = check_count("steps", steps), check_count("restarts", restarts)
    checks = checkpoints(steps)
    with attacking(model, images, mos, objective, norm, eps, eot, generator) as problem:
        eps = problem.eps

        def climb(copies: int, best: Best) -> Tensor:
            x = problem.random_starts(copies)
            before = x
            loss, direction = problem.ascend(x)
            best.offer(x, loss)
            losses = [loss]
            start, best_direction = 0, direction
            size = torch.full_like(loss, 2 * eps)
            successes = torch.zeros_like(loss)
            # Start with True: the first checkpoint then checks only the share of successful steps.
            halved = torch.ones_like(loss, dtype=torch.bool)
            best_then = loss
            for step in range(1, steps + 1):
                ahead = problem.project(torch.addcmul(x, direction, problem.per_image(size)))
                if step > 1:
                    rest = x - before
                    ahead = problem.project(x.lerp(ahead, _MOMENTUM).add_(rest, alpha=1 - _MOMENTUM))
                before, x = x, ahead
                if step < steps:
                    loss, direction = problem.ascend(x)
                else:
                    loss = problem.loss(x)
                better = best.offer(x, loss)
                best_direction = problem.choose(better, direction, best_direction)
                successes = successes + exceeds(loss, losses[-1])
                losses.append(loss)
                if on_step is not None:
                    for _ in range(copies):
                        on_step()
                if step in checks:
                    stalled = ~halved & ~exceeds(best.loss, best_then)
                    halved = (successes < _SUCCESS * (step - start)) | stalled
                    size = torch.where(halved, size / 2, size)
                    x, before = (problem.choose(halved, best.points, points) for points in (x, before))
                    direction = problem.choose(halved, best_direction, direction)
                    start, best_then, successes = step, best.loss, torch.zeros_like(successes)
            return torch.stack(losses, 1)

        kept, losses = run_restarts(problem, climb, restarts, restart_batch)
        return trace_of(images, problem, kept, losses, gradients=restarts * steps * len(images))


apgd = images_of(apgd_trace)


def checkpoints(steps: int) -> frozenset[int]:
    """Return the steps, counted from 1, after which APGD checks its progress."""
    found, share, window = set(), _FIRST_WINDOW, _FIRST_WINDOW
    while share < 1:
        found.add(math.ceil(share * steps - 1e-9))  # allows for the rounding of `share`
        window = max(window - _WINDOW_SHRINKS, _LEAST_WINDOW)
        share += window
    return frozenset(found)
