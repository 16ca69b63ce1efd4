"""Test `bench.cpu_neck` at small sizes: its rows, the ratios, and the mark of a missed target."""

from __future__ import annotations

import json
import sys

import pytest

from bench import cpu_neck


def test_rows_and_lines(tmp_path, monkeypatch, capsys):
    sizes = "--sides 64 --channels 32 --heads 2 --rank 8".split()
    effort = ["--warmup", "1", "--repeats", "2", "--seconds", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["cpu_neck", *sizes, *effort])
    cpu_neck.main()
    (written,) = tmp_path.rglob("cpu_neck.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [(row["direction"], row["dyt"], row["neck"]) for row in rows] == [
        (direction, dyt, name)
        for direction in ("forward", "both")
        for dyt in (True, False)
        for name in ("quadratic", "srm", "srm, not compiled")
    ]
    for base, *others in (rows[i : i + 3] for i in range(0, len(rows), 3)):
        for row in (base, *others):
            assert row["ms"]["processor"] > 0
            assert row["share_of_time"] == row["ms"]["processor"] / base["ms"]["processor"]
            assert row["share_of_memory"] == row["memory_above"] / base["memory_above"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, False),
        ({"share_of_time": 0.61}, True),
        ({"share_of_memory": 0.26}, True),
        ({"direction": "forward", "share_of_time": 0.41}, True),
        ({"direction": "forward", "share_of_memory": 0.9}, False),
        ({"direction": "forward", "dyt": False}, True),
        ({"neck": "quadratic", "share_of_time": 1.0, "share_of_memory": 1.0}, False),
        ({"side": 128, "share_of_time": 3.0}, False),
        ({"side": 256, "share_of_memory": 0.35}, False),
    ],
)
def test_what_misses_its_aim_is_marked(change, missed):
    row = {
        "neck": "srm", "side": 512, "direction": "both", "dyt": True, "ms": {"processor": 100.0},
        "share_of_time": 0.39, "memory_above": 2**20, "share_of_memory": 0.25,
    }  # fmt: skip
    assert cpu_neck.line_of(row | change).endswith("!") == missed
