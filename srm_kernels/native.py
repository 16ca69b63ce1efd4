"""The C++ library of `csrc/`, if the installation built it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_cpu.so")
BUILT = LIBRARY.is_file()  # a constant, because torch.compile cannot trace file access


@cache
def load() -> None:
    """Register `torch.ops.srm_cpu`."""
    torch.ops.load_library(str(LIBRARY))
