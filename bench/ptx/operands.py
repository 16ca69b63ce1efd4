"""Translate PTX to Python: operands to expressions over arrays of lanes, and basic blocks to functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic
from .arithmetic import UNSIGNED
from .parse import WIDTH, Address, Block, Imm, Instruction, Kernel, Not, Reg, Special, Symbol, Unsupported

FLOATS = ("f16", "f32", "f64", "bf16", "f16x2", "bf16x2", "f32x2", "tf32")
SKIPPED = ("createpolicy", "membar", "nanosleep", "griddepcontrol", "prefetch", "applypriority", "discard")


class Operands:
    """Translate basic blocks to Python functions.

    Each Python function executes one basic block for a group of lanes (`state.Group`). Its arguments are the
    `Execution`, the group, the registers of the group, and the mask of active lanes. The mask is None if all lanes are
    active.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.names: dict[str, Any] = {
            name: getattr(arithmetic, name) for name in dir(arithmetic) if not name.startswith("__")
        }
        self.constants: dict[tuple[str, Any], str] = {}
        self.accumulators: set[int] = set()
        self.operands: set[int] = set()  # registers that wgmma reads
        for ins in kernel.instructions:
            if ins.op[:2] == ["wgmma", "mma_async"]:
                self.accumulators |= indices(ins.args[0])
                self.operands |= indices(ins.args[1]) if isinstance(ins.args[1], list) else set()

    def block(self, block: Block, number: int, masked: bool) -> Callable[..., Any]:
        """Compile a basic block to a Python function.

        If the basic block ends with a conditional branch or a conditional exit, the Python function returns a mask of
        the lanes that branch or exit. Otherwise, it returns None.

        Args:
            block: The basic block.
            number: Index of the basic block, which becomes part of the function's name.
            masked: Whether the Python function executes the block only for the lanes that its argument `mask` selects.
                Otherwise, it executes the block for all lanes.
        """
        lines = [f"def block_{number}(M, G, R, mask):"]
        self.masked = masked
        for instruction in block.instructions:
            try:
                lines += self._touches(instruction)
                lines += self._lines(instruction)
            except (KeyError, IndexError, AttributeError, ValueError) as error:
                raise Unsupported(f"{instruction.text} (line {instruction.line}): {error!r}") from error
        if block.end is not None and block.end.guard is not None:
            guard = f"R[{block.end.guard.index}]"
            lines.append(f"    return ~{guard}" if block.end.negated else f"    return {guard}")
        else:
            lines.append("    return None")
        scope: dict[str, Any] = dict(self.names)
        exec(compile("\n".join(lines), f"<{self.kernel.name} block {number}>", "exec"), scope)
        function: Callable[..., Any] = scope[f"block_{number}"]
        return function

    def constant(self, value: Any) -> str:
        """Return the name of a constant in the translated code."""
        key = (type(value).__name__, value.tobytes())
        if key not in self.constants:
            self.constants[key] = f"k{len(self.constants)}"
            self.names[self.constants[key]] = value
        return self.constants[key]

    def bits(self, arg: Any, width: int) -> str:
        """Return an expression for the bits of an operand, as an unsigned integer of `width` bytes.

        If `width` is 0, the operand is a predicate, and the expression is boolean.
        """
        if isinstance(arg, Reg):
            if width == 0 or arg.width == width:
                return f"R[{arg.index}]"
            return f"R[{arg.index}].astype(u{width})"
        if isinstance(arg, Not):
            return f"(~R[{arg.of.index}])"
        if isinstance(arg, Imm):
            if width == 0:
                return self.constant(np.bool_(arg.value != 0))
            return self.constant(UNSIGNED[width](arg.value & (1 << 8 * width) - 1))
        if isinstance(arg, Symbol):
            for table in (self.kernel.shared, self.kernel.local, self.kernel.places):
                if arg.name in table:
                    return self.constant(UNSIGNED[width](table[arg.name]))
            raise Unsupported(f"symbol {arg.name}")
        if isinstance(arg, Special):
            text = f"G.special['{arg.name}']"
            return text if width == 4 else f"{text}.astype(u{width})"
        if isinstance(arg, list):  # packed, lowest first
            part = width // len(arg)
            terms = []
            for i, one in enumerate(arg):
                text = f"{self.bits(one, part)}.astype(u{width})"
                terms.append(f"({text} << {self.constant(UNSIGNED[width](8 * part * i))})" if i else text)
            return f"({' | '.join(terms)})"
        raise Unsupported(f"operand {arg}")

    def typed(self, arg: Any, kind: str) -> str:
        """Return an expression for an operand of PTX type `kind`; fp16 and bf16 are widened to fp32."""
        width = WIDTH[kind]
        if kind == "pred":
            return self.bits(arg, 0)
        text = self.bits(arg, width)
        if kind in ("f32", "tf32"):
            return f"{text}.view(f4)"
        if kind == "f64":
            return f"{text}.view(f8)"
        if kind == "f16":
            return f"half_wide({text})"
        if kind == "bf16":
            return f"bf_wide({text})"
        return f"{text}.view(i{width})" if kind[0] == "s" else text

    def shift(self, arg: Any) -> str:
        """Return an expression for an operand that is a shift count of 32 bits."""
        return self.bits(arg, 4)

    def _touches(self, ins: Instruction) -> list[str]:
        """Return the code that calls `touch` for an instruction, or no code if no call is needed.

        A call of `touch` is needed if the instruction reads an accumulator of wgmma, or writes an accumulator or an
        operand register of wgmma. The instructions of wgmma themselves need no call.
        """
        if not self.accumulators or ins.op[0] == "wgmma":
            return []
        stores = ins.op[0] in ("st", "red", "stmatrix", "cp")
        writes = set() if stores or not ins.args else indices(ins.args[0])
        reads = set().union(*map(indices, ins.args if stores else ins.args[1:]))
        reads, writes = reads & self.accumulators, writes & (self.accumulators | self.operands)
        if not reads and not writes:
            return []
        names = [f"({''.join(f'{i}, ' for i in sorted(one))})" for one in (reads, writes)]
        fresh = ins.op[0] != "mov"  # LLVM moves zeros below wgmma.fence; ptxas corrects the order
        return [
            f"    M.touch(G, {ins.number}, {names[0]}, {names[1]}, {fresh}, {'mask' if self.masked else 'None'})"
        ]

    def _lines(self, ins: Instruction) -> list[str]:
        lines = []
        if ins.guard is not None:
            guard = f"R[{ins.guard.index}]"
            guard = f"~{guard}" if ins.negated else guard
            lines.append(f"    m = {guard} & mask" if self.masked else f"    m = {guard}")
            mask = "m"
        else:
            mask = "mask" if self.masked else "None"
        found = self._emit(ins, mask)
        for target, text in found:
            if target is None:
                lines.append(f"    {text}")
            elif isinstance(target, list):
                names = [f"v{i}" for i in range(len(target))]
                lines.append(f"    {', '.join(names)}, = {text}")
                for one, name in zip(target, names, strict=True):
                    if one is not None:
                        lines.append(self._assign(one, name, mask))
            else:
                lines.append(self._assign(target, text, mask))
        return lines

    def _assign(self, target: Reg, text: str, mask: str) -> str:
        place = f"R[{target.index}]"
        return f"    {place} = {text}" if mask == "None" else f"    {place} = where({mask}, {text}, {place})"

    def _emit(self, ins: Instruction, mask: str) -> list[tuple[Any, str]]:
        op, args = ins.op[0], ins.args
        method = getattr(self, f"_{op}", None)
        if method is not None:
            return list(method(ins, mask))
        if ins.op[:3] == ["bar", "warp", "sync"]:  # the emulator runs the lanes of a warp together
            return []
        if op in SKIPPED:
            if op == "createpolicy":
                return [(args[0], self.constant(np.uint64(0)))]
            return []
        raise Unsupported(f"{ins.text} (line {ins.line})")

    def _result(self, text: str, kind: str, ins: Instruction) -> str:
        """Return a computed value as bits of its type."""
        if kind == "f32":
            if "sat" in ins.op:
                text = f"saturate({text})"
            if "ftz" in ins.op:
                text = f"ftz({text})"
            return f"({text}).view(u4)"
        if kind == "f64":
            return f"({text}).view(u8)"
        if kind == "f16":
            return f"half_round({text})"
        if kind == "bf16":
            return f"bf_round({text})"
        if kind == "pred":
            return text
        width = WIDTH[kind]
        return f"({text}).view(u{width})" if kind[0] == "s" else text


def indices(arg: Any) -> set[int]:
    """Return the indices of the registers in an operand."""
    if isinstance(arg, Reg):
        return {arg.index}
    if isinstance(arg, (list, tuple)):
        return set().union(*map(indices, arg))
    if isinstance(arg, Not):
        return {arg.of.index}
    return indices(arg.base) if isinstance(arg, Address) else set()


def is_float(kind: str) -> bool:
    """Return whether a PTX type is a floating-point type."""
    return kind in FLOATS
