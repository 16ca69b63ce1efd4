"""Time a call.

`bench.worker` uses this module to time the operators of another checkout. The module therefore imports only
torch, and no package of this checkout.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def milliseconds(call: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Run `count` calls in a row and return the milliseconds per call.

    A GPU is timed with CUDA events. If torch has one thread, a CPU is timed by the CPU time of the process, which other
    processes barely affect. If torch has several threads, a CPU is timed by wall-clock time.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(count):
        call()
    return (clock() - begin) * 1e3 / count
