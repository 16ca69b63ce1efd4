"""Test the operator benchmarks: every operator runs, and an operator with wrong results is refused."""

from __future__ import annotations

import pytest
import torch

import srm_kernels
from bench.operators import DIRECTIONS, FAMILIES, OPERATORS, NumericsError, Timed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_passes_its_own_check(operator: str, backend: str, dtype: str):
    for direction in DIRECTIONS:
        if direction == "forward" or OPERATORS[operator].gradients:
            timed = Timed(operator, FAMILIES["tiny"], backend, direction, dtype, "cpu")
            # The relative error of a correct result is a few rounding errors; that of an unrelated result is about 1.
            assert timed.verify() < {"fp32": 1e-3, "bf16": 0.1}[dtype]


def test_every_public_operator_is_there():
    public = {
        name for name in srm_kernels.__all__ if callable(getattr(srm_kernels, name)) and name.islower()
    } - {
        "backends",
        "explain",
        "serves_pooled_links",
        "diagnosed_attention",
    }  # these are not operators of their own
    assert public == set(OPERATORS)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_wrong_numbers_are_refused(direction: str, monkeypatch: pytest.MonkeyPatch):
    honest = srm_kernels.dyt

    def wrong(*args, backend):
        return honest(*args, backend=backend) * (1 + 1e-5 if backend == "torch" else 1)

    monkeypatch.setattr(srm_kernels, "dyt", wrong)
    assert Timed("dyt", FAMILIES["tiny"], "reference", direction, "fp32", "cpu").verify() < 1e-5
    with pytest.raises(NumericsError, match=r"dyt by torch, .*it is not timed$"):
        Timed("dyt", FAMILIES["tiny"], "torch", direction, "fp32", "cpu").verify()


def test_a_result_that_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(srm_kernels, "full_attention", lambda q, *_, **__: torch.full_like(q, float("nan")))
    with pytest.raises(NumericsError):
        Timed("full_attention", FAMILIES["tiny"], "torch", "forward", "fp32", "cpu").verify()


def test_worse_or_repeated_landmarks_are_refused(monkeypatch: pytest.MonkeyPatch):
    honest = srm_kernels.select_landmarks
    timed = Timed("select_landmarks", FAMILIES["tiny"], "torch", "forward", "fp32", "cpu")
    timed.verify()
    for spoil in (
        lambda chosen: (chosen + 1) % FAMILIES["tiny"].keys,
        lambda chosen: chosen[..., :1].expand_as(chosen),
    ):
        monkeypatch.setattr(srm_kernels, "select_landmarks", lambda *a, f=spoil, **k: f(honest(*a, **k)))
        with pytest.raises(NumericsError):
            timed.verify()
