"""Theoretical occupancy of compiled kernels: what a multiprocessor can hold at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from bench.resources import case_words


class Limits(NamedTuple):
    """What a multiprocessor holds: warps, blocks, 32-bit registers, bytes of shared memory, and most of it a block."""

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
_PARTITIONS = 4  # of a multiprocessor, each with its own registers
_REGISTER_UNIT = 256  # registers a warp is given are a multiple of this
_SHARED_UNIT, _SHARED_RESERVED = 128, _KI  # bytes; the driver keeps a KiB of every block
_MOST_REGISTERS = 255  # of a thread


class Occupancy(NamedTuple):
    """Blocks and warps that are resident together, as a share of the warps that would fit, and what limits them."""

    blocks: int
    warps: int
    share: float
    limit: str


def occupancy(registers: int, shared: int, warps: int, capability: int) -> Occupancy:
    """Theoretical occupancy of a kernel: registers a thread, bytes of shared memory a block, warps a block.

    capability: 80, 86, 89, 90 or 120. A kernel that cannot be launched has 0 blocks, and `limit` says why. ValueError
    for another capability or negative sizes.
    """
    if capability not in LIMITS:
        raise ValueError(f"capability={capability}: expected one of {', '.join(map(str, LIMITS))}")
    if registers < 0 or shared < 0 or warps < 1:
        raise ValueError(
            f"registers={registers}, shared={shared}, warps={warps}: expected none below 0, and at least one warp"
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
    """Rows of `bench.resources` with theoretical occupancy; shapes at which a kernel is the same are one line."""
    header = (
        "operator,kernel,sm,warps,registers,spilled B,shared KiB,blocks,occupancy %,limited by,shape".split(
            ","
        )
    )
    lines: dict[tuple[str, ...], str] = {}
    for row in rows:
        try:
            found = occupancy(row["registers"], row["shared"], row["warps"], row["architecture"])
            line = (
                row["operator"],
                row["kernel"],
                str(row["architecture"]),
                str(row["warps"]),
                str(row["registers"]),
                str(row["spilled"]),
                f"{row['shared'] / _KI:.1f}",
                str(found.blocks),
                f"{100 * found.share:.0f}",
                found.limit,
            )
            lines.setdefault(line, case_words(row["case"]))
        except KeyError as missing:
            raise ValueError(
                f"a row of resources lacks {missing}; expected those of bench.resources"
            ) from None
    return header, [[*line, shape] for line, shape in lines.items()]
