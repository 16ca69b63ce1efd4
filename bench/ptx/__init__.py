"""PTX emulator: execute compiled Triton kernels on CPU tensors, check their memory accesses and count instructions.

    with emulated_device(89) as device:
        nystrom_attention(q, k, v, 64, backend="triton")
    assert not device.reports()

README.md in this folder says what is checked and what is not modelled.
"""

from __future__ import annotations

from .device import Device, Launch, emulated_device
from .parse import Unsupported
from .state import Report

__all__ = ["Device", "Launch", "Report", "Unsupported", "emulated_device"]
