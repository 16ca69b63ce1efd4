"""Shared memory: bounds, initialisation, hazards between warps, and asynchronous copies."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import UNSIGNED, f4, i2, i8, u2, u4, where
from .parse import Unsupported
from .state import SEVERAL_READERS, SEVERAL_WRITERS, Group, State


class SharedMemory(State):
    def _shared_index(
        self, group: Group, number: int, address: Any, size: int, mask: Any
    ) -> tuple[Any, Any, Any]:
        """(byte offsets, lanes or None, offsets of all lanes with inactive ones at 0)."""
        address = group.full(address)
        offset = address.astype(i8)
        if mask is not None:
            mask = group.full(mask)
            if mask.all():
                mask = None
        bad = (offset + size > self.shared_limit) | (offset % size != 0)
        if mask is not None:
            bad &= mask
        if bad.any():
            self.report(
                "shared bounds",
                number,
                f"shared access of {size} B at {int(offset[bad][0])} of {self.shared_limit}",
                int(bad.sum()),
            )
            mask = ~bad if mask is None else mask & ~bad
        if mask is None:
            return offset + group.base, None, offset
        lanes = np.flatnonzero(mask)
        return offset[lanes] + group.base[lanes], lanes, where(mask, offset, -1)

    def _reads(self, group: Group, number: int, offsets: Any, lanes: Any, size: int) -> None:
        """Hazards of reads of `size` bytes at byte offsets."""
        granule = self.program.granule
        warp = group.warp if lanes is None else group.warp[lanes]
        epoch = self.epoch[group.block if lanes is None else group.block[lanes]]
        first = offsets // granule
        for k in range(max(1, size // granule)):
            index = first + k if k else first
            if self.in_flight.any() and self.in_flight[index].any():
                self.report(
                    "race", number, "reads what cp.async is still writing", int(self.in_flight[index].sum())
                )
            other = (self.writer_epoch[index] == epoch) & (self.writer[index] != warp)
            if other.any():
                where_ = int(index[other][0] * granule) % self.shared_size
                self.report(
                    "race",
                    number,
                    f"reads what another warp wrote since the last barrier (byte {where_})",
                    int(other.sum()),
                )
            same = (self.reader_epoch[index] == epoch) & (self.reader[index] != warp)
            mark = where(same, i2(SEVERAL_READERS), warp)
            self.reader[index] = mark
            self.reader_epoch[index] = epoch
            conflict = self.reader[index] != mark
            if conflict.any():
                self.reader[index[conflict]] = SEVERAL_READERS

    def _writes(self, group: Group, number: int, offsets: Any, lanes: Any, size: int, changed: Any) -> None:
        """Hazards of writes; `changed` says where the new value differs from what is there."""
        granule = self.program.granule
        warp = group.warp if lanes is None else group.warp[lanes]
        epoch = self.epoch[group.block if lanes is None else group.block[lanes]]
        first = offsets // granule
        for k in range(max(1, size // granule)):
            index = first + k if k else first
            if self.in_flight.any() and self.in_flight[index].any():
                self.report(
                    "race", number, "writes what cp.async is still writing", int(self.in_flight[index].sum())
                )
            if self.program.wgmma:
                self._proxied(group, number, index, lanes, changed)
            other = (self.reader_epoch[index] == epoch) & (self.reader[index] != warp)
            if changed is not None:
                other &= changed
            if other.any():
                where_ = int(index[other][0] * granule) % self.shared_size
                self.report(
                    "race",
                    number,
                    f"overwrites what another warp read since the last barrier (byte {where_})",
                    int(other.sum()),
                )
            twice = (self.writer_epoch[index] == epoch) & (self.writer[index] != warp)
            if changed is not None:
                twice &= changed
            if twice.any():
                where_ = int(index[twice][0] * granule) % self.shared_size
                self.report(
                    "race",
                    number,
                    f"overwrites what another warp wrote since the last barrier (byte {where_})",
                    int(twice.sum()),
                )
            self.writer[index] = warp
            self.writer_epoch[index] = epoch
            conflict = self.writer[index] != warp
            if (
                conflict.any()
            ):  # several warps at once; harmless where all write the same, which the values show
                self.writer[index[conflict]] = SEVERAL_WRITERS

    def _proxied(self, group: Group, number: int, index: Any, lanes: Any, changed: Any) -> None:
        """Writes where products may still read, or will."""
        busy = self.reading[index] > 0
        if changed is not None:
            busy &= changed
        if busy.any():
            self.report("race", number, "overwrites what wgmma is still reading", int(busy.sum()))
        self.stamp[index] = self.fences[group.block if lanes is None else group.block[lanes]]

    def _uninitialised(self, number: int, view: Any, index: Any, width: int) -> None:
        full = UNSIGNED[width](0x0101010101010101 & ((1 << 8 * width) - 1))
        bad = view[index] != full
        if bad.any():
            self.report("uninitialised", number, "reads shared memory that nobody wrote", int(bad.sum()))

    def load_shared(
        self, group: Group, number: int, address: Any, count: int, width: int, mask: Any
    ) -> list[Any]:
        offsets, lanes, whole = self._shared_index(group, number, address, count * width, mask)
        kind = UNSIGNED[width]
        if lanes is not None and not len(lanes):
            return [kind(0)] * count
        if self.check:
            self._reads(group, number, offsets, lanes, count * width)
        if self.count:
            self.counters.count_shared(number, whole, count * width)
        index = offsets >> (width.bit_length() - 1)
        results = []
        for k in range(count):
            at = index + k if k else index
            if self.check:
                self._uninitialised(number, self.written[width], at, width)
            value = self.shared[width][at]
            if lanes is not None:
                full = np.zeros(group.lanes, kind)
                full[lanes] = value
                value = full
            results.append(value)
        return results

    def store_shared(self, group: Group, number: int, address: Any, data: Any, width: int, mask: Any) -> None:
        count = len(data)
        offsets, lanes, whole = self._shared_index(group, number, address, count * width, mask)
        if lanes is not None and not len(lanes):
            return
        if self.count:
            self.counters.count_shared(number, whole, count * width)
        index = offsets >> (width.bit_length() - 1)
        values = [group.full(one) if lanes is None else group.full(one)[lanes] for one in data]
        if self.check:
            granule = self.program.granule
            if width >= granule:
                for k, one in enumerate(values):
                    at = index + k if k else index
                    changed = self.shared[width][at] != one
                    if width == 4 and changed.any():
                        changed &= ~(
                            np.isnan(self.shared[4][at].view(f4)) & np.isnan(np.asarray(one).view(f4))
                        )
                    self._writes(group, number, offsets + k * width, lanes, width, changed)
            else:
                self._writes(group, number, offsets, lanes, count * width, None)
        for k, one in enumerate(values):
            at = index + k if k else index
            self.shared[width][at] = one
            self.written[width][at] = UNSIGNED[width](0x0101010101010101 & ((1 << 8 * width) - 1))
            if self.check:
                differs = self.shared[width][at] != one
                if differs.any() and width == 4:  # NaN's bits depend on the host
                    differs &= ~(np.isnan(self.shared[4][at].view(f4)) & np.isnan(np.asarray(one).view(f4)))
                if differs.any():
                    self._differing(
                        group, number, lanes, offsets + k * width, self.shared[width][at], one, differs
                    )

    def _differing(
        self, group: Group, number: int, lanes: Any, offsets: Any, kept: Any, given: Any, differs: Any
    ) -> None:
        """Several threads wrote one place at once, differently: one warp's copies of a number, or a race of warps.

        Copies part in their last bit where a product is fused with the sum over a butterfly: fma(x, x, shfl(x x)).
        """
        warps = (group.warp if lanes is None else group.warp[lanes])[differs]
        owner = self.writer[offsets[differs] // self.program.granule]
        pair = [hex(int(x[differs][0])) for x in (kept, given)]
        apart = owner != warps
        if apart.any():
            self.report(
                "race",
                number,
                f"several warps write one place at once, differently, {pair}",
                int(apart.sum()),
            )
        else:
            self.report("copies", number, f"a warp writes one place at once, differently, {pair}", len(warps))

    def ldmatrix(
        self, group: Group, number: int, address: Any, count: int, transposed: bool, mask: Any
    ) -> list[Any]:
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
        """Words that a warp-wide load gives its lanes."""
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
            self._uninitialised(number, self.written[width], index, width)
        value = self.shared[width][index]
        if lanes is not None:
            full = np.zeros(group.lanes, UNSIGNED[width])
            full[lanes] = value
            return full
        return value

    def stmatrix(
        self, group: Group, number: int, address: Any, data: Any, transposed: bool, mask: Any
    ) -> None:
        if mask is not None:
            mask = group.full(mask)
            rows = mask.reshape(-1, 32)
            if (rows.any(1) != rows.all(1)).any():
                raise Unsupported("stmatrix in a warp that parted")
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
            for k in range(count):
                self._issue(group, number, offsets + 4 * k, lanes)
        group.copies.append([group.committed[who].copy(), who, index, kept, number])

    def _issue(self, group: Group, number: int, offsets: Any, lanes: Any) -> None:
        granule = self.program.granule
        warp = group.warp if lanes is None else group.warp[lanes]
        epoch = self.epoch[group.block if lanes is None else group.block[lanes]]
        for k in range(4 // granule):
            index = offsets // granule + k
            other = (self.reader_epoch[index] == epoch) & (self.reader[index] != warp)
            if other.any():
                self.report(
                    "race",
                    number,
                    "cp.async overwrites what another warp read since the last barrier",
                    int(other.sum()),
                )
            twice = (self.writer_epoch[index] == epoch) & (self.writer[index] != warp)
            if twice.any():
                self.report(
                    "race",
                    number,
                    "cp.async overwrites what another warp wrote since the last barrier",
                    int(twice.sum()),
                )
            if self.program.wgmma:
                self._proxied(group, number, index, lanes, None)
            self.in_flight[index] = True

    def commit(self, group: Group, mask: Any) -> None:
        if mask is None:
            group.committed += 1
        else:
            group.committed[group.full(mask)] += 1

    def wait(self, group: Group, count: int, mask: Any) -> None:
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
                at = where_ + k
                self.shared[4][at] = one if everything else one[done]
                self.written[4][at] = u4(0x01010101)
                if self.check:
                    granule = self.program.granule
                    for part in range(4 // granule):
                        cell = at * (4 // granule) + part
                        self.in_flight[cell] = False
                        self.writer[cell] = group.warp[lanes]
                        self.writer_epoch[cell] = self.epoch[group.block[lanes]]
                        if self.program.wgmma:
                            self.stamp[cell] = self.fences[group.block[lanes]]
            if not everything:
                left = ~done
                kept.append([number_of[left], who[left], index[left], [one[left] for one in data], number])
        group.copies = kept
