"""Test `bench.fused_neck` at small sizes on a CPU: its rows, the ratios, and the mark of a missed target."""

from __future__ import annotations

import json
import sys

import pytest

from bench import fused_neck


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_every_neck_has_a_row_with_its_ratios(direction, tmp_path, monkeypatch, capsys):
    options = "--device cpu --backbones pvt_v2_b2 --sides 64 --batches 1 --channels 32 --heads 2 --rank 4"
    effort = f"--repeats 2 --warmup 1 --seconds 0.1 --direction {direction} --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["fused_neck", *options.split(), *effort.split()])
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "reference")
    monkeypatch.setattr(
        fused_neck, "launches_by_interpreter", lambda: "counted\n"
    )  # tests/model/test_fused_neck.py tests the launches
    fused_neck.main()
    (written,) = tmp_path.rglob("fused_neck.jsonl")
    rows = [json.loads(line) for line in written.read_text("utf-8").splitlines()]
    assert [row["neck"] for row in rows] == ["quadratic", "plain", "unfused", "fused"]
    quadratic = rows[0]
    assert quadratic["faster_than_quadratic"] == quadratic["memory_of_quadratic"] == 1
    for row in rows:
        assert row["faster_than_quadratic"] == pytest.approx(quadratic["ms"]["p50"] / row["ms"]["p50"])
        assert row["memory_above"] > 0
        assert row["machine"]
    printed = capsys.readouterr().out
    assert printed.count("pvt_v2_b2") == 4
    assert "counted\n" in printed
    assert ("times_the_floor" in quadratic) == (direction == "forward")  # only the forward pass has a floor


def test_a_fused_neck_that_misses_what_is_asked_is_marked():
    row = {
        "backbone": "pvt_v2_b2", "side": 512, "batch": 8, "neck": "fused", "direction": "forward", "dyt": True,
        "ms": {"p50": 1.0}, "faster_than_quadratic": 3.1, "faster_than_compiled": 2.1, "times_the_floor": 2.9,
        "memory_of_quadratic": 0.2, "launches": 9,
    }  # fmt: skip
    assert not fused_neck.line_of(row).endswith("!")
    for worse in (
        {"faster_than_quadratic": 2.9},
        {"faster_than_compiled": 1.9},
        {"memory_of_quadratic": 0.3},
        {"times_the_floor": 3.1},
        {"neck": "fused, one graph", "faster_than_quadratic": 2.9},
        # Without DyT, the targets are 5 over the eager quadratic neck and 3 over the compiled quadratic neck.
        {"dyt": False, "faster_than_compiled": 3.1},
        {"dyt": False, "faster_than_quadratic": 5.1},
        {"side": 1024, "faster_than_quadratic": 5.9},
        {"direction": "both", "faster_than_quadratic": 1.9},
    ):
        assert fused_neck.line_of(row | worse).endswith("!"), worse
    for other in ({"direction": "both", "memory_of_quadratic": 0.3}, {"batch": 1, "times_the_floor": 9.0}):
        assert not fused_neck.line_of(row | other).endswith("!")


def test_the_floor_is_the_larger_of_reading_and_multiplying(monkeypatch):
    """The floor, a lower bound of the time, is the larger of two times: reading the maps and multiplying matrices.

    At a low bandwidth, reading takes longer. At a low rate of matrix products, multiplying takes longer.
    """
    import argparse

    options = argparse.Namespace(
        device="cpu", dtype="fp32", channels=32, heads=2, rank=4, no_dyt=False, direction="forward",
        channels_last=False, bandwidth=1.0, rate=1e9,
    )  # fmt: skip
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "reference")
    maps = fused_neck.maps_of("pvt_v2_b2", 64, 1, options)
    neck = fused_neck.neck_of("pvt_v2_b2", options, backend="reference").eval()
    size = sum(m.numel() for m in maps) * 4
    assert fused_neck.floor_of(neck, maps, options) == pytest.approx(size / 1e9 * 1e3)
    options.bandwidth, options.rate = 1e9, 1e-3
    assert fused_neck.floor_of(neck, maps, options) > 10 * size / 1e9
    options.rate = None
    assert fused_neck.floor_of(neck, maps, options) is None
