from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import ToyModel, ToySet

from srm_model.metrics import LogisticMap, plcc, srocc
from srm_model.training import evaluate, predict


def test_scores_do_not_depend_on_the_batch_size():
    model, images = ToyModel(), ToySet(11)
    whole = predict(model, images, batch_size=11)
    assert whole.shape == (11,)
    assert whole.dtype == np.float64
    for batch_size in (1, 3, 64):
        # fp32 sums in another order differ by a few units in the last place
        np.testing.assert_allclose(predict(model, images, batch_size=batch_size), whole, rtol=1e-5)


def test_predict_leaves_modes_and_random_state_as_they_were():
    model = ToyModel().train()
    model.neck.eval()
    state = torch.get_rng_state()
    predict(model, ToySet(5))
    assert model.training
    assert model.backbone[2].training
    assert not model.neck.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stochastic_model_scores_the_same_every_time():
    class Noisy(ToyModel):
        stochastic = True

        def forward(self, images, return_losses=False):
            return super().forward(images) + torch.randn(len(images))

    first, second = predict(Noisy(), ToySet(6)), predict(Noisy(), ToySet(6))
    assert np.array_equal(first, second)
    assert len(np.unique(first)) == 6


def test_evaluation_takes_plcc_after_the_frozen_map_and_srocc_on_raw_scores():
    model, images = ToyModel(), ToySet(20)
    scores = predict(model, images)
    logistic = LogisticMap((1.0, 9.0, 0.1, 0.02, 0.5), float(scores.mean()), float(scores.std()))
    found = evaluate(model, images, logistic=logistic, batch_size=7)
    np.testing.assert_allclose(found["scores"], scores, rtol=1e-5)
    assert found["srocc"] == srocc(scores, images.mos)
    assert found["plcc"] == pytest.approx(plcc(logistic(scores), images.mos), abs=1e-6)
    assert found["plcc"] < evaluate(model, images)["plcc"] - 0.01
    assert found["logistic"] == logistic.to_dict()
    assert (found["n"], found["names"], found["labels"]) == (20, images.names, "mos")
    assert found["mos"] == images.mos.tolist()
