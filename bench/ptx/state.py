"""Data that all parts of an execution use: reports, groups of lanes, and the arrays of the running blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import UNSIGNED, i2, i4, i8, u4
from .counting import Counters
from .parse import Unsupported

if TYPE_CHECKING:
    from .memory import Allocation
    from .program import Program

# These numbers replace the number of the warp that read or wrote a word of global memory, if several warps did.
SEVERAL_READERS, SEVERAL_WRITERS = -2, -3
# A mark of shared memory is 1024 times the number of barriers passed, plus the number of the warp. If several warps
# made the access, SEVERAL replaces the number of the warp.
SEVERAL = 1023
UNWRITTEN, IN_FLIGHT = -1, -2  # IN_FLIGHT: a cp.async that has not completed


@dataclass
class Report:
    """A fault of one instruction.

    Attributes:
        kind: A report of the table "Checks" in README.md, such as "race".
        text: Text of the instruction.
        line: Line number in the PTX.
        source: File and line of the Triton source.
        detail: What was wrong.
        count: Number of lanes with this fault, over all blocks.
    """

    kind: str
    text: str
    line: int
    source: str
    detail: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail} at PTX line {self.line} `{self.text}` ({self.source}), {self.count} lanes"


class Group:
    """Lanes that execute basic blocks together. They belong to the same warps of one or several blocks of the grid.

    Args:
        state: The execution that the group belongs to.
        blocks: Numbers of the blocks within the grid.
        warps: Numbers of the warps within each block.
    """

    def __init__(self, state: State, blocks: np.ndarray, warps: np.ndarray) -> None:
        grid = state.grid
        self.count, self.width = len(blocks), len(warps) * 32
        self.lanes = self.count * self.width
        tid = np.tile((warps[:, None] * 32 + np.arange(32)).ravel(), self.count)
        self.block = np.repeat(np.arange(self.count), self.width)
        self.warp = (tid // 32).astype(i2)
        self.base = self.block.astype(i8) * state.shared_size
        of_block = np.repeat(blocks, self.width)
        self.special = {
            "tid.x": tid.astype(u4),
            "tid.y": u4(0),
            "tid.z": u4(0),
            "ntid.x": u4(state.warps * 32),
            "ntid.y": u4(1),
            "ntid.z": u4(1),
            "ctaid.x": (of_block % grid[0]).astype(u4),
            "ctaid.y": (of_block // grid[0] % grid[1]).astype(u4),
            "ctaid.z": (of_block // (grid[0] * grid[1])).astype(u4),
            "nctaid.x": u4(grid[0]),
            "nctaid.y": u4(grid[1]),
            "nctaid.z": u4(grid[2]),
            "laneid": (tid % 32).astype(u4),
            "warpid": (tid // 32).astype(u4),
        }
        self.registers: list[Any] = [
            np.bool_(False) if r.width == 0 else UNSIGNED[r.width](0) for r in state.program.kernel.registers
        ]
        self.counter: np.ndarray | None = None  # program counter of every lane; None: all are at `at`
        self.at = 0
        self.version = -1  # version of `marks`
        self.marks = np.zeros(0, i4)
        self.parameters = state.parameters
        self.local = np.zeros(self.lanes * state.program.kernel.local_bytes, np.uint8)
        self.committed = np.zeros(self.lanes, i4)  # groups of cp.async that each lane committed
        self.copies: list[list[Any]] = []  # cp.async in flight
        self.products = np.zeros(self.lanes // 32, i4)  # groups of wgmma that each warp committed
        self.pending: list[list[Any]] = []  # wgmma in flight
        self.unfenced: dict[
            int, Any
        ] = {}  # register of wgmma: the warps that wrote it since their last wgmma.fence

    def param(self, address: Any, width: int) -> Any:
        """Load from the parameters of the kernel."""
        whole = self.parameters[: len(self.parameters) // width * width]
        return whole.view(UNSIGNED[width])[address // UNSIGNED[8](width)]

    def full(self, x: Any) -> np.ndarray:
        """Broadcast a value that all lanes share to one entry per lane."""
        return x if getattr(x, "ndim", 0) else np.broadcast_to(x, (self.lanes,))

    def active(self, mask: Any) -> np.ndarray:
        """Return which warps take part, where `mask` holds the active lanes, or None for all."""
        if mask is None:
            return np.ones(self.lanes // 32, bool)
        return self.full(mask).reshape(-1, 32).any(1)


class State:
    """Data of one execution. A granule is the smallest piece of shared memory that the kernel accesses."""

    program: Program
    grid: list[int]
    warps: int  # per block
    parameters: np.ndarray
    shared_size: int  # bytes between the shared memory of two blocks
    shared_limit: int  # bytes per block
    check: bool
    count: bool
    global_checks: bool

    allocations: Sequence[Allocation]
    starts: list[int]
    start_array: np.ndarray

    first: int  # number of the block that is first in the arrays below
    epoch: np.ndarray  # per block: barriers passed
    shared: dict[int, np.ndarray]  # by width in bytes
    wrote: np.ndarray  # per granule: mark of the last write
    read: np.ndarray  # per granule: mark of the last read
    version: int  # changes with `epoch`
    reading: np.ndarray  # per granule: products in flight that read it
    stamp: np.ndarray  # per granule: proxy fences of the block before it was written
    fences: np.ndarray  # per block: proxy fences passed

    def __init__(self) -> None:
        self.version = 0
        self.reports: dict[tuple[str, int], Report] = {}
        self.counters = Counters(
            np.zeros(len(self.program.kernel.blocks), np.int64), grid=int(np.prod(self.grid))
        )

    def report(self, kind: str, number: int, detail: str, count: int) -> None:
        """Record a fault of the instruction with this number; repeated ones are summed."""
        key = (kind, number)
        if key in self.reports:
            self.reports[key].count += count
            return
        ins = self.program.kernel.instructions[number]
        source = f"{self.program.kernel.files.get(ins.loc[0], '?')}:{ins.loc[1]}"
        self.reports[key] = Report(kind, ins.text, ins.line, source, detail, count)

    def unsupported(self, number: int, reason: str) -> Unsupported:
        """Return the error for an instruction in a form that is not modelled."""
        ins = self.program.kernel.instructions[number]
        return Unsupported(f"{ins.text} (line {ins.line}): {reason}")

    def now(self, group: Group, lanes: Any) -> np.ndarray:
        """Return the marks of the present moment for lanes of a group, None for all."""
        if group.version != self.version:
            group.marks = (self.epoch[group.block] << 10) | group.warp
            group.version = self.version
        return group.marks if lanes is None else group.marks[lanes]

    def chunks(self, array: np.ndarray) -> np.ndarray:
        """View an array over granules by chunks of 16 bytes."""
        return array.reshape(-1, 16 // self.program.granule)
