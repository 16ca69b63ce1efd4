"""Test that `bench.compare` reports a planted slowdown, and only a slowdown."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import compare
from bench.compare import COPIES, Verdict, Worker, judge, main, one_set, signed_rank
from bench.operators import NumericsError
from bench.worker import prepared, stopwatch

ROOT = Path(__file__).resolve().parent.parent.parent


class Machine:
    """Simulate the times of operators on a busy machine.

    Each measured time has a random error of about 8 %. One measurement in twenty takes three times as long. The machine
    gets slower during a run. Each process is slower or faster by a constant factor; the standard deviation of the
    factor's logarithm is `placement`.
    """

    def __init__(self, seed: int, placement: float = 0.05) -> None:
        self.random = np.random.default_rng(seed)
        self.placement = placement
        self.measured = 0

    def operator(self, milliseconds: float) -> Callable[[], float]:
        here = milliseconds * math.exp(self.random.normal(0, self.placement))

        def measure() -> float:
            self.measured += 1
            drift = 1 + self.measured / 40
            spike = 3 if self.random.random() < 0.05 else 1
            return here * drift * spike * math.exp(self.random.normal(0, 0.08))

        return measure

    def judged(self, slowdown: float, sets: int = 20, lines: int = 1) -> Verdict:
        found = []
        for _ in range(sets):
            copies = {copy: self.operator(1.0 if copy[0] == "A" else slowdown) for copy in COPIES}
            found.append(one_set(copies, 4, self.random))
        return judge(found, lines=lines)


@pytest.mark.parametrize("seed", range(10))
def test_a_slowdown_of_a_fifth_is_flagged(seed: int):
    verdict = Machine(seed).judged(1.2)
    assert verdict.slower
    assert verdict.low < 1.2 < verdict.high


@pytest.mark.parametrize("seed", range(10))
def test_no_slowdown_is_no_alarm(seed: int):
    verdict = Machine(seed).judged(1.0)
    assert not verdict.slower
    assert verdict.low < 1 < verdict.high


@pytest.mark.parametrize("seed", range(10))
def test_faster_is_no_alarm_and_less_than_the_tolerance_neither(seed: int):
    assert not Machine(seed).judged(0.8).slower
    assert not Machine(seed).judged(1.02).slower


@pytest.mark.parametrize("seed", range(10))
def test_what_a_process_happens_to_be_is_no_slowdown(seed: int):
    """Constant differences between processes, here of about 16 %, are not a slowdown.

    When two identical checkouts were measured, the times of two processes differed by one sixth.
    """
    assert not Machine(seed, placement=0.16).judged(1.0).slower
    assert Machine(seed, placement=0.16).judged(2.0).slower


def test_the_interval_errs_as_seldom_as_it_says():
    """An interval misses the true value with a probability of at most 1 %.

    More than 34 of 2,000 intervals then miss the true value with a probability of at most 0.15 %.
    """
    random = np.random.default_rng(0)
    missed = 0
    for _ in range(2000):
        _, low, high = signed_rank(random.standard_t(2, 12), 0.005)
        missed += not low < 0 < high
    assert 4 <= missed <= 34


def test_the_signed_rank_interval_is_the_textbooks():
    """Of the 2⁸ combinations of signs, 1 has no positive rank. In 10 of them, the positive ranks sum to at most 5."""
    values = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    means = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2))
    sums = [
        sum(rank for rank, sign in enumerate(signs, 1) if sign)
        for signs in itertools.product((0, 1), repeat=8)
    ]
    assert signed_rank(values, 1 / 256)[1:] == (means[0], means[-1])
    assert sum(total <= 5 for total in sums) == 10
    assert signed_rank(values, 10 / 256)[1:] == (means[5], means[-6])
    assert signed_rank(values, 1 / 257)[1:] == (-math.inf, math.inf)
    assert signed_rank([3.0] * 8, 10 / 256) == (3.0, 3.0, 3.0)


def test_a_round_is_abba_and_every_copy_has_every_place():
    order: list[str] = []

    def timed(copy: str) -> Callable[[], float]:
        return lambda: order.append(copy) or 1.0  # type: ignore[func-returns-value]

    one_set({copy: timed(copy) for copy in COPIES}, 200, np.random.default_rng(0))
    rounds = [tuple(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert {"".join(copy[0] for copy in one) for one in rounds} == {"ABBA", "BAAB"}
    assert len(set(rounds)) == 8
    assert all(sorted(one) == sorted(COPIES) for one in rounds)


def test_a_steady_drift_cancels():
    clock = itertools.count()
    copies = {copy: lambda: math.exp(next(clock) / 10) for copy in COPIES}
    change, _ = one_set(copies, 5, np.random.default_rng(0))
    assert change == pytest.approx(0, abs=1e-12)


def test_the_null_does_not_see_the_change_and_the_change_not_the_null():
    cost = {"A1": 1.0, "A2": 1.0, "B1": 1.5, "B2": 1.5}
    found = one_set({copy: lambda copy=copy: cost[copy] for copy in COPIES}, 3, np.random.default_rng(0))
    assert found == (pytest.approx(math.log(1.5)), pytest.approx(0))
    cost = {"A1": 1.5, "A2": 1.0, "B1": 1.5, "B2": 1.0}
    found = one_set({copy: lambda copy=copy: cost[copy] for copy in COPIES}, 3, np.random.default_rng(0))
    assert found == (pytest.approx(0), pytest.approx(math.log(1.5)))


def test_a_slowdown_within_the_noise_is_not_told():
    random = np.random.default_rng(0)
    nulls = random.choice([-0.5, 0.5], 20)
    assert judge([(0.3, 0.01 * null) for null in nulls]).slower
    noisy = judge([(0.3, null) for null in nulls])
    assert noisy.noise > math.exp(0.3)
    assert not noisy.slower


def test_more_lines_need_more_evidence():
    sets = [(0.1 + 0.05 * place, 0.0) for place in range(20)]
    assert judge(sets, lines=100).low < judge(sets, lines=1).low
    with pytest.raises(
        ValueError, match="8 sets cannot detect a slowdown among 2 lines: expected at least 9"
    ):
        judge([(0.3, 0.0)] * 8, lines=2)
    assert judge([(0.3, 0.0)] * 8, lines=1).slower


def slowed(call: Callable[[], object], slowdown: float) -> Callable[[], object]:
    """Return a function that runs `call` and then loops until it has used `slowdown` times the CPU time of `call`."""

    def longer() -> None:
        begin = time.process_time()
        call()
        end = begin + slowdown * (time.process_time() - begin)
        while time.process_time() < end:
            pass

    return longer if slowdown > 1 else call


@pytest.mark.parametrize("slowdown", [1.0, 1.2])
def test_ten_repeats_on_this_machine(slowdown: float, monkeypatch: pytest.MonkeyPatch):
    """Time real work with the real clock. The verdicts must also be right on a busy machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("bench.worker.LEAST_MILLISECONDS", 0.5)
    random = np.random.default_rng(0)

    def prepare(copy: str) -> Callable[[], float]:
        matrix = torch.rand(96, 96)
        return stopwatch(slowed(lambda: matrix @ matrix, 1.0 if copy[0] == "A" else slowdown), "cpu")

    for _ in range(10):
        sets = [one_set({copy: prepare(copy) for copy in COPIES}, 4, random) for _ in range(12)]
        assert judge(sets).slower == (slowdown > 1)


