"""Test which programs of a grid are counted, and the report of the simulated times."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from bench.ptx import report, workloads
from bench.ptx.rates import Gpu
from srm_kernels import rms_scale
from srm_model.profiling.results import read


def test_programs_of_every_kind_run_in_the_proportion_in_which_they_are_launched():
    """The grid has programs of three kinds. For each of 8 heads, it has 16, 8 and 8 programs of these kinds."""
    chosen = workloads.sample("attention_backward_kernel", (256,))
    assert chosen is not None
    kinds = Counter(0 if program < 128 else 1 if program < 192 else 2 for program in chosen)
    assert kinds == {0: 4, 1: 2, 2: 2}


def test_a_small_grid_runs_whole():
    assert workloads.sample("merge_kernel", (8, 1, 1)) is None


def test_the_floor_counts_bytes_and_distinct_products():
    gpu = Gpu("a card", 89, 100, 1.0, 1000, 128, 256, 128)
    found = {"dram_bytes": 10**6, "products": {"bf16": 256 * 10**5 * 8}, "repeated": 2.0}
    assert report.floor_of(found, gpu) == pytest.approx(4.0)  # µs; reading the bytes takes 1 µs
    assert report.floor_of(found | {"dram_bytes": 10**7}, gpu) == pytest.approx(10.0)


def row_of(workload: str, kernel: str, **values: object) -> dict[str, object]:
    """Return a row of the report for `report.TUNED`, the GPU of the targets; `values` adds or replaces columns."""
    row = {
        "gpu": report.TUNED, "workload": workload, "kernel": kernel, "limit": "lsu", "share_of_floor": 0.1,
        "busy_us": dict.fromkeys(report.UNITS, 1.0), "repeated_products": 2.0, "warps": 4, "registers": 96,
    }  # fmt: skip
    return row | values


def test_a_page_of_two_cards():
    row = row_of("attention", "forward_kernel", us=12.34, floor_us=6.0, share_of_floor=0.486)
    page = report.page([row, row | {"gpu": "A100", "us": 99.9}])
    assert page.index("## RTX 4090") < page.index("## A100")
    assert "| attention | forward_kernel | 12.3 | shared memory | 6.0 | 49 |" in page
    assert "No GPU has run this" in page
    assert "| attention | forward_kernel | 134 | 134 | 12 | 49 | shared memory |" in page


def test_the_launches_of_a_tuned_kernel_are_added():
    row = row_of("neck, DyT, training", "squash_kernel", us=60.0, floor_us=30.0, limit="dram")
    page = report.page([row, row | {"us": 40.0, "floor_us": 30.0}])
    line = (
        "| neck, DyT, training | squash_kernel ×2, before dyt_kernel | 175 | 88 | 100 (missed) | 60 | DRAM |"
    )
    assert line in page


def test_a_page_says_which_aims_are_missed():
    row = row_of("neck, key sides", "context_kernel", us=40.4, floor_us=6.0, limit="issue")
    assert "| 64 | 40 | 40 | 15 | issue |" in report.page([row])
    assert "| 64 | 40 | 65 (missed) | 9 | issue |" in report.page([row | {"us": 65.2}])


def test_every_target_is_of_a_kernel_that_was_counted():
    path = Path(report.__file__).parent.parent / "results/simulated/kernels.jsonl"
    counted = {(row["workload"], row["kernel"]) for row in read(path) if row["gpu"] == report.TUNED}
    assert {(target.workload, target.kernel) for target in report.TARGETS} <= counted


def test_a_report_counts_a_kernel_for_every_card_of_an_architecture():
    """Both GPUs have the same architecture, so the launches are counted once."""
    small = workloads.Workload(
        "statistic", lambda dtype: rms_scale(torch.ones(1, 2, 64, 16, dtype=dtype), backend="triton")
    )
    rows = list(report.rows(("H100", "H100 mma.sync"), (small,)))
    assert [row["gpu"] for row in rows[:2]] == ["H100", "H100 mma.sync"]
    assert {row["kernel"] for row in rows} == {"moments_kernel", "merge_kernel"}
    for row in rows:
        assert 0 < row["share_of_floor"] <= 1
        assert row["us"] >= max(row["busy_us"].values()) - 0.01  # rounded to two places
        assert row["busy_us"][row["limit"]] == max(row["busy_us"].values())


def test_results_of_programs_that_do_not_run_are_no_repeated_products():
    """Only the kernel that computes dK and dV runs.

    In place of the other kernels' results, it reads the random numbers of `_FilledMemory`.
    """
    small = workloads.Workload("key side", workloads.key_sides(1))
    counts = [
        launch.counters.products
        for _ in range(2)
        for _, launch in workloads.counted([small], names={"tokens_backward_kernel"})
    ]
    assert counts[0] == counts[1]
    assert counts[0]
    # If a result has 16 rows, two warps compute the same mma products. No mma product is computed more than twice.
    assert all(2 * distinct >= total for total, distinct in counts[0].values())
