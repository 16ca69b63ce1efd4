"""Devices that can run the Triton kernels, and the device properties that kernel launches depend on.

Kernel launches get the device properties from this module only, so a port to GPUs of another vendor begins
here. The port must also change `parts.precision` and `parts.finest_precision`, and add launch rules for the
compute capabilities of the new GPUs.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)
MOST_REGISTERS = 255  # of a thread


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_missing() -> str | None:
    """Return why no Triton kernel can run here, or None."""
    if not _has_triton():
        return "Triton is not installed: pip install triton"
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA GPUs, and this torch is built for AMD GPUs"
    if not torch.cuda.is_available() and cpu_launch_device() is None:
        return "there is no CUDA device; only TRITON_INTERPRET=1 runs kernels on the CPU, and it is not set"
    return None


@cache
def _has_triton() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:  # sys.modules has the module without a specification
        return False


def interpreting() -> bool:
    """Return whether Triton kernels run in Triton's interpreter, on CPU tensors.

    The interpreter is slow and is used for tests only.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


class LaunchDevice(NamedTuple):
    """A GPU for Triton kernels: its compute capability, and the bytes of shared memory that a thread block can use."""

    capability: tuple[int, int]
    shared_memory: int


def cpu_launch_device() -> LaunchDevice | None:
    """Return the GPU that is assumed for CPU tensors, or None if no Triton kernel can run on CPU tensors.

    In Triton's interpreter, the assumed GPU has compute capability 8.9 and unlimited shared memory. Code that emulates
    a GPU (`bench.ptx` and `bench.overhead`) replaces this function with one that returns the emulated GPU.
    """
    return LaunchDevice((8, 9), sys.maxsize) if interpreting() else None


def launch_device(tensor: Tensor) -> LaunchDevice:
    """Return the GPU whose properties determine the launches of Triton kernels on this tensor.

    For a tensor that is not on a GPU, such as a CPU tensor or a meta tensor, this is the GPU that `cpu_launch_device`
    returns. If `cpu_launch_device` returns None, it is a GPU with compute capability 8.9 and unlimited shared memory.
    """
    if tensor.is_cuda:
        properties = torch.cuda.get_device_properties(tensor.device)
        shared = int(getattr(properties, "shared_memory_per_block_optin", 0))
        return LaunchDevice(torch.cuda.get_device_capability(tensor.device), shared)
    return cpu_launch_device() or LaunchDevice((8, 9), sys.maxsize)


def capability(tensor: Tensor) -> tuple[int, int]:
    """Return the compute capability of the tensor's `launch_device`."""
    return launch_device(tensor).capability


def stages(tensor: Tensor) -> int:
    """Return the number of stages of a kernel's software pipeline on the tensor's `launch_device`."""
    return pipeline_stages(capability(tensor))


def pipeline_stages(capability: tuple[int, int]) -> int:
    """Return the number of pipeline stages of a kernel: 2, or 1 if two stages would cause a data race.

    The data race occurs on compute capability 9.x with Triton before 3.7.1. These versions insert no fence between a
    copy by cp.async and the wgmma instruction that reads the copied data (triton-lang/triton, pull request 10537).
    """
    return 1 if capability[0] == 9 and not _copies_are_fenced() else 2


@cache
def _copies_are_fenced() -> bool:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version("triton"))
    return found is None or tuple(map(int, found.groups())) >= (3, 7, 1)


def register_limit(registers: int | None = MOST_REGISTERS) -> dict[str, int]:
    """Return a dict with the launch option that limits the registers per thread; it is empty if `registers` is None.

    Triton has this option for NVIDIA GPUs only.
    """
    return {} if registers is None else {"maxnreg": registers}


def triton_refusal(tensor: Tensor) -> str | None:
    """Return why no Triton kernel can run on a tensor, or None. Only conditions that all kernels share are checked."""
    reason: str | None = triton_missing()
    if reason is not None:
        return reason
    if tensor.dtype == torch.float64:
        return "its kernels accept float32, bfloat16 and float16, and the tensors are float64"
    if tensor.device.type not in ("cuda", "cpu", "meta"):
        return f"its kernels run on CUDA devices, and the tensors are on {tensor.device}"
    if tensor.device.type == "cpu" and cpu_launch_device() is None:
        return "the tensors are on the CPU; only TRITON_INTERPRET=1 runs its kernels there"
    if launch_device(tensor).capability < LEAST_CAPABILITY:
        return f"its kernels need compute capability {'.'.join(map(str, LEAST_CAPABILITY))} or higher"
    return None


def roomy(tensor: Tensor, kibibytes: int = 160) -> bool:
    """Return whether a thread block can use `kibibytes` KiB of shared memory.

    Consumer GPUs have less than the default of 160 KiB: at most 99 KiB.
    """
    return launch_device(tensor).shared_memory >= kibibytes * 1024
