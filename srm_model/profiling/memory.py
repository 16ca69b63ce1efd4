"""Peak memory of a call, and memory over time."""

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
    """Bytes; None where this device or system cannot tell.

    `held` is what parameters, inputs and optimiser state take before the call. `allocated` and `reserved` are the
    peaks of torch's allocator, `above` the first of them less `held`. `resident` and `resident_above` are the
    process's memory as the system sees it, on a CPU: everything counts, libraries included.
    """

    held: int
    above: int
    allocated: int
    reserved: int | None
    resident: int | None
    resident_above: int | None


def peak(call: Callable[[], object], device: torch.device, *, held: int = 0) -> Peak:
    """Peak memory during one `call` after a reset of the peaks; `held` is taken from the allocator on a GPU.

    On a CPU `above` sums what torch's allocator was asked for, exactly; what libraries take for themselves (oneDNN's
    scratch, BLAS's buffers) is seen by `resident` alone, and by that only on Linux.
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
    """(microseconds, bytes above what was held before) at every allocation and release of torch's CPU allocator."""
    with undisturbed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = call()
    del kept
    return allocations(profiled)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection: it would release what earlier calls left behind, and lower a sum taken meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def allocations(profiled: Any, kind: Any = torch.autograd.DeviceType.CPU) -> list[tuple[float, int]]:
    """The timeline of one kind of device out of a profile that was taken with `profile_memory=True`."""
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
    """What tensors, and those inside lists, tuples and dicts, take."""
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
    """Whether an allocator gave up; the CPU's says so in words only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _reset_resident() -> int | None:
    """Give free memory back, start the process's high-water mark anew, and say what is resident; None off Linux."""
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
