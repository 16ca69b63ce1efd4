"""Test `bench.training` at a tiny size: its rows, its table, and the mark of a missed target."""

from __future__ import annotations

import json
import re

import pytest

training = pytest.importorskip("bench.training")  # only in a checkout; `bench` is not installed


def test_it_runs_at_a_tiny_size_on_the_cpu(tmp_path, capsys):
    sizes = ["--image-size", "64", "--batch-size", "2", "--repeats", "2", "--warmup", "1", "--batches", "3"]
    chosen = ["--backbones", "test_convnext", "--backends", "reference", "--device", "cpu"]
    training.main([*sizes, *chosen, "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "cpu/training.jsonl").read_text().splitlines()]
    steps, data = ([row for row in rows if row["kind"] == kind] for kind in ("step", "data"))
    assert [(row["neck"], row["backend"]) for row in steps] == [
        ("quadratic", "reference"),
        ("srm", "reference"),
        ("none", None),
    ]
    assert steps[0]["speed_over_first"] == 1
    assert steps[2]["speed_over_first"] > 1  # the model without a neck does the least work
    assert all(row["images_per_second"] > 0 and row["peak_mib"] is None for row in steps)
    assert [row["images"] for row in data] == ["decoded", "cached"]
    assert all(0 < row["data_share"] < 1 for row in data)
    assert all(row["machine"]["commit"] and row["machine"]["torch"] for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.match(r"test_convnext +(quadratic|srm|none)[ ,]", line)]) == 5


def test_a_fused_neck_that_misses_its_aim_is_marked():
    row = {"backbone": "b", "neck": "srm", "backend": "triton", "images_per_second": 1.0, "peak_mib": 1.0}
    assert training.line_of({**row, "speed_over_first": 1.29}).endswith(" !")
    assert not training.line_of({**row, "speed_over_first": 1.3}).endswith("!")
    assert not training.line_of({**row, "speed_over_first": 1.2, "backend": "torch"}).endswith("!")
