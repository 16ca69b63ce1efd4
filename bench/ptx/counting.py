"""Count the memory requests, matrix products and PTX instructions that an emulated kernel executes.

The instructions are counted by unit, by call chain and by source line.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import i8, where
from .parse import WIDTH, Instruction

if TYPE_CHECKING:
    from .device import Launch

SPECIAL_FUNCTIONS = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos", "popc")
FLOAT_OPERATIONS = ("add", "sub", "mul", "fma", "mad")
FLOAT_TYPES = ("f32", "f32x2", "bf16x2", "f16x2", "f16", "bf16", "f64")


@dataclass
class Counters:
    """Counters of an execution.

    Without `count=True` in `Execution` or `emulated_device`, only `blocks`, `grid` and `ran` have values. Keys of
    `global_requests`, `shared_requests` and `products` are indices of instructions in the kernel. If a warp executes an
    instruction or a basic block several times, every execution counts.

    Attributes:
        blocks: For each basic block, number of executions by warps.
        global_requests: For each instruction, [executions by warps, sectors, bytes that the lanes request].
        shared_requests: For each instruction, [executions by warps, wavefronts, wavefronts that would be needed
            without bank conflicts].
        products: For each instruction, [all products, distinct products]. One execution of a matrix
            instruction by one warp is one product. If several warps of a thread block multiply equal operands
            at the same time, their products count as one distinct product. Products of wgmma always count as
            distinct.
        read: Indices of the sectors (32 bytes) of global memory that were read.
        written: Indices of the sectors (32 bytes) of global memory that were written.
        grid: Number of thread blocks in the grid.
        ran: Number of thread blocks that were executed.
    """

    blocks: np.ndarray
    global_requests: dict[int, list[int]] = field(default_factory=dict)
    shared_requests: dict[int, list[int]] = field(default_factory=dict)
    products: dict[int, list[int]] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    grid: int = 0
    ran: int = 0

    @property
    def scale(self) -> float:
        """Return the number of thread blocks in the grid divided by the number of executed thread blocks."""
        return self.grid / max(1, self.ran)

    def count_global(self, number: int, address: Any, active: Any, size: int, touched: set[int]) -> None:
        """Count the sectors of an access to global memory with `size` bytes per lane, and add them to `touched`.

        `active` (warps, 32) says which lanes are active. None means that all lanes are active.
        """
        sectors = (address.view(i8) >> 5).reshape(-1, 32)
        lanes = sectors.size
        if active is not None:
            warps = active.any(1)
            if not warps.any():
                return
            sectors, active = sectors[warps], active[warps]
            first = np.take_along_axis(sectors, active.argmax(1)[:, None], 1)
            sectors = where(active, sectors, first)
            lanes = int(active.sum())
        ordered = np.sort(sectors, 1)
        distinct = len(sectors) + int((np.diff(ordered, axis=1) != 0).sum())
        _add(self.global_requests, number, len(sectors), distinct, lanes * size)
        touched.update(np.unique(sectors).tolist())

    def count_shared(self, number: int, offsets: Any, size: int) -> None:
        """Count the wavefronts of an access to shared memory with `size` bytes per lane.

        `offsets` has the byte offset of each lane, or −1 for an inactive lane. A warp accesses memory in
        phases of at most 128 bytes. A phase accesses some number of distinct words in each bank. The largest
        of these numbers is the number of wavefronts of the phase.
        """
        phases = max(1, size // 4)
        rows = offsets.reshape(-1, 32)
        active = (rows >= 0).any(1)
        rows = rows[active].reshape(-1, 32 // phases)
        words = rows[:, :, None] // 4 + np.arange(phases)
        words = np.sort(where(rows[:, :, None] >= 0, words, -1).reshape(len(rows), -1), 1)
        fresh = np.ones(words.shape, bool)
        fresh[:, 1:] = words[:, 1:] != words[:, :-1]
        fullest = _fullest_bank(words, fresh & (words >= 0))
        _add(self.shared_requests, number, int(active.sum()), int(fullest.sum()), int((fullest > 0).sum()))

    def count_rows(self, number: int, rows: Any, first: bool) -> None:
        """Count the wavefronts of one of the 8×8 matrices that an ldmatrix instruction loads.

        A row of the matrix has 16 bytes. `rows` (warps, 8) has the byte offset of each row. `first` says whether the
        matrix is the first one that the instruction loads. Only then are the executing warps counted, so that they
        count once for each instruction and not once for each matrix.
        """
        words = (rows[:, :, None] // 4 + np.arange(4)).reshape(len(rows), -1)
        fullest = _fullest_bank(words, np.ones(words.shape, bool))
        _add(self.shared_requests, number, len(rows) if first else 0, int(fullest.sum()), len(rows))

    def count_products(self, number: int, blocks: Any, first: Any, second: Any, active: Any) -> None:
        """Count all products and the distinct ones.

        If several warps of a thread block multiply equal fragments, their products count as one distinct product.

        Args:
            number: Index of the instruction in the kernel.
            blocks: Thread block of each warp (warps,).
            first: Left fragments (warps, …).
            second: Right fragments (warps, …).
            active: Whether each warp takes part (warps,).
        """
        mark = np.random.default_rng(0)
        keys = [blocks] + [
            np.nan_to_num(one.reshape(len(one), -1).astype(np.float64)) @ mark.random(one[0].size)
            for one in (first, second)
        ]
        both = np.stack(keys, 1)[active]
        _add(self.products, number, len(both), len(np.unique(both, axis=0)))


def _add(table: dict[int, list[int]], number: int, *amounts: int) -> None:
    entry = table.setdefault(number, [0] * len(amounts))
    entry[:] = [one + amount for one, amount in zip(entry, amounts, strict=True)]


def _fullest_bank(words: Any, chosen: Any) -> Any:
    """Return the largest number of words in one bank, for each row of `words`; `chosen` says which words count."""
    bank = words % 32 + 32 * np.arange(len(words))[:, None]
    return np.bincount(bank[chosen], minlength=32 * len(words)).reshape(-1, 32).max(1)


def unit_of(op: list[str]) -> str:
    """Return the unit of a PTX instruction, given the parts of its name, such as ["add", "f32"]."""
    name, kind = op[0], op[-1]
    if name == "mma" or op[:2] == ["wgmma", "mma_async"]:
        return "mma"
    if name in ("ld", "st", "ldmatrix", "stmatrix", "cp", "atom", "red"):
        if "param" in op or (op[:2] == ["cp", "async"] and op[2].startswith(("commit", "wait"))):
            return "other"
        return (
            "shared" if any(word.startswith("shared") for word in op[1:3]) or "matrix" in name else "global"
        )
    if name in FLOAT_OPERATIONS and kind in FLOAT_TYPES:
        return "fp32"
    if name == "cvt":
        of, to = (word[0] in "us" for word in op[1:] if word in WIDTH)
        return "alu" if of and to else "xu" if of != to else "convert"
    return _UNITS.get(name, "alu")


_UNITS = {
    **dict.fromkeys(("wgmma", "fence"), "other"),
    **dict.fromkeys(("shfl", "redux", "vote"), "shuffle"),
    **dict.fromkeys(SPECIAL_FUNCTIONS, "xu"),
    **dict.fromkeys(("bra", "ret", "exit"), "branch"),
    **dict.fromkeys(("mov", "cvta", "createpolicy"), "move"),
    **dict.fromkeys(("mul", "mad"), "imad"),
    "div": "div",
    "bar": "barrier",
}


def executed(launch: Launch) -> Iterator[tuple[Instruction, str, float]]:
    """Yield (PTX instruction, its unit, how often warps of the whole grid executed it)."""
    counters = launch.counters
    for block, times in zip(launch.program.kernel.blocks, counters.blocks, strict=True):
        for ins in [*block.instructions, *([block.end] if block.end else [])]:
            yield ins, unit_of(ins.op), float(times * counters.scale)


def ptx_counts(launch: Launch) -> Counter[str]:
    """Count warp instructions of the whole grid by unit, and matrix products by shape and type.

    A warp instruction is one execution of an instruction by one warp. A wgmma is executed by the four warps of a
    warpgroup. It counts as four warp instructions of the unit "mma", but as one matrix product of its shape.
    """
    found: Counter[str] = Counter()
    for ins, unit, times in executed(launch):
        found[unit] += times  # type: ignore[assignment]
        if unit == "mma":
            shape = next(word for word in ins.op if word.startswith(("m16n8", "m64n")))
            warpgroup = ins.op[0] == "wgmma"
            name = f"wgmma {shape} {ins.op[-1]}" if warpgroup else f"mma {shape} {ins.op[-3]}"
            found[name] += times / 4 if warpgroup else times  # type: ignore[assignment]
    return found


def by_place(launch: Launch, library: tuple[str, ...] = ("standard.py",)) -> dict[str, Counter[str]]:
    """Count PTX instructions of the whole grid by call chain and by unit.

    A call chain lists frames, the innermost first, as in "parts.py:120 < kernels.py:77". A frame is omitted
    if the name of its file starts with an entry of `library`. Each call chain has a counter. Its keys are the
    units and the names of two sums: "all" is the sum over all units, and "lsu" is the number of shuffles plus the
    number of wavefronts of shared memory. Moves are not counted.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    requests, scale = launch.counters.shared_requests, launch.counters.scale
    for ins, unit, times in executed(launch):
        place = " < ".join(frame for frame in ins.chain.split(" < ") if not frame.startswith(library))
        if unit != "move":
            found[place]["all"] += times  # type: ignore[assignment]
            found[place][unit] += times  # type: ignore[assignment]
        if unit == "shuffle":
            found[place]["lsu"] += times  # type: ignore[assignment]
        if ins.number in requests:
            found[place]["lsu"] += requests[ins.number][1] * scale  # type: ignore[assignment]
    return found


def by_line(launch: Launch) -> dict[tuple[str, int], list[float]]:
    """Count PTX instructions and their executions by source line.

    The keys are (file, line). The values are [number of PTX instructions of the kernel, executions of these
    instructions by warps of the whole grid]. Moves are not counted.
    """
    lines: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0.0])
    files = launch.program.kernel.files
    for ins, unit, times in executed(launch):
        if unit != "move":
            entry = lines[(Path(files.get(ins.loc[0], "")).name, ins.loc[1])]
            entry[0] += 1
            entry[1] += times
    return lines
