"""Errors and signals that end a training run early."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, Self

from PIL import Image
from torch.utils.data import DataLoader

_PATIENCE = 5.0  # seconds to wait for a thread that writes to a worker's pipe


class DivergenceError(RuntimeError):
    """The loss or a gradient is not finite. The message names the images of the batch."""


class WorkerError(RuntimeError):
    """A process that loads images died."""


class Preempted(BaseException):
    """SIGTERM arrived; `train` raises this exception after it has saved the training state.

    Like KeyboardInterrupt, this class is not a subclass of `Exception`, so `except Exception` does not catch it.
    """


class Termination:
    """Context manager that records SIGTERM, so that the signal does not end the process.

    It has no effect outside the main thread.

    Attributes:
        received: Whether SIGTERM arrived.
    """

    def __init__(self) -> None:
        self.received = False
        self._at_once = False
        self._before: Any = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Preempted as soon as SIGTERM arrives within the block.

        If SIGTERM has already arrived before the block, Preempted is raised at the start of the block.
        """
        self._at_once = True
        try:
            if self.received:
                raise Preempted
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._at_once:
            raise Preempted


def outlive_sigterm(worker: int) -> None:
    """Ignore SIGTERM in a worker.

    Schedulers send SIGTERM to all processes of a job. If SIGTERM ended a worker, torch could raise an error in the
    training process before the training process saves its state. Workers therefore ignore SIGTERM, and the training
    process ends them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def worker_start() -> Callable[[int], None]:
    """Return a `worker_init_fn` that makes a worker ignore SIGTERM and use its parent's limit of pixels per image."""
    return partial(_start, Image.MAX_IMAGE_PIXELS)


def _start(max_pixels: int | None, worker: int) -> None:
    outlive_sigterm(worker)
    Image.MAX_IMAGE_PIXELS = max_pixels


@contextmanager
def reading(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """Yield an iterator over a loader's batches, and end the loader's workers at the end of the block.

    The workers are also ended if the loader fails to start. Without this function, the workers would run as long as the
    iterator exists, which can cause two problems:

    - A traceback can keep the iterator and its workers alive until Python exits. Python then sends SIGTERM to the
      workers and waits for them. The workers ignore SIGTERM, so Python would wait forever.
    - If the garbage collector removes the iterator, the iterator's threads can close the descriptor of a pipe twice.
      If another file has received the same descriptor in between, this file is closed by mistake.
    """
    workers, threads = set(multiprocessing.active_children()), set(threading.enumerate())
    items: Any = None
    try:
        try:
            items = iter(loader)
        except BaseException as error:
            items = _half_made(error)
            raise
        yield items
    finally:
        if loader.num_workers > 0:
            if items is not None:
                with suppress(AttributeError):  # an iterator that failed early may not have these attributes
                    items._shutdown_workers()
            for worker in set(multiprocessing.active_children()) - workers:
                with suppress(RuntimeError):  # torch raises it if a worker has died
                    worker.kill()
                    worker.join()
            for thread in set(threading.enumerate()) - threads:
                if thread.name == "QueueFeederThread":
                    thread.join(_PATIENCE)


def _half_made(error: BaseException) -> Any:
    """Return the iterator whose construction raised the error. Only the traceback has a reference to this iterator."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made = frame.f_locals.get("self")
        if hasattr(made, "_shutdown_workers"):
            return made
    return None


def is_worker_death(error: BaseException) -> bool:
    """Return whether torch's DataLoader raised this error because a worker was killed."""
    known = isinstance(error, RuntimeError) and not isinstance(error, WorkerError)
    return known and "DataLoader worker (pid" in str(error)


def reading_fault(error: Exception) -> Exception:
    """Convert an error from reading images into an error with a short message.

    If a worker was killed, return a WorkerError. For a ValueError or OSError, return a ValueError with only the last
    line of the message, because the message of an error in a worker is a whole traceback. Return other errors
    unchanged.
    """
    if is_worker_death(error):
        return WorkerError(
            f"a process that loads images was killed ({str(error).splitlines()[0]}); the usual cause is too little "
            "memory or shared memory; try fewer --workers"
        )
    if not isinstance(error, ValueError | OSError):
        return error
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return ValueError(last.removeprefix(f"{type(error).__name__}: "))