def test_one_thread_is_timed_without_what_others_had(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bench.worker.LEAST_MILLISECONDS", 0.5)

    def waiting() -> None:
        time.sleep(0.02)
        end = time.process_time() + 1e-3
        while time.process_time() < end:
            pass

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert 1 <= stopwatch(waiting, "cpu")() < 10
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert stopwatch(waiting, "cpu")() >= 21


TINY = ["--families", "tiny", "--rounds", "1", "--device", "cpu", "--sets", "10"]


class Here:
    """Replace `Worker` and measure in this process, because starting a process takes seconds."""

    def __init__(self, checkout: Path) -> None:
        assert checkout == ROOT

    def prepare(self, request: dict[str, str]) -> Callable[[], float]:
        try:
            return prepared(request)
        except NotImplementedError as error:
            raise NumericsError(str(error)) from None

    def close(self) -> None:
        pass


def test_two_backends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(compare, "Worker", Here)
    arguments = ["--backends", "reference", "torch", "--operators", "dyt", "select_landmarks", "--seed", "1"]
    assert main([*arguments, "--tolerance", "99", "--dtype", "fp32", *TINY]) == 0
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


def test_what_cannot_run_is_not_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(compare, "Worker", Here)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["--backends", "reference", "triton", "--operators", "dyt", *TINY]) == 2
    assert capsys.readouterr().out.count("not compared: backend 'triton' cannot run") == 2


