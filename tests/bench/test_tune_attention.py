"""Test `bench.tune_attention` in Triton's interpreter: each alternative configuration is launched and timed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from bench import tune_attention
from srm_kernels.attention import launch_rules
from srm_model.profiling.results import read

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for where no GPU is")
TINY = [
    "--batch",
    "1",
    "--heads",
    "1",
    "--queries",
    "40",
    "--keys",
    "20",
    "--repeats",
    "1",
    "--warmup",
    "1",
    "--seconds",
    "0",
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in (("SIZES", ((16, 16),)), ("BLOCKS", (16, 32)), ("WARPS", (4,)), ("STAGES", (1,))):
        monkeypatch.setattr(tune_attention, name, values)


def run(out: Path, *more: str) -> list[dict[str, object]]:
    tune_attention.main([*TINY, "--device", "cpu", "--dtype", "fp32", "--out", str(out), *more])
    return read(out / "cpu" / "tuning.jsonl")


def test_each_alternative_is_timed_and_each_rules_own_choice_is_marked(
    small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rules = {name: getattr(launch_rules, name) for name in tune_attention.RULES}
    rows = run(tmp_path, "--processes", "1")
    for name, rule in rules.items():
        own = [row for row in rows if row["rule"] == name]
        assert {row["block"] for row in own} >= {16, 32}
        (chosen,) = (row for row in own if row["chosen"])
        choice = rule(16, 16, tune_attention.DTYPES["fp32"], (8, 9))
        assert [chosen[field] for field in choice._fields] == list(choice)
        assert getattr(launch_rules, name) is rule  # the rule is restored
    assert all(row["error"] is None and row["typical"] > 0 for row in rows)
    assert capsys.readouterr().out.count("<- the rule") == len(rules)


def test_what_cannot_run_is_a_row_that_says_why(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune_attention, "BLOCKS", (16, 24))  # 24 is not a power of two
    rows = run(tmp_path, "--processes", "1")
    refused = [row for row in rows if row["error"]]
    assert {row["block"] for row in refused} == {24}
    assert all(row["typical"] is None for row in refused)
    assert any(row["error"] is None for row in rows)


def test_processes_compile_before_one_of_them_measures(
    small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = run(tmp_path, "--processes", "2")
    assert f"{len(rows)} of {len(rows)} compiled" in capsys.readouterr().err


def test_a_process_that_is_ended_ends_the_compiling_and_not_the_measuring(
    small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def ended(pool: object, call: object, wanted: list[object], options: object) -> Iterator[None]:
        yield None
        raise BrokenProcessPool

    monkeypatch.setattr(tune_attention.ProcessPoolExecutor, "map", ended)
    rows = run(tmp_path, "--processes", "2")
    assert "a compiling process died" in capsys.readouterr().err
    assert all(row["typical"] > 0 for row in rows)


def test_a_launch_that_leaves_the_device_unusable_ends_the_run(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After an illegal memory access, the device refuses every further launch, so no later row would be valid."""

    def illegal(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(tune_attention, "call_of", illegal)
    (trial, *_), options = tune_attention.trials(torch.float32, torch.device("cpu")), Namespace(device="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert tune_attention.compiled(trial, options) == "RuntimeError: illegal memory access"
    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    with pytest.raises(
        SystemExit, match=r"query_forward at r = 16.*illegal memory access.*rows up to it are kept"
    ):
        tune_attention.compiled(trial, options)
