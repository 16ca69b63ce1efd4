"""Tests of the CUDA code paths on a CPU.

Stand-ins replace the functions of torch.cuda, so these tests check the bookkeeping, not a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from srm_model.profiling import Effort, machine, measure_together
from srm_model.profiling import sweep as sweep_module
from srm_model.profiling.machines import clocks, folder_name, sentence
from srm_model.profiling.memory import allocations, peak

CUDA = torch.device("cuda")


class Device:
    """A stand-in device that queues work. Event times can be read only after `synchronize`."""

    def __init__(self) -> None:
        self.milliseconds, self.waits, self.queued = 0.0, 0, 0

    def work(self, milliseconds: float) -> Any:
        def call() -> None:
            self.milliseconds += milliseconds
            self.queued += 1

        return call

    def synchronize(self, *_: Any) -> None:
        self.waits += 1
        self.queued = 0

    def event(self, enable_timing: bool = False) -> Any:
        assert enable_timing
        device = self

        class Event:
            def record(self) -> None:
                self.at = device.milliseconds

            def elapsed_time(self, other: Any) -> float:
                assert device.queued == 0, "read before the device was waited for"
                return other.at - self.at

        return Event()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    return made


def test_events_time_every_call_and_are_read_after_one_wait(device: Device):
    calls = {"a": device.work(2.0), "b": device.work(3.0)}
    times = measure_together(calls, CUDA, Effort(50, 20, 1e9), now=lambda: device.milliseconds * 1e-3)
    assert times["a"].p50 == pytest.approx(2)
    assert times["b"].p50 == pytest.approx(3)
    assert device.milliseconds == pytest.approx((50 + 20) * 5)
    # once before, after each warm-up call, and once after all measured calls
    assert device.waits == 1 + 50 + 1


def test_a_call_of_seconds_is_not_warmed_up_fifty_times(device: Device):
    measure_together(
        {"": device.work(4000.0)}, CUDA, Effort(50, 100, 5.0), now=lambda: device.milliseconds * 1e-3
    )
    assert device.milliseconds == (3 + 3) * 4000


def test_peaks_are_taken_after_a_reset(monkeypatch: pytest.MonkeyPatch):
    done = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: done.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 250)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 400)
    found = peak(lambda: done.append("call"), CUDA)
    assert (found.held, found.above, found.allocated, found.reserved) == (100, 150, 250, 400)
    assert done == ["synchronize", "empty_cache", "reset_peak_memory_stats", "call", "synchronize"]


def event(name: str, kind: Any, annotation: bool = False, start: int = 0, size: int = 0) -> Any:
    return SimpleNamespace(
        name=lambda: name,
        device_type=lambda: kind,
        is_user_annotation=lambda: annotation,
        start_ns=lambda: start,
        nbytes=lambda: size,
    )


def profile_of(*events: Any) -> Any:
    return SimpleNamespace(
        profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: list(events)))
    )


def test_launches_are_kernels_alone():
    profiled = profile_of(
        event("aten::mm", DeviceType.CPU),
        event("cutlass_gemm", DeviceType.CUDA),
        event("_query_side", DeviceType.CUDA),
        event("Memcpy DtoD (Device -> Device)", DeviceType.CUDA),
        event("Memset (Device)", DeviceType.CUDA),
        event("links.4to1", DeviceType.CUDA, annotation=True),
        event("[memory]", DeviceType.CUDA, size=4),
    )
    assert [kernel.name() for kernel in sweep_module.kernels(profiled)] == ["cutlass_gemm", "_query_side"]


def test_a_timeline_is_of_one_device():
    profiled = profile_of(
        event("[memory]", DeviceType.CUDA, start=3000, size=-10),
        event("[memory]", DeviceType.CUDA, start=1000, size=10),
        event("[memory]", DeviceType.CPU, start=2000, size=7),
    )
    assert [total for _, total in allocations(profiled, DeviceType.CUDA)] == [10, 0]
    assert [total for _, total in allocations(profiled)] == [7]


def test_a_gpu_says_what_it_is(monkeypatch: pytest.MonkeyPatch):
    answers = {
        "driver_version": "580.10",
        "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem": "1755, 2619, 1980, [N/A]",
    }
    asked = []

    def output(command: list[str], folder: Any) -> str | None:
        if command[0] != "nvidia-smi":
            return None
        asked.append(command[-1])
        return answers[command[1].removeprefix("--query-gpu=")]

    monkeypatch.setattr("srm_model.profiling.machines._output", output)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    properties = SimpleNamespace(uuid="abc-1", total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    about = machine(CUDA)
    assert (about["driver"], about["capability"], about["commit"]) == ("580.10", "9.0", None)
    assert about["clocks"] == {"sm": 1755, "mem": 2619, "max.sm": 1980, "max.mem": None}
    assert set(asked) == {"--id=GPU-abc-1"}
    assert folder_name(about) == "nvidia-h100-80gb-hbm3"
    assert "compute capability 9.0, driver 580.10" in sentence(about)
    answers.clear()
    monkeypatch.setattr("srm_model.profiling.machines._output", lambda *_: None)
    assert clocks(CUDA) == {"sm": None, "mem": None, "max.sm": None, "max.mem": None}
