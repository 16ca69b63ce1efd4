"""Emulate global and local memory; check bounds, and find races between the warps of a thread block."""

from __future__ import annotations

import bisect
import ctypes
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import UNSIGNED, f4, i2, i4, i8, u1, where
from .state import SEVERAL_READERS, SEVERAL_WRITERS, Group, State

REAL = {"f32": f4, "f64": np.float64, "f16": np.float16, "s32": i4, "s64": i8}
ATOMIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: new if old == expected else old,
}


class Allocation:
    """Host memory that a kernel may access: `size` bytes at the address `start`. Reports show `name`."""

    def __init__(self, start: int, size: int, name: str) -> None:
        self.start, self.end, self.name = start, start + size, name
        raw = (ctypes.c_uint8 * size).from_address(start)
        whole = np.frombuffer(raw, u1)
        self.views = {1: whole}
        for width in (2, 4, 8):
            if start % width == 0:
                self.views[width] = whole[: size // width * width].view(UNSIGNED[width])
        self.shadow: tuple[np.ndarray, ...] | None = None

    def marks(self, word: int) -> tuple[np.ndarray, ...]:
        """Return four arrays, each with one entry for each word of `word` bytes.

        A "moment" is a number that identifies a thread block and one of its intervals between two barriers. The first
        array has the moment of the last store to each word, and the second array has the warp that stored. The third
        array has the moment of the last load of each word, and the fourth array has the warp that loaded.
        """
        if self.shadow is None:
            size = (self.end - self.start) // word + 1
            self.shadow = (np.zeros(size, i8), np.zeros(size, i2), np.zeros(size, i8), np.zeros(size, i2))
        return self.shadow


class GlobalMemory(State):
    """Execute accesses to global memory; check bounds and alignment, and find races within a thread block."""

    def _split(
        self, group: Group, number: int, address: Any, size: int, mask: Any
    ) -> list[tuple[Allocation, Any]]:
        """Return a pair (allocation, indices of the lanes that access it) for each accessed allocation.

        The indices are None if all lanes of the group access the same allocation. A lane is reported and left
        out if its address is misaligned, or if the bytes that it accesses are not all inside one allocation.
        """
        address = group.full(address).view(i8)
        if mask is not None:
            mask = group.full(mask)
            if not mask.any():
                return []
            lanes = np.flatnonzero(mask)
            address = address[lanes]
        else:
            lanes = None
        low, high = int(address.min()), int(address.max())
        place = bisect.bisect_right(self.starts, low) - 1
        if (address % size if size > 1 else address * 0).any():
            self.report(
                "misaligned", number, f"address not a multiple of {size}", int((address % size != 0).sum())
            )
            keep = address % size == 0
            lanes = np.flatnonzero(keep) if lanes is None else lanes[keep]
            address = address[keep]
            if not len(address):
                return []
        if place >= 0 and high + size <= self.allocations[place].end:
            return [(self.allocations[place], lanes)]
        places = np.searchsorted(self.start_array, address, side="right") - 1
        ends = np.array([a.end for a in self.allocations], i8)
        good = (places >= 0) & (address + size <= ends[places])
        if not good.all():
            bad = int(address[~good][0])
            near = self.allocations[max(0, min(int(places[~good][0]), len(self.allocations) - 1))]
            self.report(
                "out of bounds",
                number,
                f"global access of {size} B at {near.name} {bad - near.start:+d} of {near.end - near.start} B",
                int((~good).sum()),
            )
        found = []
        for one in np.unique(places[good]):
            chosen = good & (places == one)
            found.append((self.allocations[one], np.flatnonzero(chosen) if lanes is None else lanes[chosen]))
        return found

    def load_global(
        self, group: Group, number: int, address: Any, count: int, width: int, mask: Any
    ) -> list[Any]:
        """Load `count` elements of `width` bytes per lane."""
        address = group.full(address)
        parts = self._split(group, number, address, count * width, mask)
        if self.count:
            self.counters.count_global(
                number, address, self._rows(group, mask), count * width, self.counters.read
            )
        kind = UNSIGNED[width]
        if len(parts) == 1 and parts[0][1] is None:
            allocation = parts[0][0]
            index = (address.view(i8) - allocation.start) >> (width.bit_length() - 1)
            if self.global_checks:
                self._loaded(group, number, allocation, address, None, count * width)
            view = allocation.views[width]
            return [view[index + k] if k else view[index] for k in range(count)]
        results = [np.zeros(group.lanes, kind) for _ in range(count)]
        for allocation, lanes in parts:
            index = (address[lanes] if lanes is not None else address).view(i8)
            index = (index - allocation.start) >> (width.bit_length() - 1)
            if self.global_checks:
                self._loaded(group, number, allocation, address, lanes, count * width)
            for k in range(count):
                if lanes is None:
                    results[k] = allocation.views[width][index + k]
                else:
                    results[k][lanes] = allocation.views[width][index + k]
        return results

    def store_global(self, group: Group, number: int, address: Any, data: Any, width: int, mask: Any) -> None:
        """Store `len(data)` elements of `width` bytes per lane; `data[k]` has element k of every lane."""
        address = group.full(address)
        count = len(data)
        if self.count:
            self.counters.count_global(
                number, address, self._rows(group, mask), count * width, self.counters.written
            )
        for allocation, lanes in self._split(group, number, address, count * width, mask):
            index = (address if lanes is None else address[lanes]).view(i8)
            index = (index - allocation.start) >> (width.bit_length() - 1)
            for k, one in enumerate(data):
                one = group.full(one)
                one = one if lanes is None else one[lanes]
                if self.global_checks:
                    self._stored(group, number, allocation, index + k, lanes, one, width)
                else:
                    allocation.views[width][index + k] = one

    def _rows(self, group: Group, mask: Any) -> Any:
        return None if mask is None else group.full(mask).reshape(-1, 32)

    def _moment(self, group: Group, lanes: Any) -> tuple[Any, Any]:
        """Return the current moment and the warp of each of the given lanes; None means all lanes.

        A moment is a number that identifies a thread block and one of its intervals between two barriers.
        """
        block = group.block if lanes is None else group.block[lanes]
        times = (np.arange(len(self.epoch)) + (self.first + 1)) * i8(1 << 32) + self.epoch
        return times[block], group.warp if lanes is None else group.warp[lanes]

    def _loaded(
        self, group: Group, number: int, allocation: Allocation, address: Any, lanes: Any, size: int
    ) -> None:
        """Report races of a load of `size` bytes per lane, and record the load in the arrays of `allocation.marks`."""
        word = self.program.word
        stored, storer, loaded, loader = allocation.marks(word)
        now, warp = self._moment(group, lanes)
        place = ((address if lanes is None else address[lanes]).view(i8) - allocation.start) // word
        for k in range(max(1, size // word)):
            index = place + k if k else place
            other = (stored[index] == now) & (storer[index] != warp)
            if other.any():
                self._global_race(
                    number, "loads what another warp stored since the last barrier", allocation, index, other
                )
            mark = where((loaded[index] == now) & (loader[index] != warp), i2(SEVERAL_READERS), warp)
            loader[index] = mark
            loaded[index] = now
            several = loader[index] != mark
            if several.any():  # the last thread block wins; mark it if several of its warps load
                several &= loaded[index] == now
                loader[index[several]] = SEVERAL_READERS

    def _stored(
        self,
        group: Group,
        number: int,
        allocation: Allocation,
        index: Any,
        lanes: Any,
        value: Any,
        width: int,
    ) -> None:
        """Store `value`; report races, and record the store in the arrays of `allocation.marks`.

        Words whose value the store does not change are neither checked for races nor recorded.
        """
        view, word = allocation.views[width], self.program.word
        changed = view[index] != value
        view[index] = value
        if not changed.any():
            return
        stored, storer, loaded, loader = allocation.marks(word)
        now, warp = self._moment(group, lanes)
        given = value
        if not changed.all():
            index, now, warp, given = index[changed], now[changed], warp[changed], value[changed]
        for k in range(max(1, width // word)):
            cell = index * (width // word) + k if width >= word else index
            read = (loaded[cell] == now) & (loader[cell] != warp)
            twice = (stored[cell] == now) & (storer[cell] != warp)
            for found, text in ((read, "loaded"), (twice, "stored")):
                if found.any():
                    detail = f"overwrites what another warp {text} since the last barrier"
                    self._global_race(number, detail, allocation, cell, found)
            storer[cell] = warp
            stored[cell] = now
            lost = (view[index] != given) & (storer[cell] != warp) & (stored[cell] == now)
            if lost.any():
                detail = "several warps store different values to one place at once"
                self._global_race(number, detail, allocation, cell, lost)
            several = (storer[cell] != warp) & (stored[cell] == now)
            if several.any():
                storer[cell[several]] = SEVERAL_WRITERS

    def _global_race(self, number: int, text: str, allocation: Allocation, words: Any, bad: Any) -> None:
        offset = int(words[bad][0]) * self.program.word
        self.report("global race", number, f"{text} ({allocation.name} +{offset})", int(bad.sum()))

    def atomic(
        self, group: Group, number: int, address: Any, data: Any, name: str, kind: str, mask: Any
    ) -> Any:
        """Apply an atomic operation lane by lane and return the old values."""
        width = int(kind.lstrip("usbf")) // 8
        if kind == "bf16":
            raise self.unsupported(number, "atomic on bf16")
        real = REAL.get(kind, UNSIGNED[width])
        address = group.full(address)
        result = np.zeros(group.lanes, UNSIGNED[width])
        values = [group.full(one).view(real) for one in data]
        for allocation, lanes in self._split(group, number, address, width, mask):
            view = allocation.views[width].view(real)
            for lane in range(group.lanes) if lanes is None else lanes:
                place = (int(address[lane]) - allocation.start) // width
                old = view[place].copy()
                result[lane] = old.view(UNSIGNED[width])
                view[place] = ATOMIC[name](old, *(v[lane] for v in values))
        return result


class LocalMemory(State):
    """Execute accesses to the local memory of threads."""

    def load_local(
        self, group: Group, number: int, address: Any, count: int, width: int, mask: Any
    ) -> list[Any]:
        """Load `count` elements of `width` bytes per lane."""
        index = self._local(group, number, address, count * width, mask) // width
        view = group.local.view(UNSIGNED[width])
        return [view[index + k] for k in range(count)]

    def store_local(self, group: Group, number: int, address: Any, data: Any, width: int, mask: Any) -> None:
        """Store `len(data)` elements of `width` bytes per lane; `data[k]` has element k of every lane."""
        index = self._local(group, number, address, len(data) * width, mask) // width
        view = group.local.view(UNSIGNED[width])
        for k, one in enumerate(data):
            one = group.full(one)
            if mask is None:
                view[index + k] = one
            else:
                chosen = group.full(mask)
                view[index[chosen] + k] = one[chosen]

    def _local(self, group: Group, number: int, address: Any, size: int, mask: Any) -> Any:
        """Return the byte offset of each lane's access in `group.local`.

        `group.local` has the local memory of all lanes. Accesses outside a lane's own part are reported.
        """
        limit = self.program.kernel.local_bytes
        offset = group.full(address).astype(i8)
        bad = offset + size > limit
        if mask is not None:
            bad &= group.full(mask)
        if bad.any():
            self.report(
                "local bounds", number, f"local access at {int(offset[bad][0])} of {limit}", int(bad.sum())
            )
        return where(offset + size > limit, 0, offset) + np.arange(group.lanes) * limit
