"""Test that no kernel reads a global for which Triton would refuse the launch.

At compilation, Triton copies every global that a kernel reads. It refuses a launch if a global differs from its copy. A
NaN always differs from its copy. Triton's interpreter and ahead-of-time compilation do not compare globals with copies,
so tests that use them cannot find such a global.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Iterator
from types import CodeType, ModuleType
from typing import Any

import pytest

import srm_kernels

pytest.importorskip("triton")


def modules() -> list[ModuleType]:
    names = [m.name for m in pkgutil.walk_packages(srm_kernels.__path__, "srm_kernels.")]
    return [importlib.import_module(name) for name in names if name.endswith(("kernels", "parts"))]


def is_kernel(value: Any) -> bool:
    """Return whether a value is Triton's JITFunction, or InterpretedFunction under the interpreter.

    Both wrap a Python function as `fn`.
    """
    return type(value).__module__.startswith("triton.") and hasattr(value, "fn")


def names_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_of(constant)


def globals_read(kernels: list[Any]) -> dict[str, Any]:
    """Return the values of all globals that are read by these kernels, or by functions that the kernels call.

    Each key states which function reads which name.
    """
    found, seen = {}, set()
    while kernels:
        function = kernels.pop().fn
        if function in seen:
            continue
        seen.add(function)
        for name in names_of(function.__code__):
            value = function.__globals__.get(name)
            if is_kernel(value):
                kernels.append(value)
            elif value is not None and not isinstance(value, ModuleType):
                found[f"{function.__module__}.{function.__name__} reads {name}"] = value
    return found


def test_no_kernel_reads_a_global_that_differs_from_its_own_copy():
    kernels = [value for module in modules() for value in vars(module).values() if is_kernel(value)]
    read = globals_read(kernels)
    assert any(name.endswith("reads INFINITY") for name in read)
    assert [name for name, value in read.items() if copy.deepcopy(value) != value] == []
