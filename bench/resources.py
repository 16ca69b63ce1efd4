"""List registers, shared memory and spills of every Triton kernel, compiled without a GPU: `python -m bench.resources`.

For each shape and architecture, the launches of the package are recorded instead of executed. Each recorded
launch is then compiled for the architecture. Registers and spills are read from the log of ptxas, and the
size of shared memory from Triton's metadata. The resources show whether a kernel fits on a GPU, not how fast
it is.

`--out FILE` writes a row for each launch. The row has a digest of everything that determines the compiled code:
the code of the kernel and of the functions that it calls, the global constants that this code reads, the types,
constants and alignment of the arguments, the launch options, the architecture, and the version of Triton. A launch
whose digest is in FILE is not compiled again. An old row of FILE is removed if the options select it and the
package no longer performs its launch.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import shapes
from bench.harness import parser, write_lines
from srm_model.profiling import machine
from srm_model.profiling.results import append, read

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, options
ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB per thread block
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}


class Resources(NamedTuple):
    """Resources of a compiled kernel."""

    kernel: str
    warps: int  # per thread block
    registers: int  # per thread
    spilled: int  # bytes per thread that do not fit into registers
    shared: int  # bytes per thread block


@contextmanager
def recorded(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Record the launches in the `with` block for a GPU of this compute capability, without running them."""
    from triton.runtime.jit import JITFunction

    from srm_kernels import devices

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((self, args, options))

    kept = JITFunction.run, devices.capability
    JITFunction.run, devices.capability = run, lambda tensor: capability
    try:
        yield launches
    finally:
        JITFunction.run, devices.capability = kept


class Source(NamedTuple):
    """Input of Triton's compiler.

    `signature` has the type of each argument by name. `constants` has the values that are known at compile
    time, and `attributes` has the known divisibility of integers and pointers. The keys of `constants` and
    `attributes` are positions of arguments: (2,) is argument 2, and (2, 0) is the first entry of argument 2 if
    this argument is a tuple. `options` has the launch options.
    """

    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]


def source_of(launch: Launch) -> Source:
    """Return the input of Triton's compiler for a launch.

    This function specialises integers and pointers as Triton does. It assumes that all pointers are aligned to
    16 bytes.
    """
    kernel, args, options = launch
    launch_options = {
        name: options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in options
    }
    source = Source({}, {}, {}, launch_options)

    def kind_of(place: tuple[int, ...], value: Any, specialised: bool) -> Any:
        """Return the type of an argument, or the types of a tuple, and record what is known at compile time."""
        if isinstance(value, tuple):
            return tuple(kind_of((*place, i), part, specialised) for i, part in enumerate(value))
        if specialised and type(value) is int and value == 1:
            source.constants[place] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            source.attributes[place] = [["tt.divisibility", 16]]
            return f"*{DTYPES[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        if specialised and value % 16 == 0:
            source.attributes[place] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"

    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            source.signature[parameter.name], source.constants[(index,)] = "constexpr", value
        else:
            source.signature[parameter.name] = kind_of((index,), value, not parameter.do_not_specialize)
    return source


def _code(source: str) -> str:
    """Return a function's code without its docstring, comments and formatting."""
    (function,) = ast.parse(source).body
    if ast.get_docstring(function) is not None:
        del function.body[0]
    return ast.dump(function)


def sources(kernel: Any, found: dict[str, str] | None = None) -> dict[str, str]:
    """Return the code and the constants that a kernel is compiled from, by qualified name.

    The result has the code of the kernel, the code of all functions that it calls, and the values of the global
    constants that this code reads.
    """
    from triton.language import constexpr
    from triton.runtime.jit import JITCallable

    found = {} if found is None else found
    name = f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"
    if name in found:
        return found
    found[name] = _code(kernel.src)
    for used in kernel.fn.__code__.co_names:
        value = kernel.fn.__globals__.get(used)
        if isinstance(value, JITCallable):
            sources(value, found)
        elif isinstance(value, constexpr):
            found[f"{kernel.fn.__module__}.{used}"] = repr(value.value)
    return found


