"""Square attack: random search that needs scores only (Andriushchenko et al., ECCV 2020), for any objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srm_model.attacks.gradient import PGDTrace, images_of, trace_of
from srm_model.attacks.objectives import Objective
from srm_model.attacks.problem import Best, Problem, attacking, check_count, check_number, exceeds
from srm_model.config import SRMConfig

_DEFAULTS = SRMConfig()
# After each of these shares of the queries, the area of the squares is halved. Source: the paper's schedule for 10,000
# queries.
_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def square_trace(
    model: nn.Module,
    images: Tensor,
    mos: Tensor | Sequence[float],
    objective: Objective,
    *,
    norm: str = "linf",
    eps: float,
    queries: int = _DEFAULTS.attack_queries,
    area: float = _DEFAULTS.attack_square_area,
    eot: int = 1,
    generator: torch.Generator | None = None,
    on_step: Callable[[], object] | None = None,
) -> PGDTrace:
    """Maximise an objective by random search, with at most `queries` scores per image and without gradients.

    The first round of queries evaluates the starting points. Each later round proposes one change for each
    image. With "linf", the perturbation in a random square becomes ±eps, with one random sign per channel.
    With "l2", the perturbation in one random square becomes zero. In a second random square, the perturbation
    is normalised, and a bump of random sign is added to it. This sum is scaled so that the norm of the whole
    perturbation becomes eps. Finally, the changed image is projected to the ball and to [0, 1].

    An image keeps the change if the change raises its loss. If the objective returns one loss for the whole
    batch, the changes of the images are tried one after another, and a change is kept if it raises the loss of
    the batch. Such a trial needs no further query, because all scores of the round are known.

    The model need not be differentiable. The arguments that are not listed below, the result and the errors are as in
    `pgd`. `square` returns only the attacked images, and `square_trace` returns a `PGDTrace`. The field `losses`
    of the trace contains the losses of the images that are kept after each round, (1, rounds, B), or (1, rounds) if the
    objective returns one loss for the whole batch. The fields `zero_gradients` and `nonfinite_gradients` are NaN,
    because no gradient is computed.

    Args:
        queries: Maximum number of scores per image. The score of the clean image counts if the objective uses it. Each
            of the `eot` forward passes counts as one score.
        area: Area of the first squares as a share of the image area. The area shrinks as queries are used.
        on_step: Called after each round of queries.
    """
    queries, area = check_count("queries", queries), check_number("area", area)
    if not 0 < area <= 1:
        raise ValueError(f"area={area!r}: expected a share of the image in (0, 1]")
    with attacking(model, images, mos, objective, norm, eps, eot, generator) as problem:
        eot = problem.eot
        rounds = queries // eot - bool(getattr(objective, "uses_clean_scores", True))
        if rounds < 1:
            raise ValueError(
                f"queries={queries}: expected at least {eot * (1 + queries // eot - rounds)} with eot={eot} "
                "and this objective"
            )
        walk = _Squares(problem, area)
        x = walk.start()
        scores = problem.scores(x)
        loss = problem.loss_of(scores)
        losses = [loss]
        for number in range(1, rounds):
            if on_step is not None:
                on_step()
            proposal = walk.propose(x, number / rounds)
            proposed = problem.scores(proposal)
            if loss.ndim > 1:
                raised = problem.loss_of(proposed)
                better = exceeds(raised, loss)
                loss = torch.where(better, raised, loss)
                scores = torch.where(better, proposed, scores)
                x = problem.choose(better, proposal, x)
            else:
                accepted, loss, scores = _decide(problem, scores, proposed, loss)
                x = torch.where(accepted[:, None, None, None], proposal, x)
            losses.append(loss)
        if on_step is not None:
            on_step()
        best = Best(problem)
        best.offer(x, loss)
        return trace_of(images, problem, best, torch.stack(losses, 1), gradients=0)


square = images_of(square_trace)


def _decide(
    problem: Problem, scores: Tensor, proposed: Tensor, loss: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept or reject the proposals one by one; return the mask of accepted proposals, the new loss and new scores."""
    accepted = torch.zeros(proposed.shape[1], dtype=torch.bool, device=proposed.device)
    for position in range(len(accepted)):
        tried = scores.clone()
        tried[:, position] = proposed[:, position]
        raised = problem.loss_of(tried)
        better = exceeds(raised, loss)
        accepted[position] = better[0]
        loss = torch.where(better, raised, loss)
        scores = torch.where(better, tried, scores)
    return accepted, loss, scores


