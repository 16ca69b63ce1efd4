"""What `backend=None` takes on a device that was verified: the fastest implementation whose results are right.

Decided for an operator, a dtype and the classes of its sizes. Sizes leave out the batch and the heads, so that a
sample is computed alike alone and in any batch; and training and evaluation take the same implementation. The verdict
of a device is read once a process. Under torch.export, whose programs run elsewhere, and under torch.func nothing is
taken by a verdict. `torch.compile` decides when it traces, by the same classes.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import verdicts
from .checks import exporting, transforming
from .verdicts import Group, Key, Row, Verdict

# Sizes between two bounds are of one class, whose middle is a power of four.
BOUNDS = (8, 32, 128, 512, 2_048, 8_192, 32_768, 131_072)
MOST_CACHED = 10_000
CPU = -1  # in place of a CUDA device's number
Sizes = Callable[[], tuple[int, ...]]
Refusal = Callable[[str], str | None]


class Explanation(NamedTuple):
    """Which implementation a call takes, and why.

    Attributes:
        operator: The operator, and the variant of it that is measured apart.
        backend: The implementation.
        reason: One sentence.
        origin: Whose verdict it follows: "this machine" or "shipped"; None where it follows none.
        measured: Date and time of the measurement that it follows, the first and the last where they differ; or None.
        milliseconds: Shape → direction → implementation → median time, of the nearest measured shapes.
        sizes: The sizes that the choice goes by.
    """

    operator: str
    backend: str
    reason: str
    origin: str | None = None
    measured: str | None = None
    milliseconds: dict[str, dict[str, dict[str, float]]] = {}  # noqa: RUF012 - never written to
    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend}, {self.reason}"


class Question:
    """In place of a backend: the operator raises `Answer` instead of running."""

    def __init__(self, requested: str | None = None) -> None:
        self.requested = requested


class Answer(Exception):  # noqa: N818 - not an error
    """What an operator says to a `Question`."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__(str(explanation))
        self.explanation = explanation


class Table:
    """What is known about a device: the rows that decide each group, why there are none, and what is not finished."""

    def __init__(
        self,
        groups: dict[Group, tuple[Verdict, list[Row]]],
        reason: str = "nothing was measured",
        unfinished: Collection[Group] = (),
    ) -> None:
        self.groups, self.reason, self.unfinished = groups, reason, unfinished

    def nearest(self, group: Group, classes: Sequence[int]) -> list[Row]:
        """The rows of the shapes whose classes are nearest."""
        _, rows = self.groups.get(group, (None, []))
        distances = [
            (
                sum(abs(class_of(size) - wanted) for size, wanted in zip(row["sizes"], classes, strict=True)),
                row,
            )
            for row in rows
            if len(row["sizes"]) == len(classes)
        ]
        least = min((distance for distance, _ in distances), default=0)
        return [row for distance, row in distances if distance == least]

    def ranking(self, group: Group, classes: Sequence[int]) -> list[str]:
        """Implementations that are right wherever they were measured and timed here, the fastest first.

        The time is the geometric mean over the directions of the nearest shapes.
        """
        if group not in self.groups:
            return []
        rows = self.groups[group][1]
        wrong = {row["backend"] for row in verdicts.faults(rows)}
        right = {row["backend"] for row in rows if row["status"] == verdicts.RIGHT} | {"reference"}
        times = times_of(self.nearest(group, classes))
        measured = [by_name for directions in times.values() for by_name in directions.values()]
        if not measured:
            return []
        candidates = [name for name in right - wrong if all(name in by_name for by_name in measured)]
        return sorted(candidates, key=lambda name: sum(math.log(by_name[name]) for by_name in measured))

    def takes_kernels(self, group: Group) -> bool:
        """Whether kernels are the first choice of a group at one measured shape at least."""
        sizes = {tuple(row["sizes"]) for row in self.groups[group][1]}
        first = [self.ranking(group, [class_of(size) for size in one])[:1] for one in sizes]
        return ["triton"] in first


