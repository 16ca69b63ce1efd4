"""Compare gradient attacks with a known optimum, and PGD with other implementations.

For a linear score, the best perturbation that keeps the image in [0, 1] is known.
"""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from attack_models import Convolutional, Linear, batch, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from srm_model.attacks import (
    MSE,
    Drift,
    PairInversion,
    Signed,
    apgd,
    apgd_trace,
    fgsm,
    pgd,
    pgd_trace,
    square,
    square_trace,
)
from srm_model.attacks.gradient import default_step_size


def best_rise(w, images, norm, eps):
    """Return the maximum of ⟨w, δ⟩ over all δ with ‖δ‖ ≤ eps and x + δ in [0, 1], computed in fp64.

    For L2, δ = clip(t·w) is optimal. The number t is found by bisection so that ‖δ‖ = eps.
    """
    w, images = w.double().expand(images.shape), images.double()
    low, high = -images, 1 - images
    if norm == "linf":
        delta = (eps * w.sign()).clamp(low, high)
        return (w * delta).flatten(1).sum(1)
    least, most = torch.zeros(len(images), 1, 1, 1), torch.full((len(images), 1, 1, 1), 1e6)
    for _ in range(100):
        middle = (least + most) / 2
        length = (middle * w).clamp(low, high).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        least, most = torch.where(length < eps, middle, least), torch.where(length < eps, most, middle)
    return (w * (least * w).clamp(low, high)).flatten(1).sum(1)


@pytest.mark.parametrize("attack", [pgd, apgd])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("linf", 0.3), ("l2", 0.5), ("l2", 2.0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_optimum_inside_the_box_is_reached(attack, norm, eps, sign):
    w, images = weight(), batch(low=0, high=1)  # many pixels are near 0 or 1
    model = Linear(w)
    attacked = attack(model, images, [0.0] * 4, Signed(sign), norm=norm, eps=eps, steps=40, restarts=1)
    risen = sign * (w.double() * (attacked - images).double()).flatten(1).sum(1)
    optimum = best_rise(sign * w, images, norm, eps)
    assert (risen >= 0.99 * optimum).all()
    assert (risen <= (1 + 1e-6) * optimum).all()


@pytest.mark.parametrize(("attack", "share"), [(pgd, 0.98), (apgd, 0.99)])
def test_nearly_so_where_every_pixel_lies_on_a_face(attack, share):
    # Every pixel is 0 or 1, so that half of the entries of each gradient point out of [0, 1]. Clipping shortens PGD's
    # steps, whose size is fixed, so that PGD ends 1.5 % below the optimum.
    w, images = weight(), batch(low=0, high=1).round()
    attacked = attack(Linear(w), images, [0.0] * 4, Signed(1), norm="l2", eps=4.0, steps=40, restarts=1)
    risen = (w.double() * (attacked - images).double()).flatten(1).sum(1)
    assert (risen >= share * best_rise(w, images, "l2", 4.0)).all()


@given(seed=st.integers(0, 10**6), eps=st.floats(1e-3, 0.25))
def test_fgsm_is_the_optimum_away_from_the_faces(seed, eps):
    w, images = weight(seed, 5), batch(2, seed=seed, side=5)
    attacked = fgsm(Linear(w), images, [0.0] * 2, Signed(1), eps=eps)
    risen = (w.double() * (attacked - images).double()).flatten(1).sum(1)
    # Rounding changes each of the 75 pixels by at most 2⁻²⁵.
    room = float(w.abs().sum()) * 2.0**-24
    assert (risen >= best_rise(w, images, "linf", eps) - room).all()


quick = partial(square, queries=15)


@settings(max_examples=30)
@given(
    attack=st.sampled_from(
        [partial(apgd, steps=3, restarts=2), partial(pgd, steps=2, restart_batch=3), quick]
    ),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.one_of(st.sampled_from([0.25 / 255, 4 / 255, 1.0]), st.floats(1e-4, 1)),
    objective=st.sampled_from([MSE(), Drift(), PairInversion(), Signed(-1)]),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_every_attack_stays_in_the_ball_and_in_range(attack, norm, eps, objective, seed, dtype):
    images = batch(3, seed=seed, side=5, low=0, high=1).to(dtype)
    images[0, 0] = images[0, 0].round()
    attacked = attack(Linear(weight(seed, 5, dtype)), images, [0.1, 0.5, 0.9], objective, norm=norm, eps=eps)
    assert attacked.shape == images.shape
    assert attacked.dtype == dtype
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    delta = (attacked.double() - images.double()).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (length <= eps + (0 if dtype == torch.float32 else 1e-15)).all()


@pytest.mark.parametrize("attack", [apgd, quick])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_zero_returns_the_images_and_a_seed_repeats(attack, norm):
    model, images, mos = Convolutional(), batch(low=0, high=1), [0.5] * 4
    assert torch.equal(attack(model, images, mos, MSE(), norm=norm, eps=0.0), images)

    def seeded(seed):
        return attack(
            model, images, mos, MSE(), norm=norm, eps=0.1, generator=torch.Generator().manual_seed(seed)
        )

    first = seeded(1)
    torch.manual_seed(5)
    assert torch.equal(seeded(1), first)
    assert not torch.equal(seeded(2), first)


# Restarts in one batch.


class Curved(nn.Module):
    """A model whose score has many local maxima.

    It has no matrix product over the batch, so that the batch size hardly changes the rounding.
    """

    def forward(self, x):
        return (torch.sin(9 * x) * torch.linspace(-1, 1, x[0].numel()).view(x[0].shape)).sum((1, 2, 3))


@pytest.mark.parametrize("trace", [pgd_trace, apgd_trace])
@pytest.mark.parametrize("objective", [MSE(), PairInversion()])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("at_once", [2, 5, None])
def test_restarts_at_once_are_restarts_one_after_another(trace, objective, norm, at_once):
    images, mos = batch(4), torch.linspace(0, 1, 4)
    arguments = {"norm": norm, "eps": 0.1, "steps": 6, "restarts": 5}
    serial = trace(Curved(), images, mos, objective, **arguments)
    together = trace(Curved(), images, mos, objective, restart_batch=at_once, **arguments)
    for one, other in zip(serial, together, strict=True):  # the same, except for rounding
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))


