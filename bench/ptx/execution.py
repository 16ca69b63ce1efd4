"""Execute a kernel launch with NumPy arrays: each register is an array with one element per lane.

A group (`state.Group`) is a set of lanes that execute basic blocks together. If lanes diverge, the lanes
whose next basic block has the lowest index run first. The argument `order` of `Execution` sets the order in
which the warps of a thread block run:

- "together": all warps run in lockstep and do not stop at barriers. Many thread blocks run at once.
- "forward": the warps run one after the other, from the first to the last, each up to the next barrier.
  Thread blocks also run one after the other.
- "reversed": like "forward", but from the last warp to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arithmetic import UNSIGNED, i4, i8, u1, where
from .memory import Allocation, GlobalMemory, LocalMemory
from .parse import Instruction, Unsupported
from .products import MatrixProducts
from .program import Program
from .shared import SharedMemory
from .state import UNWRITTEN, Group
from .warpgroups import WarpgroupProducts
from .warps import Warps

EXITED = 2**30
LANES = 4096  # approximate number of lanes that are executed together
ORDERS = ("together", "forward", "reversed")


class Execution(GlobalMemory, LocalMemory, SharedMemory, Warps, MatrixProducts, WarpgroupProducts):
    """Run one kernel launch, and record reports (for example of races) and counters.

    Args:
        program: The translated kernel.
        grid: Number of thread blocks along each of one to three dimensions.
        warps: Warps per thread block.
        parameters: A dict from the name of each kernel parameter to its value as bytes.
        allocations: Memory that the kernel may access.
        shared: Bytes of shared memory per thread block.
        check: Whether to look for memory faults and races.
        count: Whether to count memory transactions, matrix products and distinct matrix products (see `Counters`).
        order: One of `ORDERS`.
        lanes: Approximate number of lanes that are executed together.
        global_checks: Whether `check` also looks for races in global memory.
    """

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        warps: int,
        parameters: dict[str, bytes],
        allocations: Sequence[Allocation],
        shared: int,
        *,
        check: bool = True,
        count: bool = False,
        order: str = "together",
        lanes: int = LANES,
        global_checks: bool = True,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
        self.program, self.warps = program, warps
        self.grid = [*grid, 1, 1][:3]
        places = program.kernel.places
        size = max((places[name] + len(data) for name, data in parameters.items()), default=0)
        self.parameters = np.zeros(-(-size // 8) * 8, u1)
        for name, data in parameters.items():
            self.parameters[places[name] : places[name] + len(data)] = np.frombuffer(data, u1)
        self.allocations = sorted(allocations, key=lambda a: a.start)
        self.starts = [a.start for a in self.allocations]
        self.start_array = np.array(self.starts, i8)
        self.shared_limit = max(shared, program.kernel.shared_bytes)
        self.shared_size = -(-max(self.shared_limit, 16) // 128) * 128
        self.check, self.count, self.order, self.lanes = check, count, order, lanes
        self.global_checks = check and global_checks and warps > 1
        self.fragments: dict[Any, Any] = {}
        self.patterns: dict[Any, Any] = {}
        super().__init__()

    def run(self, blocks: Sequence[int] | None = None) -> Execution:
        """Execute the thread blocks with the given indices, or all thread blocks of the grid."""
        numbers = np.arange(int(np.prod(self.grid))) if blocks is None else np.asarray(blocks)
        self.counters.ran = len(numbers)
        # If warps run one after the other, all lanes of a group must reach the same barrier. Thread blocks may branch
        # differently, so a group then has lanes of one thread block only.
        together = max(1, self.lanes // (self.warps * 32)) if self.order == "together" else 1
        with np.errstate(all="ignore"):
            for first in range(0, len(numbers), together):
                self.first = first
                self._run(numbers[first : first + together])
        return self

    def _run(self, blocks: np.ndarray) -> None:
        self._clear_shared(len(blocks))
        if self.order == "together":
            groups = [Group(self, blocks, np.arange(self.warps))]
        else:
            order = range(self.warps) if self.order == "forward" else range(self.warps - 1, -1, -1)
            groups = [Group(self, blocks, np.array([w])) for w in order]
        self.fragments.clear()
        while True:
            waiting = [self._advance(group) for group in groups]
            if not any(waiting):
                break
            if not all(waiting):
                raise RuntimeError(
                    "some warps wait at a barrier that other warps of their block do not reach"
                )
            self.epoch += 1
            self.version += 1

    def _clear_shared(self, count: int) -> None:
        """Allocate shared memory for `count` thread blocks, and reset the records of its reads and writes."""
        size = count * self.shared_size
        raw = np.full(size + 128, 0xFF, u1)
        shift = -raw.ctypes.data % 128
        raw = raw[shift : shift + size]
        self.shared = {w: raw.view(UNSIGNED[w]) for w in (1, 2, 4, 8)}
        granules = size // self.program.granule
        self.wrote = np.full(granules, UNWRITTEN, i4)
        self.read = np.full(granules, UNWRITTEN, i4)
        self.epoch = np.zeros(count, i4)
        if self.program.wgmma:
            self.reading = np.zeros(granules, i4)
            self.stamp = np.full(granules, -1, i4)
            self.fences = np.zeros(count, i4)

    def _advance(self, group: Group) -> bool:
        """Run a group until its lanes wait at a barrier (return True) or have exited (return False).

        With the order "together", a group does not wait at barriers.
        """
        blocks, program, counts = self.program.kernel.blocks, self.program, self.counters.blocks
        warps = group.lanes // 32
        while True:
            if group.counter is None:
                here, mask = group.at, None
                if here == EXITED:
                    return False
                counts[here] += warps
            else:
                here = int(group.counter.min())
                if here == EXITED:
                    return False
                mask = group.counter == here
                if mask.all():
                    group.counter, group.at, mask = None, here, None
                    counts[here] += warps
                else:
                    counts[here] += int(mask.reshape(-1, 32).any(1).sum())
            outcome = program.function(here, mask is not None)(self, group, group.registers, mask)
            end = blocks[here].end
            following = here + 1 if here + 1 < len(blocks) else EXITED
            if end is None:
                self._go(group, mask, following)
            elif end.op[0] in ("ret", "exit"):
                self._branch(group, mask, outcome, EXITED, following)
            elif end.op[0] == "bra":
                self._branch(group, mask, outcome, self.program.kernel.targets[end.args[0].name], following)
            elif end.op[0] in ("bar", "barrier"):
                if end.guard is not None or end.op[:2] == ["bar", "red"] or len(end.args) != 1:
                    raise Unsupported(f"{end.text} (line {end.line})")
                self._go(group, mask, following)
                if self.order != "together":
                    if mask is not None:
                        raise self.unsupported(
                            end.number, "in divergent code, with warps one after the other"
                        )
                    return True
                self._barrier(group, mask, end)
            else:
                raise Unsupported(f"{end.text} (line {end.line})")

    def _go(self, group: Group, mask: Any, to: int) -> None:
        if mask is None:
            group.at = to
        else:
            assert group.counter is not None
            group.counter[mask] = to

    def _branch(self, group: Group, mask: Any, taken: Any, to: int, otherwise: int) -> None:
        """Move the lanes of `mask` to the basic block `to`, or to `otherwise` where `taken` is False."""
        if taken is None:
            self._go(group, mask, to)
        elif mask is not None:
            group.counter = where(mask, where(taken, to, otherwise), group.counter)
        elif getattr(taken, "ndim", 0) == 0:
            group.at = to if taken else otherwise
        elif taken.all():
            group.at = to
        elif not taken.any():
            group.at = otherwise
        else:
            group.counter = where(taken, to, otherwise)

    def _barrier(self, group: Group, mask: Any, end: Instruction) -> None:
        if mask is None:
            self.epoch += 1
            self.version += 1
            return
        mine = mask.reshape(group.count, -1)
        assert group.counter is not None
        exited = group.counter.reshape(group.count, -1) == EXITED
        some, every = mine.any(1), (mine | exited).all(1)
        if (some & ~every).any():
            detail = "some threads of a block do not reach the barrier together with the others"
            self.report("barrier", end.number, detail, int((some & ~every).sum()))
        self.epoch[some] += 1
        self.version += 1
