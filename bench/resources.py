"""Registers, shared memory and spills of every Triton kernel, compiled without a GPU: `python -m bench.resources`.

The launches are those that the package makes for a shape and a device, recorded instead of run; each is compiled for
the device's architecture, and what ptxas says of it is read. What it says about speed is only whether a kernel fits.

`--out FILE` keeps a row of each, with a digest of everything it was compiled from: the kernel's source and that of what
it calls, its constants and options, the architecture and Triton's version. What FILE has by that digest is not compiled
again, and rows of what is no longer launched are dropped, so that FILE always tells of the kernels as they are.
"""

from __future__ import annotations

import argparse
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

from bench import shapes
from bench.harness import append, machine, read
from srm_model.files import json_text, write_text

Launches = list[tuple[Any, tuple[Any, ...], dict[str, Any]]]
ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB a block may ask for


class Case(NamedTuple):
    """One shape: r, d, N_k, the dtype's name, and what the road through the kernels depends on."""

    rank: int
    d: int
    keys: int = 256
    dtype: str = "bfloat16"
    method: str = "leverage"
    solver: str = "cholesky"
    qk_norm: str | None = "both"


class Resources(NamedTuple):
    """What a compiled kernel asks of a multiprocessor."""

    kernel: str
    warps: int
    registers: int
    spilled: int  # bytes a thread stores to memory for want of registers
    shared: int  # bytes


# Every kernel at the largest size that may not spill, by the roads that lead there; then smaller ones, the other sides
# of the rule; then what is larger and may.
CASES = (
    Case(64, 64, keys=4096),
    Case(64, 64, dtype="float32", method="pivoted_cholesky"),
    Case(64, 64, dtype="float16", solver="lu"),
    Case(64, 64, method="pivoted_cholesky"),
    Case(64, 64),
    Case(64, 64, keys=4096, dtype="float16"),
    Case(64, 64, keys=4096, dtype="float32", solver="lu"),
    Case(64, 32),
    Case(64, 32, keys=4096),
    Case(64, 32, dtype="float32"),
    Case(64, 32, dtype="float16"),
    Case(32, 64),
    Case(32, 64, dtype="float32"),
    Case(32, 64, dtype="float16"),
    Case(32, 32, solver="lu"),
    Case(16, 24, dtype="float32", qk_norm=None),
    Case(128, 128, dtype="float32"),
    Case(128, 128, dtype="float16", method="pivoted_cholesky"),
    Case(128, 128, solver="lu"),
    Case(64, 128, dtype="float32"),
    Case(128, 64),
    Case(32, 128, dtype="float16"),
    Case(128, 32, dtype="float32"),
    Case(128, 128),
)


@contextmanager
def recorded(capability: tuple[int, int]) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Launches of Triton kernels inside are collected instead of run, as on a device of this capability."""
    from triton.runtime.jit import JITFunction

    from srm_kernels.attention import configurations

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((self, args, options))

    kept = JITFunction.run, configurations.capability
    JITFunction.run, configurations.capability = run, lambda tensor: capability
    try:
        yield launches
    finally:
        JITFunction.run, configurations.capability = kept


def launches_of(case: Case, architecture: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What forward and backward launch for a case; the tensors have no memory.

    Leverage and landmarks asked for by themselves are launched with "pivoted_cholesky" in half precision.
    """
    import torch

    from srm_kernels.attention import kernels, key_kernels
    from srm_kernels.conditioning import kernels as conditioning
    from srm_kernels.landmarks import METHODS_OF_KERNELS
    from srm_kernels.landmarks import kernels as landmarks
    from srm_kernels.options import KeySide, LandmarkOptions, SolveOptions

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kind = getattr(torch, case.dtype)
    query, key, value = (tensor(2, 4, n, case.d, dtype=kind) for n in (16_384, case.keys, case.keys))
    tau, scale = tensor(4), case.d**-0.5
    choice = LandmarkOptions(case.rank, case.method)
    side = KeySide(key, value, None, choice, scale, case.qk_norm)
    with recorded(divmod(architecture, 10)) as launches:
        if case.solver == "cholesky":
            results = key_kernels.landmark_context(side, 1e-3)
            key_kernels.landmark_context_backward(results[:2], results, side, 1e-3)
        else:
            results = key_kernels.landmark_blocks(side)
            system = (*results[1:3], SolveOptions(solver=case.solver))
            solved = conditioning.landmark_solve(*system)
            conditioning.landmark_solve_backward(solved[:1], solved, *system)
            key_kernels.landmark_blocks_backward(results[:3], results, side)
        if case.method == "pivoted_cholesky" and case.dtype != "float32":
            landmarks.ridge_leverage_scores(key, 1e-3)
            for method in METHODS_OF_KERNELS:
                landmarks.select_landmarks(key, None, LandmarkOptions(case.rank, method), scale)
        keys = results[0]
        outputs = kernels.landmark_attention(query, keys, keys, tau, scale, case.qk_norm, True)
        kernels.landmark_attention_backward(
            outputs[:1], outputs, query, keys, keys, tau, scale, case.qk_norm, True
        )
    return launches


