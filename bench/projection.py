"""Projected times for RTX cards, and theoretical occupancy: `python -m bench.projection`. Nothing here is measured.

A projection is the larger of two times, bytes over bandwidth and multiply-accumulates over matrix rate, plus a fixed
cost for every launch, at stated shares of the card's published peaks. It says what a card could do at best and what it
would do at the assumed shares; no card was run for it. Two amounts of bytes are given, and the truth lies between:
"fused" moves inputs, parameters and results once; "apart" writes and reads every map between the neck's steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness import latest, read
from bench.resources import case_words
from srm_model.config import NECKS, STAGES, SRMConfig
from srm_model.profiling.counting import map_sizes, neck_macs
from srm_model.profiling.tables import number

BANDWIDTH_SHARE = 0.75
MATRIX_SHARE = 0.4
LAUNCH_SECONDS = 4e-6
STEPS = 12  # of a link: DyT twice, three projections, norm, choice, system, solve, attention, pooling, W_O
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Multiply-accumulates of dense tensor cores a multiprocessor and clock, accumulated in fp32; TF32 serves fp32.
TENSOR_RATE = {"fp32": 128, "bf16": 256, "fp16": 256}
CHANNELS = (64, 128, 320, 512)  # of pvt_v2_b2's stages
PROJECTION = "PROJECTION, not measured"


class Card(NamedTuple):
    """Published figures: multiprocessors, boost clock in GHz, bandwidth in GB/s."""

    name: str
    capability: int
    multiprocessors: int
    clock: float
    bandwidth: float

    def matrix_rate(self, dtype: str) -> float:
        """Peak multiply-accumulates a second."""
        return self.multiprocessors * self.clock * 1e9 * TENSOR_RATE[dtype]


CARDS = (
    Card("RTX 3060", 86, 28, 1.777, 360),
    Card("RTX 3090", 86, 82, 1.695, 936),
    Card("RTX 4070", 89, 46, 2.475, 504),
    Card("RTX 4090", 89, 128, 2.520, 1008),
    Card("RTX 5090", 120, 170, 2.407, 1792),
)


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


class Work(NamedTuple):
    """What a call has to do at least."""

    macs: int
    fused_bytes: int
    apart_bytes: int
    fused_launches: int
    apart_launches: int


def neck_work(
    config: SRMConfig, neck: str, channels: Sequence[int], resolution: int, batch: int, dtype: str
) -> Work:
    """Forward of a neck on a pyramid of these channels.

    Launches apart: one for each of a link's twelve steps, each alignment, gate and fusion. Fused: a key side for
    each link, one query side for all, gate and fusion.
    """
    sizes = map_sizes(resolution, resolution)
    tokens = dict(zip(STAGES, (h * w for h, w in sizes), strict=True))
    item, C, P2 = ITEM_BYTES[dtype], config.channels, config.pool_size**2
    macs = batch * sum(neck_macs(config, neck, channels, sizes).values())
    acting = [(s, t) for s, t in config.links if t in config.fused_stages] if neck != "none" else []
    used = STAGES if neck != "none" else STAGES[-1:]
    inputs = sum(tokens[stage] * channels[stage - 1] for stage in used)
    weights = sum(channels[stage - 1] * C for stage in used) + 4 * C * C * len(acting)
    fused = item * (weights + batch * (inputs + C * P2))
    # Written once and read once: aligned maps; DyT, Q, Y of the target and DyT, K, V of the source, of every link.
    between = sum(tokens[stage] for stage in used) + sum(3 * tokens[t] + 3 * tokens[s] for s, t in acting)
    apart = fused + 2 * item * batch * C * between
    return Work(macs, fused, apart, 3 + len(acting), 2 + len(used) + STEPS * len(acting))


class Projection(NamedTuple):
    """Milliseconds; `best` at the published peaks and without launches, the other two at the assumed shares."""

    best: float
    fused: float
    apart: float
    bound: str  # what bounds `fused`: "bandwidth", "matrix rate" or "launches"


def project(
    card: Card,
    work: Work,
    dtype: str,
    *,
    bandwidth_share: float = BANDWIDTH_SHARE,
    matrix_share: float = MATRIX_SHARE,
    launch: float = LAUNCH_SECONDS,
) -> Projection:
    """Times of `work` on `card`."""
    rate, bandwidth = card.matrix_rate(dtype), card.bandwidth * 1e9

    computing = work.macs / (rate * matrix_share)
    fused, apart = (moved / (bandwidth * bandwidth_share) for moved in (work.fused_bytes, work.apart_bytes))
    times = {"bandwidth": fused, "matrix rate": computing, "launches": launch * work.fused_launches}
    return Projection(
        1e3 * max(work.fused_bytes / bandwidth, work.macs / rate),
        1e3 * (max(fused, computing) + times["launches"]),
        1e3 * (max(apart, computing) + launch * work.apart_launches),
        max(times, key=lambda name: times[name]),
    )


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


def assumptions(channels: Sequence[int], resolution: int, batch: int, dtype: str, **assumed: float) -> str:
    """What a projection stands on, in two sentences."""
    bandwidth = assumed.get("bandwidth_share", BANDWIDTH_SHARE)
    matrix, launch = assumed.get("matrix_share", MATRIX_SHARE), assumed.get("launch", LAUNCH_SECONDS)
    return (
        f"{PROJECTION}. Neck forward, {resolution}×{resolution}, B={batch}, {dtype}, stage channels "
        f"{', '.join(map(str, channels))}. Assumed: {bandwidth:.0%} of published bandwidth, {matrix:.0%} of published "
        f"dense tensor rate (TF32 for fp32, fp32 accumulation), {launch * 1e6:g} µs a launch, {STEPS} launches a link "
        "where apart, nothing found in a cache, boost clock throughout."
    )


def projection_table(
    config: SRMConfig, channels: Sequence[int], resolution: int, batch: int, dtype: str, **assumed: float
) -> tuple[list[str], list[list[str]]]:
    """One line a card and neck, each of which says that it is a projection."""
    header = ["card", "sm", "neck", "at peaks, ms", "fused, ms", "apart, ms", "bound by", "what this is"]
    lines = []
    for card in CARDS:
        for neck in NECKS:
            work = neck_work(config, neck, channels, resolution, batch, dtype)
            found = project(card, work, dtype, **assumed)
            times = [number(value) for value in (found.best, found.fused, found.apart)]
            lines.append([card.name, str(card.capability), neck, *times, found.bound, PROJECTION])
    return header, lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the projection with its assumptions, and occupancy where rows of resources are given."""
    from srm_model.cli.runs import table

    options = _parser().parse_args(arguments)
    try:
        if options.resources:
            print("theoretical occupancy, from offline compilation; no card was run")
            print(table(*kernel_table(latest(read(options.resources)))) + "\n")
        assumed = {
            "bandwidth_share": options.bandwidth_share,
            "matrix_share": options.matrix_share,
            "launch": options.launch_microseconds * 1e-6,
        }
        shape = (options.channels, options.resolution, options.batch, options.dtype)
        print(assumptions(*shape, **assumed))
        print(table(*projection_table(SRMConfig(), *shape, **assumed)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.projection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--channels", type=int, nargs=len(STAGES), default=list(CHANNELS), help="pvt_v2_b2's")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bf16", choices=tuple(ITEM_BYTES))
    parser.add_argument("--bandwidth-share", type=float, default=BANDWIDTH_SHARE)
    parser.add_argument("--matrix-share", type=float, default=MATRIX_SHARE)
    parser.add_argument("--launch-microseconds", type=float, default=LAUNCH_SECONDS * 1e6)
    parser.add_argument("--resources", type=Path, metavar="FILE", help="rows of bench.resources")
    return parser


if __name__ == "__main__":
    sys.exit(main())
