"""What can end a training early, and the sentence for each."""

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

_PATIENCE = 5.0  # seconds for a thread that writes to a worker's pipe


class DivergenceError(RuntimeError):
    """The loss or a gradient stopped being finite; the message names the images of that batch."""


class WorkerError(RuntimeError):
    """A process that loads images died."""


class Preempted(BaseException):
    """SIGTERM came, and the training is saved; like KeyboardInterrupt no `Exception`, which others might swallow."""


class Termination:
    """SIGTERM noted instead of obeyed for the length of a block, then as it was before.

    received: whether it came. Only the main thread can do this; in others SIGTERM keeps its meaning.
    """

    def __init__(self) -> None:
        self.received = False
        self._at_once = False
        self._before: Any = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block in which SIGTERM raises Preempted where the program stands, and at the start if it came before."""
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
    """For workers: schedulers send SIGTERM to every process, and the one that trains ends its workers itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def worker_start() -> Callable[[int], None]:
    """What a worker does first: outlive SIGTERM, and take this process's limit of pixels, which only forks inherit."""
    return partial(_start, Image.MAX_IMAGE_PIXELS)


def _start(max_pixels: int | None, worker: int) -> None:
    outlive_sigterm(worker)
    Image.MAX_IMAGE_PIXELS = max_pixels


@contextmanager
def reading(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The loader's batches; its workers end with the block, those of a loader that failed to start too.

    Python ends by SIGTERM, which they outlive, what is left of them at exit, and waits: an error whose traceback keeps
    the iterator alive would keep the process alive too. And an iterator that the garbage collector ends closes its
    pipes while its threads still write to them and close them, so that a file opened meanwhile may be closed instead.
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
                with suppress(AttributeError):  # one that failed before it had what this needs
                    items._shutdown_workers()
            for worker in set(multiprocessing.active_children()) - workers:
                with suppress(RuntimeError):  # torch's word that one has died
                    worker.kill()
                    worker.join()
            for thread in set(threading.enumerate()) - threads:
                if thread.name == "QueueFeederThread":
                    thread.join(_PATIENCE)


def _half_made(error: BaseException) -> Any:
    """The iterator in whose making the error was raised: nothing else holds it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made = frame.f_locals.get("self")
        if hasattr(made, "_shutdown_workers"):
            return made
    return None


def is_worker_death(error: BaseException) -> bool:
    """Whether torch's DataLoader raised this for a worker that was killed."""
    known = isinstance(error, RuntimeError) and not isinstance(error, WorkerError)
    return known and "DataLoader worker (pid" in str(error)


def reading_fault(error: Exception) -> Exception:
    """What went wrong in reading images, in one sentence; an error that is none of those known is returned as it is.

    A worker's error arrives as its whole traceback, whose last line is the sentence.
    """
    if is_worker_death(error):
        return WorkerError(
            f"a process that loads images was killed ({str(error).splitlines()[0]}); too little memory, shared memory "
            "included, is the usual cause: try fewer --workers"
        )
    if not isinstance(error, ValueError | OSError):
        return error
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return ValueError(last.removeprefix(f"{type(error).__name__}: "))
