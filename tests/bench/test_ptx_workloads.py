"""The programs of a grid that are counted."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("ptx")
from bench import ptx_workloads


def test_programs_of_every_kind_run_in_the_proportion_in_which_they_are_launched():
    """The attention of the neck's backward pass: three kinds, 16, 8 and 8 programs for each of 8 heads."""
    chosen = ptx_workloads.sample("attention_backward_kernel", (256,))
    assert chosen is not None
    kinds = Counter(0 if program < 128 else 1 if program < 192 else 2 for program in chosen)
    assert kinds == {0: 4, 1: 2, 2: 2}


def test_a_small_grid_runs_whole():
    assert ptx_workloads.sample("merge_kernel", (8, 1, 1)) is None
