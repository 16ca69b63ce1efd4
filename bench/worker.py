"""Times operators of one checkout for `bench.compare`: requests and answers are JSON lines on stdin and stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.operators import FAMILIES, NumericsError, Timed

LEAST_MILLISECONDS = 2.0  # of one measurement; shorter calls are repeated within it
MOST_CALLS = 1000


def stopwatch(call: Callable[[], object], device: str) -> Callable[[], float]:
    """Measures `call`, warm and repeated so often that one measurement lasts: milliseconds a call.

    One thread of a CPU is timed by the processor's clock, which stands still while others have the core.
    """
    cuda = torch.device(device).type == "cuda"
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def many(count: int) -> float:
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                call()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / count
        begin = clock()
        for _ in range(count):
            call()
        return (clock() - begin) * 1e3 / count

    many(50 if cuda else 2)
    count = max(1, min(MOST_CALLS, round(LEAST_MILLISECONDS / max(many(3), 1e-6))))
    return lambda: many(count)


def prepared(request: dict[str, Any]) -> Callable[[], float]:
    """The stopwatch of one operator, its numbers verified where the request says `verify`."""
    timed = Timed(
        request["operator"],
        FAMILIES[request["family"]],
        request["backend"],
        request["direction"],
        request["dtype"],
        request["device"],
    )
    if request["verify"]:
        timed.verify()
    return stopwatch(timed.call, request["device"])


def serve(checkout: str) -> None:
    """Answer requests until stdin ends: an object prepares an operator, an empty line measures it once."""
    import srm_kernels

    if Path(checkout).resolve() not in Path(srm_kernels.__file__).resolve().parents:
        raise SystemExit(f"srm_kernels was imported from {srm_kernels.__file__}, not from {checkout}")
    measure: Callable[[], float] | None = None
    for line in sys.stdin:
        if line.strip():
            try:
                measure = prepared(json.loads(line))
                answer: dict[str, Any] = {}
            except (NotImplementedError, NumericsError, ValueError, TypeError) as error:
                answer = {"error": " ".join(str(error).split())}
        else:
            assert measure is not None
            answer = {"milliseconds": measure()}
        print(json.dumps(answer), flush=True)
