"""The compiled CUDA kernels of csrc, where the install built them: one library on torch's stable ABI."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_cuda.so")
BUILT = LIBRARY.is_file()  # asked once: torch.compile cannot trace a look at the disk


def missing() -> str | None:
    """Why the kernels cannot run here; None where they can."""
    if not BUILT:
        return "csrc is not built; installing the package with nvcc on PATH and torch's headers in place builds it"
    return None if torch.cuda.is_available() else "there is no CUDA device"


@cache
def load() -> None:
    """Make `torch.ops.srm_cuda` known."""
    torch.ops.load_library(str(LIBRARY))
