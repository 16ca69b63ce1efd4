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


# A case of `bench.resources`, and what is compiled of it for one architecture: kernels that spilled once, by other
# roads to the same sizes, and kernels over tiles above 64 that did not fit.
SMALL = {86: (2, "backward_kernel"), 120: (6, "landmarks_backward_kernel")}
LARGE = {
    86: (11, "forward_kernel", "pieces_backward_kernel", "landmarks_backward_kernel"),
    89: (12, "leverage_kernel"),
    120: (13, "queries_backward_kernel", "scores_kernel"),
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


@pytest.mark.parametrize("architecture", SMALL)
def test_other_roads_spill_nothing_either(architecture, tmp_path):
    case, *kernels = SMALL[architecture]
    rows = compiled(tmp_path, "attention", (case,), (architecture,), tuple(kernels))
    assert {row["kernel"] for row in rows} == set(kernels)
    assert misfits(rows, SHARED_KIB[architecture]) == []


@pytest.mark.parametrize("architecture", LARGE)
def test_larger_tiles_fit_where_a_block_has_least(architecture, tmp_path):
    case, *kernels = LARGE[architecture]
    rows = compiled(tmp_path, "attention", (case,), (architecture,), tuple(kernels))
    assert {row["kernel"] for row in rows} == set(kernels)
    limit = SHARED_KIB[architecture] * 1024
    assert [(row["kernel"], row["case"], row["shared"]) for row in rows if row["shared"] > limit] == []
