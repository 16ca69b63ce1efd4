"""What tests of Triton kernels share: the device, the rule for values, and memory that is poisoned before it is filled.

The rule, for the largest and for the mean absolute error against the fp64 definition: at most twice that of plain
PyTorch in the same dtype with fp32 inside, plus half a unit of the dtype, plus 8 units of fp32: sums are taken in
another order. Units are of the exact result's largest (mean) entry. A lone number, such as the gradient of α, may be
near by luck: there the error of plain PyTorch counts as half a unit of the dtype at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16)


def within(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    found, plain, exact = (x.detach().cpu() for x in (found, plain, exact))
    for measure in (torch.amax, torch.mean):
        size = float(measure(exact.abs()))
        error, reference = (float(measure((x.double() - exact).abs())) for x in (found, plain))
        unit = torch.finfo(found.dtype).eps / 2
        if exact.numel() == 1:
            reference = max(reference, unit * size)
        bound = 2 * reference + (unit + 8 * torch.finfo(torch.float32).eps) * size
        assert error <= bound, f"{measure.__name__}: error {error:.3e} over {bound:.3e} (size {size:.3e})"


@contextmanager
def poisoned(*modules: Any) -> Iterator[None]:
    """Outputs and workspaces of these kernels modules hold NaN, or indices that lead nowhere, until they are filled."""

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(math.nan if tensor.is_floating_point() else 2**40)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in modules:
            plain = module.empty
            monkeypatch.setattr(module, "empty", lambda *a, plain=plain: poison(plain(*a)))
        yield


def results_and_gradients(
    function: Callable[..., Any], tensors: list[Tensor], seed: int = 99
) -> list[Tensor]:
    """What a function gives, and the gradients of its tensors for upstream gradients from a seed."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    make = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=make, dtype=torch.float64).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)]


def follow_the_rule(function: Callable[..., Any], tensors: list[Tensor]) -> None:
    """function(*tensors, backend=…) by kernels against plain PyTorch and fp64, results and gradients."""
    cpu = [x.cpu() for x in tensors]
    found = results_and_gradients(lambda *x: function(*x, backend="triton"), tensors)
    plain = results_and_gradients(lambda *x: function(*x, backend="reference"), cpu)
    exact = results_and_gradients(lambda *x: function(*x, backend="reference"), [x.double() for x in cpu])
    for f, p, e in zip(found, plain, exact, strict=True):
        assert f.dtype == p.dtype
        within(f, p, e)
