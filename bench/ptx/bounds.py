"""Estimate how long a launch keeps each unit of a GPU busy, and which unit limits the launch.

The emulator counts how often each PTX instruction is executed. However, a GPU does not execute PTX: ptxas
translates PTX to SASS, and a cubin contains this SASS. If the launch has a cubin, the instructions of each
unit are therefore counted in the SASS, otherwise in the PTX. The emulator does not execute SASS, so it
estimates how often a SASS instruction is executed. The estimate is the mean number of executions of the PTX
instructions of the same source line. Latencies and caches are not modelled. All units are assumed to work at
the same time.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from bench.occupancy import occupancy

from .counting import ptx_counts
from .device import Launch
from .rates import Gpu
from .sass import sass_counts


def bound(launch: Launch, gpu: Gpu, *, batch: int = 1, use_sass: bool = True) -> dict[str, Any]:
    """Estimate the busy time of every unit of a GPU for a launch whose instructions were counted.

    Args:
        launch: A launch executed with `count=True`.
        gpu: The GPU, one of `rates.GPUS`.
        batch: Number of copies of the grid that are launched at once.
        use_sass: Whether to count the SASS of the cubin instead of the PTX. If there is no cubin, the PTX is counted.

    Returns:
        A dictionary with these entries:

        - "kernel": name of the kernel.
        - "blocks": number of thread blocks in all copies of the grid.
        - "warps": warps per thread block.
        - "registers": registers per thread, from the SASS. If the SASS is not counted, 128 is assumed.
        - "resident": thread blocks that one SM can hold at once.
        - "waves": blocks / (SMs × resident).
        - "uneven": the largest number of thread blocks on one SM, divided by the mean number per SM.
        - "busy": busy time of each unit, in µs.
        - "bottleneck": the unit with the largest busy time.
        - "us": estimated time of the launch in µs. The busy time of every unit except "dram" is multiplied by
          "uneven". The largest of the resulting times is "us".
        - "units": warp instructions by unit, from the SASS if it is counted, else from the PTX.
        - "ptx": PTX instructions by unit, and matrix products by shape and type.
        - "opcodes": SASS warp instructions by opcode, for the 25 most frequent opcodes.
        - "lines": SASS warp instructions by source line, for the 25 source lines with the most instructions.
        - "products": fused multiply-adds of matrix products, by type.
        - "repeated": number of matrix products divided by the number of distinct products. Every wgmma counts
          as distinct.
        - "conflicts": wavefronts of shared memory, divided by the number of wavefronts that would be needed
          if there were no bank conflicts.
        - "sector_bytes": bytes of all accessed sectors of global memory.
        - "asked_bytes": bytes that the lanes request from global memory.
        - "dram_bytes": bytes of the distinct accessed sectors, but at most the bytes of all tensor arguments.
    """
    counters = launch.counters
    scale = counters.scale * batch
    ptx = ptx_counts(launch)
    counted = sass_counts(launch) if use_sass else None
    units: Counter[str] = Counter()
    for name, times in (counted.units if counted else ptx).items():
        units[name] = times * batch
    registers = counted.registers if counted else 128
    wavefronts, ideal = (sum(v[i] for v in counters.shared_requests.values()) * scale for i in (1, 2))
    sectors, asked = (sum(v[i] for v in counters.global_requests.values()) * scale for i in (1, 2))
    dram = min((len(counters.read) + len(counters.written)) * 32 * scale, launch.tensor_bytes * batch)
    products = _products(ptx, batch)
    clocks = gpu.sms * gpu.ghz * 1000  # clock cycles of all SMs per µs
    busy = {
        "issue": sum(v for name, v in units.items() if " " not in name) / 4 / clocks,
        "fp32": units["fp32"] * 32 / gpu.fp32 / clocks,
        "alu": (units["alu"] + units["convert"]) * 32 / gpu.alu / clocks,
        "imad": units["imad"] * 32 / gpu.imad / clocks,
        "xu": units["xu"] * 32 / gpu.xu / clocks,
        "lsu": (wavefronts + units["shuffle"] + max(sectors / 4, units["global"])) / clocks,
        "mma": (products["bf16"] / gpu.bf16 + products["tf32"] / gpu.tf32) / clocks,
        "dram": dram / gpu.dram / 1000,
    }
    resident = max(1, occupancy(registers, launch.shared, launch.warps, gpu.capability).blocks)
    blocks = counters.grid * batch
    uneven = math.ceil(blocks / gpu.sms) * gpu.sms / blocks  # thread blocks on the fullest SM / mean over SMs
    return {
        "kernel": launch.name,
        "blocks": blocks,
        "warps": launch.warps,
        "registers": registers,
        "resident": resident,
        "waves": blocks / (gpu.sms * resident),
        "uneven": uneven,
        "busy": busy,
        "bottleneck": max(busy, key=busy.__getitem__),
        "us": max(us * (1 if name == "dram" else uneven) for name, us in busy.items()),
        "units": dict(units),
        "ptx": {name: times * batch for name, times in ptx.items()},
        "opcodes": {k: v * batch for k, v in counted.opcodes.most_common(25)} if counted else {},
        "lines": {f"{f}:{n}": v * batch for (f, n), v in counted.lines.most_common(25)} if counted else {},
        "products": dict(products),
        "repeated": _ratio(counters.products.values()),
        "conflicts": wavefronts / max(1.0, ideal),
        "sector_bytes": sectors * 32,
        "asked_bytes": asked,
        "dram_bytes": dram,
    }


def _products(ptx: Counter[str], batch: int) -> Counter[str]:
    """Count fused multiply-adds of matrix products by type; fp16 counts as "bf16", because both have the same rate."""
    products: Counter[str] = Counter()
    for name, times in ptx.items():
        found = re.match(r"w?g?mma m(\d+)n(\d+)k(\d+) (\w+)", name)
        if found:
            fma = times * batch * math.prod(map(int, found.groups()[:3]))
            products["tf32" if found.group(4) == "tf32" else "bf16"] += fma  # type: ignore[assignment]
    return products


def _ratio(entries: Iterable[list[int]]) -> float:
    """Return the number of all products divided by the number of distinct products."""
    both = list(entries)
    return sum(e[0] for e in both) / max(1, sum(e[1] for e in both))