def test_a_checkout_is_timed_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """The process uses one thread by default. Only one process is started, because each start takes seconds."""
    for variable in ("OMP_NUM_THREADS", "TRITON_INTERPRET"):
        monkeypatch.delenv(variable, raising=False)
    request = {"operator": "dyt", "family": "tiny", "direction": "forward", "dtype": "fp32", "device": "cpu"}
    worker = Worker(ROOT)
    try:
        # Ctrl-C in a terminal interrupts a whole process group. A worker has its own group, so it prints no traceback.
        assert os.getpgid(worker.process.pid) != os.getpgid(0)
        environment = Path(f"/proc/{worker.process.pid}/environ")
        assert worker.prepare({**request, "backend": "reference", "verify": True})() > 0
        if environment.is_file():
            assert b"OMP_NUM_THREADS=1" in environment.read_bytes().split(b"\0")
        with pytest.raises(NumericsError, match="backend 'triton' cannot run"):
            worker.prepare({**request, "backend": "triton", "verify": True})
        assert worker.prepare({**request, "backend": "torch", "verify": False})() > 0
    finally:
        worker.close()
    assert worker.process.returncode == 0
    assert "OMP_NUM_THREADS" not in os.environ


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from bench import operators

    honest = operators.Timed.call

    def wrong(self: operators.Timed) -> list[torch.Tensor]:
        return [x * (1.01 if self.backend == "torch" else 1) for x in honest(self)]

    monkeypatch.setattr(compare, "Worker", Here)
    monkeypatch.setattr(operators.Timed, "call", wrong)
    arguments = ["--backends", "reference", "torch", "--operators", "dyt", "--directions", "forward"]
    assert main([*arguments, *TINY]) == 2
    assert "it is not timed" in capsys.readouterr().out


def test_every_set_is_four_new_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    machine, started, closed, verified = Machine(0), [], [], []

    class Stub:
        def __init__(self, checkout: Path) -> None:
            self.cost = {"old": 1.0, "new": 1.5}[checkout.name]
            started.append(checkout.name)

        def prepare(self, request: dict[str, bool]) -> Callable[[], float]:
            verified.append(request["verify"])
            assert request["backend"] == "reference"
            return machine.operator(self.cost)

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(compare, "Worker", Stub)
    arguments = ["--operators", "dyt", "--directions", "forward", "--families", "tiny", "--sets", "12"]
    arguments += ["--backend", "reference"]
    assert main(["--checkouts", "old", "new", *arguments]) == 1
    sets = [tuple(started[i : i + 4]) for i in range(0, len(started), 4)]
    assert len(sets) == 12
    assert all(sorted(one) == ["new", "new", "old", "old"] for one in sets)
    assert len(set(sets)) > 1  # in random order
    assert len(closed) == 48
    assert verified == [True] * 4 + [False] * 44
    assert "SLOWER" in capsys.readouterr().out
    assert main(["--checkouts", "new", "old", *arguments]) == 0


@pytest.mark.parametrize(("sets", "told"), [(9, True), (3, False)])
def test_ctrl_c_tells_what_the_finished_sets_say(
    sets: int, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    honest, done = compare.one_set, itertools.count()

    def interrupted(*args: Any) -> tuple[float, float]:
        if next(done) == sets:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(compare, "Worker", Here)
    monkeypatch.setattr(compare, "one_set", interrupted)
    arguments = ["--backends", "reference", "torch", "--operators", "dyt", "--directions", "forward"]
    assert main([*arguments, *TINY]) == 130
    captured = capsys.readouterr()
    assert ("1 compared" in captured.out) == told
    assert bool(captured.out) == told  # a table without lines is not printed
    assert "interrupted" in captured.err
    assert ("3 sets cannot detect a slowdown" in captured.err) == (not told)


def test_the_rule_is_in_the_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    for part in ("ABBA", "signed-rank", "Bonferroni", "SLOWER is printed if"):
        assert part in told


def test_bad_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The exit code is 2, because 1 means a slowdown."""
    for arguments, sentence in (
        (["--checkouts", str(tmp_path), str(tmp_path), *TINY], "no srm_kernels in it"),
        (["--backends", "reference", "torch", *TINY, "--rounds", "0"], "rounds=0: expected at least 1"),
        (["--backends", "reference", "torch", *TINY, "--sets", "4"], "4 sets cannot detect a slowdown"),
    ):
        assert main([*arguments, "--operators", "dyt"]) == 2
        captured = capsys.readouterr()
        assert sentence in captured.err
        assert captured.err.count("\n") == 1