class Source(NamedTuple):
    """What Triton compiles of a launch: by argument its type, its value where that is constant, what else is known."""

    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]


def source_of(launch: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Source:
    """As Triton would, specialising integers and aligned pointers."""
    import torch

    kernel, args, options = launch
    options = dict(options)
    launch_options = {
        name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options
    }
    source = Source({}, {}, {}, launch_options)
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}

    def kind_of(place: tuple[int, ...], value: Any, specialised: bool) -> Any:
        """The type of an argument, or of every part of a tuple; what is known of it at compile time is noted."""
        if isinstance(value, tuple):
            return tuple(kind_of((*place, i), part, specialised) for i, part in enumerate(value))
        if specialised and type(value) is int and value == 1:
            source.constants[place] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            source.attributes[place] = [["tt.divisibility", 16]]
            return f"*{names[value.dtype]}"
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


def sources(kernel: Any, found: dict[str, str] | None = None) -> dict[str, str]:
    """Source texts of a kernel and of all that it calls, and the constants they read, by qualified name."""
    from triton.language import constexpr
    from triton.runtime.jit import JITCallable

    found = {} if found is None else found
    name = f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"
    if name in found:
        return found
    found[name] = kernel.src
    for used in kernel.fn.__code__.co_names:
        value = kernel.fn.__globals__.get(used)
        if isinstance(value, JITCallable):
            sources(value, found)
        elif isinstance(value, constexpr):
            found[f"{kernel.fn.__module__}.{used}"] = repr(value.value)
    return found


