from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from srm_model.metrics import LogisticMap, plcc, srocc


def logistic(q: np.ndarray, beta: tuple[float, ...]) -> np.ndarray:
    b1, b2, b3, b4, b5 = beta
    return b1 * (0.5 - 1 / (1 + np.exp(b2 * (q - b3)))) + b4 * q + b5


def sigmoid_data(n: int = 200, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(3.0, 2.0, n)
    q = (scores - scores.mean()) / scores.std()
    return scores, logistic(q, (1.0, 4.0, -0.4, 0.02, 0.4)) + noise * rng.normal(size=n)


# Few distinct integers, so that most examples have ties.
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=40))
def test_srocc_is_scipys_with_ties_and_without_warnings(pairs):
    x, y = np.array(pairs, dtype=float).T
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = srocc(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = stats.spearmanr(x, y).statistic
    assert ours == pytest.approx(theirs, abs=1e-12, nan_ok=True)  # both use float64; errors are about n · eps


@given(
    st.lists(
        st.tuples(st.floats(-1e3, 1e3), st.floats(0, 1)), min_size=3, max_size=30, unique_by=lambda p: p[0]
    )
)
def test_plcc_is_scipys(pairs):
    x, y = np.array(pairs).T
    if np.ptp(x) < 1e-6 or np.ptp(y) < 1e-6:
        return  # nearly constant, so rounding errors dominate
    assert plcc(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-8)


def test_tied_ranks_are_averaged_by_hand():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: r = 4.5 / √(4.5 · 5).
    assert srocc([0.1, 0.5, 0.5, 0.9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-12)


@pytest.mark.parametrize("metric", [srocc, plcc])
def test_constant_or_broken_scores_are_nan(metric):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(metric([0.3, 0.3, 0.3], [0.1, 0.2, 0.3]))
        assert math.isnan(metric([0, 0, 0], [0.1, 0.2, 0.3]))
        assert math.isnan(metric([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]))
        assert math.isnan(metric([0.1, math.nan, 0.3], [0.1, 0.2, 0.3]))
        assert math.isnan(metric([0.1, math.inf, 0.3], [0.1, 0.2, 0.3]))


@pytest.mark.parametrize("metric", [srocc, plcc])
def test_tensors_arrays_and_lists_agree(metric):
    scores, mos = [0.5, 0.25, 0.75, 1.0], [0.1, 0.3, 0.4, 0.6]
    expected = metric(scores, mos)
    assert metric(torch.tensor(scores, dtype=torch.bfloat16, requires_grad=True), np.array(mos)) == expected
    assert isinstance(expected, float)


def test_plcc_survives_huge_scores():
    scores = np.array([1.0, 2.0, 3.0, 5.0])
    assert plcc(scores * 1e300, [1, 2, 3, 4]) == pytest.approx(plcc(scores, [1, 2, 3, 4]), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "mos", "error", "words"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], ValueError, r"shape \(2,\).*shape \(3,\)"),
        ([[1.0], [2.0]], [[1.0], [2.0]], ValueError, "1-D"),
        ([1.0], [1.0], ValueError, "at least 2 items, got 1"),
        ([1.0, 2.0], [1.0, math.nan], ValueError, "1 of 2 mos"),
        (["a", "b"], [1.0, 2.0], TypeError, "scores is a list"),
    ],
)
def test_bad_input_is_one_sentence(scores, mos, error, words):
    for function in (srocc, plcc, LogisticMap.fit):
        with pytest.raises(error, match=words) as caught:
            function(scores, mos)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beta", [(1.0, 4.0, -0.4, 0.02, 0.4), (0.6, 2.0, 0.3, -0.02, 0.2)])
def test_a_known_logistic_is_recovered(beta):
    scores = np.random.default_rng(1).normal(10.0, 3.0, 300)
    mos = logistic((scores - scores.mean()) / scores.std(), beta)
    fitted = LogisticMap.fit(scores, mos)
    assert fitted.converged
    assert fitted.reason == ""
    assert np.abs(fitted(scores) - mos).max() < 1e-6  # least squares stops at a relative tolerance of 1e-8
    # β is unique up to the sign change (β1, β2) → (−β1, −β2).
    sign = np.sign(fitted.beta[1])
    assert np.array([sign * fitted.beta[0], sign * fitted.beta[1], *fitted.beta[2:]]) == pytest.approx(
        np.array(beta), abs=1e-3
    )


