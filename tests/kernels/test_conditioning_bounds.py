"""Tests of the bounds of docs/CONDITIONING.md.

The bounds are κ₂(S + λI) ≤ (1 + λ)/λ and κ₂(W_λ) ≤ ϱ(1 + λ)/λ. ϱ is the largest row sum of exp(K̃K̃ᵀ/√d) divided by the
smallest. For keys of equal norm, ϱ ≤ r. Because of rounding errors, a computed κ₂ may exceed its bound by at most 1e-6
of the bound (`ROUNDING`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import tokens

from bench import bounds
from srm_kernels import landmark_solve, nystrom_attention

ROUNDING = 1 + 1e-6
COMMITTED = Path(__file__).parents[2] / "bench/results/cpu/conditioning-bounds.jsonl"


@pytest.mark.parametrize("normalised", [True, False])
def test_no_drawn_or_optimised_keys_exceed_a_bound(normalised):
    """A small version of `python -m bench.conditioning --search`."""
    reached = dict.fromkeys(bounds.Figures._fields, 0.0)
    for _, figures in bounds.search(300, normalised=normalised, steps=15):
        for name, values in figures._asdict().items():
            reached[name] = max(reached[name], float(values.nan_to_num(posinf=0).max()))
    assert 0.9 < reached["symmetric"] <= ROUNDING, "the bound is attained, so the search must come near it"
    assert reached["certificate"] <= ROUNDING
    if normalised:
        assert reached["landmark"] <= ROUNDING
        assert reached["gain"] < 10
    else:
        assert reached["landmark"] > 100, "without normalised keys the bound should be seen to fail"
        assert reached["gain"] > 100


def test_the_ascent_climbs():
    """Gradient ascent increases the mean of log κ by more than 1."""
    case = bounds.Case(8, 4, 1e-3, "random", "kappa")
    keys = bounds.draw_keys(case, 20, torch.Generator().manual_seed(0))

    def kappa(keys):
        return bounds.evaluate(bounds.normalise(keys), case.ridge, torch.Generator()).kappa

    climbed = bounds.ascend(keys, case, True, 25, 0)
    assert kappa(climbed).log().mean() > kappa(keys).log().mean() + 1


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    r=st.integers(1, 24),
    d=st.integers(1, 20),
    ridge=st.floats(1e-4, 0.3),
    spread=st.floats(-6, 2),
)
def test_keys_as_they_are_obey_the_certificate(seed, r, d, ridge, spread):
    keys = tokens(seed, r, d) * 10 ** (spread * torch.rand(r, 1, dtype=torch.float64))
    logits = keys @ keys.mT / math.sqrt(d)
    rows = logits.logsumexp(-1)
    ratio = (rows.amax() - rows.amin()).exp()
    lam = oracle.system(logits, keys, ridge).ridge
    result = landmark_solve(logits, tokens(seed + 1, r, 3), ridge=ridge, diagnostics=True)
    if result.kappa < 1e9:
        assert result.kappa <= ROUNDING * ratio * (1 + lam) / lam
        assert result.gain <= ROUNDING * ratio.sqrt() / lam


def test_duplicated_landmarks_attain_both_bounds_but_for_r():
    """With two equal landmarks, κ₂(W_λ) = (1 + λ)/λ: both bounds are attained, with ϱ = 1, which is less than r.

    W = S has the eigenvalues 0 and 1, so W_λ = S + λI has the eigenvalues λ and 1 + λ.
    """
    keys = oracle.normalise(tokens(0, 1, 8)).expand(2, 8)
    logits = keys @ keys.mT / math.sqrt(8)
    lam = oracle.system(logits, keys, 1e-3).ridge
    kappa = landmark_solve(logits, keys, diagnostics=True).kappa
    torch.testing.assert_close(kappa, (1 + lam) / lam, rtol=1e-9, atol=0)


def test_keys_that_vanish_are_not_of_one_norm():
    """With keys of very small norm, κ₂ exceeds the bound r(1 + λ)/λ, but not the bound ϱ(1 + λ)/λ.

    Normalisation divides by ‖k‖ + 1e-6, so the norms of such keys differ from √d afterwards.
    """
    r, d = 4, 1024
    key = torch.zeros(1, 1, r, d, dtype=torch.float64)
    key[0, 0, :, 0] = torch.tensor([1.66e-4, 7.6e-5, 1.96e-6, 3.8e-7], dtype=torch.float64)
    _, found = nystrom_attention(key, key, key, r, qk_norm="keys", diagnostics=True)
    normalised = oracle.normalise(key)
    logits = normalised @ normalised.mT / math.sqrt(d)
    lam = oracle.system(logits, key, 1e-3).ridge
    rows = logits.logsumexp(-1)
    ratio = (rows.amax() - rows.amin()).exp()
    assert found.kappa > 50 * r * (1 + lam) / lam
    assert found.kappa <= ROUNDING * ratio * (1 + lam) / lam
    longer = oracle.normalise(1e3 * key)  # the same directions, with norms far above 1e-6
    logits = longer @ longer.mT / math.sqrt(d)
    lam = oracle.system(logits, key, 1e-3).ridge
    assert oracle.condition(oracle.system(logits, key, 1e-3).matrix) <= r * (1 + lam) / lam


def test_the_committed_search_found_nothing_over_a_bound():
    header, *rows = [json.loads(line) for line in COMMITTED.read_text("utf-8").splitlines()]
    assert header["exceeded"] == 0
    assert header["cases"] >= 100_000
    normalised = [row for row in rows if row["normalised"]]
    assert sum(row["cases"] for row in normalised) == header["cases"]
    assert {row["optimised"] for row in normalised} == {None, *bounds.OBJECTIVES}
    for row in rows:
        assert row["symmetric"] <= ROUNDING
        assert row["certificate"] <= ROUNDING
        assert row["landmark"] <= ROUNDING or not row["normalised"]
