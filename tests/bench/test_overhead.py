"""Test the rows of `bench.overhead`, which counts and times the launches of the fused neck without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the rows of a run in another process, because this process may use Triton's interpreter."""
    out = tmp_path_factory.mktemp("overhead")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.overhead", "--repeats", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (out / "cpu/overhead.jsonl").read_text("utf-8").splitlines()]
    assert len(done.stdout.splitlines()) == len(rows) + 1
    return rows


def test_a_row_for_each_pass(rows):
    assert [(row["pass"], row["dyt"]) for row in rows] == [
        (name, dyt) for name in ("forward", "training step") for dyt in (True, False)
    ]
    for row in rows:
        assert 0 < row["triton_us"] < row["total_us"]
        assert 0 < row["package_us"] < row["total_us"]
        assert row["launches"] == row["own"] + row["products"] + row["others"]


def test_a_forward_pass_takes_twelve_launches_beside_the_gates_convolutions(rows):
    for row in rows[:2]:
        assert row["own"] + 1 + 6 == row["launches"] <= 12 + 6


def test_no_launch_and_no_call_of_an_operator_is_added(rows):
    """The forward pass calls 9 operators: 4 for the links, 2 for the gate, 1 for the fusion and 2 for the losses.

    The backward pass of a training step calls 9 more.
    """
    assert [(row["launches"], row["operators"]) for row in rows[:2]] == [(17, 9), (18, 9)]
    assert [row["operators"] for row in rows[2:]] == [18, 18]


def test_a_training_step_launches_the_backward_kernels_too(rows):
    """At every launch, Triton checks that the kernel's globals are unchanged. The backward kernels pass this check."""
    for forward, step in zip(rows[:2], rows[2:], strict=True):
        assert step["own"] >= forward["own"] + 8


def test_the_interpreter_is_refused():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.overhead", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 1
    assert "expected TRITON_INTERPRET to be unset" in done.stderr
