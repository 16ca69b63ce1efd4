"""The child process that runs kernels: `python -m srm_kernels.verify.child DEVICE` answers requests in JSON lines.

An error in a kernel can make the CUDA context unusable for the whole process. After an answer with the status
"error" or "memory", the child process therefore exits. `python -m srm_kernels verify` then starts a new child
process for the next request.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from typing import IO, Any

from .. import verdicts
from . import measure
from .cases import case_of
from .target import Device, open_device

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>: sets the signal that the process gets when its parent exits


def answer(request: dict[str, Any], device: Device) -> dict[str, Any]:
    """Answer a request: check one implementation of a case, or time several of them in alternation."""
    case = case_of(request["operator"], request["dtype"], request["shape"])
    if request["part"] == "right":
        return measure.judged(case, request["backends"][0], device)
    try:
        return measure.timed(case, request["backends"], device, request["seconds"])
    except Exception as error:
        return measure.failure(error, device)


def serve(device: Device, requests: IO[str], answers: IO[str]) -> None:
    """Launch a trivial kernel, then answer requests until the input ends or a request fails."""
    with device.running():
        try:
            device.probe()
        except Exception as error:
            print(json.dumps(measure.failure(error, device)), file=answers, flush=True)
            return
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in requests:
            found = answer(json.loads(line), device)
            print(json.dumps(found), file=answers, flush=True)
            if found.get("status") in verdicts.PASSING:
                return
            device.release()


def main(name: str) -> None:
    """Read requests from stdin and write the answers to stdout.

    All other output, for instance of libraries, is redirected to stderr. On Linux the process is killed when
    its parent process exits.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(open_device(name), sys.stdin, answers)
    answers.flush()
    os._exit(0)  # a broken CUDA context can block the normal exit of the interpreter


if __name__ == "__main__":
    main(sys.argv[1])
