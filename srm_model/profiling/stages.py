"""Measure the time of each named part of a model, and show the model's modules as ranges in traces."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from srm_model.model import IQAModel
from srm_model.modules import unwrapped
from srm_model.neck import SRMNeck
from srm_model.profiling.timing import FEWEST, Effort, cpu_clock

REST = "rest"  # time outside the named parts, such as pooling, folding and fusion


def stages(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the named parts of a model or a neck, with their modules. `REST` is not included.

    A forward pass of an `SRMNeck` uses only some of its parts. If links run one by one, it uses "align", "link s→t" and
    "gate". In the pooled form (docs/METHOD.md §1.5), it uses "sources", "key sides", "query sides", "merge" and "gate".
    """
    module = unwrapped(module)
    if isinstance(module, IQAModel):
        return {"backbone": [module.backbone], **stages(module.neck), "head": [module.head]}
    if not isinstance(module, SRMNeck):
        return {"align": [module.align]}  # type: ignore[list-item]
    found: dict[str, list[nn.Module]] = {"align": list(module.align)}
    for (source, target), link in zip(module.config.links, module.links.values(), strict=True):
        found[f"link {source}→{target}"] = [link, link.output]  # type: ignore[list-item]
    found |= {"sources": [module.sources], "key sides": [module.key_sides]}
    return found | {"query sides": [module.query_sides], "merge": [module.merge], "gate": [module.gate]}


def stage_times(
    module: nn.Module, call: Callable[[], object], device: torch.device, effort: Effort
) -> dict[str, float]:
    """Return the median time in ms of each named part that `call` uses, and of `REST`.

    `call` must run one forward pass of `module`.
    """
    parts = stages(module)
    marks: list[tuple[str, Any, Any]] = []

    def mark(_: str | None = None) -> Any:
        if device.type != "cuda":
            return cpu_clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    rounds: dict[str, list[float]] = {}
    named = [(name, part) for name, modules in parts.items() for part in modules]
    with _hooked(named, mark, lambda name, start: marks.append((name, start, mark()))):
        begun = time.perf_counter()
        for count in range(max(min(effort.repeats, 20), 1)):
            if count >= FEWEST and time.perf_counter() - begun > effort.seconds:
                break
            marks.clear()
            begin = mark()
            call()
            end = mark()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken: dict[str, float] = {}
            for name, start, stop in marks:
                taken[name] = taken.get(name, 0.0) + _between(start, stop)
            taken[REST] = max(_between(begin, end) - sum(taken.values()), 0.0)
            for name, value in taken.items():
                rounds.setdefault(name, []).append(value)
    return {name: statistics.median(rounds[name]) for name in (*parts, REST) if name in rounds}


@contextmanager
def named_ranges(module: nn.Module) -> Iterator[None]:
    """Add a profiler range for each module of a model while the `with` block runs.

    In the backbone, only the two upper levels of modules get ranges.
    """
    backbone = re.compile(r"backbone\.(?:[^.]*\.){2}")  # modules below these levels
    named = [(name, part) for name, part in module.named_modules() if name and not backbone.match(name)]
    with _hooked(
        named,
        lambda name: record_function(name).__enter__(),
        lambda _, open_: open_.__exit__(None, None, None),
    ):
        yield


@contextmanager
def _hooked(
    named: Iterable[tuple[str, nn.Module]], enter: Callable[[str], Any], leave: Callable[[str, Any], object]
) -> Iterator[None]:
    """Call `x = enter(name)` before each module in `named` runs, and `leave(name, x)` after the module has run."""
    open_: list[Any] = []
    handles = []
    for name, part in named:
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: open_.append(enter(name))))
        handles.append(part.register_forward_hook(lambda *_, name=name: leave(name, open_.pop())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _between(start: Any, end: Any) -> float:
    return start.elapsed_time(end) if hasattr(start, "elapsed_time") else (end - start) * 1e3
