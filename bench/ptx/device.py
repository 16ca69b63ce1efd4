"""Emulated device: Triton compiles kernels for this device and launches them as on a GPU, with CPU tensors.

Triton's own `JITFunction.run` compiles the kernels. It specialises arguments and checks global variables as
for a launch on a GPU. Only two parts of Triton are replaced: the driver, which reports the architecture of
the device, and the launch itself.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from bench.resources import ARCHITECTURES, SHARED_LIMIT

from .counting import Counters
from .execution import ORDERS, Execution
from .memory import Allocation
from .parse import WIDTH
from .program import Program, program_of
from .state import Report

Blocks = Callable[[str, Sequence[int]], Sequence[int] | None]


@dataclass
class Launch:
    """A launch that was executed.

    Attributes:
        name: Name of the kernel.
        grid: Size of the grid in one to three dimensions.
        warps: Warps per thread block.
        shared: Bytes of shared memory per thread block.
        program: The kernel, with its basic blocks translated to Python functions.
        execution: Execution of the program, with its reports and counters.
        seconds: Duration of the execution on the CPU.
        compiled: Triton's CompiledKernel.
        tensor_bytes: Bytes of the storages of all arguments.
        tensors: Tensor arguments; empty without `keep=True`.
    """

    name: str
    grid: tuple[int, ...]
    warps: int
    shared: int
    program: Program
    execution: Execution
    seconds: float
    compiled: Any
    tensor_bytes: int
    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def counters(self) -> Counters:
        """Return what the execution counted."""
        return self.execution.counters

    @property
    def reports(self) -> list[Report]:
        """Return the reports of the execution. A report is a fault, unless its kind is "copies"."""
        return list(self.execution.reports.values())


class _Driver:
    """The methods of a GPU driver that Triton calls before it compiles a kernel."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the emulated device has no {name}")


class Device:
    """An emulated device that executes launches and keeps the results; `emulated_device` documents the options.

    Attributes:
        launches: Executed launches in order.
        refusals: Reasons why launches were refused. Each refusal also raises RuntimeError.
    """

    def __init__(
        self,
        architecture: int,
        *,
        names: set[str] | None = None,
        blocks: Blocks | None = None,
        keep: bool = False,
        **options: Any,
    ) -> None:
        self.architecture = architecture
        self.launches: list[Launch] = []
        self.refusals: list[str] = []
        self._names, self._blocks, self._keep, self._options = names, blocks, keep, options

    def reports(self) -> list[tuple[str, Report]]:
        """Return the reports of all launches as pairs (kernel name, report).

        A report is a fault, unless its kind is "copies".
        """
        return [(launch.name, report) for launch in self.launches for report in launch.reports]

    def fault_texts(self) -> list[str]:
        """Return the distinct faults as text. Reports of the kind "copies" are left out: they are not faults."""
        return sorted({f"{name}: {report}" for name, report in self.reports() if report.kind != "copies"})

    def run(self, compile_: Callable[..., Any], kernel: Any, args: Any, grid: Any, options: Any) -> Any:
        """Compile and execute a launch in place of `JITFunction.run`.

        Raises:
            RuntimeError: Triton or the device refuses the launch.
            Unsupported: The kernel contains an instruction that is not modelled.
        """
        name = kernel.__name__.strip("_")
        if self._names is not None and name not in self._names:
            return None
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        for parameter in kernel.params:
            values.setdefault(parameter.name, parameter.default)
        try:
            compiled = compile_(kernel, *args, grid=grid, warmup=True, **options)
        except RuntimeError as error:
            if "Global variable" in str(error):
                self.refusals.append(f"{kernel.__name__}: {str(error).splitlines()[0]}")
            raise
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        if callable(grid):
            grid = grid(values)
        self.launches.append(self._launch(name, compiled, grid, values))
        return compiled

    def _launch(self, name: str, compiled: Any, grid: Any, values: dict[str, Any]) -> Launch:
        shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
        limit = SHARED_LIMIT[self.architecture] * 1024
        if shared > limit:
            refusal = f"{name}: {shared} B of shared memory; sm_{self.architecture} allows at most {limit} B"
            self.refusals.append(refusal)
            raise RuntimeError(refusal)
        if getattr(compiled.metadata, "global_scratch_size", 0):
            raise NotImplementedError(f"{name}: the emulated device has no global scratch memory")
        program = program_of(compiled.asm["ptx"])
        parameters, allocations, tensors = _bound(program, compiled.src.signature, values)
        start = time.perf_counter()
        execution = Execution(program, grid, warps, parameters, allocations, shared, **self._options)
        execution.run(self._blocks(name, grid) if self._blocks else None)
        return Launch(
            name=name,
            grid=tuple(grid),
            warps=warps,
            shared=shared,
            program=program,
            execution=execution,
            seconds=time.perf_counter() - start,
            compiled=compiled,
            tensor_bytes=sum(a.end - a.start for a in allocations),
            tensors=tensors if self._keep else [],
        )