def digest(launch: tuple[Any, tuple[Any, ...], dict[str, Any]], architecture: int) -> str:
    """Of all that decides what a launch is compiled to."""
    import triton

    parts = (triton.__version__, architecture, source_of(launch), sorted(sources(launch[0]).items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compile_launch(launch: tuple[Any, tuple[Any, ...], dict[str, Any]], architecture: int) -> Resources:
    """Compile one recorded launch as Triton would."""
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
    return Resources(
        kernel.__name__.strip("_"), compiled.metadata.num_warps, registers, spilled, compiled.metadata.shared
    )


class Family(NamedTuple):
    """Kernels that are launched together: all shapes looked at, the article's, and their launches by architecture."""

    cases: Sequence[Any]
    article: Sequence[Any]
    launches: Callable[[Any, int], Launches]


def _recording(call: Callable[[Any], None]) -> Callable[[Any, int], Launches]:
    def found(case: Any, architecture: int) -> Launches:
        with recorded(divmod(architecture, 10)) as launches:
            call(case)
        return launches

    return found


FAMILIES = {
    "attention": Family(CASES, (Case(64, 32), Case(64, 32, keys=4096), Case(128, 64)), launches_of),
    "neck": Family(shapes.SCHEDULES, shapes.SCHEDULES[:2], _recording(shapes.neck)),
    "solve": Family(shapes.SYSTEMS, shapes.SYSTEMS[:10], _recording(shapes.solve)),
    "landmarks": Family(shapes.CHOICES, shapes.CHOICES[:2], _recording(shapes.choose)),
}


def operator(kernel: Any) -> str:
    """The folder of `srm_kernels` that a kernel is in."""
    return str(kernel.fn.__module__.split(".")[1])


def rows(
    family: str,
    cases: Sequence[Any],
    architectures: Sequence[int],
    kernels: Sequence[str] | None = None,
    known: dict[str, Resources] | None = None,
) -> Iterator[dict[str, Any]]:
    """One for each kernel, by name those asked for, shape and architecture; launches of the same code are one.

    known: what was compiled before, by `digest`; it grows.
    """
    known = {} if known is None else known
    for case in cases:
        for architecture in architectures:
            launches = {
                digest(launch, architecture): launch
                for launch in FAMILIES[family].launches(case, architecture)
            }
            for number, (code, launch) in enumerate(launches.items()):
                if kernels and launch[0].__name__.strip("_") not in kernels:
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
    """The rows of a file: what was compiled before is taken from it, what is new is in it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = read(path) if path.is_file() else []
        self.known = {
            row["code"]: Resources(**{name: row[name] for name in Resources._fields}) for row in self.before
        }
        self.after: list[dict[str, Any]] = []
        about = machine("cpu")
        self.about = {name: about[name] for name in ("triton", "python")}
        self._compiled = set(self.known)

    def add(self, row: dict[str, Any]) -> None:
        row = row | {"machine": self.about}
        self.after.append(row)
        if row["code"] not in self._compiled:
            self._compiled.add(row["code"])
            append(self.path, row)

    def close(self, replaced: Callable[[dict[str, Any]], bool]) -> None:
        """Write what was added behind the earlier rows that it does not replace."""
        told = [row for row in self.before if not replaced(row)] + self.after
        write_text(self.path, "".join(json_text(row) + "\n" for row in told))


def shape(case: Any) -> dict[str, Any]:
    """A case as a row has it, and as JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(case._asdict()))
    return {name: value for name, value in found.items() if value is not None}


def case_words(case: dict[str, Any]) -> str:
    """A shape as a table names it."""
    return ", ".join(f"{name}={value}" for name, value in case.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """One line per kernel, shape and architecture, marked where it spills or cannot be launched."""
    options = _parser().parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", None):  # kernels decorated under it cannot be compiled
        given = sys.argv[1:] if arguments is None else arguments
        return subprocess.call([sys.executable, "-m", "bench.resources", *given])
    table = Table(options.out) if options.out else None
    print(
        f"{'operator':12} {'kernel':26} {'sm':>4} {'warps':>6} {'registers':>10} {'spilled B':>10} {'shared KiB':>11}"
    )
    known = table.known if table else {}
    for name in options.families:
        for row in rows(name, _cases(name, options), options.architectures, options.kernels, known):
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
        table.close(lambda row: _asked_for(row, options))
    return 0


def _cases(family: str, options: argparse.Namespace) -> Sequence[Any]:
    """The shapes asked for."""
    cases = FAMILIES[family].article if options.article else FAMILIES[family].cases
    if options.cases is None:
        return cases
    return [cases[number] for number in options.cases if number < len(cases)]


def _asked_for(row: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a row is of a kernel, shape and architecture asked for; of all shapes, those that are gone too."""
    if row["family"] not in options.families or row["architecture"] not in options.architectures:
        return False
    if options.kernels and row["kernel"] not in options.kernels:
        return False
    if options.cases is None and not options.article:
        return True
    return row["case"] in [shape(case) for case in _cases(row["family"], options)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=tuple(FAMILIES))
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument(
        "--article",
        action="store_true",
        help="only r = 64, d = 32, and one shape taken in pieces",
    )
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of a family's shapes, all by default")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only these, all by default")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="rows; what it has already is not compiled again"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
