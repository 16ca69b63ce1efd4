"""Test `bench.attention`, `bench.conditioning`, `bench.neck` and `bench.loading` at tiny sizes on a CPU."""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import attention, conditioning, loading, neck
from srm_model.profiling.results import read

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
    # Do not compile: compilation needs a C compiler and takes half a minute.
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: call)
    more = ["--dtype", "bf16", "--compile", "--out", str(tmp_path), "--note", "a look", "--kernels"]
    given(monkeypatch, *ATTENTION, "--shapes", "64", "16", "--batch", "2", *more)
    attention.main()
    printed = capsys.readouterr().out
    assert "bf16, B=2 H=2 d=8 r=4, forward, solver cholesky" in printed
    (line,) = (line for line in printed.splitlines() if "64 × 16" in line)
    assert [part.rsplit(" ", 1)[0].strip() for part in line.split("speedup: ")[1].split(",")] == [
        "default",
        "reference",
        "svd",
        "torch",
        *(f"{name} compiled" for name in ("exact", "default", "reference", "svd", "torch")),
    ]
    assert "% of copy bandwidth" in printed
    assert "srm::nystrom_attention" in printed
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
    assert f"default {row['typical']['exact'] / row['typical']['default']:.2f}x" in line


def test_a_compiled_rival_is_seen_through_and_computes_the_same(monkeypatch: pytest.MonkeyPatch):
    """The traced graph contains PyTorch's operations and no operator of this package.

    An operator of this package would be a single node of the graph, and torch.compile could not compile its content.
    """
    sizes = {"device": "cpu", "dtype": "fp32", "batch": 1, "heads": 2, "width": 8, "rank": 16}
    compiling = argparse.Namespace(**sizes, backward=False, compile=True)
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    calls = attention.rivals(compiling)
    inputs = attention.tokens(32, 24, compiling)
    for name in ("reference", "svd", "torch"):
        seen.clear()
        torch.testing.assert_close(calls[f"{name} compiled"](*inputs), calls[name](*inputs))
        assert len(seen) > 20
        assert not [target for target in seen if "srm" in target or "nystrom" in target]


def test_attention_backward_marks_a_missed_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(attention, "SHAPES", ((32, 16, 1e-9), (32, 16, 1e9)))
    given(monkeypatch, *ATTENTION, "--backward", "--out", str(tmp_path))
    attention.main()
    title, missed, kept = capsys.readouterr().out.splitlines()
    assert "r=4, forward and backward, solver cholesky" in title
    assert missed.endswith("  ! target of default: 1000000000x")
    assert "!" not in kept
    rows = read(tmp_path / "cpu" / "attention.jsonl")
    assert [row["direction"] for row in rows] == ["backward"] * 2


def test_solvers_and_the_search_write_their_machine_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, values in (("BATCHES", (2,)), ("RANKS", (4,)), ("WIDTHS", (8,))):
        monkeypatch.setattr(conditioning, name, values)
    monkeypatch.setattr(conditioning, "shares", lambda device, repeats: [{"share_of_attention": 0.1}])
    given(monkeypatch, "--device", "cpu", "--repeats", "1", "--out", str(tmp_path / "times.jsonl"))
    assert conditioning.main() == 0
    header, *rows = map(json.loads, (tmp_path / "times.jsonl").read_text().splitlines())
    assert header["torch"] == torch.__version__
    assert rows[0] == {"share_of_attention": 0.1}
    assert {row["solver"] for row in rows[1:]} >= set(conditioning.SOLVERS)
    given(monkeypatch, "--search", "--cases", "20", "--out", str(tmp_path / "search.jsonl"))
    assert conditioning.main() == 0
    header, *rows = map(json.loads, (tmp_path / "search.jsonl").read_text().splitlines())
    assert (header["cases"], header["exceeded"]) == (20, 0)
    assert sum(row["cases"] for row in rows) >= 20
    assert "0 key sets exceeded a bound" in capsys.readouterr().out


def test_a_run_that_is_cut_short_keeps_the_sizes_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Ctrl-C interrupts the measurement of the second batch size."""
    for name, values in (("BATCHES", (2, 3)), ("RANKS", (4,)), ("WIDTHS", (8,))):
        monkeypatch.setattr(conditioning, name, values)
    monkeypatch.setattr(conditioning, "shares", lambda device, repeats: [])
    plain = conditioning.system

    def system(batch: int, *size: object) -> object:
        if batch == 3:
            raise KeyboardInterrupt
        return plain(batch, *size)

    monkeypatch.setattr(conditioning, "system", system)
    given(monkeypatch, "--device", "cpu", "--repeats", "1", "--out", str(tmp_path / "times.jsonl"))
    assert conditioning.main() == 130
    _, *rows = map(json.loads, (tmp_path / "times.jsonl").read_text().splitlines())
    assert {row["batch"] for row in rows} == {2}
    assert "kept" in capsys.readouterr().err


def test_the_necks_rows_are_kept_beside_the_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neck, "RESULTS", tmp_path)
    size = ["--backbone", "test_convnext", "--neck", "none", "--resolution", "32", "--small-ceilings"]
    given(monkeypatch, *size, "--device", "cpu", "--repeats", "1", "--warmup", "0", "--no-progress")
    assert neck.run() == 0
    assert [row["neck"] for row in read(tmp_path / "cpu" / "neck.jsonl")] == ["none"]


def test_loading_by_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{seed}.png")
    out = tmp_path / "rows.jsonl"
    flags = ["--image-size", "16", "32", "--most", "2", "--repeats", "2", "--out", str(out)]
    loading.main([str(tmp_path), *flags])
    machine, *rows = map(json.loads, out.read_text().splitlines())
    assert machine["benchmark"] == "loading"
    assert machine["images"] == 2
    times = {(row["image_size"], row["part"]): row["ms"] for row in rows}
    assert len(times) == 10
    assert min(times.values()) >= 0
    assert times[32, "crop and mirror"] < times[32, "decode and resize"]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_loading_takes_the_least_processor_time_of_one_image():
    def busy() -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    assert 4.9 <= loading.milliseconds(busy, images=4, repeats=2) < 10


def test_loading_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        loading.main([str(tmp_path)])
    assert "no images in it" in capsys.readouterr().err