def test_the_fit_undoes_a_saturated_scale():
    scores, mos = sigmoid_data(noise=0.02)
    fitted = LogisticMap.fit(scores, mos)
    assert fitted.converged
    assert plcc(fitted(scores), mos) > plcc(scores, mos) + 0.03
    assert fitted.center == pytest.approx(scores.mean())
    assert fitted.scale == pytest.approx(scores.std())


@given(st.integers(0, 10**6), st.integers(5, 60), st.floats(0, 2), st.sampled_from([-1.0, 1.0]))
def test_the_fit_never_loses_correlation_on_its_own_data(seed, n, noise, sign):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n)
    mos = sign * np.tanh(scores) + noise * rng.normal(size=n)
    fitted = LogisticMap.fit(scores, mos)
    assert plcc(fitted(scores), mos) >= abs(plcc(scores, mos)) - 1e-6
    assert fitted.converged == (fitted.reason == "")


@pytest.mark.parametrize("seed", range(6))
def test_slightly_curved_data_converge_too(seed):
    # The minimum is at the end of a long flat valley, where β1 is large and β2 small.
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0, 1, 600)
    mos = scores**2 + 0.02 * rng.normal(size=600)
    fitted = LogisticMap.fit(scores, mos)
    assert fitted.converged
    assert plcc(fitted(scores), mos) > plcc(scores, mos) + 0.02


def test_constant_predictions_fall_back_to_the_mean():
    fitted = LogisticMap.fit([0.4] * 6, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert not fitted.converged
    assert "constant" in fitted.reason
    assert fitted([0.4, 7.0]) == pytest.approx([0.5, 0.5])


def test_too_few_items_fall_back_to_the_line():
    fitted = LogisticMap.fit([1.0, 2.0, 3.0], [0.2, 0.4, 0.6])
    assert not fitted.converged
    assert "5" in fitted.reason
    assert fitted([4.0]) == pytest.approx([0.8])


def test_a_fit_that_gives_up_falls_back_to_the_line(monkeypatch):
    from scipy import optimize

    genuine = optimize.least_squares
    monkeypatch.setattr(optimize, "least_squares", lambda *a, **k: genuine(*a, **{**k, "max_nfev": 1}))
    scores, mos = sigmoid_data()
    fitted = LogisticMap.fit(scores, mos)
    assert not fitted.converged
    assert "did not converge" in fitted.reason
    slope, offset = np.polyfit(scores, mos, 1)
    assert fitted(scores) == pytest.approx(slope * scores + offset, abs=1e-10)


def test_a_minimum_worse_than_the_line_falls_back_to_it(monkeypatch):
    from scipy import optimize

    genuine = optimize.least_squares

    def stuck(*args, **kwargs):
        found = genuine(*args, **kwargs)
        found.x, found.cost = np.array([0.0, 1.0, 0.0, 0.0, 0.0]), 1e3
        return found

    monkeypatch.setattr(optimize, "least_squares", stuck)
    scores, mos = sigmoid_data()
    fitted = LogisticMap.fit(scores, mos)
    assert not fitted.converged
    assert "straight line" in fitted.reason
    assert plcc(fitted(scores), mos) == pytest.approx(plcc(scores, mos), abs=1e-12)


def test_far_scores_do_not_overflow_and_nan_stays():
    scores, mos = sigmoid_data()
    fitted = LogisticMap.fit(scores, mos)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = fitted(torch.tensor([[-1e9, 1e9], [math.nan, 3.0]]))
    assert mapped.shape == (2, 2)
    assert np.isfinite(mapped).tolist() == [[True, True], [False, True]]


def test_scores_that_are_not_finite_cannot_be_fitted():
    with pytest.raises(ValueError, match="2 of 3 scores are not finite"):
        LogisticMap.fit([math.nan, 1.0, math.inf], [1.0, 2.0, 3.0])


def test_dict_round_trip_through_json():
    scores, mos = sigmoid_data(noise=0.1)
    for fitted in (LogisticMap.fit(scores, mos), LogisticMap.fit([1.0] * 5, mos[:5])):
        again = LogisticMap.from_dict(json.loads(json.dumps(fitted.to_dict())))
        assert again == fitted
        assert again(scores).tolist() == fitted(scores).tolist()


@pytest.mark.parametrize(
    "change",
    [{"beta": [1, 2]}, {"scale": 0.0}, {"center": None}, {"beta": [1, 2, 3, 4, math.nan]}, {"extra": 1}],
)
def test_a_foreign_dict_is_refused(change):
    values = LogisticMap.fit(*sigmoid_data()).to_dict()
    with pytest.raises(ValueError, match="logistic map") as caught:
        LogisticMap.from_dict({**values, **change})
    assert "\n" not in str(caught.value)
