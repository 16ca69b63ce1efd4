"""Parse the PTX that Triton emits into basic blocks of instructions."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field
from typing import Any

_KINDS = {
    0: "pred",
    1: "b8 u8 s8",
    2: "b16 u16 s16 f16 bf16",
    4: "b32 u32 s32 f32 f16x2 bf16x2 tf32",
    8: "f32x2 b64 u64 s64 f64",
    16: "b128",
}
WIDTH = {kind: width for width, kinds in _KINDS.items() for kind in kinds.split()}  # bytes by type


class Unsupported(Exception):  # noqa: N818  # part of the public API
    """An instruction or other part of PTX that the emulator does not model; the message contains its text."""


@dataclass(frozen=True)
class Reg:
    """A register. The width is in bytes, and 0 for a predicate."""

    index: int
    width: int
    name: str


@dataclass(frozen=True)
class Imm:
    """An immediate of kind "int", "f32" or "f64".

    For "f32" and "f64", `value` is the bit pattern of the floating-point number, as an integer.
    """

    kind: str
    value: int


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Address:
    """An address: a Reg, Imm or Symbol plus an offset in bytes."""

    base: Any
    offset: int


@dataclass(frozen=True)
class Not:
    of: Reg


@dataclass
class Instruction:
    """An instruction.

    Attributes:
        op: Parts of the name, such as ["add", "f32"].
        args: Operands.
        guard: Predicate that decides which lanes execute the instruction, or None.
        negated: Whether the predicate is negated.
        text: Text of the instruction.
        line: Line number in the PTX.
        loc: Index of the source file in `Kernel.files`, and line number in this file.
        chain: Call chain of the source line, the innermost frame first, as in "parts.py:120 < kernels.py:77".
        number: Index of the instruction in the kernel.
    """

    op: list[str]
    args: list[Any]
    guard: Reg | None
    negated: bool
    text: str
    line: int
    loc: tuple[int, int]
    chain: str = ""
    number: int = -1

    @property
    def name(self) -> str:
        return ".".join(self.op)


@dataclass
class Block:
    """A basic block.

    `end` is the last instruction of the block: a branch, a return, an exit or a barrier. If `end` is None, execution
    continues with the next basic block.
    """

    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None


@dataclass
class Kernel:
    """A parsed kernel.

    Attributes:
        name: Name of the kernel.
        params: A pair (type, name) for each parameter.
        places: Dictionary from the name of each parameter to its offset in bytes.
        registers: All registers.
        blocks: Basic blocks in order.
        targets: Dictionary from each label to the index of the basic block that starts there.
        shared: Dictionary from the name of each shared-memory array to its offset in bytes. Dynamic arrays are
            included.
        shared_bytes: Total size of the static shared-memory arrays in bytes.
        local: Dictionary from the name of each local-memory array to its offset in bytes.
        local_bytes: Total size of the local-memory arrays in bytes.
        files: Dictionary from the index of each source file to its name.
        instructions: All instructions in order.
    """

    name: str
    params: list[tuple[str, str]]
    places: dict[str, int]
    registers: list[Reg]
    blocks: list[Block]
    targets: dict[str, int]
    shared: dict[str, int]
    shared_bytes: int
    local: dict[str, int]
    local_bytes: int
    files: dict[int, str]
    instructions: list[Instruction]


SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.([xyz])$|%(laneid|warpid|clock|globaltimer|clusterid.*|cluster_.*)$"
)


def parse(text: str) -> Kernel:
    """Parse a PTX module with one kernel.

    Raises:
        Unsupported: The module does not consist of one kernel, or has an unknown directive or operand.
    """
    starts = [0] + [m.end() for m in re.finditer("\n", text)]
    clean = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
    clean = re.sub(r"//[^\n]*", lambda m: " " * len(m.group()), clean)
    kernel, pos = _declarations(text, clean)
    scopes: list[dict[str, Reg]] = [{}]
    loc, chain = (0, 0), ""
    stop = re.compile(r"\s*")
    label = re.compile(r"([\w$%]+):(?!:)")

    while True:
        pos = stop.match(clean, pos).end()  # type: ignore[union-attr]
        char = clean[pos]
        if char == "{":
            scopes.append({})
            pos += 1
            continue
        if char == "}":
            scopes.pop()
            pos += 1
            if not scopes:
                break
            continue
        found = label.match(clean, pos)
        if found:
            if kernel.blocks[-1].instructions or kernel.blocks[-1].end:
                kernel.blocks.append(Block())
            kernel.targets[found.group(1)] = len(kernel.blocks) - 1
            pos = found.end()
            continue
        if clean.startswith((".loc ", ".loc\t"), pos):  # and not .local
            end = clean.index("\n", pos)
            numbers = clean[pos + 4 : end].split()
            loc = (int(numbers[0]), int(numbers[1]))
            chain = " < ".join(re.findall(r"([\w.]+:\d+):\d+", text[pos:end])) or chain
            pos = end
            continue
        end = clean.index(";", pos)
        statement = " ".join(clean[pos:end].split())
        line = bisect.bisect_right(starts, pos)
        pos = end + 1
        if not statement:
            continue
        if statement.startswith("."):
            _directive(kernel, scopes[-1], statement)
            continue
        instruction = _instruction(kernel, scopes, statement, line, loc)
        instruction.number = len(kernel.instructions)
        instruction.chain = chain
        kernel.instructions.append(instruction)
        if instruction.op[0] in ("bra", "ret", "exit", "bar", "barrier", "brx") and instruction.op[1:2] != [
            "warp"
        ]:
            kernel.blocks[-1].end = instruction
            kernel.blocks.append(Block())
        else:
            kernel.blocks[-1].instructions.append(instruction)
    return kernel


def _declarations(text: str, clean: str) -> tuple[Kernel, int]:
    """Parse everything before the body of the kernel, and the declarations of arrays in the body.

    Return a `Kernel` whose registers and instructions are still empty, and the index in `clean` at which the body
    starts. `clean` is `text` with every comment replaced by spaces.
    """
    files = {int(n): name for n, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(", clean))
    if len(entries) != 1:
        raise Unsupported(f"a module with {len(entries)} kernels; expected one")
    if re.search(r"^\s*(\.visible\s+|\.weak\s+)?\.func\b", clean, re.M):
        raise Unsupported("a module with a .func")
    entry = entries[0]
    close = clean.index(")", entry.end())
    params = []
    for part in clean[entry.end() : close].split(","):
        words = part.split()
        if words:
            params.append((words[1].lstrip("."), words[-1].split("[")[0]))
    body = clean.index("{", close) + 1
    places, used = {}, 0
    for kind, name in params:
        used = -(-used // WIDTH[kind]) * WIDTH[kind]
        places[name] = used
        used += WIDTH[kind]
    kernel = Kernel(entry.group(1), params, places, [], [Block()], {}, {}, 0, {}, 0, files, [])
    for m in re.finditer(r"\.(shared|local)\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", clean):
        _place(kernel, *m.groups())
    return kernel, body


def _place(kernel: Kernel, space: str, align: str, name: str, size: str) -> None:
    """Place an array behind the earlier arrays of its memory space."""
    start = -(-getattr(kernel, f"{space}_bytes") // int(align)) * int(align)
    getattr(kernel, space)[name] = start
    setattr(kernel, f"{space}_bytes", start + int(size or 0))


def _directive(kernel: Kernel, scope: dict[str, Reg], statement: str) -> None:
    if statement.startswith(".reg"):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()  # type: ignore[union-attr]
        for name in names.split(","):
            name = name.strip()
            many = re.match(r"(.*)<(\d+)>$", name)
            for one in [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]:
                scope[one] = Reg(len(kernel.registers), WIDTH[kind], one)
                kernel.registers.append(scope[one])
    elif not statement.startswith((".pragma", ".local", ".shared")):
        raise Unsupported(statement)


def _instruction(
    kernel: Kernel, scopes: list[dict[str, Reg]], text: str, line: int, loc: tuple[int, int]
) -> Instruction:
    rest, guard, negated = text, None, False
    if rest.startswith("@"):
        word, rest = rest.split(None, 1)
        negated = word[1] == "!"
        guard = _lookup(scopes, word.lstrip("@!"))
    name, _, operands = rest.partition(" ")
    try:
        args = [_operand(kernel, scopes, part) for part in _split(operands)]
    except Unsupported as error:
        raise Unsupported(f"{text} (line {line}): {error}") from error
    return Instruction(name.split("."), args, guard, negated, text, line, loc)


def _lookup(scopes: list[dict[str, Reg]], name: str) -> Reg:
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    raise Unsupported(f"undeclared register {name}")


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _operand(kernel: Kernel, scopes: list[dict[str, Reg]], text: str) -> Any:
    if text.startswith("{"):
        return [_operand(kernel, scopes, part) for part in _split(text[1:-1])]
    if text.startswith("["):
        inner = text[1:-1].strip()
        m = re.match(r"([^+\s]+)\s*(?:\+\s*(-?\w+))?$", inner)
        if not m:
            raise Unsupported(f"address {text}")
        return Address(_operand(kernel, scopes, m.group(1)), int(m.group(2) or "0", 0))
    if text.startswith("!"):
        return Not(_lookup(scopes, text[1:].strip()))
    if "|" in text:
        return tuple(_operand(kernel, scopes, part.strip()) for part in text.split("|"))
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Imm("f32", int(text[2:], 16))
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Imm("f64", int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Imm("int", int(text.rstrip("U"), 0))
    if SPECIAL.match(text):
        return Special(text[1:])
    for scope in reversed(scopes):
        if text in scope:
            return scope[text]
    if text == "_":
        return None
    return Symbol(text)
