"""The remaining benchmarks' commands run at a tiny size on a CPU, with every flag that one has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import attention, conditioning, neck
from bench.harness import read

ATTENTION = [
    "--device",
    "cpu",
    "--heads",
    "2",
    "--width",
    "8",
    "--rank",
    "4",
    "--repeats",
    "2",
    "--warmup",
    "1",
]


def given(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["bench", *arguments])


def test_attention_as_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: call)  # takes a compiler and half a minute
    more = ["--dtype", "bfloat16", "--compile", "--out", str(tmp_path), "--note", "a look"]
    given(monkeypatch, *ATTENTION, "--shapes", "64", "16", "--batch", "2", *more)
    attention.main()
    printed = capsys.readouterr().out
    assert "bfloat16, B=2 H=2 d=8 r=4, forward, solver cholesky" in printed
    (line,) = (line for line in printed.splitlines() if "64 × 16" in line)
    assert [part.split(" 1/")[0].strip() for part in line.split("of it: ")[1].split(",")] == [
        "default",
        "reference",
        "svd",
        "sdpa",
        *(f"{name} compiled" for name in ("exact", "default", "reference", "svd", "sdpa")),
    ]
    assert "% of copy bandwidth" in printed
    (row,) = read(tmp_path / "cpu" / "attention.jsonl")
    assert [row[name] for name in ("N_q", "N_k", "B", "r", "dtype", "note")] == [
        64,
        16,
        2,
        4,
        "bf16",
        "a look",
    ]
    assert all(row["milliseconds"][name]["count"] == 2 for name in row["typical"])
    assert f"default 1/{row['typical']['exact'] / row['typical']['default']:.2f}" in line


def test_attention_backward_and_its_crossover(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(attention, "CROSSOVER_KEYS", (8, 16))
    monkeypatch.setattr(attention, "CROSSOVER_BATCHES", (1, 2))
    given(monkeypatch, *ATTENTION, "--backward", "--crossover", "--queries", "32")
    attention.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "exact / default at N_q=32, forward and backward; - marks a loss"
    assert [line.split()[0] for line in lines[3:]] == ["8", "16"]
    for ratio in (ratio for line in lines[3:] for ratio in line.split()[1:]):
        assert float(ratio.rstrip("-")) > 0
        assert ratio.endswith("-") == (float(ratio.rstrip("-")) < 1) or ratio.startswith("1.00")


def test_solvers_and_the_search_write_their_machine_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, values in (("BATCHES", (2,)), ("RANKS", (4,)), ("WIDTHS", (8,))):
        monkeypatch.setattr(conditioning, name, values)
    monkeypatch.setattr(conditioning, "share", lambda device, repeats: {"share_of_attention": 0.1})
    given(monkeypatch, "--device", "cpu", "--repeats", "1", "--out", str(tmp_path / "times.jsonl"))
    assert conditioning.main() == 0
    header, *rows = map(json.loads, (tmp_path / "times.jsonl").read_text().splitlines())
    assert header["torch"] == torch.__version__
    assert {row["solver"] for row in rows[:-1]} >= set(conditioning.SOLVERS)
    given(monkeypatch, "--search", "--cases", "20", "--out", str(tmp_path / "search.jsonl"))
    assert conditioning.main() == 0
    header, *rows = map(json.loads, (tmp_path / "search.jsonl").read_text().splitlines())
    assert (header["cases"], header["exceeded"]) == (20, 0)
    assert sum(row["cases"] for row in rows) >= 20
    assert "0 key sets exceeded a bound" in capsys.readouterr().out


def test_the_necks_rows_are_kept_beside_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neck, "RESULTS", tmp_path)
    size = ["--backbone", "test_convnext", "--neck", "none", "--resolution", "32", "--small-ceilings"]
    given(monkeypatch, *size, "--device", "cpu", "--repeats", "1", "--warmup", "0", "--no-progress")
    assert neck.run() == 0
    assert [row["neck"] for row in read(tmp_path / "cpu" / "neck.jsonl")] == ["none"]
