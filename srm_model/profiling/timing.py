"""Times of a call: CUDA events on a GPU, the wall clock on a CPU, always as percentiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

WARMUP = {"cuda": 50, "cpu": 2}  # article 3.8.5: 50 on a GPU
REPEATS = {"cuda": 100, "cpu": 10}
FEWEST = 3
WARMUP_SECONDS = 2  # times an effort's own are spent on warming up at most
Now = Callable[[], float]


@dataclass(frozen=True)
class Effort:
    """How often a call is repeated: `warmup` unmeasured calls, then at most `repeats` within about `seconds`."""

    warmup: int
    repeats: int
    seconds: float = 10.0

    @classmethod
    def for_device(
        cls,
        device: torch.device,
        warmup: int | None = None,
        repeats: int | None = None,
        seconds: float = 10.0,
    ) -> Effort:
        """What is not given is the device's own: 50 and 100 calls on a GPU, 2 and 10 on a CPU."""
        kind = "cuda" if device.type == "cuda" else "cpu"
        return cls(
            WARMUP[kind] if warmup is None else warmup, REPEATS[kind] if repeats is None else repeats, seconds
        )


@dataclass(frozen=True)
class Times:
    """Percentiles of one call's time in milliseconds.

    `processor` is the median of the time that this process's threads had a processor, on a CPU: on a busy machine the
    wall clock also counts what others were given meanwhile.
    """

    p20: float
    p50: float
    p80: float
    least: float
    most: float
    count: int
    processor: float | None = None

    @classmethod
    def of(cls, milliseconds: Sequence[float], processor: Sequence[float] = ()) -> Times:
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
        """The processor's median where one thread of a CPU does all, which others cannot lengthen; else the clock's."""
        return self.processor if self.processor is not None and torch.get_num_threads() == 1 else self.p50

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cpu_clock() -> float:
    """Seconds by the clock that `Times.typical` is of on a CPU."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(
    call: Callable[[], object],
    device: torch.device,
    effort: Effort,
    *,
    now: Now = time.perf_counter,
) -> Times:
    """Percentiles of `call` on `device`; `now` is the wall clock in seconds, read on a CPU only.

    On a GPU calls are queued one behind the other, as in a loop that trains or serves: launch overhead counts where
    it is not hidden by the kernels, and inputs may lie in the cache.
    """
    return measure_together({"": call}, device, effort, now=now)[""]


def measure_together(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    effort: Effort,
    *,
    now: Now = time.perf_counter,
) -> dict[str, Times]:
    """Several calls in turn, round by round, so that a drift of the machine reaches all of them alike."""
    _wait(device)
    begun, spent = now(), 0.0
    for _ in range(max(effort.warmup, 1)):
        begin = now()
        for call in calls.values():
            call()
        _wait(device)
        spent = now() - begin  # of the last round: the first ones pay for compilation and caches
        if now() - begun > WARMUP_SECONDS * effort.seconds:
            break  # a call of seconds is warm sooner
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
