"""Matrix products of a warpgroup: wgmma, its descriptors, and hazards of its asynchronous execution."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import f4, i8, u2, u4, u8, where
from .products import rows_of
from .state import IN_FLIGHT, SEVERAL, UNWRITTEN, Group, State


class WarpgroupProducts(State):
    """Execute products of a warpgroup immediately.

    The checks treat each product as in flight until a wgmma.wait_group completes it, because wgmma is asynchronous
    on a GPU.
    """

    def proxy(self, group: Group, mask: Any) -> None:
        """Record a fence.proxy.async."""
        if not self.program.wgmma:
            return
        self.fences[np.arange(group.count) if mask is None else np.unique(group.block[group.full(mask)])] += 1

    def wgmma_fence(self, group: Group, mask: Any) -> None:
        """Record a wgmma.fence: later products may use the registers that were written before the fence."""
        if mask is None:
            group.unfenced.clear()
            return
        active = group.active(mask)
        for warps in group.unfenced.values():
            warps &= ~active

    def wgmma_commit(self, group: Group, mask: Any) -> None:
        """Commit the products of the active warps as a wgmma group."""
        group.products += group.active(mask)

    def wgmma_wait(self, group: Group, count: int, mask: Any) -> None:
        """Complete all wgmma groups except the last `count`."""
        active = group.active(mask)
        kept = []
        for entry in group.pending:
            _, warps, number_of, chunks, owner = entry
            done = warps & active & (number_of < group.products - count)
            if done.any() and chunks is not None:
                over = done[owner]
                np.subtract.at(self.chunks(self.reading), chunks[over].ravel(), 1)
                epoch = self.epoch[owner[over] // (group.width // 32)]
                self.chunks(self.read)[chunks[over]] = (epoch[:, None, None] << 10) | SEVERAL
                entry[3:] = [chunks[~over], owner[~over]]
            warps &= ~done
            if warps.any():
                kept.append(entry)
        group.pending = kept

    def touch(self, group: Group, number: int, reads: Any, writes: Any, fresh: bool, mask: Any) -> None:
        """Report an instruction that reads or writes accumulators, or overwrites operands, of a wgmma in flight.

        Args:
            group: Lanes that execute the instruction.
            number: Index of the instruction in the kernel.
            reads: Indices of the accumulator registers of wgmma that the instruction reads.
            writes: Indices of the accumulator and operand registers of wgmma that the instruction writes.
            fresh: Whether the written registers need a wgmma.fence before the next product.
            mask: Active lanes, or None for all.
        """
        active = group.active(mask)
        for registers, warps, *_ in group.pending:
            results, operands = registers
            if not (results.isdisjoint(reads) and results.isdisjoint(writes) and operands.isdisjoint(writes)):
                early = warps & active
                if early.any():
                    self.report(
                        "wgmma registers",
                        number,
                        "touches a register of wgmma before wgmma.wait_group",
                        32 * int(early.sum()),
                    )
        for one in writes if fresh else ():
            group.unfenced[one] = active | group.unfenced.get(one, False)

    def _matrix(
        self, group: Group, number: int, one: Any, size: int, kind: str, major: bool, active: Any
    ) -> tuple[Any, Any]:
        """Return the matrices that the descriptors in `one` describe, and the indices of the chunks that hold them.

        The matrices have the shape (units, size, k). For the left operand, size is 64; for the right operand, it is n.
        A unit is a warpgroup, or one warp if warps run one after the other. A chunk is 16 bytes of shared memory.
        """
        width = 4 if kind == "tf32" else 2
        units = len(active)
        words = group.full(one).reshape(units, -1)
        words = where(active[:, None], words, words[active.argmax(), 0])
        word = words[:, 0]
        if (words != word[:, None]).any():
            raise self.unsupported(number, "a descriptor that differs among the lanes of a warpgroup")
        high = np.unique(word >> u8(16))
        if len(high) != 1:
            raise self.unsupported(number, "descriptors whose layouts differ")
        high = int(high[0]) << 16
        start = (word & u8(0x3FFF)).astype(i8) << 4
        leading, stride, swizzle = (high >> 16 & 0x3FFF) << 4, (high >> 32 & 0x3FFF) << 4, high >> 62
        if high >> 49 & 7:
            raise self.unsupported(number, "a descriptor with a base offset")
        key = (size, width, leading, stride, swizzle, major)
        if key not in self.patterns:
            wide = (1, 8, 4, 2)[swizzle]  # chunks in a row of the swizzle's atom
            if not major:  # along k: [size, 2]
                row, chunk = np.arange(size)[:, None], np.arange(2)[None, :]
                pattern = row % 8 * 16 * wide + row // 8 * stride + chunk * (leading if swizzle == 0 else 16)
            else:  # along the other dimension: [depth, size / 8]
                deep, chunk = np.arange(16)[:, None], np.arange(size * width // 16)[None, :]
                one_, other = (stride, leading) if swizzle == 0 else (leading, stride)
                pattern = chunk % wide * 16 + chunk // wide * one_ + deep % 8 * 16 * wide + deep // 8 * other
            self.patterns[key] = pattern.astype(i8)
        place = start[:, None, None] + self.patterns[key]
        if swizzle:
            place = place ^ ((place >> 7 & (0, 7, 3, 1)[swizzle]) << 4)
        bad = place + 16 > self.shared_limit
        if bad.any():
            self.report(
                "shared bounds",
                number,
                f"wgmma reads shared memory at {int(place[bad][0])} of {self.shared_limit}",
                int(bad.sum()),
            )
            place = where(bad, 0, place)
        place = place + group.base.reshape(units, -1)[:, :1, None]
        chunks = place >> 4
        raw = self.shared[1].reshape(-1, 16)[chunks]  # [units, ., ., 16]
        if kind == "tf32":
            values = (raw.view(u4) & u4(0xFFFFE000)).view(f4)
        else:
            values = (
                raw.view(np.float16).astype(f4)
                if kind == "f16"
                else (raw.view(u2).astype(u4) << u4(16)).view(f4)
            )
        if major:
            matrix = values.reshape(units, 16, size).transpose(0, 2, 1)
        else:
            matrix = values.reshape(units, size, 32 // width)
        return matrix, chunks

    def wgmma(
        self,
        group: Group,
        number: int,
        mask: Any,
        shape: tuple[int, int],
        kind: str,
        to: Any,
        a: Any,
        b: Any,
        keep: Any,
        scales: tuple[int, int],
        majors: tuple[bool, bool],
        registers: Any,
    ) -> list[Any]:
        """Return the new accumulators.

        Each warp computes 16 rows of the product on its own, so warps may run one after the other.

        Args:
            group: Lanes that execute the instruction.
            number: Index of the instruction in the kernel.
            mask: Active lanes, or None for all.
            shape: (n, k). The instruction multiplies a 64×k matrix by a k×n matrix.
            kind: Type of the operands: "f16", "bf16" or "tf32".
            to: Accumulators before the instruction.
            a: Left operand: a tuple of registers, or a descriptor.
            b: Descriptor of the right operand.
            keep: Whether the product is added to the accumulators. Otherwise the product replaces the accumulators.
            scales: Signs (1 or −1) by which the two operands are multiplied.
            majors: For each operand, False if its elements are contiguous along k, or True if they are contiguous along
                the other dimension.
            registers: Indices of the accumulator registers, and indices of the registers of the left operand.
        """
        size, depth = shape
        warps = group.lanes // 32
        together = 4 if group.width % 128 == 0 else 1
        units = warps // together
        active = group.active(mask)
        if mask is not None:
            self._check_divergence(group, number, mask, units)
        if self.check and group.unfenced:
            self._check_fence(group, number, active, (*registers[0], *registers[1]))
        if self.count:
            entry = self.counters.products.setdefault(number, [0, 0])
            entry[:] = [one + int(active.sum()) for one in entry]
        read = []
        if isinstance(a, tuple):
            stacked = np.stack([group.full(r) for r in a], -1).reshape(warps, 8, 4, len(a))
            first = rows_of(stacked, kind, depth).reshape(units, 16 * together, depth)
        else:
            first, chunks = self._matrix(group, number, a, 64, kind, majors[0], active[::together])
            if together == 1:
                start = 16 * (group.warp.reshape(units, -1)[:, 0].astype(i8) % 4)
                first = np.take_along_axis(first, (start[:, None] + np.arange(16))[:, :, None], 1)
            read.append(chunks.reshape(units, -1))
        second, chunks = self._matrix(group, number, b, size, kind, majors[1], active[::together])
        read.append(chunks.reshape(units, -1))
        everything = np.concatenate(read, 1)
        held = None
        owner = np.arange(units) * together
        if self.check:
            self._taken(group, number, everything, owner, active)
            held = everything[active[owner]]
        group.pending.append([registers, active.copy(), group.products.copy(), held, owner[active[owner]]])
        # Always 16 rows at a time, because a larger product may be summed in another order.
        by_warp = first.reshape(units, together, 16, depth)
        product = np.matmul(by_warp, second.transpose(0, 2, 1)[:, None]).reshape(
            warps, 2, 8, size // 8, 4, 2
        )  # r, g, j, t, e
        if scales[0] * scales[1] < 0:
            product = -product
        parts = np.ascontiguousarray(product.transpose(3, 1, 5, 0, 2, 4)).reshape(size // 2, group.lanes)
        return [_accumulated(group, part, one, keep) for part, one in zip(parts, to, strict=True)]

    def _check_divergence(self, group: Group, number: int, mask: Any, units: int) -> None:
        """Report warpgroups in which only some lanes execute a wgmma."""
        whole = group.full(mask).reshape(units, -1)
        diverged = whole.any(1) != whole.all(1)
        if diverged.any():
            self.report("barrier", number, "threads of a warpgroup diverge at wgmma", int(diverged.sum()))

    def _check_fence(self, group: Group, number: int, active: Any, registers: tuple[Any, ...]) -> None:
        """Report a wgmma if one of its registers was written after the last wgmma.fence."""
        if any(one in group.unfenced and (group.unfenced[one] & active).any() for one in registers):
            self.report(
                "wgmma registers",
                number,
                "no wgmma.fence since its registers were written",
                32 * int(active.sum()),
            )

    def _taken(self, group: Group, number: int, chunks: Any, owner: Any, active: Any) -> None:
        """Report hazards of the shared memory that a product reads, and mark the memory as read.

        The comment above `SEVERAL` in state.py describes marks. A mark usually has the index of the warp that accessed
        the memory. Here it has SEVERAL instead of the index, because all warps of the warpgroup read the memory.
        """
        chosen = active[owner]
        chunks = chunks[chosen]
        if not len(chunks):
            return
        block = (owner // (group.width // 32))[chosen]
        epoch = self.epoch[block][:, None, None]
        last = self.chunks(self.wrote)[chunks]
        if (last == UNWRITTEN).any():
            self.report("uninitialised", number, "reads shared memory that nothing wrote", 1)
        busy = last == IN_FLIGHT
        if busy.any():
            self.report("race", number, "reads what cp.async is still writing", int(busy.sum()))
        fresh = last >> 10 == epoch
        if fresh.any():
            self.report("race", number, "reads what was written since the last barrier", int(fresh.sum()))
        near = self.chunks(self.stamp)[chunks] == self.fences[block][:, None, None]
        if near.any():
            self.report(
                "proxy", number, "reads what was written with no fence.proxy.async since", int(near.sum())
            )
        self.chunks(self.read)[chunks] = (epoch << 10) | SEVERAL
        np.add.at(self.chunks(self.reading), chunks.ravel(), 1)


def _accumulated(group: Group, part: Any, one: Any, keep: Any) -> Any:
    """Return a part of the product, plus the old accumulator `one` where `keep` is true."""
    if getattr(keep, "ndim", 0) == 0:
        return ((part + group.full(one).view(f4)) if keep else part).view(u4)
    return (part + where(keep, group.full(one).view(f4), f4(0))).view(u4)
