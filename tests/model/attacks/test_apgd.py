"""Test APGD, a variant of PGD that adapts its step sizes."""

from __future__ import annotations

import pytest
import torch
from attack_models import Convolutional, Linear, OfFirstPixel, batch, weight

from srm_model.attacks import MSE, Drift, PairInversion, Signed, apgd, apgd_trace, pgd_trace
from srm_model.attacks.apgd import checkpoints


def test_checkpoints_are_those_of_the_paper():
    # The paper's checkpoints are at the fractions 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93 and 0.99 of all steps.
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert max(checkpoints(1)) == 1


def widths(trace, images):
    return (trace - images)[:, 0, 0, 0]


def step_sizes(monkeypatch, model, images, **arguments):
    """Return the step sizes of APGD: the floating-point values that it passes to `Problem.per_image`."""
    from srm_model.attacks.problem import Problem

    seen = []
    genuine = Problem.per_image

    def spy(self, values):
        if values.dtype.is_floating_point:
            seen.append(values.clone())
        return genuine(self, values)

    monkeypatch.setattr(Problem, "per_image", spy)
    apgd(model, images, [0.5] * len(images), **arguments)
    return torch.stack(seen)


def test_the_step_starts_at_twice_eps_and_is_kept_while_the_loss_rises(monkeypatch):
    images = batch(2)
    sizes = step_sizes(
        monkeypatch, Linear(weight()), images, objective=Signed(1), eps=0.1, steps=20, restarts=1
    )
    assert torch.equal(sizes[0], torch.full((1, 2), 0.2))
    # A linear score reaches its maximum after one or two steps. The loss then stops rising, so that every checkpoint
    # halves the step.
    halvings = [step for step in range(1, 20) if (sizes[step] < sizes[step - 1]).all()]
    assert halvings == [step for step in sorted(checkpoints(20)) if step < 20]
    assert torch.equal(sizes[-1], sizes[0] / 2 ** len(halvings))


def test_each_image_has_its_own_step_and_a_batch_objective_one(monkeypatch):
    def two_ways(p):  # a slope below 0.5, constant above
        return torch.where(p < 0.5, p, 0.5 + 0 * p)

    images = torch.stack([torch.full((3, 2, 2), value) for value in (0.2, 0.7)])
    model = OfFirstPixel(two_ways)
    sizes = step_sizes(monkeypatch, model, images, objective=Signed(1), eps=0.1, steps=40, restarts=1)
    assert sizes.shape[1:] == (1, 2)
    assert (sizes[-1] < sizes[0]).all()
    monkeypatch.undo()
    sizes = step_sizes(
        monkeypatch,
        model,
        images,
        objective=lambda scores, mos, clean: scores.sum(),
        eps=0.1,
        steps=40,
        restarts=1,
    )
    assert sizes.shape[1:] == (1,)


def test_a_halved_step_starts_again_from_the_best_point():
    # The peaks are so narrow that steps of 2 ε jump over them. Only smaller and smaller steps climb a peak.
    # Three peaks are within 0.196 of 0.5. At both ends of this interval the gradient points inside.
    model = OfFirstPixel(lambda p: torch.cos(40 * p))
    images = torch.full((32, 3, 1, 1), 0.5)
    mos = [-2.0] * 32  # the loss is (cos + 2)², at most 9
    arguments = {"eps": 0.196, "steps": 60, "restarts": 1}
    best = apgd_trace(model, images, mos, MSE(), **arguments)
    # The last steps are 0.4 / 2⁷ = 0.003. At a distance of half a step from the peak, the loss is 0.1 % lower.
    assert best.loss.min() > 0.995 * 9
    coarse = pgd_trace(model, images, mos, MSE(), step_size=0.3, **arguments)
    assert coarse.loss.min() < best.loss.min()


