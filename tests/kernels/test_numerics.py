"""Test the numerics rule: which errors `error_ratio` accepts, and which errors it rejects."""

from __future__ import annotations

import math

import pytest
import torch

from srm_kernels.numerics import error_ratio

EXACT = torch.linspace(-1, 1, 64, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_twice_the_error_of_plain_pytorch_is_the_limit(dtype):
    plain = (EXACT + 80 * torch.finfo(dtype).eps).to(dtype)

    def by(factor: float) -> float:
        return error_ratio((EXACT + factor * 80 * torch.finfo(dtype).eps).to(dtype), plain, EXACT)

    assert by(1.9) <= 1 < by(2.3)


def test_an_exact_baseline_leaves_the_units_of_rounding():
    unit = torch.finfo(torch.float32).eps
    plain = EXACT.float().double().float()
    spread = EXACT.float().double()
    assert error_ratio((spread + 3 * unit).float(), plain, spread) <= 1
    assert error_ratio((spread + 6 * unit).float(), plain, spread) > 1


def test_one_wrong_entry_shows_in_the_largest_error():
    found = EXACT.float()
    found[3] += 1e-4
    assert error_ratio(found, EXACT.float(), EXACT) > 10


def test_the_size_may_be_that_of_results_computed_together():
    found = (EXACT + 1e-4).float()
    assert error_ratio(found, EXACT.float(), EXACT) > 1
    assert error_ratio(found, EXACT.float(), EXACT, [EXACT, 400 * EXACT]) <= 1


def test_one_number_is_not_judged_by_a_lucky_baseline():
    exact = torch.tensor([1.0], dtype=torch.float64)
    found = torch.tensor([1 + 2**-9]).half()
    assert error_ratio(found, exact.half(), exact) > 1
    assert error_ratio(torch.tensor([1 + 2**-10]).half(), exact.half(), exact) <= 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_must_be_where_they_are_in_the_definition(value):
    broken = EXACT.clone()
    broken[0] = value
    assert error_ratio(broken.float(), EXACT.float(), EXACT) == math.inf
    assert error_ratio(broken.float(), broken.float(), broken) <= 1
    if math.isnan(value):
        assert error_ratio(EXACT.float(), broken.float(), broken) == math.inf


def test_other_shapes_are_an_error():
    with pytest.raises(ValueError, match="expected three results of the same shape"):
        error_ratio(EXACT[:3], EXACT, EXACT)


def test_draws_measure_a_sum_that_cancels():
    """Terms of order 1 cancel to a sum of 1e-3, but the rounding error of the sum is that of terms of order 1.

    The rule accepts an error of this size only if `draws` contains the results for other losses.
    """
    exact = torch.tensor([1e-3], dtype=torch.float64)
    found, plain = (exact + 1e-6).float(), exact.float()
    draws = [(torch.tensor([1.0 + 1e-6]), torch.tensor([1.0], dtype=torch.float64))] * 4
    assert error_ratio(found, plain, exact) > 1
    assert error_ratio(found, plain, exact, draws=draws) <= 1
    assert error_ratio((exact + 1e-5).float(), plain, exact, draws=draws) > 1


def test_an_overflow_of_plain_pytorch_bounds_nothing_else():
    """Elements that overflow in plain PyTorch but not in the exact result are ignored; all others are checked."""
    exact = torch.tensor([7e4, 1.0], dtype=torch.float64)
    plain = torch.tensor([math.inf, 1.0], dtype=torch.float16)
    assert error_ratio(torch.tensor([math.inf, 1.0], dtype=torch.float16), plain, exact) == 0
    assert error_ratio(torch.tensor([math.inf, -123.0], dtype=torch.float16), plain, exact) > 100
    assert error_ratio(torch.tensor([0.0, math.inf], dtype=torch.float16), plain, exact) == math.inf


def test_a_result_beside_it_that_is_not_finite_bounds_nothing():
    exact = torch.ones(3, dtype=torch.float64)
    together = [exact, torch.tensor([math.nan, math.inf], dtype=torch.float64)]
    assert error_ratio(torch.full((3,), 2.0), torch.ones(3), exact, together) > 100
