"""Translate PTX arithmetic, logic and conversions to Python expressions on arrays with one element per lane."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import COMPARE, COMPARE_FLOAT, SIGNED, UNSIGNED
from .operands import FLOATS, Operands, is_float
from .parse import WIDTH, Imm, Instruction, Reg, Unsupported

ROUNDING = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")
# Types with two numbers in one register: (expression that reads a number from its bits, expression that writes it).
PACKED = {
    "f16x2": ("half_wide({})", "half_round({})"),
    "bf16x2": ("bf_wide({})", "bf_round({})"),
    "s16x2": ("{}.view(i2)", "({}).view(u2)"),
    "u16x2": ("{}", "({})"),
}


def is_mixed(ins: Instruction) -> bool:
    """Return whether an instruction computes in fp32 with operands of 16 bits."""
    return ins.op[-2] == "f32" and ins.op[-1] in ("bf16", "f16")


class ScalarInstructions(Operands):
    """Emit arithmetic, logic and conversions.

    The method for an instruction is named after it, with a leading underscore: `_add` emits add.
    """

    def _arithmetic(self, ins: Instruction, form: str) -> list[tuple[Any, str]]:
        """Emit an arithmetic instruction. `form` is its expression, with {a}, {b} and {c} in place of the operands."""
        kind = ins.op[-1]
        operands = list(zip("abc", ins.args[1:], strict=False))
        if kind in PACKED:
            if "sat" in ins.op and not is_float(kind):
                raise Unsupported(ins.text)
            widen, narrow = PACKED[kind]
            halves = []
            for i in (0, 16):
                shift = self.constant(np.uint32(i))
                names = {n: widen.format(f"({self.bits(x, 4)} >> {shift}).astype(u2)") for n, x in operands}
                halves.append(f"{narrow.format(form.format(**names))}.astype(u4)")
            return [(ins.args[0], f"({halves[0]} | ({halves[1]} << {self.constant(np.uint32(16))}))")]
        if kind == "f32x2":
            if "ftz" in ins.op:
                raise Unsupported(ins.text)
            names = {name: f"pairs(G, {self.bits(arg, 8)})" for name, arg in operands}
            return [(ins.args[0], f"({form.format(**names)}).view(u8)")]
        if kind not in WIDTH or kind == "b128":
            raise Unsupported(ins.text)
        if any(r in ins.op for r in ("rz", "rm", "rp")) and is_float(kind):
            raise Unsupported(ins.text)
        names = {name: self.typed(arg, kind) for name, arg in operands}
        if "ftz" in ins.op and kind == "f32":
            names = {name: f"ftz({text})" for name, text in names.items()}
        return [(ins.args[0], self._result(form.format(**names), kind, ins))]

    def _mixed(self, ins: Instruction) -> Any:
        """Emit fma, add or sub in fp32. All operands except the last are bf16 or f16."""
        if ins.op[1:-2] not in ([], ["rn"]):
            raise Unsupported(f"{ins.text} (line {ins.line})")
        narrow = [self.typed(arg, ins.op[-1]) for arg in ins.args[1:-1]]
        last = self.typed(ins.args[-1], "f32")
        form = {"fma": "fma({0}, {1}, {c})", "add": "{0} + {c}", "sub": "{0} - {c}"}[ins.op[0]]
        return [(ins.args[0], f"({form.format(*narrow, c=last)}).view(u4)")]

    def _add(self, ins: Instruction, mask: str) -> Any:
        return self._sum(ins, "{a} + {b}")

    def _sub(self, ins: Instruction, mask: str) -> Any:
        return self._sum(ins, "{a} - {b}")

    def _sum(self, ins: Instruction, form: str) -> Any:
        if is_mixed(ins):
            return self._mixed(ins)
        self._only(ins, "rn", "ftz", "sat")
        return self._arithmetic(ins, form)

    def _only(self, ins: Instruction, *known: str) -> None:
        """Refuse unknown modifiers between the name and the type of an instruction."""
        for word in ins.op[1:-1]:
            if word not in known:
                raise Unsupported(f"{ins.text} (line {ins.line})")

    def _mul(self, ins: Instruction, mask: str) -> Any:
        self._only(ins, "rn", "ftz", "sat", "lo", "hi", "wide")
        if "wide" in ins.op:
            return [(ins.args[0], f"({self._wide(ins)}).view(u{2 * WIDTH[ins.op[-1]]})")]
        return self._arithmetic(ins, "high({a}, {b})" if "hi" in ins.op else "{a} * {b}")

    def _wide(self, ins: Instruction) -> str:
        """Return an expression for the product of the first two operands, which has twice their width."""
        kind = ins.op[-1]
        wide = f"{'i' if kind[0] == 's' else 'u'}{2 * WIDTH[kind]}"
        return " * ".join(f"{self.typed(arg, kind)}.astype({wide})" for arg in ins.args[1:3])

    def _mad(self, ins: Instruction, mask: str) -> Any:
        kind = ins.op[-1]
        if kind in FLOATS:
            return self._fma(ins, mask)
        self._only(ins, "lo", "hi", "wide")
        if "wide" in ins.op:
            width = 2 * WIDTH[kind]
            c = self.typed(ins.args[3], f"{kind[0]}{8 * width}")
            return [(ins.args[0], f"({self._wide(ins)} + {c}).view(u{width})")]
        return self._arithmetic(ins, "high({a}, {b}) + {c}" if "hi" in ins.op else "{a} * {b} + {c}")

    def _fma(self, ins: Instruction, mask: str) -> Any:
        if is_mixed(ins):
            return self._mixed(ins)
        self._only(ins, "rn", "ftz", "sat")
        kind = ins.op[-1]
        wide = "{a}.astype(f8) * {b}.astype(f8) + {c}.astype(f8)"
        if kind in ("bf16", "bf16x2"):
            found = self._arithmetic(ins, wide)
            return [(target, text.replace("bf_round(", "bf_round64(")) for target, text in found]
        return self._arithmetic(ins, wide if kind in ("f16", "f16x2") else "fma({a}, {b}, {c})")

    def _div(self, ins: Instruction, mask: str) -> Any:
        self._only(ins, "rn", "full", "approx", "ftz")
        return self._arithmetic(ins, "{a} / {b}" if is_float(ins.op[-1]) else "divide({a}, {b})")

    def _rem(self, ins: Instruction, mask: str) -> Any:
        return self._arithmetic(ins, "remainder({a}, {b})")

    def _min(self, ins: Instruction, mask: str) -> Any:
        self._only(ins, "ftz", "NaN")
        return self._least(ins, "min")

    def _max(self, ins: Instruction, mask: str) -> Any:
        self._only(ins, "ftz", "NaN")
        return self._least(ins, "max")

    def _least(self, ins: Instruction, which: str) -> Any:
        function = f"f{which}" if is_float(ins.op[-1]) and "NaN" not in ins.op else f"{which}imum"
        if len(ins.args) == 4:
            return self._arithmetic(ins, f"np.{function}(np.{function}({{a}}, {{b}}), {{c}})")
        return self._arithmetic(ins, f"np.{function}({{a}}, {{b}})")

    def _abs(self, ins: Instruction, mask: str) -> Any:
        kind = ins.op[-1]
        if kind == "f32" and "ftz" not in ins.op:
            return [(ins.args[0], f"{self.bits(ins.args[1], 4)} & {self.constant(np.uint32(0x7FFFFFFF))}")]
        if kind in ("f16x2", "bf16x2"):
            return [(ins.args[0], f"{self.bits(ins.args[1], 4)} & {self.constant(np.uint32(0x7FFF7FFF))}")]
        return self._arithmetic(ins, "np.abs({a})")

    def _neg(self, ins: Instruction, mask: str) -> Any:
        kind = ins.op[-1]
        if kind == "f32" and "ftz" not in ins.op:
            return [(ins.args[0], f"{self.bits(ins.args[1], 4)} ^ {self.constant(np.uint32(0x80000000))}")]
        if kind in ("f16x2", "bf16x2"):
            return [(ins.args[0], f"{self.bits(ins.args[1], 4)} ^ {self.constant(np.uint32(0x80008000))}")]
        return self._arithmetic(ins, "-{a}")

    def _copysign(self, ins: Instruction, mask: str) -> Any:
        return self._arithmetic(ins, "np.copysign({b}, {a})")

    def _and(self, ins: Instruction, mask: str) -> Any:
        return self._logic(ins, "{a} & {b}")

    def _or(self, ins: Instruction, mask: str) -> Any:
        return self._logic(ins, "{a} | {b}")

    def _xor(self, ins: Instruction, mask: str) -> Any:
        return self._logic(ins, "{a} ^ {b}")

    def _not(self, ins: Instruction, mask: str) -> Any:
        return self._logic(ins, "~{a}")

    def _logic(self, ins: Instruction, form: str) -> Any:
        width = WIDTH[ins.op[-1]]
        names = {name: self.bits(arg, width) for name, arg in zip("abc", ins.args[1:], strict=False)}
        return [(ins.args[0], form.format(**names))]

    def _lop3(self, ins: Instruction, mask: str) -> Any:
        if len(ins.args) != 5:
            raise Unsupported(ins.text)
        a, b, c = (self.bits(arg, 4) for arg in ins.args[1:4])
        return [(ins.args[0], f"lop3({a}, {b}, {c}, {ins.args[4].value})")]

    def _shl(self, ins: Instruction, mask: str) -> Any:
        return self._shifted(ins, "shl", "<<")

    def _shr(self, ins: Instruction, mask: str) -> Any:
        return self._shifted(ins, "shr", ">>")

    def _shifted(self, ins: Instruction, name: str, sign: str) -> Any:
        kind, count = ins.op[-1], ins.args[2]
        value = self.typed(ins.args[1], kind)
        width = WIDTH[kind]
        if isinstance(count, Imm) and 0 <= count.value < 8 * width:
            number = self.constant((SIGNED if kind[0] == "s" else UNSIGNED)[width](count.value))
            return [(ins.args[0], self._result(f"{value} {sign} {number}", kind, ins))]
        return [(ins.args[0], self._result(f"{name}({value}, {self.shift(count)})", kind, ins))]

    def _shf(self, ins: Instruction, mask: str) -> Any:
        a, b, c = (self.bits(arg, 4) for arg in ins.args[1:4])
        name = "funnel_left" if ins.op[1] == "l" else "funnel_right"
        return [(ins.args[0], f"{name}({a}, {b}, {c}, {ins.op[2] == 'wrap'})")]

    def _bfe(self, ins: Instruction, mask: str) -> Any:
        value = self.typed(ins.args[1], ins.op[-1])
        text = f"extract({value}, {self.shift(ins.args[2])}, {self.shift(ins.args[3])})"
        return [(ins.args[0], self._result(text, ins.op[-1], ins))]

    def _bfi(self, ins: Instruction, mask: str) -> Any:
        width = WIDTH[ins.op[-1]]
        a, b = (self.bits(arg, width) for arg in ins.args[1:3])
        return [(ins.args[0], f"insert({a}, {b}, {self.shift(ins.args[3])}, {self.shift(ins.args[4])})")]

    def _prmt(self, ins: Instruction, mask: str) -> Any:
        if ins.op[1] != "b32":
            raise Unsupported(ins.text)
        a, b, c = (self.bits(arg, 4) for arg in ins.args[1:4])
        return [(ins.args[0], f"permute({a}, {b}, {c})")]

    def _popc(self, ins: Instruction, mask: str) -> Any:
        return [(ins.args[0], f"np.bitwise_count({self.bits(ins.args[1], WIDTH[ins.op[-1]])}).astype(u4)")]

    def _clz(self, ins: Instruction, mask: str) -> Any:
        width = WIDTH[ins.op[-1]]
        return [(ins.args[0], f"({8 * width - 1} - leading({self.bits(ins.args[1], width)})).astype(u4)")]

    def _bfind(self, ins: Instruction, mask: str) -> Any:
        if ins.op[-1] not in ("u32", "u64") or "shiftamt" in ins.op:
            raise Unsupported(ins.text)
        return [(ins.args[0], f"leading({self.bits(ins.args[1], WIDTH[ins.op[-1]])}).astype(u4)")]

    def _brev(self, ins: Instruction, mask: str) -> Any:
        return [(ins.args[0], f"reverse({self.bits(ins.args[1], 4)})")]

    def _ex2(self, ins: Instruction, mask: str) -> Any:
        if ins.op[-1] != "f32":
            raise Unsupported(ins.text)
        return [(ins.args[0], f"exp2({self.typed(ins.args[1], 'f32')}, {'ftz' in ins.op}).view(u4)")]

    def _unary(self, ins: Instruction, form: str) -> Any:
        if ins.op[-1] != "f32":
            raise Unsupported(ins.text)
        return self._arithmetic(ins, form)

    def _lg2(self, ins: Instruction, mask: str) -> Any:
        return self._unary(ins, "np.log2({a})")

    def _rcp(self, ins: Instruction, mask: str) -> Any:
        return self._unary(ins, "f4(1) / {a}")

    def _sqrt(self, ins: Instruction, mask: str) -> Any:
        return self._unary(ins, "np.sqrt({a})")

    def _rsqrt(self, ins: Instruction, mask: str) -> Any:
        return self._unary(ins, "(1 / np.sqrt({a}.astype(f8))).astype(f4)")

    def _tanh(self, ins: Instruction, mask: str) -> Any:
        return self._unary(ins, "np.tanh({a})")

    def _sin(self, ins: Instruction, mask: str) -> Any:
        return self._unary(ins, "np.sin({a})")

    def _cos(self, ins: Instruction, mask: str) -> Any:
        return self._unary(ins, "np.cos({a})")

    def _testp(self, ins: Instruction, mask: str) -> Any:
        form = {
            "finite": "np.isfinite({a})",
            "infinite": "np.isinf({a})",
            "notanumber": "np.isnan({a})",
            "number": "~np.isnan({a})",
        }[ins.op[1]]
        return [(ins.args[0], form.format(a=self.typed(ins.args[1], ins.op[-1])))]

    def _setp(self, ins: Instruction, mask: str) -> Any:
        kind = ins.op[-1]
        table = COMPARE_FLOAT if is_float(kind) else COMPARE
        a, b = self.typed(ins.args[1], kind), self.typed(ins.args[2], kind)
        if "ftz" in ins.op:
            a, b = f"ftz({a})", f"ftz({b})"
        text = table[ins.op[1]].format(a=a, b=b)
        combine = next((word for word in ins.op[2:-1] if word in ("and", "or", "xor")), None)
        targets = ins.args[0] if isinstance(ins.args[0], tuple) else (ins.args[0],)
        found = []
        for target, plain in zip(targets, (text, f"~{text}"), strict=False):
            if combine:
                sign = {"and": "&", "or": "|", "xor": "^"}[combine]
                plain = f"({plain} {sign} {self.bits(ins.args[3], 0)})"
            if target is not None:
                found.append((target, plain))
        return found

    def _selp(self, ins: Instruction, mask: str) -> Any:
        width = WIDTH[ins.op[-1]]
        a, b = (self.bits(arg, width) for arg in ins.args[1:3])
        return [(ins.args[0], f"where({self.bits(ins.args[3], 0)}, {a}, {b})")]

    def _slct(self, ins: Instruction, mask: str) -> Any:
        width = WIDTH[ins.op[-2]]
        a, b = (self.bits(arg, width) for arg in ins.args[1:3])
        return [(ins.args[0], f"where({self.typed(ins.args[3], ins.op[-1])} >= 0, {a}, {b})")]

    def _mov(self, ins: Instruction, mask: str) -> Any:
        kind = ins.op[-1]
        width = WIDTH[kind]
        if isinstance(ins.args[0], list):
            part = width // len(ins.args[0])
            source = self.bits(ins.args[1], width)
            return [
                (target, f"({source} >> {self.constant(UNSIGNED[width](8 * part * i))}).astype(u{part})")
                for i, target in enumerate(ins.args[0])
                if target is not None
            ]
        return [(ins.args[0], self.bits(ins.args[1], width))]

    def _cvta(self, ins: Instruction, mask: str) -> Any:
        if {"global", "param", "shared", "local"}.isdisjoint(ins.op):
            raise Unsupported(ins.text)
        return [(ins.args[0], self.bits(ins.args[1], WIDTH[ins.op[-1]]))]

    def _cvt(self, ins: Instruction, mask: str) -> Any:
        modes = [word for word in ins.op[1:] if word in ROUNDING]
        kinds = [word for word in ins.op[1:] if word in WIDTH]
        if set(ins.op[1:]) - {*modes, *kinds, "ftz", "sat"} or len(kinds) != 2:
            raise Unsupported(f"{ins.text} (line {ins.line})")
        to, of = kinds
        mode = modes[0] if modes else None
        target = ins.args[0]
        if to in ("f16x2", "bf16x2"):
            if of != "f32" or mode not in ("rn", "rz") or (to == "f16x2" and mode == "rz"):
                raise Unsupported(ins.text)
            narrow = "half_round" if to == "f16x2" else "bf_round" if mode == "rn" else "bf_truncate"
            highest, lowest = (f"{narrow}({self.typed(arg, 'f32')}).astype(u4)" for arg in ins.args[1:3])
            return [(target, f"({lowest} | ({highest} << {self.constant(np.uint32(16))}))")]
        source = self.typed(ins.args[1], of)
        if "ftz" in ins.op and of == "f32":
            source = f"ftz({source})"
        if to == "tf32":
            return [(target, f"tf32_{mode}({source})")]
        if is_float(to) and is_float(of):
            if mode in ("rni", "rzi", "rmi", "rpi"):
                name = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[mode]
                return [(target, self._result(f"np.{name}({source})", to, ins))]
            if mode not in (None, "rn") and not (mode == "rz" and to == "bf16"):
                raise Unsupported(ins.text)
            if to == "bf16":
                if of not in ("f32", "f64", "f16"):
                    raise Unsupported(ins.text)
                name = "bf_truncate" if mode == "rz" else "bf_round64" if of == "f64" else "bf_round"
                return [(target, f"{name}({source})")]
            if to == "f16":
                return [(target, f"half_round({source})")]
            return [(target, self._result(f"{source}.astype({'f4' if to == 'f32' else 'f8'})", to, ins))]
        if is_float(to):  # from an integer
            if mode != "rn":
                raise Unsupported(ins.text)
            wide = f"{source}.astype({'f8' if to == 'f64' else 'f4'})"
            return [(target, self._result(wide, to, ins))]
        if is_float(of):
            width = WIDTH[to]
            letter = "i" if to[0] == "s" else "u"
            text = f"to_int({source}, {letter}{width}, '{mode}').view(u{width})"
            return [(target, self._grown(text, to, target))]
        if "sat" in ins.op:
            raise Unsupported(ins.text)
        width = WIDTH[to]
        grown = f"astype(i{width}).view(u{width})" if of[0] == "s" else f"astype(u{width})"
        return [(target, self._grown(f"{source}.{grown}", to, target))]

    def _grown(self, text: str, kind: str, target: Reg) -> str:
        """Return a value extended to a wider register."""
        width = WIDTH[kind]
        if target.width == width:
            return text
        if kind[0] == "s":
            return f"{text}.view(i{width}).astype(i{target.width}).view(u{target.width})"
        return f"{text}.astype(u{target.width})"
