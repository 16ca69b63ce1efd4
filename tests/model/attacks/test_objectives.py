from __future__ import annotations

import math

import pytest
import torch
from attack_models import Linear, batch, weight
from torch.autograd import gradcheck

from srm_model.attacks import MSE, Drift, PairInversion, Signed, SignedPairInversion, SoftSpearman, pgd
from srm_model.config import SRMConfig
from srm_model.metrics import srocc

SCORES = torch.tensor([0.2, 0.5, 0.4])
MOS = torch.tensor([0.9, 0.6, 0.58], dtype=torch.float64)
CLEAN = torch.tensor([0.3, 0.5, 0.1])


def test_mse_and_drift_by_hand():
    assert MSE()(SCORES, MOS, CLEAN).tolist() == pytest.approx([0.49, 0.01, 0.0324], rel=1e-5)
    assert Drift()(SCORES, MOS, CLEAN).tolist() == pytest.approx([0.01, 0.0, 0.09], rel=1e-5)


def test_pair_inversion_by_hand():
    # 0.9 − 0.6 and 0.9 − 0.58 exceed 0.05; 0.6 − 0.58 does not.
    expected = (math.log1p(math.exp(0.3 / 0.1)) + math.log1p(math.exp(0.2 / 0.1))) / 2
    loss = PairInversion()(SCORES, MOS, CLEAN)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # With a smaller margin the third pair counts, with its own temperature.
    third = [math.log1p(math.exp(-gap / 0.2)) for gap in (-0.3, -0.2, 0.1)]
    assert PairInversion(margin=0.01, temperature=0.2)(SCORES, MOS, CLEAN).item() == pytest.approx(
        sum(third) / 3, rel=1e-5
    )


def test_pair_inversion_margin_is_strict_and_no_pair_is_zero_with_zero_gradient():
    scores = SCORES.clone().requires_grad_()
    loss = PairInversion(margin=0.25)(scores, torch.tensor([0.5, 0.25, 0.5]), CLEAN)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == 0
    assert gradient.tolist() == [0, 0, 0]


def test_pair_inversion_gradient_by_hand_and_by_differences():
    scores = SCORES.double().requires_grad_()
    (gradient,) = torch.autograd.grad(PairInversion()(scores, MOS, CLEAN), scores)

    def sigmoid(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    first, second = sigmoid(3) / 0.1 / 2, sigmoid(2) / 0.1 / 2
    assert gradient.tolist() == pytest.approx([-first - second, first, second], rel=1e-6)
    assert gradcheck(lambda s: PairInversion()(s, MOS, CLEAN), (scores,))


def test_pair_inversion_does_not_overflow():
    loss = PairInversion()(torch.tensor([-1e4, 1e4]), torch.tensor([1.0, 0.0]), CLEAN[:2])
    assert loss.item() == pytest.approx(2e5)


def test_attributes_say_what_is_defined_on_the_batch():
    for objective in (MSE(), Drift(), PairInversion()):
        per_batch = objective(SCORES, MOS, CLEAN).ndim == 0
        assert objective.batch_defined == per_batch
    assert [o.name for o in (MSE(), Drift(), PairInversion())] == ["mse", "drift", "pair_inversion"]


def test_defaults_are_the_configs():
    config = SRMConfig()
    assert PairInversion() == PairInversion(margin=config.pair_margin, temperature=config.pair_temperature)


@pytest.mark.parametrize("values", [{"margin": -0.1}, {"temperature": 0.0}, {"temperature": math.nan}])
def test_bad_constants_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        PairInversion(**values)


def test_signed_objectives_are_the_score_and_its_negative():
    assert Signed(1)(SCORES, MOS, CLEAN).tolist() == SCORES.tolist()
    assert Signed(-1)(SCORES, MOS, CLEAN).tolist() == (-SCORES).tolist()
    assert (Signed(1).name, Signed(-1).name) == ("raise", "lower")
    with pytest.raises(ValueError, match="sign=0: expected 1 or -1"):
        Signed(0)


@pytest.mark.parametrize("sign", [1, -1])
def test_signed_pair_inversion_moves_one_side_of_each_pair(sign):
    # Pairs (0, 1) and (0, 2) count: image 0 is the better of both.
    gaps = [(CLEAN[0] - SCORES[b]) if sign > 0 else (SCORES[0] - CLEAN[b]) for b in (1, 2)]
    expected = sum(math.log1p(math.exp(-float(gap) / 0.1)) for gap in gaps) / 2
    scores = SCORES.clone().requires_grad_()
    objective = SignedPairInversion(sign)
    loss = objective(scores, MOS, CLEAN)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.sign().tolist() == ([0, 1, 1] if sign > 0 else [-1, 0, 0])
    assert objective.name == f"pair_inversion_{Signed(sign).name}"
    same = SignedPairInversion(sign)(CLEAN, MOS, CLEAN)
    assert same.item() == pytest.approx(PairInversion()(CLEAN, MOS, CLEAN).item())
    with pytest.raises(ValueError, match="sign=0"):
        SignedPairInversion(0)
    with pytest.raises(ValueError, match="margin=-1"):
        SignedPairInversion(sign, margin=-1)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_attack_with_it_moves_scores_that_way_and_only_those(sign):
    model, images, mos = Linear(weight()), batch(), [0.9, 0.7, 0.3, 0.1]
    attacked = pgd(model, images, mos, SignedPairInversion(sign), eps=0.02, steps=10, restarts=1)
    moved = (model(attacked) - model(images)).detach() * sign
    reach = 0.02 * float(model.weight.detach().abs().sum())
    held = 0 if sign > 0 else 3  # better, or worse, than all others: it stays about where its start was drawn
    assert moved[[1, 2]].min() > 0.9 * reach
    assert moved[held].abs() < 0.5 * reach


def test_soft_spearman_tends_to_minus_the_rank_correlation():
    scores = torch.tensor([0.1, 0.9, 0.4, 0.7, 0.2], dtype=torch.float64)
    mos = torch.tensor([0.3, 0.8, 0.5, 0.4, 0.5], dtype=torch.float64)
    sharp = SoftSpearman(temperature=1e-4)(scores, mos, scores)
    assert sharp.item() == pytest.approx(-srocc(scores, mos), abs=1e-6)
    assert SoftSpearman()(scores, torch.full_like(mos, 0.5), scores).item() == 0
    assert gradcheck(lambda x: SoftSpearman()(x, mos, x), scores.clone().requires_grad_())
    with pytest.raises(ValueError, match="temperature=0: expected a positive number"):
        SoftSpearman(temperature=0)
