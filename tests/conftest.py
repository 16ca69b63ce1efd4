"""What every test relies on: one thread, reproducible hypothesis examples, the optional shared data, and Triton's
interpreter, which runs kernels on CPU tensors, where there is no GPU. It is asked for before Triton is imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
settings.register_profile("srm", deadline=None, derandomize=True)
settings.load_profile("srm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs kernels on a module's DEVICE is asked of a GPU, where there is one, as what only a GPU shows is."""
    for item in items:
        if getattr(getattr(item, "module", None), "DEVICE", None) == "cuda":
            item.add_marker(pytest.mark.gpu)


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
