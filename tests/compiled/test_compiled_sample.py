"""Test that the sample covers every kernel and every combination of launch options, and test the committed rows."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

pytest.importorskip("triton")
from sampled import MATRIX
from triton.runtime.jit import JITFunction

import srm_kernels
from bench import resources
from bench.ptx import matrix
from srm_model.profiling.results import read


@pytest.fixture(scope="module")
def sampled() -> set[matrix.Configuration]:
    """Return the kernels that the sample launches, with their launch options."""
    return set().union(*(matrix.configurations_of(run) for run in matrix.runs(sample=True)))


def test_every_kernel_of_the_package_is_executed(sampled):
    kernels = set()
    for module in pkgutil.walk_packages(srm_kernels.__path__, "srm_kernels."):
        if module.name.endswith("kernels"):
            found = vars(importlib.import_module(module.name)).items()
            kernels |= {
                name.strip("_")
                for name, f in found
                if name.endswith("_kernel") and isinstance(f, JITFunction)
            }
    assert len(kernels) >= 40
    assert {one.kernel for one in sampled} == kernels


def test_every_branch_of_the_launch_rules_is_executed(sampled):
    """`bench.resources` compiles the kernels of every branch."""
    branches = set()
    for family in resources.FAMILIES.values():
        for case in family.cases:
            for architecture in resources.ARCHITECTURES:
                for kernel, _, options in family.launches(case, architecture):
                    branches.add(matrix.Configuration.of(kernel, options))
    assert branches - sampled == set()


def test_the_committed_rows_are_those_of_the_matrix_and_passed():
    rows = read(MATRIX)
    together = [matrix.key_of(row) for row in rows if row["order"] == "together"]
    assert together == [matrix.key_of(run.about()) for run in matrix.runs()]
    assert all(row["passed"] for row in rows)


def test_no_result_of_the_committed_rows_depends_on_the_order_of_the_warps():
    rows = read(MATRIX)
    bits = {matrix.key_of(row): row["bits"] for row in rows if row["order"] == "together"}
    turned = [row for row in rows if row["order"] == "reversed"]
    assert {row["case"] for row in turned} >= {"even maps", "even maps, DyT", "heads of 64"}
    assert {row["dtype"] for row in turned} == {"bf16", "fp16", "fp32"}
    assert [row for row in turned if row["bits"] != bits[matrix.key_of({**row, "order": "together"})]] == []
