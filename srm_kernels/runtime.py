"""Which implementation of an operator can run here, and why not the others.

The one place that asks the hardware and the environment.
"""

from __future__ import annotations

import os
from typing import NamedTuple

ENVIRONMENT_VARIABLE = "SRM_KERNELS_BACKEND"
BACKENDS = {
    "reference": "the mathematics in plain PyTorch",
    "sdpa": "attention through scaled_dot_product_attention; the other operators have one plain-PyTorch form",
    "triton": "fused Triton kernels",
    "cuda": "CUDA kernels of csrc",
}
_MISSING = {
    "triton": "its Triton kernels are not written yet",
    "cuda": "its CUDA kernels are not written yet",
}


class BackendStatus(NamedTuple):
    """Whether an implementation can run here; `reason` says what it is, or why it cannot."""

    available: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """The implementations `backend=` accepts: name → (available here, what it is or why it cannot run).

    An operator without kernels of its own for an available backend says so when that backend is asked for.
    """
    return {
        name: BackendStatus(name not in _MISSING, _MISSING.get(name, description))
        for name, description in BACKENDS.items()
    }


def choose_backend(requested: str | None, implementations: tuple[str, ...], operator: str) -> str:
    """The implementation to run: the one asked for, or the first (fastest) of `implementations`.

    `requested` None reads SRM_KERNELS_BACKEND. A name outside `backends()` is a ValueError, a known one that
    this operator cannot run is a NotImplementedError with the reason: a request never falls back.
    """
    name = requested or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is None:
        return implementations[0]
    if name not in BACKENDS:
        origin = "backend" if requested else ENVIRONMENT_VARIABLE
        raise ValueError(f"{origin}={name!r}: expected None or one of {', '.join(BACKENDS)}")
    if name not in implementations:
        reason = _MISSING.get(name, f"it has no form for these arguments, only {', '.join(implementations)}")
        raise NotImplementedError(f"backend {name!r} cannot run {operator}: {reason}")
    return name
