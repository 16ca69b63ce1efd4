"""Configure all tests.

Tests use one thread and reproducible hypothesis examples. Without a GPU, kernels run on CPU tensors in Triton's
interpreter, which is selected before Triton is imported. `compiled_module.py` runs the tests of compiled kernels.

The interpreter computes matrix products with NumPy's BLAS. The BLAS sums in an order that depends on the processor and
on the other rows of a tile. In these tests, products are therefore computed in fp64 and rounded once, so that results
do not depend on the BLAS.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled_module import CompiledModule, is_compiled, only_compiled
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("srm", deadline=None, derandomize=True)
settings.load_profile("srm")


def pytest_configure(config: pytest.Config) -> None:
    """Use an empty folder for stored verdicts, and select Triton's interpreter if there is no GPU.

    The interpreter is not selected in a session that has only tests of compiled kernels.
    """
    folder = tempfile.TemporaryDirectory(prefix="srm-kernels-")
    config.add_cleanup(folder.cleanup)
    os.environ["SRM_KERNELS_CACHE"] = folder.name
    if torch.cuda.is_available():
        return
    if only_compiled(config):
        os.environ.pop("TRITON_INTERPRET", None)
        return
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        _multiply_in_fp64()


def _multiply_in_fp64() -> None:
    from triton.runtime import interpreter

    def create_dot(builder: Any, a: Any, b: Any, accumulator: Any, *precision: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        total = product.astype(accumulator.data.dtype) + accumulator.data
        return interpreter.TensorHandle(total, accumulator.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Run the tests of compiled kernels in another process if this process uses Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1" and is_compiled(module_path):
        return CompiledModule.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the mark `gpu` to tests of modules whose DEVICE is "cuda", and move tests with the mark `forks` to the front.

    Tests that fork must run first: with a CUDA build of torch, code traced by torch.compile leaves autograd threads
    behind, and a process with autograd threads cannot be forked.
    """
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)
    for item in items:
        if getattr(getattr(item, "module", None), "DEVICE", None) == "cuda":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def no_pretended_device() -> Iterator[None]:
    """Check after each test that `choice.pretended`, which treats CPU tensors as GPU tensors, is no longer active."""
    from srm_kernels import choice

    yield
    assert choice._pretended is None


@pytest.fixture(scope="session", autouse=True)
def exact_libraries() -> Iterator[None]:
    """On a GPU, compute fp32 convolutions and matrix products in fp32 instead of TF32, with deterministic algorithms.

    TF32 has 11 significant bits, so the reference would be less accurate than the tested kernel. Without deterministic
    algorithms, two passes could give different bits because cuDNN selects different algorithms.
    """
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, False, True, False
    yield
    cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Return a function that locates a file in the shared folder, or skips the test if the file is missing.

    The environment variable SRM_SHARED has the path of the folder. The default is `shared` beside the checkout.
    """
    checkout = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("SRM_SHARED") or checkout.parent / "shared")

    def locate(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"no {name} in the shared folder")
        return path

    return locate
