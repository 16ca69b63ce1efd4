"""The compiled library of csrc, where the install built it, on torch's stable ABI."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_cpu.so")
BUILT = LIBRARY.is_file()  # asked once: torch.compile cannot trace a look at the disk


@cache
def load() -> None:
    """Make `torch.ops.srm_cpu` known."""
    torch.ops.load_library(str(LIBRARY))