def digest(launch: Launch, architecture: int) -> str:
    """Return a digest of everything that a launch is compiled from."""
    import triton

    parts = (triton.__version__, architecture, source_of(launch), sorted(sources(launch[0]).items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """Compile a recorded launch and return its resources, from the log of ptxas and Triton's metadata."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, found = launch[0], source_of(launch)
    source = ASTSource(kernel, found.signature, found.constants, found.attributes)
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # a cached binary has no log
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=found.options)
    spilled, registers = (
        sum(map(int, re.findall(pattern, log.getvalue())))
        for pattern in (r"(\d+) bytes spill stores", r"Used (\d+) registers")
    )
    metadata = compiled.metadata
    return Resources(kernel.__name__.strip("_"), metadata.num_warps, registers, spilled, metadata.shared)


class Family(NamedTuple):
    """Kernels that are launched together.

    Attributes:
        call: Function that launches the kernels for a case.
        cases: All cases.
        article: Cases for `--article`.
    """

    call: Callable[[Any], None]
    cases: Sequence[Any]
    article: Sequence[Any]

    def launches(self, case: Any, architecture: int) -> list[Launch]:
        """Return the launches for a case on an architecture."""
        with recorded(divmod(architecture, 10)) as launches:
            self.call(case)
        return launches


ARTICLE = (shapes.Case(64, 32), shapes.Case(64, 32, keys=4096), shapes.Case(128, 64))
FAMILIES = {
    "attention": Family(shapes.attention, shapes.CASES, ARTICLE),
    "neck": Family(shapes.neck, shapes.SCHEDULES, shapes.SCHEDULES[:2]),
    "solve": Family(shapes.solve, shapes.SYSTEMS, shapes.SYSTEMS[:10]),
    "landmarks": Family(shapes.choose, shapes.CHOICES, shapes.CHOICES[:2]),
}


def operator(kernel: Any) -> str:
    """Return the folder of `srm_kernels` that a kernel is in."""
    return str(kernel.fn.__module__.split(".")[1])


def rows(options: argparse.Namespace, known: dict[str, Resources]) -> Iterator[dict[str, Any]]:
    """Yield a row for each launch of the selected kernels, for each selected shape and architecture.

    Launches that have the same shape, architecture and digest share one row.

    Args:
        options: Options of the command line.
        known: Resources by digest. Launches whose digest is missing are compiled, and their resources are added.
    """
    for family in options.families:
        for case in _cases(family, options):
            for architecture in options.architectures:
                found = FAMILIES[family].launches(case, architecture)
                launches = {digest(launch, architecture): launch for launch in found}
                for number, (code, launch) in enumerate(launches.items()):
                    if options.kernels and launch[0].__name__.strip("_") not in options.kernels:
                        continue
                    if code not in known:
                        known[code] = compile_launch(launch, architecture)
                    yield {
                        "family": family,
                        "operator": operator(launch[0]),
                        "launch": number,
                        "architecture": architecture,
                        **known[code]._asdict(),
                        "case": shape(case),
                        "code": code,
                    }


class Table:
    """Rows of resources in a file: rows already in the file are read first, and each new row is appended immediately.

    Attributes:
        known: Resources by digest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = read(path) if path.is_file() else []
        self.known = {
            row["code"]: Resources(**{name: row[name] for name in Resources._fields}) for row in self.before
        }
        self.after: list[dict[str, Any]] = []
        about = machine("cpu")
        self.about = {name: about[name] for name in ("triton", "python")}
        self._written = set(self.known)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row to the table, and write the row to the file at once if its digest is new."""
        row = row | {"machine": self.about}
        self.after.append(row)
        if row["code"] not in self._written:
            self._written.add(row["code"])
            append(self.path, row)

    def close(self, replaced: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrite the file: first the earlier rows for which `replaced` returns False, then the added rows."""
        write_lines(self.path, [row for row in self.before if not replaced(row)] + self.after)


def shape(case: Any) -> dict[str, Any]:
    """Return a case as a dictionary that equals the entry "case" of its row in a JSON file.

    None values are omitted, and tuples become lists.
    """
    found: dict[str, Any] = json.loads(json.dumps(case._asdict()))
    return {name: value for name, value in found.items() if value is not None}


def case_words(case: dict[str, Any]) -> str:
    """Return the case of a row as text."""
    return ", ".join(f"{name}={value}" for name, value in case.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each kernel, shape and architecture; mark kernels that spill or cannot be launched."""
    options = _options(arguments)
    if os.environ.pop("TRITON_INTERPRET", None):  # interpreted kernels cannot be compiled
        given = sys.argv[1:] if arguments is None else arguments
        return subprocess.call([sys.executable, "-m", "bench.resources", *given])
    table = Table(options.out) if options.out else None
    numbers = f"{'sm':>4} {'warps':>6} {'registers':>10} {'spilled B':>10} {'shared KiB':>11}"
    print(f"{'operator':12} {'kernel':26} {numbers}")
    for row in rows(options, table.known if table else {}):
        if table:
            table.add(row)
        mark = "spills" if row["spilled"] else ""
        if row["shared"] > SHARED_LIMIT[row["architecture"]] * 1024:
            mark = "cannot be launched"
        print(
            f"{row['operator']:12} {row['kernel']:26} {row['architecture']:4} {row['warps']:6} "
            f"{row['registers']:10} {row['spilled']:10} {row['shared'] / 1024:11.1f}  "
            f"{case_words(row['case'])}  {mark}",
            flush=True,
        )
    if table:
        table.close(lambda row: _selected(row, options))
    return 0


def _cases(family: str, options: argparse.Namespace) -> Sequence[Any]:
    """Return the shapes of a family that the options select."""
    cases = FAMILIES[family].article if options.article else FAMILIES[family].cases
    if options.cases is None:
        return cases
    return [cases[number] for number in options.cases if number < len(cases)]


def _selected(row: dict[str, Any], options: argparse.Namespace) -> bool:
    """Return whether the options select a row.

    If the options select all shapes, they also select the rows of shapes that no longer exist.
    """
    if row["family"] not in options.families or row["architecture"] not in options.architectures:
        return False
    if options.kernels and row["kernel"] not in options.kernels:
        return False
    if options.cases is None and not options.article:
        return True
    return row["case"] in [shape(case) for case in _cases(row["family"], options)]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser("resources", __doc__)
    made.add_argument("--families", nargs="+", default=list(FAMILIES), choices=tuple(FAMILIES))
    made.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    made.add_argument(
        "--article", action="store_true", help="compile r = 64, d = 32 and one shape read in pieces only"
    )
    made.add_argument(
        "--cases", type=int, nargs="+", help="compile the shapes of these numbers (default: all)"
    )
    made.add_argument("--kernels", nargs="+", metavar="NAME", help="compile these kernels (default: all)")
    made.add_argument(
        "--out", type=Path, metavar="FILE", help="keep rows in FILE and compile only what it lacks"
    )
    return made.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
