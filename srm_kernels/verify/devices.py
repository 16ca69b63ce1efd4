"""Devices that are measured: what waits for one, times it and names it.

`open_device` gives a CUDA device by its name. For tests a name such as "module:function" is a function that returns
another kind of `Device`, for instance an emulated one.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from .. import runtime, verdicts

WARMUP = 3
FEWEST, MOST = 5, 60  # rounds of a measurement


class CannotRunError(RuntimeError):
    """Why nothing can be measured here."""


class Device:
    """A device whose tensors are on `torch_device`.

    Attributes:
        key: What a verdict about it holds for.
        torch_device: Where its tensors are.
        shapes: The shapes that are measured; None for those of the command.
    """

    key: verdicts.Key
    torch_device: torch.device
    shapes: tuple[str, ...] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The time in which kernels run on it; entered in the process that runs them."""
        yield

    def probe(self) -> None:
        """Launch a trivial kernel; a failure is of the environment and not of a kernel.

        Raises:
            CannotRunError: its numbers are wrong. Whatever Triton and the driver raise passes through.
        """
        from . import probe

        if not probe.works(self.torch_device):
            raise CannotRunError("a trivial Triton kernel gives wrong numbers")
        self.reports()

    def synchronize(self) -> None:
        """Wait until everything has run; an error of a kernel is raised here at the latest."""

    def times(self, steps: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
        """Median time of every step in milliseconds, measured in turns within about `seconds` altogether."""
        raise NotImplementedError

    def release(self) -> None:
        """Give memory back that other processes may need."""

    def reports(self) -> list[str]:
        """Faults that the device itself found since the last call."""
        return []

    def refusals(self) -> list[str]:
        """Launches that it refused since the last call."""
        return []


class CudaDevice(Device):
    """A CUDA device by its number."""

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self.key = verdicts.key_of_cuda(index)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Launch on it; the reference multiplies in full precision."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.cuda.device(self.torch_device):
            yield

    def synchronize(self) -> None:
        """Wait until everything has run."""
        torch.cuda.synchronize(self.torch_device)

    def release(self) -> None:
        """Give memory back that torch keeps for later."""
        torch.cuda.empty_cache()

    def times(self, steps: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
        """Medians by CUDA events, every round in the same order."""
        for step in steps.values():
            for _ in range(WARMUP):
                step()
        rounds = [self._round(steps)]
        once = sum(rounds[0].values()) / 1e3
        count = max(FEWEST, min(MOST, int(seconds / max(once, 1e-6))))
        rounds += [self._round(steps) for _ in range(count)]
        return {name: statistics.median(one[name] for one in rounds[1:]) for name in steps}

    def _round(self, steps: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        events = {}
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            events[name] = start, end
        self.synchronize()
        return {name: max(start.elapsed_time(end), 1e-6) for name, (start, end) in events.items()}


def open_device(name: str) -> Device:
    """Return the device of a name: "cuda", "cuda:1", or "module:function".

    Raises:
        CannotRunError: kernels cannot run here, with the reason.
    """
    if not name.startswith("cuda") and ":" in name:
        module, _, function = name.partition(":")
        try:
            made = getattr(import_module(module), function)()
        except CannotRunError:
            raise
        except Exception as error:
            raise CannotRunError(
                f"--device {name}: no such device ({' '.join(str(error).split())})"
            ) from None
        if not isinstance(made, Device):
            raise CannotRunError(f"--device {name}: it returned a {type(made).__name__} and no device")
        return made
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CannotRunError(f"--device {name}: expected cuda or cuda:NUMBER") from None
    if device.type != "cuda":
        raise CannotRunError(f"--device {name}: kernels are verified on CUDA devices")
    reason = cuda_missing() or runtime.triton_missing()
    if reason is not None:
        raise CannotRunError(reason)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise CannotRunError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    capability = torch.cuda.get_device_capability(index)
    if capability < runtime.LEAST_CAPABILITY:
        found, least = (".".join(map(str, one)) for one in (capability, runtime.LEAST_CAPABILITY))
        raise CannotRunError(
            f"{torch.cuda.get_device_name(index)} has compute capability {found}; its kernels need {least}"
        )
    if runtime.interpreting():
        raise CannotRunError("TRITON_INTERPRET=1 is set, and compiled kernels are to be verified")
    return CudaDevice(index)


def cuda_missing() -> str | None:
    """Why there is no CUDA device, or None; a driver that is too old says so."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build for CUDA from pytorch.org"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    said = [str(warning.message) for warning in caught]
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said.append(str(error))
    text = " ".join(" ".join(said).split())
    return f"there is no CUDA device that torch can use: {text}" if text else "there is no CUDA device"
