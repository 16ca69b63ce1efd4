"""Devices on which kernels are checked and timed, with methods to synchronise them and to time calls.

`open_device` returns the device with a given name. A name such as "cuda:1" means a CUDA device. For tests, the name
"module:function" means the `Device` that this function returns, for instance an emulated device.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from .. import devices, verdicts

WARMUP = 3
FEWEST, MOST = 5, 60  # rounds of a measurement


class CannotRunError(RuntimeError):
    """Nothing can be measured on this device; the message gives the reason."""


class Device:
    """A device whose tensors are on `torch_device`.

    Attributes:
        key: The device and the software versions for which the results of `verify` on this device are valid.
        torch_device: The torch device of its tensors.
        shapes: The shapes to measure; None means the default shapes of the command.
    """

    key: verdicts.Key
    torch_device: torch.device
    shapes: tuple[str, ...] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Prepare the process that runs kernels on the device."""
        yield

    def probe(self) -> None:
        """Launch a trivial kernel. If this kernel fails, the cause is the environment, not a kernel of this package.

        Errors of Triton and of the driver are not caught.

        Raises:
            CannotRunError: The trivial kernel gives wrong numbers.
        """
        from . import probe

        if not probe.works(self.torch_device):
            raise CannotRunError("a trivial Triton kernel gives wrong numbers")
        self.reports()

    def synchronize(self) -> None:
        """Wait for all kernels, and raise their errors."""

    def times(self, steps: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
        """Return the median time of every step, in milliseconds.

        The steps are timed in alternation: every round runs each step once. All rounds together take about
        `seconds`.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Free cached memory, which other processes could need."""

    def reports(self) -> list[str]:
        """Return the faults that the device has detected since the previous call of this method."""
        return []

    def refusals(self) -> list[str]:
        """Return the reasons why launches were refused since the previous call of this method, each reason once."""
        return []


class CudaDevice(Device):
    """The CUDA device with a given index."""

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self.key = verdicts.key_of_cuda(index)

    @contextmanager
    def running(self) -> Iterator[None]:
        # The reference multiplies in full fp32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.cuda.device(self.torch_device):
            yield

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def times(self, steps: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
        """Return the median time of every step, in milliseconds, measured with CUDA events.

        Every round runs the steps in the same order.
        """
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
    """Return the device with a name such as "cuda", "cuda:1" or "module:function".

    Raises:
        CannotRunError: There is no device with this name, or kernels cannot run on it.
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
            raise CannotRunError(
                f"--device {name}: {function} returned a {type(made).__name__}; expected a Device"
            )
        return made
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CannotRunError(f"--device {name}: expected cuda or cuda:NUMBER") from None
    if device.type != "cuda":
        raise CannotRunError(f"--device {name}: expected a CUDA device")
    reason = cuda_missing() or devices.triton_missing()
    if reason is not None:
        raise CannotRunError(reason)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise CannotRunError(f"--device {name}: the number of CUDA devices is {torch.cuda.device_count()}")
    capability = torch.cuda.get_device_capability(index)
    if capability < devices.LEAST_CAPABILITY:
        found, least = (".".join(map(str, one)) for one in (capability, devices.LEAST_CAPABILITY))
        raise CannotRunError(
            f"{torch.cuda.get_device_name(index)} has compute capability {found}; the kernels need {least} or higher"
        )
    if devices.interpreting():
        raise CannotRunError(
            "TRITON_INTERPRET=1 is set; unset it, because only compiled kernels can be verified"
        )
    return CudaDevice(index)


def cuda_missing() -> str | None:
    """Return the reason why torch cannot use a CUDA device, including driver errors; None if torch can use one."""
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
