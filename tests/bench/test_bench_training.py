"""The benchmark runs at any size and tells one run's ratios."""

from __future__ import annotations

import json
import re

import pytest

training = pytest.importorskip("bench.training")  # beside the packages, in a checkout


def test_it_runs_at_a_tiny_size_on_the_cpu(tmp_path, capsys):
    sizes = ["--image-size", "64", "--batch-size", "2", "--repeats", "2", "--warmup", "1"]
    chosen = ["--backbones", "test_convnext", "--backends", "reference", "--device", "cpu"]
    training.main([*sizes, *chosen, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["neck"], row["backend"]) for row in found["steps"]] == [
        ("quadratic", "reference"),
        ("srm", "reference"),
        ("none", None),
    ]
    assert found["steps"][0]["speed_over_first"] == 1
    assert found["steps"][2]["speed_over_first"] > 1  # no neck is the least work
    assert all(row["images_per_second"] > 0 and row["peak_mib"] is None for row in found["steps"])
    assert [row["images"] for row in found["data"]] == ["decoded", "cached"]
    assert all(0 < row["data_share"] < 1 for row in found["data"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.match(r"test_convnext +(quadratic|srm|none)[ ,]", line)]) == 5
