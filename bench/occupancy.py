"""Theoretical occupancy of compiled kernels: the thread blocks and warps that a multiprocessor can hold at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from bench.resources import case_words


class Limits(NamedTuple):
    """Capacity of a multiprocessor.

    `shared` is the shared memory of the multiprocessor in bytes. One thread block can use at most `shared_block` bytes
    of this memory.
    """

    warps: int
    blocks: int
    registers: int
    shared: int
    shared_block: int


_KI = 1024
LIMITS = {
    80: Limits(64, 32, 65_536, 164 * _KI, 163 * _KI),
    86: Limits(48, 16, 65_536, 100 * _KI, 99 * _KI),
    89: Limits(48, 24, 65_536, 100 * _KI, 99 * _KI),
    90: Limits(64, 32, 65_536, 228 * _KI, 227 * _KI),
    120: Limits(48, 24, 65_536, 100 * _KI, 99 * _KI),
}
_PARTITIONS = 4  # partitions of a multiprocessor, each with its own registers
_REGISTER_UNIT = 256  # the registers of a warp are a multiple of this number
_SHARED_UNIT, _SHARED_RESERVED = 128, _KI  # bytes; the driver reserves 1 KiB per thread block
_MOST_REGISTERS = 255  # per thread


class Occupancy(NamedTuple):
    """Theoretical occupancy of a kernel on one multiprocessor.

    Attributes:
        blocks: Number of resident thread blocks.
        warps: Number of resident warps.
        share: `warps` divided by the largest number of warps that the multiprocessor can hold.
        limit: What limits `blocks`: "blocks", "warps", "registers" or "shared memory".
    """

    blocks: int
    warps: int
    share: float
    limit: str


def occupancy(registers: int, shared: int, warps: int, capability: int) -> Occupancy:
    """Return the theoretical occupancy of a kernel. A kernel that cannot be launched has 0 resident thread blocks.

    Args:
        registers: Registers per thread.
        shared: Bytes of shared memory per thread block.
        warps: Warps per thread block.
        capability: Compute capability × 10: 80, 86, 89, 90 or 120.

    Raises:
        ValueError: The capability is unknown, `registers` or `shared` is negative, or `warps` is less than 1.
    """
    if capability not in LIMITS:
        raise ValueError(f"capability={capability}: expected one of {', '.join(map(str, LIMITS))}")
    if registers < 0 or shared < 0 or warps < 1:
        raise ValueError(
            f"registers={registers}, shared={shared}, warps={warps}: expected registers and shared memory of at "
            "least 0 and at least one warp"
        )
    has = LIMITS[capability]
    per_warp = _up(registers * 32, _REGISTER_UNIT)
    warps_by_registers = has.registers // _PARTITIONS // per_warp * _PARTITIONS if per_warp else has.warps
    per_block = _up(shared + _SHARED_RESERVED, _SHARED_UNIT)
    by = {
        "blocks": has.blocks,
        "warps": has.warps // warps,
        "registers": 0 if registers > _MOST_REGISTERS else warps_by_registers // warps,
        "shared memory": 0 if shared > has.shared_block else has.shared // per_block,
    }
    limit = min(by, key=lambda name: by[name])
    blocks = by[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / has.warps, limit)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def kernel_table(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines of a table that shows the resources and theoretical occupancy of kernels.

    If a kernel needs the same resources for several shapes, these shapes share one line of the table. The line shows
    the first shape.

    Args:
        rows: Rows of `bench.resources`.

    Raises:
        ValueError: A row lacks a column.
    """
    header = ["operator", "kernel", "sm", "warps", "registers", "spilled B", "shared KiB", "blocks"]
    header += ["occupancy %", "limited by", "shape"]
    lines: dict[tuple[str, ...], str] = {}
    for row in rows:
        try:
            found = occupancy(row["registers"], row["shared"], row["warps"], row["architecture"])
            copied = (
                row[name] for name in ("operator", "kernel", "architecture", "warps", "registers", "spilled")
            )
            computed = (found.blocks, f"{100 * found.share:.0f}", found.limit)
            line = (*map(str, copied), f"{row['shared'] / _KI:.1f}", *map(str, computed))
            lines.setdefault(line, case_words(row["case"]))
        except KeyError as missing:
            raise ValueError(
                f"a row of resources lacks {missing}; expected the columns of bench.resources"
            ) from None
    return header, [[*line, shape] for line, shape in lines.items()]