def times_of(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Shape → direction → implementation → milliseconds of all rows together."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        for direction, times in row["milliseconds"].items():
            found.setdefault(row["shape"], {}).setdefault(direction, {}).update(times)
    return found


def class_of(size: int) -> int:
    """The class of a size. By comparisons alone: of a symbolic size torch.compile then guards the class, no more."""
    number = 0
    for bound in BOUNDS:
        if size >= bound:
            number += 1
    return number


_tables: dict[int, Table] = {}
_cache: dict[Any, str] = {}
_pretended: Key | None = None
_logged = False


def refresh() -> None:
    """Forget what was read: verdicts are read again at the next call."""
    _tables.clear()
    _cache.clear()


@contextmanager
def pretended(key: Key) -> Iterator[None]:
    """Let CPU tensors be of the device of a key inside, for emulators of devices and Triton's interpreter."""
    global _pretended
    before, _pretended = _pretended, key
    refresh()
    try:
        yield
    finally:
        _pretended = before
        refresh()


def cached(tensor: Tensor, operator: str, variant: str, call: tuple[Any, ...]) -> str | None:
    """What was decided for such a call before; None where it has to be decided."""
    if torch.compiler.is_compiling() or not (tensor.is_cuda or tensor.is_cpu) or transforming():
        return None
    try:
        return _cache.get((tensor.get_device(), tensor.dtype, operator, variant, call))
    except TypeError:  # a symbolic size
        return None


def keep(tensor: Tensor, operator: str, variant: str, call: tuple[Any, ...], chosen: str) -> None:
    """Keep what was decided, for `cached`."""
    if torch.compiler.is_compiling() or not (tensor.is_cuda or tensor.is_cpu) or transforming():
        return
    if len(_cache) >= MOST_CACHED:
        _cache.clear()
    with suppress(TypeError):  # a symbolic size
        _cache[tensor.get_device(), tensor.dtype, operator, variant, call] = chosen


def measured(tensor: Tensor, operator: str, variant: str, sizes: Sizes, refusal: Refusal) -> str | None:
    """The implementation that a call takes by the verdict about its device; None without one.

    Args:
        tensor: decides the device and the dtype.
        operator: the operator's name.
        variant: what of its options is measured apart.
        sizes: gives the sizes that count, batch and heads left out.
        refusal: why an implementation cannot serve the call, or None.
    """
    index = tensor.get_device() if tensor.is_cuda else CPU
    if (index == CPU and _pretended is None) or transforming():
        return None
    if torch.compiler.is_compiling() and exporting():
        return None
    classes = [class_of(size) for size in sizes()]
    names = _ranking_of(index, operator, variant, tensor.dtype, *classes).split()
    return next((name for name in names if refusal(name) is None), None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ranking_of(index: int, operator: str, variant: str, dtype: torch.dtype, *classes: int) -> str:
    return " ".join(ranking(index, operator, variant, dtype, classes))


def ranking(index: int, operator: str, variant: str, dtype: torch.dtype, classes: Sequence[int]) -> list[str]:
    """Implementations in the order in which they are taken; none without a verdict."""
    return table(index).ranking((named(operator, variant), dtype_name(dtype)), classes)


def named(operator: str, variant: str) -> str:
    """The operator of a verdict's rows."""
    return f"{operator} ({variant})" if variant else operator


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype of a verdict's rows."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def table(index: int) -> Table:
    """What is known about a CUDA device, or about the device that CPU tensors pretend to be on."""
    if index not in _tables:
        _tables[index] = _read(index)
    return _tables[index]


def _read(index: int) -> Table:
    global _logged
    if index == CPU and _pretended is None:
        return Table({}, "kernels are verified on CUDA devices, and the tensors are on the CPU")
    from . import runtime

    refusal = runtime.triton_missing()
    if refusal is not None:
        return Table({}, refusal)
    if index != CPU and runtime.interpreting():
        return Table({}, "TRITON_INTERPRET=1 is set, and verdicts are about compiled kernels")
    key = verdicts.key_of_cuda(index) if index != CPU else _pretended
    assert key is not None
    own, reason = verdicts.load(key)
    others = verdicts.shipped(key)
    doubts = verdicts.doubts(key) if others is not None and own is None else None
    groups = verdicts.governing(own or doubts, others)
    lost = (
        own is None and reason != verdicts.NOT_VERIFIED
    )  # there is a verdict of this machine, and it does not count
    reason = reason or "nothing was measured to the end"
    if lost or not (groups or _logged):
        _logged = True
        meanwhile = "the verdict that ships with the package counts" if groups else "plain PyTorch runs"
        if doubts:
            names = ", ".join(sorted({row["operator"] for row in doubts.rows}))
            meanwhile += f", but not for what was wrong on this machine: {names};"
        verdicts.warn_once(
            f"{key.device}: {reason}; {meanwhile} until `{verdicts.COMMAND}` has measured the kernels"
        )
    return Table(groups, reason, own.unfinished if own else ())


def sentence(found: Table) -> str:
    """Whose verdict counts for a device, and how many of its operators take kernels somewhere, in one sentence."""
    if not found.groups:
        return f"no verdict: {found.reason}"
    parts = []
    for origin, groups in _by_origin(found).items():
        taken = [group for group in groups if found.takes_kernels(group)]
        parts.append(f"{origin}: kernels for {len(taken)} of {len(groups)} operators and dtypes")
    if found.unfinished:
        parts.append(f"{len(found.unfinished)} operators and dtypes are not finished")
    return "; ".join(parts)


def _by_origin(found: Table) -> dict[str, list[Group]]:
    """Groups by the words for whose verdict decides them, and when it was measured."""
    groups: dict[str, list[Group]] = {}
    for group, (verdict, _) in found.groups.items():
        groups.setdefault(verdict.origin, []).append(group)
    rows = {
        origin: [row for group in some for row in found.groups[group][1]] for origin, some in groups.items()
    }
    return {
        f"verdict of {origin}, {verdicts.dates(rows[origin])}": some
        for origin, some in sorted(groups.items())
    }


def ran(device: torch.device, requested: str | None, found: Mapping[str, Collection[str]]) -> str:
    """Say which implementations ran on a device, and on whose verdict, in one sentence.

    Args:
        device: where the operators ran.
        requested: the backend that was named to them, or None.
        found: what ran, as `registration.running` collects it.
    """
    from . import runtime

    taken = Counter(name for names in found.values() for name in names)
    if not taken:
        return "no operator of srm_kernels ran"
    counts = ", ".join(
        f"{name} for {count} operator{'s' * (count > 1)}"
        for name, count in sorted(taken.items(), reverse=True)
    )
    if requested or runtime.named_by_environment():
        return f"{counts}; named by {'the config' if requested else runtime.ENVIRONMENT_VARIABLE}"
    index = CPU
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    known = table(index)
    return "; ".join([counts, *(_by_origin(known) or [known.reason])])


def explained(
    default: str, tensor: Tensor | None, operator: str, variant: str, sizes: Sizes, refusal: Refusal
) -> Explanation:
    """What `backend=None` takes for a call, and why; `default` is what it takes without a verdict."""
    if tensor is None:
        return Explanation(operator, default, "it has no kernels that could be verified")
    name, dtype = named(operator, variant), dtype_name(tensor.dtype)
    index = tensor.get_device() if tensor.is_cuda else CPU
    numbers, found = sizes(), table(index)
    group = (name, dtype)
    if transforming():
        return Explanation(
            name, default, "no verdict counts under torch.func and in forward mode", sizes=numbers
        )
    if not found.groups:
        return Explanation(name, default, found.reason, sizes=numbers)
    if group not in found.groups:
        why = f"it was not measured in {dtype} with these options"
        if group in found.unfinished:
            why = f"its measurement in {dtype} was interrupted; `{verdicts.COMMAND}` goes on"
        return Explanation(name, default, why, sizes=numbers)
    verdict, rows = found.groups[group]
    classes = [class_of(size) for size in numbers]
    nearest = found.nearest(group, classes)
    about = Explanation(
        name, default, "", verdict.origin, verdicts.dates(nearest), times_of(nearest), numbers
    )
    shapes = ", ".join(dict.fromkeys(row["shape"] for row in nearest))
    notes = [
        f"{row['backend']} is {row['status']} at {row['shape']}: {row['reason']}"
        for row in verdicts.faults(rows)
    ]
    for candidate in found.ranking(group, classes):
        reason = refusal(candidate)
        if reason is None:
            notes.insert(0, f"the fastest that is right, by the verdict of {verdict.origin} at {shapes}")
            return about._replace(backend=candidate, reason="; ".join(notes))
        notes.append(f"{candidate} cannot run: {reason}")
    notes.insert(0, f"nothing that is right was timed at {shapes or 'any shape'}")
    return about._replace(reason="; ".join(notes))


def explain(operator: str, *tensors: Any, **options: Any) -> Explanation:
    """Say which implementation a call of an operator takes, without running it.

    Args:
        operator: a public operator, for instance "nystrom_attention".
        tensors: its arguments; `value` may be left out where it is as `key` is.
        options: its options; `backend` None or a name.

    Returns:
        The implementation, the reason, and the measurement that it follows.

    Raises:
        ValueError: no such operator, or arguments that it does not take.
        TypeError: arguments that it does not take.
        NotImplementedError: a backend was named that cannot run.
    """
    import srm_kernels

    names = [name for name in srm_kernels.__all__ if name.islower() and name != "serves_pooled_links"]
    known = {name: getattr(srm_kernels, name) for name in names}
    signatures = {name: inspect.signature(f) for name, f in known.items() if inspect.isfunction(f)}
    signatures = {name: found for name, found in signatures.items() if "backend" in found.parameters}
    if operator not in signatures:
        raise ValueError(f"operator={operator!r}: expected one of {', '.join(signatures)}")
    given = signatures[operator].bind_partial(*tensors, **options).arguments
    if "value" in signatures[operator].parameters and "key" in given:
        given.setdefault("value", given["key"])
    given["backend"] = Question(given.get("backend"))
    try:
        known[operator](**given)
    except Answer as answer:
        return answer.explanation
    raise AssertionError(f"{operator} chose no backend")
