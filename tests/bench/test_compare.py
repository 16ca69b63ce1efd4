"""The regression script flags a planted slowdown, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.compare import Verdict, Worker, compare, main
from bench.operators import NumericsError
from bench.worker import stopwatch

ROOT = Path(__file__).resolve().parent.parent.parent


class Machine:
    """Operators of known cost on a busy machine: each time is off by a few per cent, one in twenty is three times as
    long, and the machine itself slows down to half its speed in the course of a run."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.measured = 0

    def prepare(self, *milliseconds: float, placement: float = 0.0):
        """`placement`: how much faster or slower a preparation is than the next, as a standard deviation."""
        base, again, candidate = (
            self.operator(one * float(np.exp(self.random.normal(0, placement)))) for one in milliseconds
        )
        return base, again, candidate

    def operator(self, milliseconds: float):
        def measure() -> float:
            self.measured += 1
            drift = 1 + self.measured / 120
            spike = 3 if self.random.random() < 0.05 else 1
            return milliseconds * drift * spike * float(np.exp(self.random.normal(0, 0.08)))

        return measure


def judged(slowdown: float, seed: int) -> Verdict:
    machine = Machine(seed)
    return compare(lambda: machine.prepare(1.0, 1.0, slowdown), seed=seed)


@pytest.mark.parametrize("seed", range(10))
def test_a_slowdown_of_a_fifth_is_flagged(seed: int):
    verdict = judged(1.2, seed)
    assert verdict.slower
    assert verdict.low < 1.2 < verdict.high


@pytest.mark.parametrize("seed", range(10))
def test_no_slowdown_is_no_alarm(seed: int):
    assert not judged(1.0, seed).slower


@pytest.mark.parametrize("seed", range(10))
def test_faster_is_no_alarm_and_less_than_the_tolerance_neither(seed: int):
    assert not judged(0.8, seed).slower
    assert not judged(1.02, seed).slower


@pytest.mark.parametrize("seed", range(10))
def test_where_inputs_happen_to_lie_is_no_slowdown(seed: int):
    """As measured on two equal checkouts: one preparation differed from the next by a sixth."""
    machine = Machine(seed)
    assert not compare(lambda: machine.prepare(1.0, 1.0, 1.0, placement=0.16), seed=seed).slower
    assert compare(lambda: machine.prepare(1.0, 1.0, 2.0, placement=0.16), seed=seed).slower


def test_a_noisy_run_says_so_and_is_not_trusted():
    machine = Machine(0)
    quiet = judged(1.0, 0).noise

    def jumping():  # the second copy of the base is as far off as the candidate
        return machine.operator(1.3)()

    verdict = compare(lambda: (machine.operator(1.0), jumping, machine.operator(1.3)))
    assert verdict.noise > 1.2 > quiet
    assert not verdict.slower


def burning(milliseconds: float):
    """An operator of known cost, whatever else the machine does: it ends when the process had the processor so long."""

    def call() -> None:
        end = time.process_time() + milliseconds * 1e-3
        while time.process_time() < end:
            pass

    return call


@pytest.mark.parametrize("slowdown", [1.0, 1.2])
def test_ten_repeats_on_this_machine(slowdown: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("bench.worker.LEAST_MILLISECONDS", 0.5)
    times = (0.5, 0.5, 0.5 * slowdown)

    def prepare():
        base, again, candidate = (stopwatch(burning(one), "cpu") for one in times)
        return base, again, candidate

    verdicts = [compare(prepare, rounds=10, seed=seed) for seed in range(10)]
    assert [verdict.slower for verdict in verdicts] == [slowdown > 1] * 10


def test_one_thread_is_timed_without_what_others_had(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.worker.LEAST_MILLISECONDS", 0.5)
    work = burning(1.0)

    def waiting() -> None:
        time.sleep(0.02)
        work()

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert 1 <= stopwatch(waiting, "cpu")() < 10
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert stopwatch(waiting, "cpu")() >= 21


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds=4"):
        compare(lambda: (float, float, float), rounds=4)


TINY = ["--families", "tiny", "--rounds", "5", "--device", "cpu"]


def test_two_backends(capsys: pytest.CaptureFixture[str]):
    arguments = [
        "--backends",
        "reference",
        "sdpa",
        "--operators",
        "dyt",
        "select_landmarks",
        "--tolerance",
        "99",
    ]
    assert main([*arguments, *TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "dyt",
        "dyt",
        "select_landmarks",
        "select_landmarks",
        "3",
    ]
    assert "not compared: select_landmarks has no derivative" in lines[-2]
    assert lines[-1].startswith("3 compared, 0 slower")


def test_what_cannot_run_is_not_compared(capsys: pytest.CaptureFixture[str]):
    assert main(["--backends", "reference", "cuda", "--operators", "dyt", *TINY]) == 2
    assert capsys.readouterr().out.count("not compared: backend 'cuda' cannot run") == 2


def test_a_checkout_is_timed_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """One process and not the three of a comparison: each takes seconds to start."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    request = {"operator": "dyt", "family": "tiny", "direction": "forward", "dtype": "fp32", "device": "cpu"}
    worker = Worker(ROOT)
    try:
        assert worker.prepare({**request, "backend": "reference"})() > 0
        with pytest.raises(NumericsError, match="backend 'cuda' cannot run"):
            worker.prepare({**request, "backend": "cuda"})
        assert worker.prepare({**request, "backend": "sdpa"})() > 0
    finally:
        worker.close()
    assert worker.process.returncode == 0


def test_two_checkouts_are_three_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    machine, started, closed = Machine(0), [], []

    class Stub:
        def __init__(self, checkout: Path) -> None:
            self.cost = {"old": 1.0, "new": 1.5}[checkout.name]
            started.append(checkout.name)

        def prepare(self, request: dict[str, str]):
            assert request["operator"] == "dyt"
            return machine.operator(self.cost)

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr("bench.compare.Worker", Stub)
    arguments = ["--operators", "dyt", "--directions", "forward", "--families", "tiny"]
    assert main(["--checkouts", "old", "new", *arguments]) == 1
    assert started == ["old", "old", "new"]
    assert len(closed) == 3
    assert "SLOWER" in capsys.readouterr().out
    assert main(["--checkouts", "new", "old", *arguments]) == 0


def test_a_folder_without_the_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With another code than that of a slowdown."""
    assert main(["--checkouts", str(tmp_path), str(tmp_path)]) == 2
    assert "no checkout with srm_kernels in it" in capsys.readouterr().err
    assert main(["--backends", "reference", "sdpa", "--operators", "dyt", *TINY, "--rounds", "4"]) == 2
    assert "rounds=4" in capsys.readouterr().err
