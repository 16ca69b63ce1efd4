"""The compiled libraries of csrc, where the install built them, on torch's stable ABI."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

LIBRARIES = {name: Path(__file__).with_name(f"_{name}.so") for name in ("cpu", "cuda")}
# Asked once: torch.compile cannot trace a look at the disk.
BUILT = {name for name, library in LIBRARIES.items() if library.is_file()}


def missing() -> str | None:
    """Why the CUDA kernels cannot run here; None where they can."""
    if "cuda" not in BUILT:
        return "csrc is not built; installing the package with nvcc on PATH and torch's headers in place builds it"
    return None if torch.cuda.is_available() else "there is no CUDA device"


@cache
def load(name: str) -> None:
    """Make `torch.ops.srm_<name>` known."""
    torch.ops.load_library(str(LIBRARIES[name]))