def test_restarts_are_halved_where_memory_does_not_suffice():
    sizes = []

    class Large(Curved):
        def forward(self, x):
            sizes.append(len(x))
            if len(x) > 8:
                raise torch.OutOfMemoryError("no")
            return super().forward(x)

    arguments = {"eps": 0.1, "steps": 2, "restarts": 5}
    found = pgd_trace(Large(), batch(4), [0.5] * 4, MSE(), restart_batch=None, **arguments)
    assert sizes == [20, 8, 8, 8, 8, 8, 8, 4, 4, 4]
    expected = pgd_trace(Curved(), batch(4), [0.5] * 4, MSE(), **arguments)
    torch.testing.assert_close(found.images, expected.images)
    assert found.zero_gradients == expected.zero_gradients
    with pytest.raises(torch.OutOfMemoryError):
        pgd(Large(), batch(4), [0.5] * 4, MSE(), restart_batch=5, **arguments)


def test_the_kept_loss_is_no_lower_than_any_restarts_and_more_steps_never_lower_it():
    model, images, mos = Convolutional(), batch(5), torch.linspace(0, 1, 5)
    for norm in ("linf", "l2"):
        previous = None
        for steps in (1, 2, 4, 8):
            trace = pgd_trace(model, images, mos, MSE(), norm=norm, eps=0.1, steps=steps, step_size=0.01)
            assert (trace.loss >= trace.losses.amax(1)).all()
            if previous is not None:
                assert torch.equal(trace.losses[0, : previous.losses.shape[1]], previous.losses[0])
                assert (trace.losses[0].amax(0) >= previous.losses[0].amax(0)).all()
            previous = trace


