"""The process that runs kernels: `python -m srm_kernels.verify.child DEVICE` answers requests, one JSON line each.

It ends after an error, since an error of a kernel may have broken its CUDA context; the command starts another one.
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any

from . import measure
from .cases import case_of
from .devices import Device, open_device


def answer(request: dict[str, Any], device: Device) -> dict[str, Any]:
    """What a request asks for: judge one implementation of a case, or time all of them."""
    case = case_of(request["operator"], request["dtype"], request["shape"])
    if request["part"] == "right":
        return measure.judged(case, request["backends"][0], device)
    try:
        return measure.timed(
            case, request["backends"], device, request["seconds"], compiled=request["compiled"]
        )
    except Exception as error:
        return measure.failure(error, device)


def serve(device: Device, requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until there are no more, or until one ended in an error."""
    with device.running():
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in requests:
            found = answer(json.loads(line), device)
            print(json.dumps(found), file=answers, flush=True)
            if found.get("status") == "error":
                return
            device.release()


def main(name: str) -> None:
    """Serve on stdin and stdout; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(open_device(name), sys.stdin, answers)
    answers.flush()
    os._exit(0)  # a broken CUDA context may not let the interpreter end


if __name__ == "__main__":
    main(sys.argv[1])
