"""Test, without a GPU, that every Triton kernel compiles for every architecture and fits in shared memory.

No kernel may need more shared memory than a thread block can use. Kernels with r and d up to 64 must not spill
registers.

The committed table, bench/results/compiled/resources.jsonl, has a row for each launch. The row contains a digest of
everything that determines the compiled code. If a kernel or a launch rule has changed, the digests of its launches are
not in the table, so the tests compile these launches. To update the table, run
`python -m bench.resources --out bench/results/compiled/resources.jsonl`.

The digest also depends on the version of Triton. If the table has no rows for the installed version, all launches are
missing, and compiling them takes about an hour on two cores. The tests then compile only the shapes that
`bench.resources --article` selects, and only for sm_86 (mma.sync) and sm_90 (wgmma).
"""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from offline import COMPILED, ROOT, compiled, run

from bench.resources import ARCHITECTURES, SHARED_LIMIT, Resources
from srm_kernels.conditioning import SOLVERS_OF_KERNELS
from srm_model.profiling.results import read

triton = pytest.importorskip("triton")
WHOLE = triton.__version__ in {row["machine"]["triton"] for row in read(COMPILED)}
of_all_shapes = pytest.mark.skipif(not WHOLE, reason="the committed table is of another version of Triton")
COMPILED_FOR = ARCHITECTURES if WHOLE else (86, 90)
FAMILIES = ("attention", "solve", "landmarks", "neck")
# Accepted spills in bytes for versions of Triton that are not in the table, because the launch rules are tuned
# for the version in the table.
SPILLED = {"3.6.0": {("absorbed_kernel", 86): 40}}.get(triton.__version__, {})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return a row for each launch of the current code.

    The rows cover all shapes of `bench.resources`. If the table has no rows for the installed version of Triton, they
    cover only the shapes of `--article`.
    """
    folder = tmp_path_factory.mktemp("compiled")

    def rows_of(architecture: int) -> list[dict[str, Any]]:
        out = folder / f"{architecture}.jsonl"
        shutil.copy(COMPILED, out)
        run(
            "-m",
            "bench.resources",
            "--families",
            *FAMILIES,
            "--architectures",
            str(architecture),
            "--out",
            str(out),
            *([] if WHOLE else ["--article"]),
        )
        found = [row for row in read(out) if row["machine"]["triton"] == triton.__version__]
        return [row for row in found if row["architecture"] == architecture]

    with ThreadPoolExecutor(os.cpu_count()) as processes:  # each thread waits for a compiling process
        return [row for rows in processes.map(rows_of, COMPILED_FOR) for row in rows]


def test_the_table_has_every_family_and_architecture(table: list[dict[str, Any]]):
    assert {(row["family"], row["architecture"]) for row in table} == {
        (family, architecture) for family in FAMILIES for architecture in COMPILED_FOR
    }


def test_nothing_spills_up_to_64_landmarks_and_64_channels(table: list[dict[str, Any]]):
    rows = [row for row in table if max(row["case"]["rank"], row["case"]["d"]) <= 64]
    assert len({row["code"] for row in rows}) > (500 if WHOLE else 80)
    most = [SPILLED.get((row["kernel"], row["architecture"]), 0) for row in rows]
    assert [row for row, limit in zip(rows, most, strict=True) if row["spilled"] > limit] == []


@pytest.mark.parametrize("architecture", COMPILED_FOR)
def test_everything_fits_into_shared_memory(table: list[dict[str, Any]], architecture: int):
    limit = SHARED_LIMIT[architecture] * 1024
    rows = [row for row in table if row["architecture"] == architecture]
    assert max(row["case"]["rank"] for row in rows) == 128
    assert max(row["case"]["d"] for row in rows) == 128
    assert [(row["kernel"], row["case"], row["shared"]) for row in rows if row["shared"] > limit] == []


@of_all_shapes
def test_every_solver_is_in_the_table_forward_and_backward(table: list[dict[str, Any]]):
    forms = {
        (f"solve_{direction}_kernel", solver)
        for solver in SOLVERS_OF_KERNELS
        for direction in ("forward", "backward")
    }
    for d in (32, 64, 128):
        rows = [row for row in table if row["family"] == "solve" and row["case"]["d"] == d]
        assert {(row["kernel"], row["case"]["solver"]) for row in rows} == forms


# For each architecture: a family, the index of one of its shapes, and a kernel that once spilled registers or
# needed too much shared memory.
SAMPLE = {
    80: ("neck", 1, "merge_links_kernel"),
    86: ("attention", 2, "backward_kernel"),
    89: ("landmarks", 0, "leverage_kernel"),
    90: ("solve", 5, "solve_forward_kernel"),
    120: ("attention", 6, "landmarks_backward_kernel"),
}


@of_all_shapes
@pytest.mark.parametrize("architecture", SAMPLE)
def test_compiled_anew_a_kernel_asks_for_what_the_table_says(
    table: list[dict[str, Any]], architecture: int, tmp_path: Path
):
    family, case, kernel = SAMPLE[architecture]
    rows = compiled(tmp_path, family, (case,), (architecture,), (kernel,))
    assert {row["kernel"] for row in rows} == {kernel}
    for row in rows:
        told = [other for other in table if other["code"] == row["code"]]
        assert told
        assert {tuple(other[name] for name in Resources._fields) for other in told} == {
            tuple(row[name] for name in Resources._fields)
        }


def test_no_kernel_of_the_package_is_left_out():
    """Every kernel that a source file launches is also launched for the shapes of `--article`.

    The committed table contains all launches for these shapes, and therefore every kernel.
    """
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


PASSES = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from srm_kernels.parts import wide_dot


@triton.jit
def product(a_ptr, b_ptr, out_ptr):
    i = tl.arange(0, 16)
    place = i[:, None] * 16 + i[None, :]
    tl.store(out_ptr + place, wide_dot(tl.load(a_ptr + place), tl.load(b_ptr + place), "bf16x3"))


for kinds in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "fp32")):
    signature = dict(zip(("a_ptr", "b_ptr", "out_ptr"), (*(f"*{kind}" for kind in kinds), "*fp32")))
    source = ASTSource(product, signature, {}, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1})
    print(compiled.asm["ptx"].count("mma.sync"))
"""


def test_a_factor_that_is_bf16_already_saves_a_pass(tmp_path: Path):
    """A product of two fp32 factors needs three bf16 passes; if one of the factors is bf16, two passes suffice.

    Each pass of a 16×16×16 product has two mma.sync instructions.
    """
    path = tmp_path / "passes.py"
    path.write_text(PASSES, "utf-8")
    assert run(str(path)).split() == ["6", "4", "4"]
