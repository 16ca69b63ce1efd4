"""Check whether an implementation of an operator is right, and time it.

An implementation is right if the errors of its results and gradients satisfy the numerics rule
(`srm_kernels/numerics.py`). Errors are measured against the reference computed in fp64. In addition, the
device must report no fault and refuse no launch. The Triton kernels must satisfy two more conditions: two
runs give the same bits, and a sample gives the same bits alone and in its batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..choice import Answer, Question
from ..numerics import DRAWS, FEW, error_ratio
from ..registration import plainly
from .cases import Call, Case
from .target import Device

SEED = 99  # seed of the random losses
# Out-of-memory messages of drivers, libraries and Triton, which do not raise torch's exception.
OUT_OF_MEMORY = re.compile(r"out of memory|cannot allocate memory|_ALLOC_FAILED|bad_alloc", re.IGNORECASE)
SAMPLE = 1  # index in the batch of the sample that is also computed alone


class Alone(NamedTuple):
    """What `results` must know about a batch to compute one of its samples alone.

    Attributes:
        batch: Size of the whole batch.
        axes: The batch axis of every result, or None for a result that mixes the samples of a batch.
    """

    batch: int
    axes: tuple[int | None, ...]


class Found(NamedTuple):
    """The results of a call, and the gradients of a loss: index of an input → gradient with respect to this input."""

    outputs: list[Tensor]
    gradients: dict[int, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Return a dictionary: name, such as "output 0" or "gradient 1" → floating-point result or gradient."""
        found = {f"output {i}": x for i, x in enumerate(self.outputs) if x.is_floating_point()}
        return found | {f"gradient {i}": x for i, x in self.gradients.items()}


def flat(outputs: Any) -> list[Tensor]:
    """Flatten an output, for instance nested tuples of tensors and None, to the list of its tensors."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [] if outputs is None else [tensor for one in outputs for tensor in flat(one)]


def results(
    call: Callable[..., Any], inputs: Sequence[Tensor], seed: int = SEED, alone: Alone | None = None
) -> Found:
    """Return the results of a call and the gradients of a random loss.

    The loss of a batch is a sum over its samples. If `alone` is given, `inputs` are one sample of a batch, and the loss
    is only this sample's term of the sum.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = flat(call(*leaves))
    carrying = [(i, x) for i, x in enumerate(outputs) if x.requires_grad]
    gradients: dict[int, Tensor] = {}
    if carrying:
        generator = torch.Generator(carrying[0][1].device).manual_seed(seed)
        axes = [None if alone is None else alone.axes[i] for i, _ in carrying]
        upstream = [_upstream(x, generator, axis, alone) for (_, x), axis in zip(carrying, axes, strict=True)]
        found = torch.autograd.grad([x for _, x in carrying], leaves, upstream, allow_unused=True)
        gradients = {i: g for i, g in enumerate(found) if g is not None}
    return Found([x.detach() for x in outputs], gradients)


def _upstream(x: Tensor, generator: torch.Generator, axis: int | None, alone: Alone | None) -> Tensor:
    """Draw a random gradient of the loss with respect to the result `x`.

    If `alone` is given, `x` is the result of one sample that is computed alone. The gradient is then drawn for the
    whole batch, and the function returns only the part for this sample, number `SAMPLE` of the batch.
    """
    shape = list(x.shape)
    if alone is not None and axis is not None:
        shape[axis] = alone.batch
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=x.device).to(x.dtype)
    return drawn if alone is None or axis is None else drawn.narrow(axis, SAMPLE, 1)


def ratios(
    found: Found,
    call: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    shares_size: bool = False,
    redrawn: Callable[[int], Sequence[Tensor]] | None = None,
) -> dict[str, float]:
    """Return the ratio of error to bound for every result and gradient in `found`.

    The numerics rule gives the bound (`error_ratio`). `call` runs the reference. The bound depends on the error of the
    reference in the dtype of `inputs`. For a gradient with at most `FEW` elements, this error is measured for several
    random losses, because it can be small by chance for one loss. If the function `redrawn` is given, `redrawn(seed)`
    returns new inputs for each of these losses. New inputs also change the results, so the error of the reference is
    then measured several times for results with at most `FEW` elements, too.
    """
    wide = [x.double() for x in inputs]
    plain, exact = (results(call, x).named() for x in (inputs, wide))
    drawn = [name for name in exact if redrawn is not None or name.startswith("gradient")]
    few = [name for name in drawn if exact[name].numel() <= FEW]
    others = []
    for seed in range(DRAWS) if few else ():
        again = inputs if redrawn is None else redrawn(seed)
        both = (results(call, x, seed).named() for x in (again, [one.double() for one in again]))
        others.append([{name: one[name] for name in few} for one in both])  # the large ones are not needed
    together = list(exact.values()) if shares_size else None
    given = found.named()
    return {
        name: error_ratio(
            given[name], plain[name], value, together,
            [(p[name], e[name]) for p, e in others] if name in few else [],
        )
        for name, value in exact.items()
    }  # fmt: skip


def sizes_of(case: Case) -> list[int]:
    """Return the sizes on which the choice of a case's backend depends, without running the operator."""
    inputs = case.inputs("meta")
    try:
        case.call(*inputs, backend=Question("reference"))
    except Answer as answer:
        explanation = answer.explanation
    else:
        raise AssertionError(f"{case.operator.label} chose no backend")
    assert explanation.operator == case.operator.label
    return list(explanation.sizes)


def judged(case: Case, backend: str, device: Device) -> dict[str, Any]:
    """Check an implementation; return `status`, `reason` and `ratio` of a row."""
    try:
        fault, ratio = _fault_of(case, backend, device)
    except Exception as error:
        device.reports()
        return {"ratio": None} | failure(error, device)
    ratio = ratio if ratio is None or math.isfinite(ratio) else None
    return {"status": "right" if fault is None else "wrong", "reason": fault, "ratio": ratio}


