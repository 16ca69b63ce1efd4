"""Test that `bench.small_run` runs every method of attention, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from bench import small_run
from srm_kernels.attention import launch_rules


def test_every_method_runs_with_keys_divided_among_programs(monkeypatch: pytest.MonkeyPatch):
    for name in vars(launch_rules):
        if name.startswith(("MOST_", "LEAST_")):
            # `small_run.run` changes the limits; monkeypatch restores them after the test.
            monkeypatch.setattr(launch_rules, name, getattr(launch_rules, name))
    monkeypatch.setattr(small_run, "LIMITS", small_run.LIMITS[1:2])
    monkeypatch.setattr(small_run, "DTYPES", (torch.float32,))
    small_run.run("cpu")
    assert launch_rules.MOST_KEYS_OF_ONE_PROGRAM == 16
