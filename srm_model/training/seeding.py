"""Randomness and determinism for the length of a block; outside it everything is as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed Python, NumPy and PyTorch from non-negative integers, and restore all three at the end."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 — the global state is what is kept
    # Only a GPU that is in use has a state worth keeping; asking for the others' would start them.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 — libraries that draw from the global state
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Deterministic algorithms where PyTorch has them, a warning where it has not, restored at the end."""
    if not enabled:
        yield
        return
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    benchmark, cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, cudnn
