"""A kernel with its basic blocks translated to Python functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from .accesses import AccessInstructions
from .instructions import ScalarInstructions
from .parse import WIDTH, Instruction, Kernel, parse

MOST_PROGRAMS = 64  # kept translated; each takes about 8 MB


class Translator(ScalarInstructions, AccessInstructions):
    """Translate basic blocks to Python functions."""


class Program:
    """A kernel whose basic blocks are translated when they are first executed.

    Attributes:
        granule: Size in bytes of a granule, the smallest unit of shared memory for which hazards are recorded. The
            size is the width of the kernel's narrowest access to shared memory, but at most 4.
        word: Size in bytes of a word, the smallest unit of global memory for which hazards are recorded. The size is
            the width of the kernel's narrowest access to global memory, but at most 4.
        wgmma: Whether the kernel uses wgmma, the matrix products of warpgroups.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._translator = Translator(kernel)
        self._functions: dict[tuple[int, bool], Callable[..., Any]] = {}
        self.granule = min(map(_shared_width, kernel.instructions), default=4)
        self.word = min(map(_global_width, kernel.instructions), default=4)
        self.wgmma = any(ins.op[:2] == ["wgmma", "mma_async"] for ins in kernel.instructions)

    def function(self, number: int, masked: bool) -> Callable[..., Any]:
        """Return the function of basic block `number`.

        If `masked`, the function runs only the lanes that its argument `mask` selects. Otherwise, it runs all lanes.
        """
        key = (number, masked)
        if key not in self._functions:
            self._functions[key] = self._translator.block(self.kernel.blocks[number], number, masked)
        return self._functions[key]


@lru_cache(MOST_PROGRAMS)
def program_of(text: str) -> Program:
    """Return the `Program` of a PTX text.

    Programs are cached, so that launches with the same PTX text share one `Program` and its translated basic blocks.
    """
    return Program(parse(text))


def _shared_width(ins: Instruction) -> int:
    if ins.op[0] in ("ld", "st", "ldmatrix", "stmatrix") and any(w.startswith("shared") for w in ins.op):
        return min(WIDTH.get(ins.op[-1], 4), 4)
    return 4


def _global_width(ins: Instruction) -> int:
    return min(WIDTH.get(ins.op[-1], 4), 4) if ins.op[0] in ("ld", "st") and "global" in ins.op else 4
