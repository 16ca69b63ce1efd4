"""Tests of one part of the sample: each run of it is a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.ptx import matrix


def rows_test(chosen: Callable[[str], bool]) -> Callable[[matrix.Run], None]:
    """Return a test of the runs whose kind and case are chosen."""
    runs = [run for run in matrix.runs(sample=True) if chosen("{kind} {case}".format(**run.about()))]

    @pytest.mark.parametrize("run", runs, ids="{0.case.name}-{0.dtype}-sm_{0.architecture}".format)
    def test_it_follows_the_rule_and_no_check_reports(run: matrix.Run) -> None:
        row = matrix.judge(run)
        assert row["passed"], {name: value for name, value in row.items() if name != "seconds"}

    return test_it_follows_the_rule_and_no_check_reports
