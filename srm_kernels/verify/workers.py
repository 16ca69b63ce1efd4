"""Child processes that run kernels.

Each request has a time limit. If a child hangs or dies, only its current request fails.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from .. import verdicts
from .target import CannotRunError

START_SECONDS = 180.0  # limit for importing torch and Triton and opening the device
Answer = dict[str, Any]


class Worker:
    """A child process. The first request starts it, and the next request after a failure starts a new one."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._pending = b""

    def ask(self, request: dict[str, Any], seconds: float) -> Answer:
        """Return the child's answer; if the child gives none, return the status "timeout" or "crashed" with the reason.

        Raises:
            CannotRunError: Two children in a row could not launch a trivial kernel.
        """
        if self._process is None and self._start() is not None and (failed := self._start()) is not None:
            raise CannotRunError(f"no trivial Triton kernel can run: {failed['reason']}")
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        found = self._read(seconds, f"no answer within {seconds:g} s")
        if found.get("status") in verdicts.PASSING:
            self.close()  # the child exits after a failure
        return found

    def alone(self, request: dict[str, Any], seconds: float) -> Answer:
        """Return the answer of a new child that answers only this request."""
        self.close()
        try:
            return self.ask(request, seconds)
        finally:
            self.close()

    def _start(self) -> Answer | None:
        """Start a child; return None if the child is ready, else the failure."""
        paths = os.pathsep.join(path for path in sys.path if path)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._pending = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "srm_kernels.verify.child", self._device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": paths} | _triton_cache(),
            start_new_session=True,
        )
        found = self._read(START_SECONDS, f"the process was not ready within {START_SECONDS:g} s")
        if found.get("ready"):
            return None
        self.close()
        return found

    def _read(self, seconds: float, late: str) -> Answer:
        assert self._process is not None
        assert self._process.stdout is not None
        handle, end = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._pending:
            left = end - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                self.close()
                return {"status": "timeout", "reason": late}
            part = os.read(handle, 65536)
            if not part:
                return {"status": "crashed", "reason": self._obituary()}
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        found: Answer = json.loads(line)
        return found

    def _obituary(self) -> str:
        """Return how the process ended, and its last line on stderr."""
        process, errors = self._process, self._errors
        assert process is not None
        assert errors is not None
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        code = process.returncode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name if -code in [*signal.Signals] else f"signal {-code}"
        errors.seek(0)
        lines = errors.read()[-4096:].decode(errors="replace").strip().splitlines()
        self.close()
        return f"the process ended with {how}" + (f": {lines[-1][:200]}" if lines else "")

    def kill(self) -> None:
        """Kill the process and its children; a pending request gets the status "crashed"."""
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the process and its children, and free its resources."""
        self.kill()
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(OSError):
                    pipe.close()
            process.wait()
        if self._errors is not None:
            self._errors.close()
            self._errors = None


@cache
def _triton_cache() -> dict[str, str]:
    """Return environment variables that give Triton a temporary cache if its default cache cannot be written.

    The default cache of Triton is in the user's home folder. If it can be written, or if the user has set
    `TRITON_CACHE_DIR` or `TRITON_HOME`, the returned dict is empty.
    """
    if any(name in os.environ for name in ("TRITON_CACHE_DIR", "TRITON_HOME")):
        return {}
    try:
        folder = Path.home() / ".triton" / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return {}
    except (OSError, RuntimeError):
        made = tempfile.mkdtemp(prefix="srm-kernels-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        return {"TRITON_CACHE_DIR": made}


def ask_all(
    device: str,
    requests: Sequence[dict[str, Any]],
    count: int,
    seconds: float,
    done: Callable[[int, Answer], None],
) -> None:
    """Send requests to `count` workers; call `done(index, answer)` for each answer, one call at a time."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(requests)):
        waiting.put(number)
    lock, workers = threading.Lock(), [Worker(device) for _ in range(min(count, len(requests)))]
    failures: list[BaseException] = []
    stopped = threading.Event()
    # Replaces Thread.join: if a signal interrupts `join`, Python 3.11 assumes that the thread has ended.
    ended = [threading.Event() for _ in workers]

    def work(worker: Worker, end: threading.Event) -> None:
        try:
            while not stopped.is_set():
                number = waiting.get_nowait()
                answer = worker.ask(requests[number], seconds)
                with lock:
                    if not stopped.is_set():
                        done(number, answer)
        except queue.Empty:
            pass
        except BaseException as error:
            failures.append(error)
            stopped.set()
        finally:
            worker.close()
            end.set()

    for both in zip(workers, ended, strict=True):
        threading.Thread(target=work, args=both, daemon=True).start()
    try:
        for end in ended:
            end.wait()
    except BaseException:
        stopped.set()
        while not all(end.is_set() for end in ended):
            for worker in workers:  # repeated, because a worker can be about to start a child
                worker.kill()
            time.sleep(0.05)
        raise
    if failures:
        raise failures[0]