def _bound(
    program: Program, signature: dict[str, Any], values: dict[str, Any]
) -> tuple[dict[str, bytes], list[Allocation], list[torch.Tensor]]:
    """Return the kernel parameters as bytes, the tensor arguments' storages, and the tensor arguments themselves."""
    flat: list[tuple[str, Any]] = []
    for name, kind in signature.items():
        _flatten(kind, values[name], flat)
    parameters, allocations, tensors = {}, {}, []
    declared = program.kernel.params
    for (kind, value), (width, name) in zip(flat, declared, strict=False):
        if kind.startswith("*"):
            tensors.append(value)
            storage = value.untyped_storage()
            start = storage.data_ptr()
            if storage.nbytes() and start not in allocations:
                allocations[start] = Allocation(start, storage.nbytes(), f"argument {name}")
            parameters[name] = struct.pack("<Q", value.data_ptr())
        else:
            parameters[name] = _packed(kind, value, WIDTH[width])
    for width, name in declared[len(flat) :]:  # pointers to scratch memory, which is not used
        parameters[name] = bytes(WIDTH[width])
    return parameters, list(allocations.values()), tensors


def _flatten(kind: Any, value: Any, found: list[tuple[str, Any]]) -> None:
    if isinstance(kind, tuple):
        for one, part in zip(kind, value, strict=True):
            _flatten(one, part, found)
    elif kind != "constexpr":
        found.append((kind, value))


def _packed(kind: str, value: Any, width: int) -> bytes:
    if kind in ("fp32", "fp64"):
        return struct.pack("<f" if kind == "fp32" else "<d", value)
    if kind.startswith("fp") or kind == "bf16":
        raise NotImplementedError(
            f"a kernel argument of type {kind}: expected fp32, fp64, an integer or a pointer"
        )
    return int(value).to_bytes(16, "little", signed=True)[:width]


@contextmanager
def emulated_device(
    architecture: int = 89,
    *,
    check: bool = True,
    count: bool = False,
    order: str = "together",
    global_checks: bool = True,
    poison: bool = False,
    names: set[str] | None = None,
    blocks: Blocks | None = None,
    keep: bool = False,
) -> Iterator[Device]:
    """Run the Triton kernels of the `with` block on an emulated device; `srm_kernels` then accepts CPU tensors.

    Args:
        architecture: Compute capability times ten: 80, 86, 89, 90 or 120.
        check: Look for memory faults and races.
        count: Count accesses to memory and products of matrix instructions (see `Counters`).
        order: "together" runs all warps of a thread block in lockstep. "forward" and "reversed" run the warps
            one after the other, each up to the next barrier. "forward" starts with the first warp, "reversed"
            with the last.
        global_checks: If `check` is True, also look for races in global memory.
        poison: Fill new uninitialised memory of PyTorch (`torch.empty`). Floating-point memory is filled with
            NaN, and integer memory with the largest integer.
        names: Names of the kernels to execute, without leading underscores; other kernels are skipped. If
            None, all kernels are executed.
        blocks: Function (name of a kernel, grid) → indices of the thread blocks to execute, or None for all. Without
            this function, all thread blocks are executed.
        keep: Keep the tensors of every launch in `Launch.tensors`.

    Raises:
        RuntimeError: The environment variable TRITON_INTERPRET is 1, and Triton therefore compiles no kernels. As on
            a GPU, this error is also raised if Triton or the device refuses a launch.
        ValueError: The architecture or the order is unknown.
        Unsupported: A kernel contains an instruction that is not modelled.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(map(str, ARCHITECTURES))
        raise ValueError(f"architecture={architecture}: expected one of {known}")
    if order not in ORDERS:
        raise ValueError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: the PTX emulator needs a process without it")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from srm_kernels import devices

    device = Device(
        architecture,
        names=names,
        blocks=blocks,
        keep=keep,
        check=check,
        count=count,
        order=order,
        global_checks=global_checks,
    )
    compile_, active = JITFunction.run, driver._active

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> Any:
        if warmup:
            return compile_(kernel, *args, grid=grid, warmup=True, **given)
        return device.run(compile_, kernel, args, grid, given)

    capability = divmod(architecture, 10)
    target = devices.LaunchDevice(capability, SHARED_LIMIT[architecture] * 1024)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(devices, "cpu_launch_device", return_value=target))
        if poison:
            stack.enter_context(_poisoned_memory())
        stack.callback(setattr, driver, "_active", active)
        driver.set_active(_Driver(architecture))
        yield device


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Switch PyTorch to deterministic mode, in which it fills new uninitialised memory (`torch.empty`)."""
    kept = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
