"""Make the tests for one part of the sample of `bench.ptx.matrix`: a test for each run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import triton

from bench.harness import RESULTS
from bench.ptx import matrix
from srm_model.profiling.results import read

MATRIX = RESULTS / "compiled/matrix.jsonl"
AGAIN = f"python -m bench.ptx --matrix --resume --out {MATRIX.relative_to(RESULTS.parent.parent)}"


def rows_test(chosen: Callable[[str], bool]) -> Callable[[matrix.Run], None]:
    """Return a test that is parametrised over the runs for which `chosen` returns True.

    The argument of `chosen` is the kind and the name of the case, such as "neck even maps".
    """
    runs = [run for run in matrix.runs(sample=True) if chosen("{kind} {case}".format(**run.about()))]
    committed = {matrix.key_of(row): row for row in read(MATRIX) if row["order"] == "together"}

    @pytest.mark.parametrize("run", runs, ids="{0.case.name}-{0.dtype}-sm_{0.architecture}".format)
    def test_it_follows_the_rule_no_check_reports_and_the_committed_row_ran_this_code(
        run: matrix.Run,
    ) -> None:
        row = matrix.judge(run)
        assert row["passed"], {name: value for name, value in row.items() if name != "seconds"}
        known = committed[matrix.key_of(row)]
        if known["machine"]["triton"] == triton.__version__:
            assert row["code"] == known["code"], f"the committed row ran other code: {AGAIN}"

    return test_it_follows_the_rule_no_check_reports_and_the_committed_row_ran_this_code
