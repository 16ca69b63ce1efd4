"""Matrix products of a warp: fragments in registers and mma.sync."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import f4, u2, u4
from .state import Group, State


def halves(x: Any, kind: str) -> Any:
    """Widen pairs of 16-bit numbers; return an fp32 array of shape (warps, 8, 4, registers, 2)."""
    pair = np.ascontiguousarray(x).view(u2)
    wide = pair.view(np.float16).astype(f4) if kind == "f16" else (pair.astype(u4) << u4(16)).view(f4)
    return wide.reshape(len(x), 8, 4, -1, 2)


def rows_of(x: Any, kind: str, depth: int) -> Any:
    """Return the matrices in the registers of a left operand, as an array of shape (warps, 16, depth)."""
    if kind == "tf32":  # rows g + 8 r0, columns t + 4 r1
        wide = (x & u4(0xFFFFE000)).view(f4).reshape(len(x), 8, 4, -1, 2)
        return np.ascontiguousarray(wide.transpose(0, 4, 1, 3, 2)).reshape(len(x), 16, depth)
    wide = halves(x, kind).reshape(len(x), 8, 4, -1, 2, 2)  # g, t, r1, r0, e
    return np.ascontiguousarray(wide.transpose(0, 4, 1, 3, 2, 5)).reshape(len(x), 16, depth)


class MatrixProducts(State):
    """Execute products of a warp (mma.sync)."""

    def _fragment(self, group: Group, key: str, registers: tuple[Any, ...], make: Any) -> Any:
        """Return the matrices in the given registers, one for each warp.

        Recent results are cached, because several products use the same operand.
        """
        name = (key, *map(id, registers))
        kept = self.fragments.get(name)
        if kept is not None:
            return kept[1]
        if len(self.fragments) > 64:
            self.fragments.clear()
        stacked = np.stack([group.full(r) for r in registers], -1)
        found = make(stacked.reshape(group.lanes // 32, 8, 4, len(registers)))
        self.fragments[name] = (registers, found)
        return found

    def mma(
        self, group: Group, number: int, mask: Any, shape: str, kind: str, a: Any, b: Any, c: Any
    ) -> list[Any]:
        """Return the accumulators of mma.sync.

        Args:
            group: Lanes that execute the instruction.
            number: Index of the instruction in the kernel.
            mask: Active lanes, or None for all.
            shape: "m16n8k16", "m16n8k8" or "m16n8k4".
            kind: Type of the operands: "f16", "bf16" or "tf32".
            a: Registers of the left operand.
            b: Registers of the right operand.
            c: Accumulators.
        """
        depth = int(shape.split("k")[1])

        def right(x: Any) -> Any:
            if kind == "tf32":
                columns = (x & u4(0xFFFFE000)).view(f4).transpose(0, 3, 2, 1)
            else:
                columns = halves(x, kind).transpose(0, 3, 2, 4, 1)
            return np.ascontiguousarray(columns).reshape(len(x), depth, 8)

        def left(x: Any) -> Any:
            return rows_of(x, kind, depth)

        first = self._fragment(group, f"a{shape}{kind}", a, left)
        second = self._fragment(group, f"b{shape}{kind}", b, right)
        if self.count:
            blocks = np.repeat(np.arange(group.count), group.width // 32)
            self.counters.count_products(number, blocks, first, second, group.active(mask))
        product = np.matmul(first, second)  # [warps, 16, 8]
        n = len(product)
        split = product.reshape(n, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)  # g, t, r, e
        return [
            (np.ascontiguousarray(split[:, :, :, i >> 1, i & 1]).reshape(-1) + group.full(one).view(f4)).view(
                u4
            )
            for i, one in enumerate(c)
        ]