def _fault_of(case: Case, backend: str, device: Device) -> tuple[str | None, float | None]:
    """Return a text that describes the fault of an implementation, and the largest ratio of an error to its bound.

    The text is None if the implementation is right. The ratio is None if the device reported a fault or refused a
    launch.
    """
    operator, inputs = case.operator, case.inputs(device.torch_device)

    def call(*tensors: Tensor) -> Any:
        return case.judged(*tensors, backend=backend)

    found, again = results(call, inputs), results(call, inputs)
    device.synchronize()
    reports, refusals = device.reports(), device.refusals()
    if reports or refusals:
        return "; ".join(reports or refusals), None
    if operator.ratio is not None:
        worst, name = operator.ratio(case.sizes, inputs, found.outputs), "the choice"
    else:
        plain = case.judged if operator.reference is None else operator.reference(case.sizes, inputs, backend)

        def by_reference(*tensors: Tensor) -> Any:
            return plain(*tensors, backend="reference")

        def redrawn(draw: int) -> list[Tensor]:
            return case.inputs(device.torch_device, draw + 1)

        mixed = operator.outputs is not None and None in operator.outputs  # a statistic of the batch
        by_name = ratios(
            found, by_reference, inputs, shares_size=operator.shares_size, redrawn=redrawn if mixed else None
        )
        worst, name = max((value, name) for name, value in by_name.items())
    if not worst <= 1:
        return f"the error of {name} is {worst:.3g} times the bound", worst
    if backend != "triton":  # products of PyTorch are not guaranteed to be bitwise reproducible
        return None, worst
    if not _same(found, again):
        return "two runs give different bits", worst
    if operator.outputs is not None and not _alone_as_together(case, call, inputs, found):
        return "a sample alone and in a batch gives different bits", worst
    return None, worst


def _same(one: Found, other: Found) -> bool:
    pairs = [*zip(one.outputs, other.outputs, strict=True)]
    pairs += [(one.gradients[i], other.gradients[i]) for i in one.gradients]
    return all(torch.equal(a, b) for a, b in pairs)


def _alone_as_together(case: Case, call: Callable[..., Any], inputs: Sequence[Tensor], whole: Found) -> bool:
    operator = case.operator
    assert operator.outputs is not None
    axes = operator.inputs
    sample = [
        x if axis is None else x.narrow(axis, SAMPLE, 1).clone()
        for x, axis in zip(inputs, axes[: len(inputs)], strict=True)
    ]
    alone = results(call, sample, alone=Alone(case.sizes.batch, operator.outputs))
    pairs = [
        (one, together.narrow(axis, SAMPLE, 1))
        for one, together, axis in zip(alone.outputs, whole.outputs, operator.outputs, strict=True)
        if axis is not None
    ]
    pairs += [
        (alone.gradients[i], gradient.narrow(axis, SAMPLE, 1))
        for i, gradient in whole.gradients.items()
        if (axis := axes[i]) is not None
    ]
    return all(torch.equal(one, other) for one, other in pairs)


def failure(error: Exception, device: Device) -> dict[str, str]:
    """Return the `status` and `reason` of a row for an exception."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
    refusals = device.refusals()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return {"status": "memory", "reason": reason}
    if refusals or "OutOfResources" in type(error).__name__:
        return {"status": "refused", "reason": "; ".join(refusals) or reason}
    if type(error) is NotImplementedError:
        return {"status": "unsupported", "reason": lines[0] if lines else reason}
    return {"status": "error", "reason": reason}


def timed(case: Case, names: Sequence[str], device: Device, seconds: float) -> dict[str, Any]:
    """Return the median time of every implementation in every direction, in milliseconds.

    The directions are "forward", and "backward" for the forward and the backward pass together. In each
    direction, the implementations are timed in alternation. Each element of `names` is a backend, "eager" or
    "compiled". "eager" is the reference in plain PyTorch, without the registered operator. "compiled" is the
    same operations under torch.compile. Errors of implementations are not caught.
    """
    inputs = case.inputs(device.torch_device)
    times = {}
    for direction in ("forward", "backward")[: 1 if case.operator.ratio else 2]:
        call = case.call if direction == "forward" else case.trained
        steps = {name: _step(call, inputs, name, direction) for name in names}
        for step in steps.values():
            step()
            device.synchronize()
        times[direction] = device.times(steps, seconds)
    return {"milliseconds": times}


def _step(call: Call, inputs: Sequence[Tensor], backend: str, direction: str) -> Callable[[], Any]:
    if backend == "eager":
        reference = _step(call, inputs, "reference", direction)

        def eager() -> Any:
            with plainly():
                return reference()

        return eager
    if backend == "compiled":
        return _compiled(call, inputs, direction)
    if direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return call(*inputs, backend=backend)

        return forward
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def backward() -> Any:
        carrying = [x for x in flat(call(*leaves, backend=backend)) if x.requires_grad]
        return torch.autograd.grad(carrying, leaves, [x.detach() for x in carrying], allow_unused=True)

    return backward


def _compiled(call: Call, inputs: Sequence[Tensor], direction: str) -> Callable[[], Any]:
    """Return a compiled function that runs the reference in one direction.

    The operations are traced below autograd, so the graph for "backward" contains the backward pass, too.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(*tensors: Tensor) -> Any:
        return _step(call, tensors, "reference", direction)()

    with plainly():
        graph = make_fx(traced)(*inputs)
    step = torch.compile(graph)
    return lambda: step(*inputs)