class _Squares:
    """Propose changes in random squares of shrinking area; the changed images stay in the ball."""

    def __init__(self, problem: Problem, area: float) -> None:
        self.problem, self.area = problem, area
        self.batch, self.channels, self.height, self.width = problem.images.shape
        self._on: dict[str, Any] = {"generator": problem.generator, "device": problem.generator.device}

    def start(self) -> Tensor:
        """Return the points where the search starts.

        If `Norm.bumps` is true, the perturbation of a starting point is a grid of bumps, and the norm of the
        whole grid is eps. Otherwise, the perturbation consists of vertical stripes of ±eps.
        """
        images = self.problem.images
        if not self.problem.norm.bumps:
            delta = self._signs(self.batch, self.channels, 1, self.width) * self.problem.eps
            return self.problem.project(images + delta)
        side = max(1, min(self.height, self.width) // 5)
        rows, columns = (-(-extent // side) for extent in (self.height, self.width))
        signs = self._signs(self.batch, self.channels, rows, columns)
        tiles = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)
        delta = tiles * self._bump(side).repeat(rows, columns)
        delta = delta[..., : self.height, : self.width]
        length = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        return self.problem.project(images + delta * (self.problem.eps / length))

    def propose(self, x: Tensor, spent: float) -> Tensor:
        """Return one proposal for each image. `spent` is the share of queries that were used."""
        halvings = sum(spent > share for share in _HALVINGS)
        shorter = min(self.height, self.width)
        side = round(math.sqrt(self.area * 0.5**halvings * self.height * self.width))
        side = max(1, min(side, shorter))
        images = self.problem.images
        if not self.problem.norm.bumps:
            proposal = x.clone()
            window = self._window(side)
            values = self._signs(self.batch, 1, 1, self.channels) * self.problem.eps
            proposal[window] = images[window] + values
            return self.problem.project(proposal)
        return self.problem.project(images + self._moved(x - images, max(side, min(3, shorter))))

    def _moved(self, delta: Tensor, side: int) -> Tensor:
        """Set a perturbation to zero in one random square and add a bump of random sign in another square.

        In the square that gets the bump, each channel is computed as follows: the old perturbation is normalised, the
        bump is added, and the sum is scaled. The squared norm of the scaled sum is set to the squared norm that this
        channel had in both squares before the change, plus 1/C of the unused budget eps² − ‖δ‖², where δ is the old
        perturbation of the image. With this scale, the new perturbation of the image has the norm eps.
        """
        target, source = self._window(side), self._window(side)
        old = delta[target]  # [B, side, side, C]
        spare = (self.problem.eps**2 - delta.square().sum((1, 2, 3))).clamp_min(0) / self.channels  # [B]
        emptied = delta.clone()
        emptied[target] = 0
        emptied[source] = 0
        freed = delta.square().sum((2, 3)) - emptied.square().sum((2, 3))  # [B, C]
        length = (freed.clamp_min(0) + spare[:, None]).sqrt()[:, None, None, :]
        bump = self._bump(side)[None, :, :, None] * self._signs(self.batch, 1, 1, self.channels)
        own = torch.linalg.vector_norm(old, dim=(1, 2), keepdim=True)
        shape = bump + torch.where(own > 0, old / own.clamp_min(1e-12), 0)
        norm = torch.linalg.vector_norm(shape, dim=(1, 2), keepdim=True).clamp_min(1e-12)
        emptied[target] = shape / norm * length
        return emptied

    def _window(self, side: int) -> tuple[Any, ...]:
        """Return an index that selects one random square per image: (B, C, H, W) → (B, side, side, C)."""
        device = self.problem.images.device
        top, left = (
            torch.randint(extent - side + 1, (self.batch, 1, 1), **self._on).to(device)
            for extent in (self.height, self.width)
        )
        reach = torch.arange(side, device=device)
        place = torch.arange(self.batch, device=device)[:, None, None]
        return place, slice(None), top + reach[:, None], left + reach[None, :]

    def _bump(self, side: int) -> Tensor:
        """Return a bump of concentric squares, highest in the middle, with Euclidean norm 1."""
        images = self.problem.images
        middle = (side - 1) / 2
        ramp = torch.arange(side, device=images.device, dtype=images.dtype).sub_(middle).abs_()
        ring = torch.maximum(ramp[:, None], ramp[None, :])
        bump = 1 / (1 + ring).square()
        return bump / torch.linalg.vector_norm(bump)

    def _signs(self, *shape: int) -> Tensor:
        draw = torch.randint(2, shape, **self._on)
        return (2 * draw - 1).to(self.problem.images.device, self.problem.images.dtype)
