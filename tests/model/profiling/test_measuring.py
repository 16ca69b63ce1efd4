"""Tests of time and memory measurements on operators of known cost, such as a sleep or an allocation."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from srm_model.profiling import Effort, Times, machine, measure, measure_together
from srm_model.profiling.ceilings import _best, ceilings
from srm_model.profiling.machines import IDENTITY, folder_name, sentence
from srm_model.profiling.memory import bytes_of, is_out_of_memory, peak, timeline
from srm_model.profiling.stages import stage_times

CPU = torch.device("cpu")
MEBI = 2**20


class FakeTime:
    """A clock that advances only when one of its operators is called."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def operator(self, *milliseconds: float):
        """Return an operator whose calls take the given times, one after another, and then again from the first."""
        costs = list(milliseconds)

        def call() -> None:
            self.seconds += costs[0] * 1e-3
            costs.append(costs.pop(0))

        return call


def test_percentiles_of_known_times():
    clock = FakeTime()
    times = measure(clock.operator(*range(1, 101)), CPU, Effort(0, 100, 1e9), now=clock)
    # One unmeasured call comes first. Any 100 consecutive calls have the same 100 costs.
    assert times.count == 100
    assert (times.p20, times.p50, times.p80) == pytest.approx((20.8, 50.5, 80.2))
    assert (times.least, times.most) == pytest.approx((1, 100))


def test_a_call_that_sleeps_takes_at_least_so_long():
    times = measure(lambda: time.sleep(0.004), CPU, Effort(1, 5))
    assert times.least >= 4  # a sleep never ends early, but a busy machine can prolong it
    assert times.count == 5


def test_the_processors_time_leaves_out_what_others_had(monkeypatch: pytest.MonkeyPatch):
    def call() -> None:
        time.sleep(0.05)
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    times = measure(call, CPU, Effort(1, 3))
    assert times.least >= 70
    assert times.processor is not None
    # Processor time excludes the sleep. It is the median of three calls, so one outlier has no effect.
    assert 20 <= times.processor < 50
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert times.typical == times.processor
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert times.typical == times.p50  # with several threads, processor time is a sum over threads
    assert Times.of([3.0]).typical == 3.0


def test_stages_are_timed_within_the_efforts_seconds():
    calls = itertools.count()
    slow = torch.nn.Module()
    slow.align = torch.nn.Identity()

    def call() -> None:
        next(calls)
        time.sleep(0.01)

    stage_times(slow, call, CPU, Effort(1, 20, 0.015))
    assert next(calls) == 3
    stage_times(slow, call, CPU, Effort(1, 5, 60.0))
    assert next(calls) == 3 + 1 + 5


def test_calls_measured_together_take_turns():
    order = []
    clock = FakeTime()
    one, two = clock.operator(2.0), clock.operator(5.0)
    calls = {"a": lambda: (order.append("a"), one()), "b": lambda: (order.append("b"), two())}
    times = measure_together(calls, CPU, Effort(1, 4, 1e9), now=clock)
    assert order == ["a", "b"] * 5
    assert times["a"].p50 == pytest.approx(2)
    assert times["b"].p50 == pytest.approx(5)


def test_seconds_bound_the_repeats_and_three_are_always_made():
    clock = FakeTime()
    assert measure(clock.operator(100.0), CPU, Effort(1, 1000, 2.0), now=clock).count == 20
    assert measure(clock.operator(9000.0), CPU, Effort(50, 1000, 2.0), now=clock).count == 3
    assert clock.seconds < 100 * 0.1 + 0.2 + 9 * 5


def test_effort_is_the_devices_own_where_nothing_is_said():
    assert Effort.for_device(torch.device("cuda")) == Effort(50, 100, 10.0)
    assert Effort.for_device(CPU, repeats=4) == Effort(2, 4, 10.0)


def test_an_allocation_of_known_size_is_the_peak():
    def call() -> torch.Tensor:
        first = torch.ones(8 * MEBI // 4)
        del first  # freed before the second allocation, so the two sizes do not add up
        return torch.ones(8 * MEBI // 4)

    found = peak(call, CPU, held=5)
    # Torch also allocates a few scalars.
    assert 8 * MEBI <= found.above <= 8 * MEBI + 4096
    assert found.allocated == found.above + 5
    assert found.reserved is None


def test_what_the_system_sees_is_the_allocation_and_little_else():
    found = peak(lambda: torch.ones(64 * MEBI // 4), CPU)
    if found.resident is None:
        pytest.skip("no high-water mark that could be reset")
    # The interpreter and the allocator also use a few MiB of pages.
    assert 60 * MEBI < found.resident_above < 80 * MEBI
    assert found.resident > found.resident_above


def test_two_allocations_held_together_add_up():
    def call() -> list[torch.Tensor]:
        return [torch.ones(4 * MEBI // 4), torch.ones(6 * MEBI // 4)]

    assert 10 * MEBI <= peak(call, CPU).above <= 10 * MEBI + 4096
    points = timeline(call)
    assert points == sorted(points, key=lambda point: point[0])
    assert max(total for _, total in points) >= 10 * MEBI


def test_out_of_memory_is_known_on_both_devices():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("something else"))


def test_bytes_of_nested_tensors():
    assert (
        bytes_of([torch.ones(3), (torch.ones(2, dtype=torch.float64),)], {"a": torch.ones(1)}, None, 3) == 32
    )


def test_ceilings_are_those_of_a_machine():
    roof = ceilings(CPU, torch.float32, small=True)
    assert 1e7 < roof.bandwidth < 1e13
    assert 1e6 < roof.matrix_rate < 1e15


def test_a_busy_machine_has_no_lower_ceiling():
    assert _best(Times.of([4.0, 5.0], [3.0, 3.5])) == (3.25 if torch.get_num_threads() == 1 else 4.0)
    assert _best(Times.of([4.0, 5.0])) == 4.0


def test_a_machine_says_what_results_are_compared_by():
    about = machine("cpu")
    assert set(IDENTITY) <= set(about)
    assert about["torch"] == torch.__version__
    assert about["driver"] is None
    assert folder_name(about) == "cpu"
    assert folder_name({"kind": "cuda", "device": "NVIDIA GeForce RTX 4090"}) == "nvidia-geforce-rtx-4090"
    assert torch.__version__ in sentence(about)


def test_times_are_plain_numbers():
    assert Times.of([3.0, 1.0, 2.0]).to_dict() == {
        "p20": pytest.approx(1.4),
        "p50": 2.0,
        "p80": pytest.approx(2.6),
        "least": 1.0,
        "most": 3.0,
        "count": 3,
        "processor": None,
    }
    assert Times.of([3.0], [5.0, 2.0, 1.0]).processor == 2.0
