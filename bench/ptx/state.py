"""The state of an emulated kernel launch: reports, groups of lanes, and the arrays of the running thread blocks."""

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

# For each word of global memory, the index of the last reading or writing warp is stored. If several warps read or
# wrote the word, one of these values is stored instead of the index.
SEVERAL_READERS, SEVERAL_WRITERS = -2, -3
# A mark describes an access to shared memory. It is 1024 times the number of barriers that the thread block has passed,
# plus the index of the warp. If several warps made the access, SEVERAL replaces the index.
SEVERAL = 1023
UNWRITTEN, IN_FLIGHT = -1, -2  # IN_FLIGHT: a cp.async that has not completed


@dataclass
class Report:
    """A report on one instruction. It is a fault, unless its kind is "copies".

    Attributes:
        kind: Name of the report in the table "Checks" of README.md, such as "race".
        text: Text of the instruction.
        line: Line number in the PTX.
        source: File and line of the Triton source.
        detail: What was wrong.
        count: Number of affected lanes or other units, summed over all thread blocks. Most reports count lanes. Some
            reports on races and copies count a lane once for each affected word that it accesses. Reports of the kind
            "barrier" count thread blocks or warpgroups. If the instruction is a wgmma, "shared bounds" counts chunks
            of 16 bytes of shared memory, "race" and "proxy" count granules of shared memory (`Program.granule`), and
            "uninitialised" counts 1 for each execution of the wgmma.
    """

    kind: str
    text: str
    line: int
    source: str
    detail: str
    count: int = 1

    def __str__(self) -> str:
        place = f"PTX line {self.line} `{self.text}` ({self.source})"
        return f"{self.kind}: {self.detail} at {place}, counted {self.count} times"


class Group:
    """Lanes that execute basic blocks together: all lanes of the given warps in each of the given thread blocks.

    Args:
        state: The execution that the group belongs to.
        blocks: Indices of the thread blocks in the grid.
        warps: Indices of the warps in each thread block.
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
        self.counter: np.ndarray | None = None  # next basic block of every lane; None: all at `at`
        self.at = 0
        self.version = -1  # version of `marks`
        self.marks = np.zeros(0, i4)
        self.parameters = state.parameters
        self.local = np.zeros(self.lanes * state.program.kernel.local_bytes, np.uint8)
        self.committed = np.zeros(self.lanes, i4)  # cp.async groups per lane
        self.copies: list[list[Any]] = []  # cp.async in flight
        self.products = np.zeros(self.lanes // 32, i4)  # wgmma groups per warp
        self.pending: list[list[Any]] = []  # wgmma in flight
        self.unfenced: dict[
            int, Any
        ] = {}  # register of wgmma → warps that wrote the register since their last wgmma.fence

    def param(self, address: Any, width: int) -> Any:
        """Load a value of `width` bytes from the parameters of the kernel."""
        whole = self.parameters[: len(self.parameters) // width * width]
        return whole.view(UNSIGNED[width])[address // UNSIGNED[8](width)]

    def full(self, x: Any) -> np.ndarray:
        """Return a value as an array with one entry per lane; a scalar is broadcast."""
        return x if getattr(x, "ndim", 0) else np.broadcast_to(x, (self.lanes,))

    def active(self, mask: Any) -> np.ndarray:
        """Return for each warp whether it has a lane that is active in `mask`; None means that all lanes are active."""
        if mask is None:
            return np.ones(self.lanes // 32, bool)
        return self.full(mask).reshape(-1, 32).any(1)


class State:
    """Data of one execution of a kernel. Shared memory is divided into granules, whose size is `Program.granule`."""

    program: Program
    grid: list[int]
    warps: int  # per thread block
    parameters: np.ndarray
    shared_size: int  # bytes from one thread block's shared memory to the next
    shared_limit: int  # bytes per thread block
    check: bool
    count: bool
    global_checks: bool

    allocations: Sequence[Allocation]
    starts: list[int]
    start_array: np.ndarray

    first: int  # index of the first thread block in the arrays below
    epoch: np.ndarray  # per thread block: barriers passed
    shared: dict[int, np.ndarray]  # by width in bytes
    wrote: np.ndarray  # per granule: mark of the last write
    read: np.ndarray  # per granule: mark of the last read
    version: int  # changes with `epoch`
    reading: np.ndarray  # per granule: wgmma in flight that read the granule
    stamp: np.ndarray  # per granule: value of `fences` at the last write
    fences: np.ndarray  # per thread block: proxy fences passed

    def __init__(self) -> None:
        self.version = 0
        self.reports: dict[tuple[str, int], Report] = {}
        self.counters = Counters(
            np.zeros(len(self.program.kernel.blocks), np.int64), grid=int(np.prod(self.grid))
        )

    def report(self, kind: str, number: int, detail: str, count: int) -> None:
        """Record a report on an instruction, or add `count` to the earlier report of this kind on the instruction."""
        key = (kind, number)
        if key in self.reports:
            self.reports[key].count += count
            return
        ins = self.program.kernel.instructions[number]
        source = f"{self.program.kernel.files.get(ins.loc[0], '?')}:{ins.loc[1]}"
        self.reports[key] = Report(kind, ins.text, ins.line, source, detail, count)

    def unsupported(self, number: int, reason: str) -> Unsupported:
        """Return the error for a use of an instruction that the emulator does not model."""
        ins = self.program.kernel.instructions[number]
        return Unsupported(f"{ins.text} (line {ins.line}): {reason}")

    def now(self, group: Group, lanes: Any) -> np.ndarray:
        """Return the marks of an access to shared memory that the given lanes of a group make now.

        A mark is an integer made of the index of the warp and the number of barriers that its thread block has passed
        (see the comment above `SEVERAL`). If `lanes` is None, all lanes of the group access the memory.
        """
        if group.version != self.version:
            group.marks = (self.epoch[group.block] << 10) | group.warp
            group.version = self.version
        return group.marks if lanes is None else group.marks[lanes]

    def chunks(self, array: np.ndarray) -> np.ndarray:
        """View an array with one entry per granule as an array of shape (chunks of 16 bytes, granules per chunk)."""
        return array.reshape(-1, 16 // self.program.granule)
