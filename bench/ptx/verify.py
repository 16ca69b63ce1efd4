"""Emulated device for `python -m srm_kernels verify --device bench.ptx.verify:sm_89`, which then needs no GPU.

With this device, `verify` compiles the kernels and judges their results as on a GPU, but the emulator executes
the PTX of the kernels. The reported times are constants, not measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from srm_kernels import verdicts
from srm_kernels.verify import target

from .device import Device, emulated_device

PRETENDED = {"triton": 1.0, "torch": 2.0, "reference": 3.0, "eager": 4.0, "compiled": 5.0}  # milliseconds


class EmulatedDevice(target.Device):
    """Emulated device.

    Args:
        architecture: Compute capability times ten.
        plant: Function that returns a context manager. The context is active while the device runs kernels,
            so a test can use it to change a kernel.
        times: Time to report for each step, in milliseconds.
    """

    torch_device = torch.device("cpu")
    shapes = ("tiny",)

    def __init__(
        self,
        architecture: int = 89,
        plant: Callable[[], AbstractContextManager[Any]] = nullcontext,
        times: Mapping[str, float] = PRETENDED,
    ) -> None:
        self._architecture, self._plant, self._times = architecture, plant, times
        self.key = verdicts.key_of(f"Emulated sm_{architecture}", divmod(architecture, 10), "emulated")
        self._device: Device | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Execute the launches of the `with` block on the emulator.

        In this block, PyTorch fills memory that would otherwise be uninitialised, for example the memory of
        `torch.empty`. It fills floating-point memory with NaN, and integer memory with the largest integer. Kernels
        that read such memory before they write to it therefore give wrong results.
        """
        with emulated_device(self._architecture, poison=True) as self._device, self._plant():
            yield

    def times(self, steps: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
        """Run every step once, and return a time in milliseconds for each step.

        Nothing is measured. The returned times are the values in the argument `times` of `EmulatedDevice`.
        """
        for step in steps.values():
            step()
        return {name: self._times[name] for name in steps}

    def reports(self) -> list[str]:
        """Return the faults that the emulator found since the last call of this method."""
        if self._device is None:
            return []
        found = self._device.fault_texts()
        self._device.launches.clear()
        return found

    def refusals(self) -> list[str]:
        """Return the reasons why launches were refused since the last call of this method."""
        if self._device is None:
            return []
        found = sorted(set(self._device.refusals))
        self._device.refusals.clear()
        return found


def sm_89() -> EmulatedDevice:
    """Return a device of compute capability 8.9."""
    return EmulatedDevice(89)
