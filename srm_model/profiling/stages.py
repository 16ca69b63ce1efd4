"""Named parts of a model: ranges for a trace, and the time that each takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from srm_model.model import IQAModel
from srm_model.modules import unwrapped
from srm_model.neck import SRMNeck
from srm_model.profiling.timing import FEWEST, Effort, cpu_clock

REST = "rest"  # what lies between the named parts: pooling, folding, fusion
# Methods of a neck by kernels, whose links share launches and call no module of their own.
FUSED = {
    "sources": "_shiftless_sources",
    "key sides": "_key_sides",
    "query sides": "_query_sides",
    "merge": "_merged",
}
_LAST = ("gate", "head")


def stages(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Parts of a model or a neck that add up to it, but for `REST`: backbone, align, each link, gate, head.

    A link is its projections, its attention and W_O.
    """
    module = unwrapped(module)
    if isinstance(module, IQAModel):
        return {"backbone": [module.backbone], **stages(module.neck), "head": [module.head]}
    if not isinstance(module, SRMNeck):
        return {"align": [module.align]}  # type: ignore[list-item]
    found: dict[str, list[nn.Module]] = {"align": list(module.align)}
    for (source, target), link in zip(module.config.links, module.links.values(), strict=True):
        found[f"link {source}→{target}"] = [link, link.output]  # type: ignore[list-item]
    found["gate"] = [module.gate]
    return found


def stage_times(
    module: nn.Module, call: Callable[[], object], device: torch.device, effort: Effort
) -> dict[str, float]:
    """Median milliseconds of every stage and of `REST` in a `call` of `module`, forward, within an effort's seconds.

    Where the neck runs by kernels, the `FUSED` parts stand in place of the links, which share launches there.
    """
    parts = stages(module)
    names = [
        *(name for name in parts if name not in _LAST),
        *FUSED,
        *(name for name in _LAST if name in parts),
    ]
    marks: list[tuple[str, Any, Any]] = []
    open_: list[Any] = []

    def mark() -> Any:
        if device.type != "cuda":
            return cpu_clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def entered(*_: Any) -> None:
        open_.append(mark())

    def left(name: str) -> None:
        marks.append((name, open_.pop(), mark()))

    seen: set[str] = set()
    rounds: dict[str, list[float]] = {name: [] for name in (*names, REST)}
    handles = []
    for name, modules in parts.items():
        for part in modules:
            handles.append(part.register_forward_pre_hook(entered))
            handles.append(part.register_forward_hook(lambda *_, name=name: left(name)))
    unwatch = _watch_fused(module, entered, left)
    try:
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
            taken = dict.fromkeys(names, 0.0)
            for name, start, stop in marks:
                seen.add(name)
                taken[name] += _between(start, stop)
            for name, value in taken.items():
                rounds[name].append(value)
            rounds[REST].append(max(_between(begin, end) - sum(taken.values()), 0.0))
    finally:
        unwatch()
        for handle in handles:
            handle.remove()
    return {
        name: statistics.median(values) for name, values in rounds.items() if name in seen or name == REST
    }


@contextmanager
def named_ranges(module: nn.Module) -> Iterator[None]:
    """Ranges in a profile, forward, for every part of the neck and the head, and each child of the backbone."""
    open_: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def begin(*_: Any) -> None:
            range_ = record_function(name)
            range_.__enter__()
            open_.append(range_)

        return begin

    def leave(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    handles = []
    for name, part in module.named_modules():
        if name and (not name.startswith("backbone.") or name.count(".") <= 2):
            handles.append(part.register_forward_pre_hook(enter(name)))
            handles.append(part.register_forward_hook(leave))
    unwatch = _watch_fused(module, lambda name: enter(name)(), lambda name: leave())
    try:
        yield
    finally:
        unwatch()
        for handle in handles:
            handle.remove()


def _watch_fused(
    module: nn.Module, entered: Callable[[str], object], left: Callable[[str], object]
) -> Callable[[], None]:
    """Call `entered` and `left` around every `FUSED` part; the result ends that."""
    necks = [part for part in module.modules() if isinstance(part, SRMNeck)]

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            entered(name)
            try:
                return method(*args, **options)
            finally:
                left(name)

        return call

    for neck in necks:
        for name, method in FUSED.items():
            vars(neck)[method] = watched(name, getattr(neck, method))

    def unwatch() -> None:
        for neck in necks:
            for method in FUSED.values():
                del vars(neck)[method]

    return unwatch


def _between(start: Any, end: Any) -> float:
    return start.elapsed_time(end) if hasattr(start, "elapsed_time") else (end - start) * 1e3
