"""Instructions that exchange values among the lanes of a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import i8, u4, where
from .state import Group, State


class Warps(State):
    """Execute shuffles, reductions and votes of a warp."""

    def shuffle(self, group: Group, kind: str, value: Any, lane: Any, clamp: Any) -> list[Any]:
        """Return the value of each lane's source lane, and whether the source lane is in range.

        If the source lane is out of range, the lane gets its own value.
        """
        rows = group.full(value).reshape(-1, 32)
        own = np.arange(32)
        if getattr(lane, "ndim", 0) == 0 and getattr(clamp, "ndim", 0) == 0:
            lane, clamp = np.full(32, int(lane)), int(clamp)
            single = True
        else:
            lane = group.full(lane).reshape(-1, 32).astype(i8)
            clamp = group.full(clamp).reshape(-1, 32).astype(i8)
            single = False
        b, c, segment = lane & 31, clamp & 31, (clamp >> 8) & 31
        most, least = (own & segment) | (c & ~segment), own & segment
        if kind == "up":
            source = own - b
            valid = source >= most
        elif kind == "down":
            source = own + b
            valid = source <= most
        elif kind == "bfly":
            source = own ^ b
            valid = source <= most
        else:
            source = least | (b & ~segment)
            valid = source <= most
        source = where(valid, source, own)
        if single:
            return [rows[:, source].ravel(), np.repeat(valid[None], len(rows), 0).ravel()]
        found = np.take_along_axis(rows, np.broadcast_to(source, rows.shape), 1).ravel()
        return [found, np.broadcast_to(valid, rows.shape).ravel()]

    def _members(self, group: Group, mask: Any) -> Any:
        return np.ones((group.lanes // 32, 32), bool) if mask is None else group.full(mask).reshape(-1, 32)

    def reduce(self, group: Group, name: str, value: Any, members: Any, mask: Any) -> Any:
        """Return the reduction of a value over the member lanes of each warp."""
        rows = group.full(value).reshape(-1, 32)
        bits = group.full(members).reshape(-1, 32)
        chosen = ((bits >> np.arange(32, dtype=u4)) & u4(1)).astype(bool) & self._members(group, mask)
        if name in ("min", "max"):
            limits = np.iinfo(rows.dtype)
            filler = limits.max if name == "min" else limits.min
            result = getattr(where(chosen, rows, rows.dtype.type(filler)), name)(1)
        else:
            function, filler = {
                "add": (np.add, 0),
                "or": (np.bitwise_or, 0),
                "xor": (np.bitwise_xor, 0),
                "and": (np.bitwise_and, -1),
            }[name]
            filler = ~rows.dtype.type(0) if filler else rows.dtype.type(0)
            result = function.reduce(where(chosen, rows, filler), axis=1, dtype=rows.dtype)
        return np.repeat(result.astype(rows.dtype), 32)

    def vote(self, group: Group, mode: str, value: Any, mask: Any) -> Any:
        """Return the vote of the active lanes of each warp; `mode` is "any", "all", "uni" or "ballot"."""
        rows = group.full(value).reshape(-1, 32)
        active = self._members(group, mask)
        if mode == "any":
            return np.repeat((rows & active).any(1), 32)
        if mode == "all":
            return np.repeat((rows | ~active).all(1), 32)
        if mode == "uni":
            return np.repeat((rows & active).any(1) == (rows | ~active).all(1), 32)
        bits = ((rows & active).astype(u4) << np.arange(32, dtype=u4)).sum(1, dtype=u4)
        return np.repeat(bits, 32)

    def trap(self, group: Group, number: int, mask: Any) -> None:
        """Report a trap."""
        lanes = group.lanes if mask is None else int(group.full(mask).sum())
        self.report("trap", number, "the kernel trapped", lanes)
