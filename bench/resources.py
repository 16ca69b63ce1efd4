"""Registers, shared memory and spills of every Triton kernel, compiled without a GPU: `python -m bench.resources`.

The launches are those that the package makes for a shape and a device, recorded instead of run; each is compiled for
the device's architecture, and what ptxas says of it is read. What it says about speed is only whether a kernel fits.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

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


# The first two hold every kernel at the largest size that may not spill; the rest, the other sides of the rule.
CASES = (
    Case(64, 64, keys=4096),
    Case(64, 64, dtype="float32", method="pivoted_cholesky"),
    Case(64, 32),
    Case(64, 32, dtype="float32"),
    Case(32, 32),
    Case(64, 64),
    Case(64, 64, dtype="float16"),
    Case(64, 64, keys=4096, dtype="float32"),
    Case(64, 64, keys=4096, dtype="float16", solver="lu"),
    Case(16, 24, dtype="float32", qk_norm=None),
    Case(128, 128),
    Case(128, 128, keys=4096, dtype="float32"),
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
    """What forward and backward launch for a case; the tensors have no memory."""
    import torch

    from srm_kernels.attention import kernels, key_kernels

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kind = getattr(torch, case.dtype)
    query, key, value = (tensor(2, 4, n, case.d, dtype=kind) for n in (16_384, case.keys, case.keys))
    tau, scale = tensor(4), case.d**-0.5
    side = (key, value, None, case.rank, case.method, 1e-3, scale, case.qk_norm)
    with recorded(divmod(architecture, 10)) as launches:
        if case.solver == "cholesky":
            results = key_kernels.landmark_context(*side, 1e-3)
            key_kernels.landmark_context_backward(results[:2], results, *side, 1e-3)
        else:
            results = key_kernels.landmark_blocks(*side)
            key_kernels.landmark_blocks_backward(results[:3], results, *side)
        keys = results[0]
        outputs = kernels.landmark_attention(query, keys, keys, tau, scale, case.qk_norm, True)
        kernels.landmark_attention_backward(
            outputs[:1], outputs, query, keys, keys, tau, scale, case.qk_norm, True
        )
    return launches


def compile_launch(launch: tuple[Any, tuple[Any, ...], dict[str, Any]], architecture: int) -> Resources:
    """Compile one recorded launch as Triton would, specialising integers and aligned pointers."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, options = launch
    options = dict(options)
    launch_options = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}

    def kind_of(place: tuple[int, ...], value: Any, specialised: bool) -> Any:
        """The type of an argument, or of every part of a tuple; what is known of it at compile time is noted."""
        if isinstance(value, tuple):
            return tuple(kind_of((*place, i), part, specialised) for i, part in enumerate(value))
        if specialised and type(value) is int and value == 1:
            constants[place] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[place] = [["tt.divisibility", 16]]
            return f"*{names[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        if specialised and value % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"

    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = kind_of((index,), value, not parameter.do_not_specialize)
    source = ASTSource(kernel, signature, constants, attributes)
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # a cached binary has no log
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch_options)
    spilled, registers = (
        sum(map(int, re.findall(pattern, log.getvalue())))
        for pattern in (r"(\d+) bytes spill stores", r"Used (\d+) registers")
    )
    return Resources(
        kernel.__name__.strip("_"), compiled.metadata.num_warps, registers, spilled, compiled.metadata.shared
    )


def main() -> None:
    """One line per kernel, case and architecture, or all of them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument(
        "--cases", type=int, nargs="*", default=range(len(CASES)), help="numbers, all by default"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):  # kernels decorated under it cannot be compiled
        raise SystemExit(subprocess.call([sys.executable, "-m", "bench.resources", *sys.argv[1:]]))
    rows = []
    if not options.json:
        print(
            f"{'kernel':24} {'sm':>4} {'r':>4} {'d':>4} {'N_k':>5} {'dtype':>9} {'warps':>6} {'registers':>10} "
            f"{'spilled':>8} {'shared KiB':>11}"
        )
    for case in (CASES[number] for number in options.cases):
        for architecture in options.architectures:
            for launch in launches_of(case, architecture):
                found = compile_launch(launch, architecture)
                rows.append(found._asdict() | case._asdict() | {"architecture": architecture})
                if not options.json:
                    print(
                        f"{found.kernel:24} {architecture:4} {case.rank:4} {case.d:4} {case.keys:5} "
                        f"{case.dtype:>9} {found.warps:6} {found.registers:10} {found.spilled:8} "
                        f"{found.shared / 1024:11.1f}",
                        flush=True,
                    )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
