"""Shared memory: bounds, initialisation, hazards between warps, and asynchronous copies."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import UNSIGNED, f4, i4, i8, u2, u4, where
from .state import IN_FLIGHT, SEVERAL, UNWRITTEN, Group, State


def by_another_warp(mark: Any, now: Any) -> Any:
    """Return where two accesses come from different warps, with no barrier between the accesses.

    `mark` and `now` are arrays of the marks of the accesses (see `state.py`). The result is an array of bools.
    """
    return ((mark ^ now) - i4(1)).view(u4) < u4(SEVERAL)


def _mark(array: Any, index: Any, mark: Any) -> None:
    """Write the marks of one instruction to `array`.

    If several warps access a granule in this instruction, the granule's mark has SEVERAL instead of a warp's index.
    """
    array[index] = mark
    lost = array[index] != mark
    if lost.any():
        rows = index[lost.any(1)] if lost.ndim == 2 else index[lost]
        array[rows] |= SEVERAL  # all lanes of an instruction cover whole rows


def _differ(kept: Any, given: Any) -> Any:
    """Return where `kept` and `given` differ.

    Two values that are both NaN as fp32 count as equal, even if their bits differ, because the CPU that runs the
    emulation determines the bits of a NaN.
    """
    differs = kept != given
    if kept.dtype == u4 and differs.any():
        differs &= ~(np.isnan(kept.view(f4)) & np.isnan(given.view(f4)))
    return differs


class SharedMemory(State):
    """Execute accesses to shared memory, and check every accessed granule for hazards.

    Shared memory is divided into granules of `Program.granule` bytes. With one instruction, a lane accesses one granule
    or several consecutive granules. These granules are called a row.
    """

    def _shared_index(
        self, group: Group, number: int, address: Any, size: int, mask: Any
    ) -> tuple[Any, Any, Any]:
        """Check the bounds and alignment of an access to shared memory; report violations.

        A lane is valid if it is active and its access has no violation.

        Returns:
            A tuple of three entries:

            - for each valid lane, the byte offset of its access in the array that holds the shared memory of all
              thread blocks;
            - the indices of the valid lanes, or None if all lanes are valid;
            - for every lane, the byte offset of its access in the shared memory of its own thread block, or
              −1 if the lane is not valid.
        """
        offset = group.full(address).astype(i8)
        if mask is not None:
            mask = group.full(mask)
            if mask.all():
                mask = None
        bad = (offset > self.shared_limit - size) | ((offset & (size - 1)) != 0)
        if mask is not None:
            bad &= mask
        if bad.any():
            detail = f"shared access of {size} B at {int(offset[bad][0])} of {self.shared_limit}"
            self.report("shared bounds", number, detail, int(bad.sum()))
            mask = ~bad if mask is None else mask & ~bad
        if mask is None:
            return offset + group.base, None, offset
        lanes = np.flatnonzero(mask)
        return offset[lanes] + group.base[lanes], lanes, where(mask, offset, -1)

    def _history(self, group: Group, offsets: Any, lanes: Any, size: int) -> tuple[Any, Any, Any, Any]:
        """Return what is needed to check an access of `size` bytes per lane for hazards.

        Returns:
            A tuple of four entries:

            - the array `wrote`, reshaped so that each row has the marks of `size` bytes of shared memory;
            - the array `read`, reshaped in the same way;
            - for each lane, the index of the row that the lane accesses;
            - for each lane, the mark that describes this access.
        """
        now = self.now(group, lanes)
        count = size // self.program.granule
        if count == 1:
            return self.wrote, self.read, offsets // size, now
        return self.wrote.reshape(-1, count), self.read.reshape(-1, count), offsets // size, now[:, None]

    def _race(self, number: int, what: str, offsets: Any, bad: Any) -> None:
        """Report a race where `bad` is True. `bad` has the shape (lanes,) or (lanes, granules per lane)."""
        lane, *column = np.argwhere(bad)[0]
        byte = int(offsets[lane] + sum(column) * self.program.granule) % self.shared_size
        lanes = bad.reshape(len(bad), -1).any(1)
        self.report("race", number, f"{what} (byte {byte})", int(lanes.sum()))

    def _reads(self, group: Group, number: int, offsets: Any, lanes: Any, size: int) -> None:
        """Report hazards of reads of `size` bytes at byte offsets, and mark the granules as read."""
        wrote, read, index, now = self._history(group, offsets, lanes, size)
        last = wrote[index]
        missing = last < 0
        if missing.any():
            unwritten = (last == UNWRITTEN).reshape(len(index), -1).any(1)
            if unwritten.any():
                detail = "reads shared memory that nothing wrote"
                self.report("uninitialised", number, detail, int(unwritten.sum()))
            if (last == IN_FLIGHT).any():
                self._race(number, "reads what cp.async is still writing", offsets, last == IN_FLIGHT)
        other = by_another_warp(last, now)
        if other.any():
            self._race(number, "reads what another warp wrote since the last barrier", offsets, other)
        mark = where(by_another_warp(read[index], now), now | SEVERAL, now)
        _mark(read, index, mark)

    def _writes(self, group: Group, number: int, offsets: Any, lanes: Any, size: int, changed: Any) -> None:
        """Report hazards of writes, and mark the granules as written.

        `changed` is True for granules whose value changes. If another warp has read or written a granule since the last
        barrier, a write to this granule is a hazard only if the value changes.
        """
        wrote, read, index, now = self._history(group, offsets, lanes, size)
        last = wrote[index]
        flying = last == IN_FLIGHT
        if flying.any():
            self._race(number, "writes what cp.async is still writing", offsets, flying)
        if self.program.wgmma:
            self._proxied(group, number, offsets, lanes, size, changed)
        other = by_another_warp(read[index], now) & changed
        if other.any():
            self._race(number, "overwrites what another warp read since the last barrier", offsets, other)
        twice = by_another_warp(last, now) & changed
        if twice.any():
            self._race(number, "overwrites what another warp wrote since the last barrier", offsets, twice)
        _mark(wrote, index, np.broadcast_to(now, last.shape))

    def _proxied(self, group: Group, number: int, offsets: Any, lanes: Any, size: int, changed: Any) -> None:
        """Report writes to granules that an unfinished wgmma is still reading.

        For each written granule, also record how many proxy fences its thread block has passed. A wgmma may read the
        granule only after a proxy fence that follows the write. If the number of passed fences is still the recorded
        number when a wgmma reads the granule, this fence is missing.
        """
        count = size // self.program.granule
        index = offsets // size
        busy = (self.reading.reshape(-1, count)[index] > 0) & (
            changed.reshape(-1, count) if changed is not None else True
        )
        if busy.any():
            self._race(number, "overwrites what wgmma is still reading", offsets, busy)
        fences = self.fences[group.block if lanes is None else group.block[lanes]]
        self.stamp.reshape(-1, count)[index] = fences[:, None]

    def load_shared(
        self, group: Group, number: int, address: Any, count: int, width: int, mask: Any
    ) -> list[Any]:
        """Load `count` elements of `width` bytes per lane."""
        size = count * width
        offsets, lanes, whole = self._shared_index(group, number, address, size, mask)
        kind = UNSIGNED[width]
        if lanes is not None and not len(lanes):
            return [kind(0)] * count
        if self.check:
            self._reads(group, number, offsets, lanes, size)
        if self.count:
            self.counters.count_shared(number, whole, size)
        loaded = self.shared[width].reshape(-1, count)[offsets // size]
        if lanes is not None:
            full = np.zeros((group.lanes, count), kind)
            full[lanes] = loaded
            loaded = full
        return list(np.ascontiguousarray(loaded.T))

    def store_shared(self, group: Group, number: int, address: Any, data: Any, width: int, mask: Any) -> None:
        """Store `len(data)` elements of `width` bytes per lane; `data[k]` has element k of every lane."""
        count, size = len(data), len(data) * width
        offsets, lanes, whole = self._shared_index(group, number, address, size, mask)
        if lanes is not None and not len(lanes):
            return
        if self.count:
            self.counters.count_shared(number, whole, size)
        index = offsets // size
        values = np.stack([group.full(one) for one in data], 1)
        if lanes is not None:
            values = values[lanes]
        memory = self.shared[width].reshape(-1, count)
        if self.check:
            parts = width // self.program.granule
            changed = np.repeat(_differ(memory[index], values), parts, 1)
            one_granule = changed.shape[1] == 1
            self._writes(group, number, offsets, lanes, size, changed[:, 0] if one_granule else changed)
        memory[index] = values
        if self.check:
            differs = _differ(memory[index], values)
            if differs.any():
                self._differing(group, number, lanes, offsets, memory[index], values, differs)

    def _differing(
        self, group: Group, number: int, lanes: Any, offsets: Any, kept: Any, given: Any, differs: Any
    ) -> None:
        """Report lanes that wrote different values to the same address in the same instruction.

        If the lanes that write to an address belong to several warps, a "race" is reported, which is a fault. If all
        these lanes belong to one warp, "copies" is reported, which is not a fault. For example, a butterfly reduction
        leaves a copy of the sum in every lane of a warp, and all lanes can store their copies to one address. The
        copies can differ in the last bit if the compiler contracts a product and an addition of the reduction into one
        fma, as in fma(x, x, shfl(x·x)).
        """
        lane, column = np.nonzero(differs)
        warps = (group.warp if lanes is None else group.warp[lanes])[lane]
        width = given.dtype.itemsize
        owner = self.wrote[(offsets[lane] + column * width) // self.program.granule] & SEVERAL
        pair = [hex(int(x[differs][0])) for x in (kept, given)]
        apart = owner != warps
        if apart.any():
            detail = f"several warps write different values to one place at once, {pair}"
            self.report("race", number, detail, int(apart.sum()))
        else:
            self.report(
                "copies", number, f"a warp writes different values to one place at once, {pair}", len(warps)
            )

    def ldmatrix(
        self, group: Group, number: int, address: Any, count: int, transposed: bool, mask: Any
    ) -> list[Any]:
        """Load `count` matrices of 8 × 8 elements of 16 bits.

        Lane 8·i + j of each warp gives the address of row j of matrix i.
        """
        address = group.full(address).reshape(-1, 32)[:, : 8 * count]
        lane = np.arange(32)
        results = []
        active = np.ones(len(address), bool) if mask is None else group.full(mask).reshape(-1, 32).any(1)
        lanes = None if active.all() else np.flatnonzero(np.repeat(active, 32))
        if self.count:
            rows = where(active[:, None], address.astype(i8), -1)
            for i in range(count):
                words = rows[:, 8 * i : 8 * i + 8]
                spread = np.full((len(rows), 32), -1, i8)
                spread[:, :8] = words
                self.counters.count_rows(number, spread[active][:, :8], i == 0)
        for i in range(count):
            rows = address[:, 8 * i : 8 * i + 8].astype(i8)
            if not transposed:
                place = rows[:, lane // 4] + 4 * (lane % 4)
                results.append(self._fetch(group, number, place.ravel(), 4, lanes))
            else:
                parts = [
                    self._fetch(
                        group, number, (rows[:, 2 * (lane % 4) + k] + 2 * (lane // 4)).ravel(), 2, lanes
                    )
                    for k in (0, 1)
                ]
                results.append(parts[0].astype(u4) | (parts[1].astype(u4) << u4(16)))
        return results

    def _fetch(self, group: Group, number: int, offset: Any, width: int, lanes: Any) -> Any:
        """Load one word of `width` bytes for each lane, as a part of ldmatrix."""
        bad = offset + width > self.shared_limit
        if bad.any():
            self.report(
                "shared bounds",
                number,
                f"shared access at {int(offset[bad][0])} of {self.shared_limit}",
                int(bad.sum()),
            )
            offset = where(bad, 0, offset)
        at = offset + group.base
        if lanes is not None:
            at = at[lanes]
        index = at >> (width.bit_length() - 1)
        if self.check:
            self._reads(group, number, at, lanes, width)
        value = self.shared[width][index]
        if lanes is not None:
            full = np.zeros(group.lanes, UNSIGNED[width])
            full[lanes] = value
            return full
        return value

    def stmatrix(
        self, group: Group, number: int, address: Any, data: Any, transposed: bool, mask: Any
    ) -> None:
        """Store `len(data)` matrices of 8 × 8 elements of 16 bits.

        Lane 8·i + j of each warp gives the address of row j of matrix i.
        """
        if mask is not None:
            mask = group.full(mask)
            rows = mask.reshape(-1, 32)
            if (rows.any(1) != rows.all(1)).any():
                raise self.unsupported(number, "in divergent code")
        address = group.full(address).reshape(-1, 32)
        lane = np.arange(32)
        for i, one in enumerate(data):
            rows = address[:, 8 * i : 8 * i + 8].astype(i8)
            one = group.full(one)
            for k in (0, 1):
                half = (one >> u4(16 * k)).astype(u2)
                if transposed:
                    place = rows[:, 2 * (lane % 4) + k] + 2 * (lane // 4)
                else:
                    place = rows[:, lane // 4] + 4 * (lane % 4) + 2 * k
                self.store_shared(group, number, place.ravel().astype(u4), (half,), 2, mask)

    def copy(self, group: Group, number: int, to: Any, of: Any, size: int, amount: Any, mask: Any) -> None:
        """Start cp.async of `size` bytes per lane: `amount` bytes are copied, the other bytes become zero."""
        width = min(size, 4)
        count = size // width
        amount = group.full(amount)
        reading = amount > 0 if mask is None else (amount > 0) & mask
        data = self.load_global(group, number, group.full(of), count, width, reading)
        offsets, lanes, whole = self._shared_index(group, number, to, size, mask)
        if lanes is not None and not len(lanes):
            return
        if self.count:
            self.counters.count_shared(number, whole, size)
        kept = [where(amount > u4(k * width), one, UNSIGNED[width](0)) for k, one in enumerate(data)]
        kept = kept if lanes is None else [one[lanes] for one in kept]
        index = offsets >> 2
        who = np.arange(group.lanes) if lanes is None else lanes
        if self.check:
            self._issue(group, number, offsets, lanes, size)
        group.copies.append([group.committed[who].copy(), who, index, kept, number])

    def _issue(self, group: Group, number: int, offsets: Any, lanes: Any, size: int) -> None:
        """Report hazards of a cp.async that starts, and mark its destination granules as in flight."""
        wrote, read, index, now = self._history(group, offsets, lanes, size)
        for marks, what in ((read, "read"), (wrote, "wrote")):
            other = by_another_warp(marks[index], now)
            if other.any():
                detail = f"cp.async overwrites what another warp {what} since the last barrier"
                self._race(number, detail, offsets, other)
        if self.program.wgmma:
            self._proxied(group, number, offsets, lanes, size, None)
        wrote[index] = IN_FLIGHT

    def commit(self, group: Group, mask: Any) -> None:
        """Commit the copies of the active lanes as a cp.async group."""
        if mask is None:
            group.committed += 1
        else:
            group.committed[group.full(mask)] += 1

    def wait(self, group: Group, count: int, mask: Any) -> None:
        """Complete all cp.async groups except the `count` latest groups.

        If `count` is −1, complete all groups, and also the copies that are not committed yet.
        """
        kept = []
        for entry in group.copies:
            number_of, who, index, data, number = entry
            done = number_of < group.committed[who] - count
            if mask is not None:
                done &= group.full(mask)[who]
            if not done.any():
                kept.append(entry)
                continue
            everything = bool(done.all())
            where_ = index if everything else index[done]
            lanes = who if everything else who[done]
            for k, one in enumerate(data):
                self.shared[4][where_ + k] = one if everything else one[done]
            if self.check:
                self._complete(group, where_ * 4, lanes, 4 * len(data))
            if not everything:
                left = ~done
                kept.append([number_of[left], who[left], index[left], [one[left] for one in data], number])
        group.copies = kept

    def _complete(self, group: Group, offsets: Any, lanes: Any, size: int) -> None:
        """Mark the granules that copies have written."""
        wrote, _, index, now = self._history(group, offsets, lanes, size)
        wrote[index] = now
        if self.program.wgmma:
            count = size // self.program.granule
            self.stamp.reshape(-1, count)[index] = self.fences[group.block[lanes]][:, None]
