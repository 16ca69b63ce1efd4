"""Seed random generators and enable deterministic algorithms for a block."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic


@contextmanager
def seeded(*entropy: int, rank: int = 0) -> Iterator[None]:
    """Seed the generators of Python, NumPy and PyTorch for the block, and restore their states afterwards.

    The seeds are derived from the non-negative integers `entropy`. The CPU generators have the same seeds on all ranks,
    because some random numbers apply to the whole batch and must be equal on all ranks. The seed of the GPU generator
    also depends on `rank`.
    """
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 — the global state is restored
    # Restore only the current GPU, because reading the state of another GPU would initialise that GPU.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 — libraries that draw from the global state
        torch.manual_seed(seed)
        if rank > 0 and torch.cuda.is_initialized():
            torch.cuda.manual_seed(int(np.random.SeedSequence((*entropy, rank)).generate_state(1)[0]))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def random_state() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy and PyTorch (CPU and current GPU) as JSON values."""
    version, python, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(python), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encoded(torch.get_rng_state()),
        "cuda": _encoded(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore states that `random_state` returned.

    Call this function inside a `seeded` block, so that the caller's states are restored at the end of the block.
    """
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(_decoded(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_decoded(state["cuda"]))


def _encoded(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use deterministic algorithms in the block, then restore the settings.

    Operations that have no deterministic algorithm still run, but PyTorch warns about them.
    """
    if not enabled:
        yield
        return
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    benchmark, cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # filling is for debugging only, and takes time
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, cudnn
