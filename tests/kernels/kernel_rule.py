"""Helpers for tests of Triton kernels: the device, the numerics rule, and outputs that start as NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from srm_kernels.numerics import DRAWS, FEW, error_ratio

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16)


def within(
    found: Tensor,
    plain: Tensor,
    exact: Tensor,
    together: list[Tensor] | None = None,
    draws: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Assert that a result satisfies the numerics rule of `srm_kernels.numerics`."""
    assert found.shape == exact.shape
    ratio = error_ratio(found, plain, exact, together, draws)
    assert ratio <= 1, f"the error is {ratio:.3g} times the bound"


@contextmanager
def poisoned(*modules: Any) -> Iterator[None]:
    """Make `empty` of these modules return tensors that are filled with NaN or, for integers, with an invalid index.

    The modules allocate outputs and workspaces with `empty`. If a kernel leaves an element unwritten, the result is
    then wrong.
    """

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
    """Return the results of a function, then the gradients of `tensors` for random upstream gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    make = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=make, dtype=torch.float64).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)]


def follow_the_rule(function: Callable[..., Any], tensors: list[Tensor], *, backend: str = "triton") -> None:
    """Assert that the results and the gradients of a backend satisfy the numerics rule.

    The tested result is `function(*tensors, backend=backend)`. It is compared with two results of the backend
    "reference", which is plain PyTorch: one in the dtype of the tensors, and the exact result in fp64.
    """
    cpu = [x.cpu() for x in tensors]
    wide = [x.double() for x in cpu]

    def by_reference(inputs: list[Tensor], seed: int = 99) -> list[Tensor]:
        return results_and_gradients(lambda *x: function(*x, backend="reference"), inputs, seed)

    found = results_and_gradients(lambda *x: function(*x, backend=backend), tensors)
    plain, exact = by_reference(cpu), by_reference(wide)
    outputs = len(found) - len(tensors)
    few = {i for i, e in enumerate(exact) if i >= outputs and e.numel() <= FEW}
    others = [(by_reference(cpu, seed), by_reference(wide, seed)) for seed in range(DRAWS) if few]
    for i, (f, p, e) in enumerate(zip(found, plain, exact, strict=True)):
        assert f.dtype == p.dtype
        within(f, p, e, draws=[(one[i], other[i]) for one, other in others] if i in few else ())
