"""Measure the peak memory of a call, and memory over time."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak(NamedTuple):
    """Memory of a call in bytes. A value is None if it cannot be measured on this device or operating system."""

    held: int  # allocated before the call, such as parameters, inputs and optimiser state
    above: int  # `allocated` minus `held`
    allocated: int  # peak of torch's allocator
    reserved: int | None  # peak of the memory that torch's allocator reserves
    resident: int | None  # peak of the process's memory, including libraries, on a CPU
    resident_above: int | None  # `resident` minus the process's memory before the call


def peak(call: Callable[[], object], device: torch.device, *, held: int = 0) -> Peak:
    """Measure the peak memory of a call.

    On a CPU, `above` covers only torch's allocator. Libraries such as oneDNN and BLAS also allocate buffers, which only
    `resident` and `resident_above` include. These two values are measured on Linux only.

    Args:
        call: Function to measure. It is called once on a GPU and twice on a CPU.
        device: Device on which `call` runs.
        held: On a CPU, the number of bytes that are allocated before the call. On a GPU, torch's allocator counts these
            bytes, and this argument is ignored.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        most = torch.cuda.max_memory_allocated(device)
        return Peak(before, most - before, most, torch.cuda.max_memory_reserved(device), None, None)
    above = max((total for _, total in timeline(call)), default=0)
    before_call = _reset_resident()
    call()
    resident = _read("VmHWM") if before_call is not None else None
    resident_above = max(resident - before_call, 0) if resident and before_call is not None else None
    return Peak(held, above, held + above, None, resident, resident_above)


def timeline(call: Callable[[], object]) -> list[tuple[float, int]]:
    """Run a call; return (µs, bytes above the initial memory) at each allocation and release of torch's allocator."""
    with undisturbed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = call()
    del kept
    return allocations(profiled)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Disable garbage collection within the block.

    Garbage collection could free tensors that were allocated before the block, which would lower the measured memory.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def allocations(profiled: Any, kind: Any = torch.autograd.DeviceType.CPU) -> list[tuple[float, int]]:
    """Extract the (µs, bytes) pairs of `timeline`, for one device type, from a profile with `profile_memory=True`."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    found, total = [], 0
    for event in events:
        if event.device_type() != kind:
            continue
        total += event.nbytes()
        found.append(((event.start_ns() - events[0].start_ns()) / 1e3, total))
    return found


def bytes_of(*tensors: Any) -> int:
    """Return the total bytes of tensors, including tensors in lists, tuples and dictionaries."""
    total = 0
    for value in tensors:
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, list | tuple):
            total += bytes_of(*value)
        elif isinstance(value, dict):
            total += bytes_of(*value.values())
    return total


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    On a CPU, torch raises a plain RuntimeError, which is recognised by its message.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _reset_resident() -> int | None:
    """Reset the process's peak resident memory, and return its current resident memory.

    With glibc as the C library, memory that the process no longer uses is first returned to the operating system. The
    result is None if the peak cannot be reset, for example on systems other than Linux.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5", "ascii")
    except OSError:
        return None
    return _read("VmRSS")


def _read(field: str) -> int | None:
    try:
        lines = _STATUS.read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