# Half precision inside a model.


def test_a_model_that_computes_in_fp16_inside_keeps_its_gradient():
    class Half(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", torch.float16):
                return F.linear(x.flatten(1), self.weight)[:, 0]

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(1e-3 * torch.ones(1, 192))

    model, images = Half(), batch()
    # After a random start the error is about 1e-4, so that the gradient is about 2e-7. At the clean image, where FGSM
    # starts, the gradient is 4e-9. The smallest fp16 number is 6e-8, so without scaling this gradient would become 0.
    mos = model(images).detach().float() - 2e-6
    trace = pgd_trace(model, images, mos, MSE(), eps=0.01, steps=2, restarts=1)
    assert trace.zero_gradients == 0
    fallen = fgsm(model, images, mos, MSE(), eps=0.01)
    assert torch.allclose(fallen, images + 0.01, atol=1e-6)


# Other implementations of PGD.


class TwoLogits(nn.Module):
    """Return a scalar score z as the two logits [z, −z], so that toolkits for classifiers can attack it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        score = self.model(images)
        return torch.stack([score, -score], 1)


def of_secmlt(two, images, labels, norm, eps, steps):
    from secmlt.adv.evasion.pgd import PGD

    attack = PGD(
        perturbation_model=norm,
        epsilon=eps,
        num_steps=steps,
        step_size=default_step_size(norm, eps, steps),
        random_start=True,
        backend="native",
    )
    attacked = attack(two, DataLoader(TensorDataset(images, labels), batch_size=len(images)))
    return next(iter(attacked))[0]


def of_torchattacks(two, images, labels, norm, eps, steps):
    import torchattacks

    step = {"eps": eps, "steps": steps, "alpha": default_step_size(norm, eps, steps)}
    return {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm](two, **step)(images, labels)


# torchattacks is optional, because it pins versions of packages that conflict with the versions tested here.
OTHERS = [of_secmlt, *([of_torchattacks] if find_spec("torchattacks") else [])]


@pytest.mark.parametrize("theirs", OTHERS)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("l2", 0.5)])
@pytest.mark.parametrize("sign", [1, -1])
def test_pgd_agrees_with_an_independent_one_in_final_loss(theirs, norm, eps, sign):
    model, images, steps = Convolutional().eval(), batch(8), 20
    two = TwoLogits(model).eval()
    labels = torch.full((8,), int(sign > 0))  # the cross-entropy for this label grows with sign · score
    with torch.random.fork_rng():
        torch.manual_seed(11)
        other = theirs(two, images, labels, norm, eps, steps)
    ours = pgd(model, images, [0.0] * 8, Signed(sign), norm=norm, eps=eps, steps=steps, restarts=1)

    def loss(attacked):
        return F.cross_entropy(two(attacked), labels, reduction="none").detach()

    clean = loss(images)
    assert (loss(other) > clean).all()
    assert ((loss(ours) - clean) / (loss(other) - clean) - 1).abs().max() < 0.02


def test_pair_inversion_is_the_double_loop():
    generator = torch.Generator().manual_seed(3)
    scores, mos = torch.rand(2, 9, generator=generator, dtype=torch.float64)
    mos[4] = mos[2]
    for margin in (0.0, 0.05, 0.5, 2.0):
        terms = [
            math.log1p(math.exp(-(scores[a] - scores[b]) / 0.1))
            for a in range(9)
            for b in range(9)
            if mos[a] - mos[b] > margin
        ]
        expected = sum(terms) / len(terms) if terms else 0.0
        assert PairInversion(margin=margin)(scores, mos, scores).item() == pytest.approx(expected, rel=1e-9)


def test_the_trace_of_the_search_is_that_of_its_images():
    model, images = Curved(), batch()
    trace = square_trace(model, images, [0.5] * 4, MSE(), norm="l2", eps=0.4, queries=80)
    assert torch.allclose((model(trace.images) - 0.5).square(), trace.loss, rtol=1e-5)