@pytest.mark.parametrize("objective", [MSE(), Drift(), PairInversion()])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_finds_what_pgd_finds_without_being_told_a_step(objective, norm):
    model, images, mos = Convolutional(), batch(6), torch.linspace(0, 1, 6)
    arguments = {"norm": norm, "eps": 0.05 if norm == "linf" else 0.5, "steps": 20, "restarts": 2}
    ours = apgd_trace(model, images, mos, objective, **arguments)
    theirs = pgd_trace(model, images, mos, objective, **arguments)
    assert ours.loss.shape == theirs.loss.shape
    assert (ours.loss >= 0.98 * theirs.loss).all()
    assert ours.losses.shape == theirs.losses.shape == (2, 21, *theirs.loss.shape)
    assert torch.equal(ours.loss, ours.losses.flatten(0, 1).amax(0))


def test_no_forward_pass_is_wasted():
    calls = []

    class Counting(Linear):
        def forward(self, x):
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    apgd(Counting(weight()), batch(), [0.5] * 4, MSE(), eps=0.1, steps=5, restarts=2)
    assert calls == 2 * ([True] * 5 + [False])


class Rippled(torch.nn.Module):
    """A model whose score has steep ripples of many widths, so that both rules for halving APGD's step apply."""

    def forward(self, x):
        widths = torch.linspace(50, 400, x[0].numel(), dtype=x.dtype).view(x[0].shape)
        return (torch.sin(widths * x) / widths.sqrt()).sum((1, 2, 3))


def one_image(model, image, start, eps, steps, checks):
    """Run APGD as in the paper, for one image and L∞. Return the losses of the iterates and why steps were halved."""

    def value_and_sign(x):
        x = x.clone().requires_grad_()
        score = model(x[None])[0]
        return score.item(), torch.autograd.grad(score, x)[0].sign()

    def inside(x):
        return torch.minimum(torch.maximum(x, image - eps), image + eps).clamp(0, 1)

    x, before = start, None
    loss, sign = value_and_sign(x)
    losses, best = [loss], (loss, x, sign)
    size, risen, since = 2 * eps, 0, 0
    size_then, best_then = None, loss
    reasons = set()
    for step in range(1, steps + 1):
        z = inside(x + size * sign)
        after = z if before is None else inside(x + 0.75 * (z - x) + 0.25 * (x - before))
        before, x = x, after
        loss, sign = value_and_sign(x)
        risen += loss > losses[-1]
        losses.append(loss)
        if loss > best[0]:
            best = (loss, x, sign)
        if step in checks:
            few = risen < 0.75 * (step - since)
            stalled = size == size_then and best[0] == best_then
            if few or stalled:
                reasons.add("few" if few else "stalled")
            size_then, best_then = size, best[0]
            if few or stalled:
                size /= 2
                x = before = best[1]
                sign = best[2]
            since, risen = step, 0
    return losses, reasons


def test_every_iterate_is_that_of_the_algorithm_written_out():
    model, reasons = Rippled(), set()
    for seed in (0, 1, 24):  # with seed 24, steps succeed without a new best loss
        image = batch(1, seed=seed, side=3).double()[0]
        eps, steps = 0.25, 50
        trace = apgd_trace(
            model,
            image[None],
            [0.5],
            Signed(1),
            eps=eps,
            steps=steps,
            restarts=1,
            generator=torch.Generator().manual_seed(seed),
        )
        generator = torch.Generator().manual_seed(seed)
        torch.randint(2**63 - 1, (), generator=generator)
        noise = (torch.rand(1, 3, 3, 3, generator=generator, dtype=torch.float64) * 2 - 1) * eps
        losses, why = one_image(
            model, image, (image + noise[0]).clamp(0, 1), eps, steps, {11, 21, 29, 35, 40, 44, 47, 50}
        )
        reasons |= why
        assert trace.losses[0, :, 0].tolist() == pytest.approx(losses, rel=1e-9)
    assert reasons == {"few", "stalled"}  # otherwise the images would test only one rule
