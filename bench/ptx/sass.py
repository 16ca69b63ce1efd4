"""Estimate the number of SASS instructions that a launch executes, by unit, opcode and source line."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .counting import by_line
from .device import Launch

# (pattern of an opcode, unit). The first match decides; the unit of opcodes without a match is "alu".
UNITS = (
    (r"HMMA|IMMA|QMMA|OMMA|HGMMA", "mma"),
    (r"FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2", "fp32"),
    (r"IMAD", "imad"),
    (r"MUFU|F2F\b|I2F\b|F2I|POPC|I2I", "xu"),
    (r"BAR|DEPBAR|LDGDEPBAR|ERRBAR|MEMBAR", "barrier"),
    (r"LDS|STS|LDSM|STSM", "shared"),
    (r"LDG|STG|LD\b|ST\b|ATOM|RED\b|LDL|STL", "global"),
    (r"SHFL|REDUX|VOTE|MATCH", "shuffle"),
    (r"BRA|EXIT|BSSY|BSYNC|CALL|RET|WARPSYNC|BREAK|NOP|YIELD|JMP", "branch"),
    (r"S2R|CS2R|S2UR|R2UR|LDC|U[A-Z]", "other"),
)


class SassCounts(NamedTuple):
    """Estimated numbers of warp instructions of a launch by unit, opcode and source line; registers per thread."""

    units: Counter[str]
    opcodes: Counter[str]
    lines: Counter[tuple[str, int]]
    registers: int


def unit_of_opcode(opcode: str) -> str:
    """Return the unit of a SASS instruction."""
    return next((unit for pattern, unit in UNITS if re.match(pattern, opcode)), "alu")


@cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin"


def read_sass(launch: Launch) -> tuple[list[tuple[str, str, int]], int] | None:
    """Return (opcode, file, line) of every SASS instruction, and the number of registers per thread.

    The result is None if the launch has no cubin, or if the cubin has no instructions.
    """
    cubin = launch.compiled.asm.get("cubin")
    if cubin is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output(_tools() / "nvdisasm", "-c", "-g", file.name)
        usage = _output(_tools() / "cuobjdump", "--dump-resource-usage", file.name)
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)), default=0)
    found, place = [], ("", 0)
    for line in text.splitlines():
        marked = re.match(r'\s*//## File "([^"]*)", line (\d+)', line)
        if marked:
            place = (Path(marked.group(1)).name, int(marked.group(2)))
            continue
        code = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", line)
        if code:
            found.append((code.group(1), *place))
    while found and found[-1][0] in ("NOP", "BRA"):  # padding behind the code
        found.pop()
    return (found, registers) if found else None


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass_counts(launch: Launch) -> SassCounts | None:
    """Estimate the number of SASS instructions that a launch executes; return None if `read_sass` returns None.

    For each SASS instruction, the estimated number of executions is the mean number of executions of the PTX
    instructions of the same source line. If the source line has no PTX instructions, the estimate is the mean over
    all PTX instructions of the kernel. PTX moves are left out of both means.
    """
    read = read_sass(launch)
    if read is None:
        return None
    lines = by_line(launch)
    mean = sum(e[1] for e in lines.values()) / max(1, sum(e[0] for e in lines.values()))
    counts = SassCounts(Counter(), Counter(), Counter(), read[1])
    for opcode, file, line in read[0]:
        entry = lines.get((file, line))
        times = entry[1] / entry[0] if entry else mean
        unit = unit_of_opcode(opcode)
        name = ".".join(opcode.split(".")[: 4 if unit == "mma" else 1])
        counts.units[unit] += times  # type: ignore[assignment]
        counts.opcodes[name] += times  # type: ignore[assignment]
        counts.lines[(file, line)] += times  # type: ignore[assignment]
    return counts
