from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from srm_model.attacks import MSE, Drift, PairInversion, Signed, SoftSpearman
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
    # With a smaller margin the third pair counts too. This objective has a temperature of 0.2.
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


def test_pair_inversion_is_one_loss_for_the_batch():
    objectives = (MSE(), Drift(), PairInversion())
    assert [objective(SCORES, MOS, CLEAN).ndim for objective in objectives] == [1, 1, 0]


def test_names_of_objectives():
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


def test_soft_spearman_tends_to_minus_the_rank_correlation():
    scores = torch.tensor([0.1, 0.9, 0.4, 0.7, 0.2], dtype=torch.float64)
    mos = torch.tensor([0.3, 0.8, 0.5, 0.4, 0.5], dtype=torch.float64)
    sharp = SoftSpearman(temperature=1e-4)(scores, mos, scores)
    assert sharp.item() == pytest.approx(-srocc(scores, mos), abs=1e-6)
    assert SoftSpearman()(scores, torch.full_like(mos, 0.5), scores).item() == 0
    assert gradcheck(lambda x: SoftSpearman()(x, mos, x), scores.clone().requires_grad_())
    with pytest.raises(ValueError, match="temperature=0: expected a positive number"):
        SoftSpearman(temperature=0)
