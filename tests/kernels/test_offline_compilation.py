"""Every kernel compiles for every architecture, without a GPU, and fits.

No spills up to r = d = 64, shared memory within what a block may ask for. `python -m bench.resources` prints more.
"""

from __future__ import annotations

import re

import pytest
from offline import ROOT, compiled, misfits, run

pytest.importorskip("triton")
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
KERNELS = {
    "context_kernel",
    "gram_kernel",
    "scores_kernel",
    "largest_kernel",
    "mix_kernel",
    "solve_kernel",
    "system_backward_kernel",
    "landmarks_backward_kernel",
    "gathered_kernel",
    "tokens_backward_kernel",
    "forward_kernel",
    "statistics_kernel",
    "backward_kernel",
    "sum_kernel",
}


@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_every_kernel_compiles_without_spills_and_within_shared_memory(architecture, tmp_path):
    rows = compiled(tmp_path, "attention", (0, 1), (architecture,))
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["case"]["rank"] == row["case"]["d"] == 64 for row in rows)
    assert misfits(rows, SHARED_KIB[architecture]) == []


def test_no_kernel_of_the_package_is_left_out():
    """Whatever a source file launches is among the launches of the article's shapes, which the committed table has."""
    launched = {
        (path.parent.name, name.strip("_"))
        for path in (ROOT / "srm_kernels").glob("*/*kernels.py")
        for name in re.findall(r"^ +(\w+)\[\(.*\)\]\(", path.read_text("utf-8"), flags=re.MULTILINE)
    }
    assert len(launched) > 30
    code = (
        "from bench.resources import FAMILIES, operator\n"
        "for family in FAMILIES.values():\n"
        "    for case in family.article:\n"
        "        for launch in family.launches(case, 89):\n"
        "            print(operator(launch[0]), launch[0].__name__.strip('_'))\n"
    )
    assert {tuple(line.split()) for line in run("-c", code).splitlines()} == launched
