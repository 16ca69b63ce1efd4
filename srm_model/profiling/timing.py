"""Measure times of calls, with CUDA events on a GPU and with the wall clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

WARMUP = {"cuda": 50, "cpu": 2}  # 50 on a GPU as in the article, section 3.8.5
REPEATS = {"cuda": 100, "cpu": 10}
FEWEST = 3
WARMUP_SECONDS = 2  # upper limit of the warm-up time, as a multiple of `Effort.seconds`
Now = Callable[[], float]


@dataclass(frozen=True)
class Effort:
    """The number of repetitions of a call."""

    warmup: int  # number of calls that are not measured
    repeats: int  # largest number of measured calls
    seconds: float = 10.0  # approximate time limit of the measured calls

    @classmethod
    def for_device(
        cls,
        device: torch.device,
        warmup: int | None = None,
        repeats: int | None = None,
        seconds: float = 10.0,
    ) -> Effort:
        """Return the default effort of a device: 50 warm-up and 100 measured calls on a GPU, 2 and 10 on a CPU."""
        kind = "cuda" if device.type == "cuda" else "cpu"
        return cls(
            WARMUP[kind] if warmup is None else warmup, REPEATS[kind] if repeats is None else repeats, seconds
        )


@dataclass(frozen=True)
class Times:
    """Percentiles of a call's time in milliseconds."""

    p20: float
    p50: float
    p80: float
    least: float
    most: float
    count: int  # number of measured calls
    # Median of the CPU time of all threads together; None on a GPU. Other processes affect CPU time only a little.
    processor: float | None = None

    @classmethod
    def of(cls, milliseconds: Sequence[float], processor: Sequence[float] = ()) -> Times:
        """Summarise the elapsed times and, on a CPU, the CPU times of a call, all in milliseconds."""
        low, middle, high = np.percentile(milliseconds, [20, 50, 80])
        return cls(
            float(low),
            float(middle),
            float(high),
            min(milliseconds),
            max(milliseconds),
            len(milliseconds),
            statistics.median(processor) if processor else None,
        )

    @property
    def typical(self) -> float:
        """The median CPU time on a CPU with one thread, otherwise `p50`, the median elapsed time."""
        return self.processor if self.processor is not None and torch.get_num_threads() == 1 else self.p50

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def cpu_clock() -> float:
    """Read the clock that `Times.typical` uses on a CPU, in seconds.

    With one thread, this is the CPU time of the process; otherwise it is the wall clock.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(
    call: Callable[[], object],
    device: torch.device,
    effort: Effort,
    *,
    now: Now = time.perf_counter,
) -> Times:
    """Measure a call.

    On a GPU, calls are queued one after another, as in a training loop. While one kernel runs, the next kernels are
    launched, so the times include launch overhead only where the running kernels are too short to hide it. The inputs
    may still be in the cache from the previous call. `now` is a function that returns the wall-clock time in seconds.
    """
    return measure_together({"": call}, device, effort, now=now)[""]


def measure_together(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    effort: Effort,
    *,
    now: Now = time.perf_counter,
) -> dict[str, Times]:
    """Measure several calls in alternation, so that changes of the machine's speed affect all calls equally."""
    _wait(device)
    begun, spent = now(), 0.0
    for _ in range(max(effort.warmup, 1)):
        begin = now()
        for call in calls.values():
            call()
        _wait(device)
        spent = now() - begin  # time of the last round, because the first rounds include compilation
        if now() - begun > WARMUP_SECONDS * effort.seconds:
            break
    affordable = int(effort.seconds / spent) if spent > 0 else effort.repeats
    rounds = min(effort.repeats, max(affordable, FEWEST))
    if device.type == "cuda":
        return {name: Times.of(values) for name, values in _events(calls, rounds).items()}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, busy = now(), time.process_time()
            call()
            wall[name].append((now() - begin) * 1e3)
            processor[name].append((time.process_time() - busy) * 1e3)
    return {name: Times.of(wall[name], processor[name]) for name in calls}


def _events(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in found] for name, found in pairs.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
