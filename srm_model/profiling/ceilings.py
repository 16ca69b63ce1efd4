"""Measure the highest copy bandwidth and matrix-product throughput of a device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from srm_model.profiling.timing import Effort, Times, measure

COPY_BYTES = {"cuda": 1 << 28, "cpu": 1 << 26}  # much larger than the caches
MATRIX_SIDE = {"cuda": 8192, "cpu": 768}


class Ceilings(NamedTuple):
    """Highest copy bandwidth and matrix-product throughput that were measured on a device."""

    bandwidth: float  # bytes that a large copy reads and writes per second
    matrix_rate: float  # multiply-accumulates per second of a large square matrix product


def ceilings(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Ceilings:
    """Measure the bandwidth of a large copy and the throughput of a large matrix product.

    With `small`, the copy and the matrices are smaller, so the measurement is faster but less accurate.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    size, side = COPY_BYTES[kind] >> (4 if small else 0), MATRIX_SIDE[kind] >> (2 if small else 0)
    effort = Effort.for_device(device, warmup=3, repeats=10, seconds=1.0)
    copy, product = _copy(size, device, effort), _product(side, dtype, device, effort)
    return Ceilings(2 * size / (copy * 1e-3), side**3 / (product * 1e-3))


def _copy(size: int, device: torch.device, effort: Effort) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _best(measure(lambda: target.copy_(source), device, effort))


def _product(side: int, dtype: torch.dtype, device: torch.device, effort: Effort) -> float:
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return _best(measure(lambda: left @ right, device, effort))


def _best(times: Times) -> float:
    """Return `times.least` or `times.typical`, whichever is shorter.

    `least` is the shortest elapsed time. On a CPU with one thread, `typical` is the median CPU time, which can be
    shorter than `least`, because other processes lengthen elapsed times but affect CPU times only a little. In all
    other cases, `typical` is the median elapsed time, which is never shorter than `least`.
    """
    return min(times.least, times.typical)
