"""Tests of the benchmark of the solvers.

All timed methods solve the same system. The committed table contains every solver at every size.
"""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import torch

from bench import conditioning

COMMITTED = Path(__file__).parents[2] / "bench/results/cpu/conditioning.jsonl"


@pytest.mark.parametrize("name", ["svd", "lu_factor_ex", "cholesky_ex"])
def test_what_it_compares_with_solves_the_same_system(name):
    logits, rhs = conditioning.system(3, 16, 8, torch.device("cpu"))
    found = conditioning.plain(name, logits, rhs)
    oracle.agree(found, oracle.solve(logits, rhs), oracle.plain_solve(logits, rhs, 1e-3, solver="svd"))


def test_every_solver_is_among_its_calls():
    calls = conditioning.calls(*conditioning.system(2, 4, 3, torch.device("cpu")))
    assert set(conditioning.SOLVERS) < set(calls)
    for call in calls.values():
        assert call().shape == (2, 4, 3)


def test_an_aim_that_is_missed_is_reported():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert conditioning.missed({"svd": 10.0, "cholesky": 2.1}, cpu, 64)
    assert not conditioning.missed({"svd": 10.0, "cholesky": 1.9}, cpu, 64)
    assert not conditioning.missed({"svd": 10.0, "cholesky": 2.1}, cpu, 128)
    times = {
        "cholesky@triton": 1.0,
        "torch.linalg.svd": 49.0,
        "torch.linalg.lu_factor_ex": 1.9,
        "torch.linalg.cholesky_ex": 2.1,
    }
    assert [words.split(",")[0].split()[-1] for words in conditioning.missed(times, cuda, 64)] == [
        "torch.linalg.svd",
        "torch.linalg.lu_factor_ex",
    ]
    assert len(conditioning.missed(times, cuda, 32)) == 1
    del times["cholesky@triton"]
    assert not conditioning.missed(times, cuda, 64)


def test_what_is_slow_is_called_seldom_and_never_in_a_queue(monkeypatch):
    """A call that takes longer than 0.1 s is timed alone, and only twice after its first measurement.

    Other calls are timed in queues of ten. On a GPU, a queue of ten SVDs of many matrices would take too long.
    "compiled" is slow only in its first measurement, so it is timed alone once more and then in queues.
    """
    taken: dict[str, list[int]] = {"slow": [], "fast": [], "compiled": []}

    def milliseconds(name: str, device: torch.device, queued: int) -> float:
        taken[name].append(queued)
        return 900.0 if name == "slow" or (name == "compiled" and len(taken[name]) == 1) else 1.0

    monkeypatch.setattr(conditioning, "milliseconds", milliseconds)
    found = conditioning.best({name: name for name in taken}, torch.device("cuda"), 4)
    assert found == {"slow": 900.0, "fast": 1.0, "compiled": 1.0}
    assert taken["slow"] == [1, 1, 1]
    assert taken["fast"] == [1, *[conditioning.QUEUED] * 4]
    assert taken["compiled"] == [1, 1, *[conditioning.QUEUED] * 3]


def test_the_solve_takes_less_than_its_share_of_the_attention():
    """The committed results satisfy the limit `LARGEST_SHARE`."""
    rows = [json.loads(line) for line in COMMITTED.read_text("utf-8").splitlines()]
    (part,) = (row["share_of_attention"] for row in rows if "share_of_attention" in row)
    assert part <= conditioning.LARGEST_SHARE


def test_the_committed_table_holds_every_solver_at_every_size():
    header, *rows = [json.loads(line) for line in COMMITTED.read_text("utf-8").splitlines()]
    assert {"device", "torch", "commit", "threads"} <= set(header)
    timed = {(row["batch"], row["r"], row["d"], row["solver"]) for row in rows if "ms" in row}
    for batch in conditioning.BATCHES:
        for r in conditioning.RANKS:
            for d in conditioning.WIDTHS:
                for solver in conditioning.SOLVERS:
                    assert (batch, r, d, solver) in timed
