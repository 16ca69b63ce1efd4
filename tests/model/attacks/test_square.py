"""Test the black-box search: it uses only scores, stays within its query budget and increases the loss."""

from __future__ import annotations

import math

import pytest
import torch
from attack_models import Convolutional, Linear, OfFirstPixel, batch, weight

from srm_model.attacks import MSE, Drift, PairInversion, Signed, pgd_trace, square, square_trace
from srm_model.attacks.problem import Problem
from srm_model.norms import NORMS


class Counting(Linear):
    """A model that counts the images it scores and records whether any of them requires a gradient."""

    def __init__(self, weight):
        super().__init__(weight)
        self.asked = 0
        self.differentiable = False

    def forward(self, images):
        self.asked += len(images)
        self.differentiable |= images.requires_grad
        return super().forward(images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", [MSE(), Drift(), PairInversion()])
@pytest.mark.parametrize("eot", [1, 3])
def test_the_budget_of_queries_is_kept_and_no_gradient_is_asked_for(norm, objective, eot):
    model = Counting(weight())
    square(model, batch(), torch.linspace(0, 1, 4), objective, norm=norm, eps=0.05, queries=31, eot=eot)
    assert 4 * (31 - eot) < model.asked <= 4 * 31
    assert not model.differentiable


def test_a_model_without_gradient_is_attacked():
    model = OfFirstPixel(lambda p: (p * 16).round() / 16)
    images = batch(4)
    with torch.no_grad():
        attacked = square(model, images, [0.0] * 4, Signed(1), eps=0.2, queries=300)
    assert (model(attacked) > model(images)).all()


def test_losses_never_fall_and_come_near_the_optimum_of_a_linear_score():
    w, images, eps = weight(), batch(), 8 / 255
    model = Linear(w)
    trace = square_trace(model, images, [0.0] * 4, Signed(1), eps=eps, queries=2000)
    assert trace.losses.shape == (1, 2000, 4)
    assert (trace.losses.diff(dim=1) >= 0).all()
    assert torch.equal(trace.loss, trace.losses[0, -1])
    assert torch.allclose(model(trace.images), trace.loss)
    risen = trace.loss - model(images)
    # Random signs for the 192 weights would raise the score by 0 on average. In 2,000 queries with ever smaller
    # squares, the search corrects most signs.
    assert (risen > 0.9 * eps * w.abs().sum()).all()


def test_the_l2_search_gets_most_of_a_smooth_slope():
    smooth = torch.ones(3, 8, 8)
    model, images = Linear(smooth), batch()
    trace = square_trace(model, images, [0.0] * 4, Signed(1), norm="l2", eps=0.3, queries=1000)
    risen = trace.loss - model(images)
    assert (risen > 0.6 * 0.3 * smooth.norm()).all()
    assert (risen <= 0.3 * smooth.norm() * (1 + 1e-5)).all()
    assert trace.losses[0, 0].mean() < 0.5 * trace.loss.mean() + 0.5 * model(images).mean()


def test_images_of_a_batch_objective_are_decided_one_by_one():
    model, images, mos = Linear(weight() * 0.05), batch(8), torch.linspace(0, 1, 8)
    trace = square_trace(model, images, mos, PairInversion(), eps=8 / 255, queries=300)
    assert trace.losses.shape == (1, 300)
    assert (trace.losses.diff() >= 0).all()
    # The search updates the loss image by image. At the end, `trace.loss` must be the loss of the returned images.
    again = PairInversion()(model(trace.images), mos, mos)
    assert trace.loss.item() == pytest.approx(again.item(), rel=1e-5)
    best = pgd_trace(model, images, mos, PairInversion(), eps=8 / 255, steps=20, restarts=1).loss
    clean = PairInversion()(model(images), mos, mos)
    assert trace.loss - clean > 0.5 * (best - clean)


def test_gradients_shares_are_those_of_nothing():
    trace = square_trace(Convolutional(), batch(), [0.5] * 4, MSE(), eps=0.1, queries=5)
    assert math.isnan(trace.zero_gradients)
    assert math.isnan(trace.nonfinite_gradients)


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_bumps_have_norm_one_and_rise_to_the_middle(side):
    problem = Problem(
        Convolutional(), batch(), torch.zeros(4), MSE(), NORMS["l2"], 1.0, 1, torch.Generator().manual_seed(0)
    )
    from srm_model.attacks.square import _Squares

    bump = _Squares(problem, 0.3)._bump(side)
    assert bump.norm() == pytest.approx(1)
    assert bump.min() > 0
    assert torch.equal(bump, bump.flip(0))
    assert bump[side // 2, side // 2] == bump.max()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"queries": 0}, ValueError, "queries=0"),
        ({"queries": 1}, ValueError, "queries=1: expected at least 2"),
        ({"queries": 1.5}, TypeError, "queries=1.5"),
        ({"queries": 5, "eot": 4}, ValueError, "queries=5: expected at least 8 with eot=4"),
        ({"area": 0}, ValueError, "area=0"),
        ({"area": 1.5}, ValueError, "area=1.5"),
        ({"area": "0.1"}, TypeError, "area='0.1'"),
    ],
)
def test_bad_input_is_one_sentence(changes, error, words):
    with pytest.raises(error, match=words):
        square(Convolutional(), batch(), [0.5] * 4, Drift(), **{"eps": 0.1, "queries": 9, **changes})
