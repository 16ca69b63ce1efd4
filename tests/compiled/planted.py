"""Emulated devices with planted faults, for options such as `--device planted:faulty`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.ptx.verify import EmulatedDevice
from srm_kernels.gate import kernels as gate_kernels
from srm_kernels.pool import kernels as pool_kernels
from srm_kernels.scale import kernels as scale_kernels
from srm_kernels.scale.kernels import row_offsets, tanh, token_offsets
from srm_kernels.verify import measure, probe


@triton.jit
def wrong_dyt_kernel(
    x_ptr, alpha_ptr, weight_ptr, bias_ptr, out_ptr, M, inner, x_outer, x_inner, x_column, C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute DyT with a weight that is too large by 0.1 %."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < M)[:, None] & (columns < C)[None, :]
    offsets = row_offsets(rows, inner, x_outer, x_inner)[:, None] + columns.to(tl.int64)[None, :] * x_column
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    out = 1.001 * weight[None, :] * tanh(tl.load(alpha_ptr).to(tl.float32) * x) + bias[None, :]
    tl.store(out_ptr + token_offsets(rows, columns, C, 1), out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def racing_kernel(x_ptr, BLOCK: tl.constexpr):
    """Read values that another warp writes, with no barrier after the write. The results are correct only by chance."""
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 1.0 + i)
    mirrored = tl.load(x_ptr + BLOCK - 1 - i)
    tl.store(x_ptr + i, mirrored * 2.0)


@triton.jit
def large_kernel(x_ptr, SIZE: tl.constexpr):
    """Multiply matrices that need more shared memory than a block has."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = x_ptr + i * SIZE + j
    tl.store(at, tl.dot(tl.load(at), tl.load(at), input_precision="tf32"))


@triton.jit
def endless_kernel(x_ptr):
    value = tl.load(x_ptr, volatile=True)
    while value == value:
        value = tl.load(x_ptr, volatile=True)


def before(plain: Any, fault: Any) -> Any:
    """Return a function that calls `fault` and then `plain`."""

    def planted(*args: Any) -> Any:
        fault()
        return plain(*args)

    return planted


def race() -> None:
    racing_kernel[(1,)](torch.zeros(256), BLOCK=256)


def refusal() -> None:
    large_kernel[(1,)](torch.zeros(128, 128), SIZE=128)


def hang() -> None:
    endless_kernel[(1,)](torch.zeros(1))


_broken = False


def illegal_access() -> None:
    """Raise an error and mark this process as broken, as an illegal memory access breaks a CUDA context."""
    global _broken
    _broken = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def context_works() -> None:
    if _broken:
        raise RuntimeError("CUDA error: the context is broken")


def compile_error() -> None:
    raise RuntimeError("PassManager::run failed\nmore about it")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")


def wrong_bits(plain: Any) -> Any:
    """Return a function that calls `plain` and changes the last bit of the results in every other call."""
    calls = 0

    def planted(*args: Any) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return tuple(x * (1 + 2**-23 * (calls % 2)) for x in plain(*args))

    return planted


@contextmanager
def plant() -> Iterator[None]:
    changed = [
        (scale_kernels, "_dyt_kernel", wrong_dyt_kernel),
        (scale_kernels, "rms_scale", wrong_bits(scale_kernels.rms_scale)),
        (scale_kernels, "tau_loss", before(scale_kernels.tau_loss, refusal)),
        (gate_kernels, "biased_gelu", before(gate_kernels.biased_gelu, illegal_access)),
        (gate_kernels, "gate_logits", before(gate_kernels.gate_logits, os.abort)),
        (gate_kernels, "gated_fusion", before(gate_kernels.gated_fusion, race)),
        (gate_kernels, "gate_losses", before(gate_kernels.gate_losses, context_works)),
        (pool_kernels, "adaptive_pool", before(pool_kernels.adaptive_pool, hang)),
    ]
    with ExitStack() as stack:
        for module, name, planted in changed:
            stack.enter_context(mock.patch.object(module, name, planted))
        yield


@contextmanager
def plant_errors() -> Iterator[None]:
    with (
        mock.patch.object(gate_kernels, "gated_fusion", before(gate_kernels.gated_fusion, compile_error)),
        mock.patch.object(scale_kernels, "dyt", before(scale_kernels.dyt, out_of_memory)),
    ):
        yield


@contextmanager
def plant_no_compiler() -> Iterator[None]:
    with mock.patch.object(probe, "works", side_effect=RuntimeError("Failed to find C compiler")):
        yield


@contextmanager
def plant_yardstick() -> Iterator[None]:
    """Make the step "eager" abort the process, as an error in a library can."""
    step = measure._step

    def planted(call: Any, inputs: Any, backend: str, direction: str) -> Callable[[], Any]:
        return os.abort if backend == "eager" else step(call, inputs, backend, direction)

    with mock.patch.object(measure, "_step", planted):
        yield


def unable() -> EmulatedDevice:
    return EmulatedDevice(89, plant_no_compiler)


def yardstick() -> EmulatedDevice:
    return EmulatedDevice(89, plant_yardstick)


def faulty() -> EmulatedDevice:
    return EmulatedDevice(89, plant)


def erring() -> EmulatedDevice:
    return EmulatedDevice(89, plant_errors)
