"""Translate memory accesses, warp operations and matrix products of PTX to calls of `Execution`'s methods."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from .arithmetic import UNSIGNED
from .operands import Operands, indices
from .parse import WIDTH, Address, Instruction, Reg, Unsupported

ATOMIC_TYPES = ("u32", "s32", "b32", "f32", "u64", "s64", "b64", "f64", "f16", "bf16")
# The types of the operands of mma.sync, by shape.
MMA = {"m16n8k16": ("f16", "bf16"), "m16n8k8": ("tf32", "f16", "bf16"), "m16n8k4": ("tf32",)}


class AccessInstructions(Operands):
    """Emit memory accesses, warp operations and matrix products, each as a call of a method of `Execution`."""

    def _access(self, ins: Instruction) -> tuple[str, int, str, int]:
        """Return the memory space and the vector length of an access, and the type and size in bytes of an element."""
        space = next((word for word in ins.op if word in ("global", "shared", "local", "param")), None)
        if space is None:
            raise Unsupported(f"{ins.text} (line {ins.line}): generic address")
        if "shared" in ins.op and any(word.startswith("shared::cluster") for word in ins.op):
            raise Unsupported(ins.text)
        count = next((int(word[1:]) for word in ins.op if word in ("v2", "v4", "v8")), 1)
        kind = ins.op[-1]
        if kind == "b128" or kind not in WIDTH:
            raise Unsupported(ins.text)
        return space, count, kind, WIDTH[kind]

    def _address(self, address: Address) -> str:
        base = address.base
        width = base.width if isinstance(base, Reg) else 8
        text = self.bits(base, width)
        if address.offset:
            text = f"({text} + {self.constant(UNSIGNED[width](address.offset & (1 << 8 * width) - 1))})"
        return text

    def _normal(self, ins: Instruction) -> Instruction:
        """Replace shared::cta by its synonym shared."""
        op = [word.replace("shared::cta", "shared") for word in ins.op]
        return replace(ins, op=op)

    def _ld(self, ins: Instruction, mask: str) -> Any:
        ins = self._normal(ins)
        if ins.op[1] == "param":
            target, address = ins.args[0], ins.args[1]
            kind = ins.op[-1]
            text = f"G.param({self._address(address)}, {WIDTH[kind]})"
            return [(target, self._grown(text, kind, target))]
        space, count, kind, width = self._access(ins)
        targets = ins.args[0] if isinstance(ins.args[0], list) else [ins.args[0]]
        if len(targets) != count:
            raise Unsupported(ins.text)
        address = self._address(ins.args[1])
        text = f"M.load_{space}(G, {ins.number}, {address}, {count}, {width}, {mask})"
        found: list[tuple[Any, str]] = [(None, f"w = {text}")]
        for i, target in enumerate(targets):
            if target is not None:
                found.append((target, self._grown(f"w[{i}]", kind, target)))
        return found

    def _ldu(self, ins: Instruction, mask: str) -> Any:
        return self._ld(ins, mask)

    def _st(self, ins: Instruction, mask: str) -> Any:
        ins = self._normal(ins)
        space, count, _, width = self._access(ins)
        sources = ins.args[1] if isinstance(ins.args[1], list) else [ins.args[1]]
        if len(sources) != count:
            raise Unsupported(ins.text)
        data = ", ".join(self.bits(source, width) for source in sources)
        address = self._address(ins.args[0])
        return [(None, f"M.store_{space}(G, {ins.number}, {address}, ({data},), {width}, {mask})")]

    def _red(self, ins: Instruction, mask: str) -> Any:
        return self._atomic(ins, None, ins.args[0], ins.args[1:], mask)

    def _atom(self, ins: Instruction, mask: str) -> Any:
        return self._atomic(ins, ins.args[0], ins.args[1], ins.args[2:], mask)

    def _atomic(self, ins: Instruction, target: Any, address: Any, data: Any, mask: str) -> Any:
        ins = self._normal(ins)
        names = ("add", "min", "max", "and", "or", "xor", "exch", "cas")
        name = next(word for word in ins.op[1:] if word in names)
        kind = ins.op[-1]
        if "global" not in ins.op or kind not in ATOMIC_TYPES:
            raise Unsupported(ins.text)
        if any(isinstance(one, list) for one in data):
            raise Unsupported(ins.text)
        values_ = ", ".join(self.bits(one, WIDTH[kind]) for one in data)
        text = (
            f"M.atomic(G, {ins.number}, {self._address(address)}, ({values_},), '{name}', '{kind}', {mask})"
        )
        return [(target, text)]

    def _ldmatrix(self, ins: Instruction, mask: str) -> Any:
        ins = self._normal(ins)
        if ins.op[-1] != "b16" or "m8n8" not in ins.op:
            raise Unsupported(f"{ins.text} (line {ins.line})")
        targets = ins.args[0]
        text = f"M.ldmatrix(G, {ins.number}, {self._address(ins.args[1])}, {len(targets)}, {'trans' in ins.op}, {mask})"
        return [(targets, text)]

    def _stmatrix(self, ins: Instruction, mask: str) -> Any:
        ins = self._normal(ins)
        if ins.op[-1] != "b16" or "m8n8" not in ins.op:
            raise Unsupported(f"{ins.text} (line {ins.line})")
        data = ", ".join(self.bits(one, 4) for one in ins.args[1])
        text = f"M.stmatrix(G, {ins.number}, {self._address(ins.args[0])}, ({data},), {'trans' in ins.op}, {mask})"
        return [(None, text)]

    def _cp(self, ins: Instruction, mask: str) -> Any:
        if ins.op[:2] != ["cp", "async"]:
            raise Unsupported(ins.text)
        if ins.op[2] == "commit_group":
            return [(None, f"M.commit(G, {mask})")]
        if ins.op[2] in ("wait_group", "wait_all"):
            count = ins.args[0].value if ins.args else -1  # wait_all also completes uncommitted copies
            return [(None, f"M.wait(G, {count}, {mask})")]
        if ins.op[2] not in ("ca", "cg"):
            raise Unsupported(ins.text)
        size = ins.args[2].value
        hint = "L2::cache_hint" in ins.name
        source = ins.args[3] if len(ins.args) > 3 + hint else None
        amount = self.bits(source, 4) if source is not None else self.constant(np.uint32(size))
        to, of = self._address(ins.args[0]), self._address(ins.args[1])
        return [(None, f"M.copy(G, {ins.number}, {to}, {of}, {size}, {amount}, {mask})")]

    def _shfl(self, ins: Instruction, mask: str) -> Any:
        kind = ins.op[2]
        target = ins.args[0]
        targets = list(target) if isinstance(target, tuple) else [target, None]
        value, lane, clamp = (self.bits(arg, 4) for arg in ins.args[1:4])
        call = f"M.shuffle(G, '{kind}', {value}, {lane}, {clamp})"
        return [(targets, call)] if targets[1] is not None else [(targets[0], f"{call}[0]")]

    def _redux(self, ins: Instruction, mask: str) -> Any:
        kind = ins.op[-1]
        value = self.typed(ins.args[1], kind)
        text = f"M.reduce(G, '{ins.op[2]}', {value}, {self.bits(ins.args[2], 4)}, {mask})"
        return [(ins.args[0], f"{text}.view(u4)")]

    def _vote(self, ins: Instruction, mask: str) -> Any:
        mode = next(word for word in ins.op if word in ("any", "all", "ballot", "uni"))
        return [(ins.args[0], f"M.vote(G, '{mode}', {self.bits(ins.args[1], 0)}, {mask})")]

    def _activemask(self, ins: Instruction, mask: str) -> Any:
        return [(ins.args[0], f"M.vote(G, 'ballot', {self.constant(np.bool_(True))}, {mask})")]

    def _elect(self, ins: Instruction, mask: str) -> Any:
        raise Unsupported(ins.text)

    def _trap(self, ins: Instruction, mask: str) -> Any:
        return [(None, f"M.trap(G, {ins.number}, {mask})")]

    def _mma(self, ins: Instruction, mask: str) -> Any:
        shape = next(word for word in ins.op if word.startswith("m16n8"))
        to, a, b, c = ins.op[-4:]
        if (to, c) != ("f32", "f32") or a != b or a not in MMA.get(shape, ()):
            raise Unsupported(f"{ins.text} (line {ins.line})")
        groups = [f"({', '.join(self.bits(one, 4) for one in part)},)" for part in ins.args[1:4]]
        text = f"M.mma(G, {ins.number}, {mask}, '{shape}', '{a}', {', '.join(groups)})"
        return [(ins.args[0], text)]

    def _fence(self, ins: Instruction, mask: str) -> Any:
        return [(None, f"M.proxy(G, {mask})")] if ins.op[1:3] == ["proxy", "async"] else []

    def _wgmma(self, ins: Instruction, mask: str) -> Any:
        what = ins.op[1]
        if what == "fence":
            return [(None, f"M.wgmma_fence(G, {mask})")]
        if what == "commit_group":
            return [(None, f"M.wgmma_commit(G, {mask})")]
        if what == "wait_group":
            return [(None, f"M.wgmma_wait(G, {ins.args[0].value}, {mask})")]
        m = re.fullmatch(r"m64n(\d+)k(\d+)", ins.op[4])
        to, kind, other = ins.op[-3:]
        depth = {"f16": 16, "bf16": 16, "tf32": 8}.get(kind)
        if (
            what != "mma_async"
            or m is None
            or to != "f32"
            or kind != other
            or int(m[2]) != depth
            or ins.guard is not None
        ):
            raise Unsupported(f"{ins.text} (line {ins.line})")
        size, d, a = int(m[1]), ins.args[0], ins.args[1]
        held = isinstance(a, list)
        rest = [one.value for one in ins.args[4:]]
        if len(d) != size // 2 or len(rest) != 2 + (kind != "tf32") * (2 - held):
            raise Unsupported(f"{ins.text} (line {ins.line})")
        transposed = [one == 1 for one in rest[2:]]  # none for tf32; only that of b if a is in registers
        majors = tuple([False] * (2 - len(transposed)) + transposed)
        left = f"({', '.join(self.bits(one, 4) for one in a)},)" if held else self.bits(a, 8)
        old = ", ".join(self.bits(one, 4) for one in d)
        registers = f"registers_{ins.number}"
        self.names[registers] = (frozenset(indices(d)), frozenset(indices(a)) if held else frozenset())
        text = (
            f"M.wgmma(G, {ins.number}, {mask}, ({size}, {depth}), '{kind}', ({old},), {left}, "
            f"{self.bits(ins.args[2], 8)}, {self.bits(ins.args[3], 0)}, ({rest[0]}, {rest[1]}), {majors}, {registers})"
        )
        return [(d, text)]
