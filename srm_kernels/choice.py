"""Choose the implementation for `backend=None` on a device that was verified.

A verdict contains the results of `python -m srm_kernels verify` for a device (see `verdicts.py`). Among the
implementations whose results are correct by the verdict, `backend=None` uses the fastest one. Each process reads the
verdict of a device once.

The chosen implementation depends on the operator, the dtype and the size classes (see `class_of`). It does not depend
on the batch size or the number of heads, so a sample uses the same implementation in a batch of any size. Training and
evaluation use the same implementation.

Under torch.compile, the choice is made during tracing; it depends on the same size classes as in eager mode.
Verdicts are used neither under torch.func nor in forward-mode differentiation. They are not used under
torch.export either, because an exported program can run on another device.
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

from . import devices, verdicts
from .checks import exporting, transforming
from .verdicts import Group, Key, Row, Verdict

# A class contains the sizes from one bound to the next, without the next bound itself. The geometric mean of the two
# bounds is a power of four.
BOUNDS = (8, 32, 128, 512, 2_048, 8_192, 32_768, 131_072)
MOST_CACHED = 10_000
CPU = -1  # stands for the CPU where other integers are indices of CUDA devices
Sizes = Callable[[], tuple[int, ...]]
Refusal = Callable[[str], str | None]


class Explanation(NamedTuple):
    """Which implementation a call uses, and why.

    Attributes:
        operator: Name of the operator. If variants of the operator are measured separately, the variant follows in
            parentheses.
        backend: Name of the implementation that the call uses.
        reason: Why the call uses this implementation.
        origin: "this machine" if the verdict was measured here, "shipped" if the package contains the verdict, None
            without a verdict.
        measured: Date and time of the measurements on which the choice is based: one date, or the first and
            the last. None without a verdict.
        milliseconds: Shape → direction → implementation → median time in milliseconds. The direction is
            "forward", or "backward" for the forward and the backward pass together. The shapes are the
            measured shapes that are nearest to the shape of the call.
        sizes: The sizes of the call on which the choice depends.
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
    """A value of the argument `backend` that makes an operator raise `Answer` instead of running.

    `explain` passes a `Question` to find out which implementation the operator would use.
    """

    def __init__(self, requested: str | None = None) -> None:
        self.requested = requested


class Answer(Exception):  # noqa: N818 - not an error
    """The exception that an operator raises if its argument `backend` is a `Question`.

    The exception contains the explanation of the chosen implementation.
    """

    def __init__(self, explanation: Explanation) -> None:
        super().__init__(str(explanation))
        self.explanation = explanation


class Table:
    """The verdicts that apply to a device, by group. A group is a pair of an operator and a dtype.

    Attributes:
        groups: Group → (verdict, rows). `rows` are the rows of `verdict` on which the choice for the group is based
            (see `verdicts.governing`).
        reason: Why `groups` is empty. It has no meaning if `groups` is not empty.
        unfinished: Groups whose measurement was interrupted.
    """

    def __init__(
        self,
        groups: dict[Group, tuple[Verdict, list[Row]]],
        reason: str = "nothing was measured",
        unfinished: Collection[Group] = (),
    ) -> None:
        self.groups, self.reason, self.unfinished = groups, reason, unfinished

    def nearest(self, group: Group, classes: Sequence[int]) -> list[Row]:
        """Return the rows of a group that were measured at the shapes whose size classes are nearest to `classes`.

        The distance between two shapes is the sum of the absolute differences of their size classes.
        """

        def distance(row: Row) -> int:
            pairs = zip(map(class_of, row["sizes"]), classes, strict=True)
            return sum(abs(found - wanted) for found, wanted in pairs)

        _, rows = self.groups.get(group, (None, []))
        rows = [row for row in rows if len(row["sizes"]) == len(classes)]
        least = min(map(distance, rows), default=0)
        return [row for row in rows if distance(row) == least]

    def ranking(self, group: Group, classes: Sequence[int]) -> list[str]:
        """Return the implementations that have no fault at any measured shape, the fastest first.

        The order follows the geometric means of the times at the measured shapes that are nearest to `classes`. An
        implementation is left out if any of these times is missing.
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
        """Return whether the Triton kernels are first in a group's ranking for at least one measured shape."""
        sizes = {tuple(row["sizes"]) for row in self.groups[group][1]}
        return any(self.ranking(group, list(map(class_of, one)))[:1] == ["triton"] for one in sizes)


