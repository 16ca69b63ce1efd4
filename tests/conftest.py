"""What every test relies on: one thread, reproducible hypothesis examples, the optional shared data, and Triton's
interpreter, which runs kernels on CPU tensors, where there is no GPU. It is chosen before Triton is imported;
`compiled_module.py` says how tests of compiled kernels run.

The interpreter multiplies by NumPy's BLAS, whose order of summation depends on the processor and on the other rows of a
tile. Here products are computed in fp64 and rounded once, so that tests judge the kernels and not the BLAS."""

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
    """Let no test follow a verdict of this machine; and choose Triton's interpreter where there is no GPU.

    Tests that need compiled kernels, where there are no others, run without the interpreter.
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
    """Run the tests of compiled kernels in a process of their own where this one interprets."""
    if os.environ.get("TRITON_INTERPRET") == "1" and is_compiled(module_path):
        return CompiledModule.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs kernels on a module's DEVICE is asked of a GPU, where there is one, as what only a GPU shows is.

    Tests that fork come first: with a CUDA build of torch, code that torch.compile traced leaves threads of autograd
    behind, and a process that has them cannot be forked.
    """
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)
    for item in items:
        if getattr(getattr(item, "module", None), "DEVICE", None) == "cuda":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def no_pretended_device() -> Iterator[None]:
    """No test leaves CPU tensors as those of a pretended device to the next."""
    from srm_kernels import choice

    yield
    assert choice._pretended is None


@pytest.fixture(scope="session", autouse=True)
def exact_libraries() -> Iterator[None]:
    """On a GPU torch takes fp32 convolutions and products in fp32, not in TF32, and by the same algorithm each time.

    With TF32, 11 bits, the reference would be the inexact side of a comparison; and a test that two passes agree to the
    bit would judge cuDNN's choice between algorithms.
    """
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, False, True, False
    yield
    cudnn.allow_tf32, products.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """A function from a name under the shared folder to its path; the test is skipped where it is not there.

    The folder is named by SRM_SHARED, or is called `shared` and lies beside the checkout.
    """
    checkout = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("SRM_SHARED") or checkout.parent / "shared")

    def locate(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"no {name} in the shared folder")
        return path

    return locate
