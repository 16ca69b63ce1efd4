"""Test that the cases of `python -m srm_kernels verify` launch every kernel of the package."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

import srm_kernels
from bench.ptx import emulated_device
from bench.resources import recorded
from srm_kernels.verify.cases import FAMILY, OPERATORS, SHAPES, Case
from srm_kernels.verify.measure import results


def kernels() -> set[str]:
    """Return the names of all kernels of the package."""
    found = set()
    for module in pkgutil.walk_packages(srm_kernels.__path__, "srm_kernels."):
        if module.name.endswith("kernels") and module.name != "srm_kernels":
            members = vars(import_module(module.name)).items()
            found |= {
                name for name, value in members if isinstance(value, JITFunction) and name.endswith("_kernel")
            }
    return found


@contextmanager
def launches() -> Iterator[set[str]]:
    """Collect the names of the kernels launched in the `with` block. The kernels do not run; outputs are zeros."""
    found: set[str] = set()
    with (
        emulated_device(89, check=False),
        recorded((8, 9)) as made,
        mock.patch.object(torch, "empty", torch.zeros),
        mock.patch.object(torch, "empty_like", torch.zeros_like),
    ):
        yield found
        found |= {launch[0].__name__ for launch in made}


def test_every_kernel_is_launched_by_a_case_of_the_family():
    """Each shape of the family is used with one sample and one head.

    Each shape is used in bf16 and in fp32, because the dtype can decide which kernels are launched.
    """
    everywhere = set()
    for shape in FAMILY:
        small = SHAPES[shape]._replace(batch=1, heads=1)
        with mock.patch.dict(SHAPES, {shape: small}), launches() as found:
            for operator in OPERATORS:
                for dtype in {"bf16", "fp32"} & set(operator.dtypes):
                    case = Case(operator, dtype, shape)
                    with suppress(NotImplementedError):  # the command reports such a case as "unsupported"
                        results(partial(case.judged, backend="triton"), case.inputs())
        everywhere |= found
    assert len(kernels()) > 40
    assert kernels() - everywhere == set()
