"""Time the operators of one checkout, in a process that `bench.compare` starts.

The process reads requests from stdin, and writes its answers as JSON lines to stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.operators import FAMILIES, NumericsError, Timed
from bench.stopwatch import milliseconds

LEAST_MILLISECONDS = 2.0  # least duration of a measurement; shorter calls are repeated within it
MOST_CALLS = 1000


def stopwatch(call: Callable[[], object], device: str) -> Callable[[], float]:
    """Warm up `call`, and return a function that measures its time in milliseconds.

    A call shorter than `LEAST_MILLISECONDS` is repeated within one measurement.
    """
    target = torch.device(device)
    milliseconds(call, target, 50 if target.type == "cuda" else 2)
    estimate = max(milliseconds(call, target, 3), 1e-6)
    count = max(1, min(MOST_CALLS, round(LEAST_MILLISECONDS / estimate)))
    return lambda: milliseconds(call, target, count)


def prepared(request: dict[str, Any]) -> Callable[[], float]:
    """Return a function that measures the milliseconds per call of an operator.

    Args:
        request: Arguments of `Timed` by name. The additional entry `verify` says whether results are checked first.

    Raises:
        NumericsError: The results are wrong.
    """
    arguments = {**request, "family": FAMILIES[request["family"]]}
    verify = arguments.pop("verify")
    timed = Timed(**arguments)
    if verify:
        timed.verify()
    return stopwatch(timed.call, request["device"])


def serve(checkout: str) -> None:
    """Answer requests, one per line of stdin, until stdin ends.

    A line with a JSON object requests that an operator is prepared. An empty line requests one measurement of the
    prepared operator.
    """
    import srm_kernels

    if Path(checkout).resolve() not in Path(srm_kernels.__file__).resolve().parents:
        raise SystemExit(f"srm_kernels was imported from {srm_kernels.__file__}; expected it in {checkout}")
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