def times_of(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the measured times in the rows of a verdict, as nested dictionaries.

    The dictionaries have the form of `Explanation.milliseconds`: shape → direction ("forward" or "backward") →
    implementation → time in milliseconds.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        for direction, times in row["milliseconds"].items():
            found.setdefault(row["shape"], {}).setdefault(direction, {}).update(times)
    return found


def class_of(size: int) -> int:
    """Return the index of the class of a size.

    The class is found by comparing the size with each number in `BOUNDS`. For a symbolic size, torch.compile therefore
    adds guards on these comparisons and not on the exact size: another size of the same class needs no recompilation.
    """
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
    """Clear all caches, so that the next call reads the verdicts again."""
    _tables.clear()
    _cache.clear()


@contextmanager
def pretended(key: Key) -> Iterator[None]:
    """Treat CPU tensors as tensors on the device that `key` describes.

    Emulators and Triton's interpreter run kernels on CPU tensors, so tests with them use this context manager.
    """
    global _pretended
    before, _pretended = _pretended, key
    refresh()
    try:
        yield
    finally:
        _pretended = before
        refresh()


def cached(tensor: Tensor, operator: str, variant: str, call: tuple[Any, ...]) -> str | None:
    """Return the cached choice for the key `call`, or None."""
    if torch.compiler.is_compiling() or not (tensor.is_cuda or tensor.is_cpu) or transforming():
        return None
    try:
        return _cache.get((tensor.get_device(), tensor.dtype, operator, variant, call))
    except TypeError:  # a symbolic size
        return None


def keep(tensor: Tensor, operator: str, variant: str, call: tuple[Any, ...], chosen: str) -> None:
    """Store a choice for `cached`."""
    if torch.compiler.is_compiling() or not (tensor.is_cuda or tensor.is_cpu) or transforming():
        return
    if len(_cache) >= MOST_CACHED:
        _cache.clear()
    with suppress(TypeError):  # a symbolic size
        _cache[tensor.get_device(), tensor.dtype, operator, variant, call] = chosen


def measured(tensor: Tensor, operator: str, variant: str, sizes: Sizes, refusal: Refusal) -> str | None:
    """Return the implementation that the device's verdict selects for a call, or None.

    The result is None if there is no verdict, or if none of the correct implementations in the verdict can run the
    call. It is also None under torch.func and torch.export, and in forward-mode differentiation.

    Args:
        tensor: A tensor with the device and the dtype of the call.
        operator: Name of the operator.
        variant: Name of the variant of the operator, for example "lu, equilibrated". The variants of an
            operator are measured separately. The name is empty if the operator has no variants.
        sizes: Function without arguments that returns the sizes on which the choice depends. The batch size and the
            number of heads are not among them.
        refusal: Function that takes the name of an implementation. It returns the reason why this implementation cannot
            run the call, or None if it can run the call.
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
    """Return the implementations in order of preference, or an empty list without a verdict."""
    return table(index).ranking((named(operator, variant), dtype_name(dtype)), classes)


def named(operator: str, variant: str) -> str:
    """Return the name that the rows of a verdict use for an operator and its variant."""
    return f"{operator} ({variant})" if variant else operator


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that the rows of a verdict use for a dtype."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def table(index: int) -> Table:
    """Return the verdicts of a CUDA device as a `Table`.

    The verdicts are read from disk on the first call, and then cached.

    Args:
        index: Index of the CUDA device. `CPU` returns the verdicts of the device that `pretended` describes.
    """
    if index not in _tables:
        _tables[index] = _read(index)
    return _tables[index]


def _read(index: int) -> Table:
    global _logged
    if index == CPU and _pretended is None:
        return Table({}, "verdicts exist for CUDA devices only, and the tensors are on the CPU")
    refusal = devices.triton_missing()
    if refusal is not None:
        return Table({}, refusal)
    if index != CPU and devices.interpreting():
        return Table({}, "TRITON_INTERPRET=1 is set, and verdicts hold for compiled kernels only")
    key = verdicts.key_of_cuda(index) if index != CPU else _pretended
    assert key is not None
    own, reason = verdicts.load(key)
    others = verdicts.shipped(key)
    doubts = verdicts.doubts(key) if others is not None and own is None else None
    groups = verdicts.governing(own or doubts, others)
    invalid = (
        own is None and reason != verdicts.NOT_VERIFIED
    )  # this machine has a verdict that does not count
    reason = reason or "no measurement was finished"
    if invalid or not (groups or _logged):
        _logged = True
        meanwhile = "using the verdict shipped with the package" if groups else "using plain PyTorch"
        if doubts:
            names = ", ".join(sorted({row["operator"] for row in doubts.rows}))
            meanwhile += f", except for operators with faults on this machine ({names}),"
        verdicts.warn_once(f"{key.device}: {reason}; {meanwhile} until `{verdicts.COMMAND}` is run")
    return Table(groups, reason, own.unfinished if own else ())


def sentence(found: Table) -> str:
    """Return a sentence that summarises the verdicts of a device.

    For each verdict, the sentence has its origin, the dates of its measurements, and the number of (operator, dtype)
    pairs that use Triton kernels for at least one measured shape. If no verdict applies to the device, the sentence
    gives the reason.
    """
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
    """Return a dictionary from a description of each verdict to the groups for which this verdict is used.

    The description has the origin of the verdict and the dates of its measurements.
    """
    groups: dict[str, list[Group]] = {}
    for group, (verdict, _) in found.groups.items():
        groups.setdefault(verdict.origin, []).append(group)
    described = {}
    for origin, some in sorted(groups.items()):
        rows = [row for group in some for row in found.groups[group][1]]
        described[f"verdict of {origin}, {verdicts.dates(rows)}"] = some
    return described


def ran(device: torch.device, requested: str | None, found: Mapping[str, Collection[str]]) -> str:
    """Return a sentence that says which implementations ran on a device, and which verdict or setting selected them.

    Args:
        device: The device of the operators.
        requested: The backend that was given to the operators, or None.
        found: Operator → implementations that ran: the dictionary that `registration.running` yields.
    """
    from . import dispatch

    taken = Counter(name for names in found.values() for name in names)
    if not taken:
        return "no operator of srm_kernels ran"
    counts = ", ".join(
        f"{name} for {count} operator{'s' * (count > 1)}"
        for name, count in sorted(taken.items(), reverse=True)
    )
    if requested or dispatch.named_by_environment():
        return f"{counts}; set by {'the config' if requested else dispatch.ENVIRONMENT_VARIABLE}"
    index = CPU
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    known = table(index)
    return "; ".join([counts, *(_by_origin(known) or [known.reason])])


def explained(
    default: str, tensor: Tensor | None, operator: str, variant: str, sizes: Sizes, refusal: Refusal
) -> Explanation:
    """Return which implementation `backend=None` uses for a call, and why.

    If no verdict selects an implementation for the call, the call uses `default`.
    """
    if tensor is None:
        return Explanation(operator, default, "the operator has no kernels")
    name, dtype = named(operator, variant), dtype_name(tensor.dtype)
    index = tensor.get_device() if tensor.is_cuda else CPU
    numbers, found = sizes(), table(index)
    group, why = (name, dtype), None
    if transforming():
        why = "verdicts are not used under torch.func and in forward mode"
    elif not found.groups:
        why = found.reason
    elif group not in found.groups and group in found.unfinished:
        why = f"its measurement in {dtype} was interrupted; `{verdicts.COMMAND}` resumes it"
    elif group not in found.groups:
        why = f"it was not measured in {dtype} with these options"
    if why is not None:
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
            notes.insert(0, f"the fastest correct one, by the verdict of {verdict.origin} at {shapes}")
            return about._replace(backend=candidate, reason="; ".join(notes))
        notes.append(f"{candidate} cannot run: {reason}")
    notes.insert(0, f"no correct implementation was timed at {shapes or 'any shape'}")
    return about._replace(reason="; ".join(notes))


def explain(operator: str, *tensors: Any, **options: Any) -> Explanation:
    """Return which implementation a call of an operator uses, without running the operator.

    Args:
        operator: Name of a public operator, for instance "nystrom_attention".
        *tensors: Positional arguments of the operator. For an operator with the parameters `key` and `value`, `value`
            can be omitted if it has the shape and dtype of `key`.
        **options: Keyword arguments of the operator. `backend` is None or a name of `backends()`.

    Returns:
        An `Explanation`. It has the implementation that the call uses, the reason, and the measurements on which the
        choice is based.

    Raises:
        ValueError: There is no such operator, or the operator does not accept a shape, device or value.
        TypeError: An argument is missing or unknown, or the operator does not accept a type or dtype.
        NotImplementedError: The named backend cannot run.
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
