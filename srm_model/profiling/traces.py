"""Write traces, the most expensive kernels, and memory over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from srm_model.files import atomic_path, write_json, write_text
from srm_model.profiling.memory import allocations, undisturbed
from srm_model.profiling.stages import named_ranges
from srm_model.profiling.subjects import Case, Subject

MOST_EXPENSIVE = 10


def slug(case: Case) -> str:
    """Return the part of a file name that identifies a case."""
    fields = (case.part, case.backbone, case.neck, case.backend, case.resolution, case.batch, case.dtype)
    return "-".join(str(field) for field in (*fields, case.direction) if field is not None)


def write_trace(subject: Subject, folder: Path) -> list[Path]:
    """Write a trace of one call and a list of the most expensive kernels; return the paths of both files.

    The trace `trace-<case>.json` can be opened in chrome://tracing or Perfetto. The list of kernels is
    `trace-<case>.txt`; on a CPU, it lists operators.
    """
    cuda = subject.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    subject.call()
    with named_ranges(subject.module), profile(activities=activities) as profiled:
        subject.call()
        if cuda:
            torch.cuda.synchronize(subject.device)
    trace, text = (folder / f"trace-{slug(subject.case)}{suffix}" for suffix in (".json", ".txt"))
    with atomic_path(trace) as temporary:
        profiled.export_chrome_trace(str(temporary))
    write_text(text, most_expensive(profiled, cuda=cuda))
    return [trace, text]


def most_expensive(profiled: Any, *, cuda: bool) -> str:
    """Return the ten kernels (on a CPU, operators) with the largest self time, one per line."""
    ranges = {event.name for event in profiled.events() if event.is_user_annotation}
    averages = [row for row in profiled.key_averages() if row.key not in ranges]
    if cuda:
        averages = [row for row in averages if row.device_type == torch.autograd.DeviceType.CUDA]

    def own(row: Any) -> float:
        return float(row.self_device_time_total if cuda else row.self_cpu_time_total)

    total = sum(own(row) for row in averages) or 1.0
    averages.sort(key=own, reverse=True)
    kind = "kernel" if cuda else "operator, by its own CPU time (a CPU launches no kernels)"
    lines = [f"{'µs':>12} {'share':>7} {'calls':>7}  {kind}"]
    lines += [
        f"{own(row):12.1f} {own(row) / total:7.1%} {row.count:7}  {row.key}"
        for row in averages[:MOST_EXPENSIVE]
    ]
    return "\n".join([*lines, f"{total:12.1f} {1:7.0%} {sum(row.count for row in averages):7}  all", ""])


def write_memory(subject: Subject, folder: Path) -> list[Path]:
    """Write the memory use of one call over time to `memory-<case>.json`; return the paths of all written files.

    The file has points and ranges. A point has a time in µs and a number of bytes: the memory allocated at this time,
    minus the memory allocated before the call. A range has the times in µs at which a named part of the model starts
    and ends. On a CPU, the bytes include only memory of torch's allocator. On a GPU, the function also writes
    `memory-<case>.pickle`, a snapshot of the allocator for pytorch.org/memory_viz.
    """
    cuda = subject.device.type == "cuda"
    path = folder / f"memory-{slug(subject.case)}.json"
    written = [path]
    subject.call()
    if cuda:
        written.append(path.with_suffix(".pickle"))
        _snapshot(subject, written[-1])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    tracing = profile(activities=activities, profile_memory=True)
    with undisturbed(), named_ranges(subject.module), tracing as profiled:
        kept = subject.call()
    del kept
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    points = allocations(profiled, kind)
    start = min(
        (e.start_ns() for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"), default=0
    )
    ranges = [
        {"name": event.name(), "from": (event.start_ns() - start) / 1e3, "to": (event.end_ns() - start) / 1e3}
        for event in profiled.profiler.kineto_results.events()
        if event.is_user_annotation() and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    most = max(points, key=lambda point: point[1], default=(0.0, 0))
    inside = [r["name"] for r in ranges if r["from"] <= most[0] <= r["to"]]
    write_json(
        path,
        {
            "case": subject.case.to_dict(),
            "unit": "points are [microseconds, bytes above what was held before the call]",
            "peak": {"microseconds": most[0], "bytes": most[1], "inside": inside},
            "points": points,
            "ranges": ranges,
        },
    )
    return written


def _snapshot(subject: Subject, path: Path) -> None:
    torch.cuda.memory._record_memory_history(max_entries=100_000, device=subject.device)
    try:
        subject.call()
        torch.cuda.synchronize(subject.device)
        with atomic_path(path) as temporary:
            torch.cuda.memory._dump_snapshot(str(temporary))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None, device=subject.device)
