"""Compile the Triton solve for GPUs that are not here, and read registers, spills and shared memory.

`python -m bench.compiled` prints a line per kernel, architecture and size, and writes JSON lines to `--out`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import record

ARCHITECTURES = (80, 86, 89, 90, 120)
SOLVERS = ("cholesky", "lu", "svd", "auto", "neumann")
DIRECTIONS = ("forward", "backward")


def compile_solve(direction: str, solver: str, r: int, d: int, architecture: int) -> dict[str, Any]:
    """Registers a thread, bytes spilled a thread, bytes of shared memory a block, and warps."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from srm_kernels.conditioning import kernels

    function = {"forward": kernels._solve_forward_kernel, "backward": kernels._solve_backward_kernel}[
        direction
    ]
    options = kernels.launch_options(r, d)
    given: dict[str, Any] = {
        "SOLVER": kernels._code(solver),
        "SYMMETRIC": solver == "cholesky",
        "SERIES": solver == "neumann",
        "REST": False,
        "RIDGED": True,
        "EQUILIBRATE": False,
        "ORDER": 3,
        "GATE": True,
        "R": options["R"],
        "D": options["D"],
    }
    constants = {name: value for name, value in given.items() if name in function.arg_names}
    types = {"used_ptr": "*i64", "ridge": "fp32", "kappa_max": "fp32"}
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in function.arg_names
    }
    built = triton.compile(
        ASTSource(function, signature, constants),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": options["num_warps"]},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return {
        "kernel": direction,
        "solver": solver,
        "r": r,
        "d": d,
        "sm": architecture,
        "warps": options["num_warps"],
        "registers": found["reg"],
        "spilled": found["stack"],
        "shared": built.metadata.shared,
    }


def table(sizes: list[tuple[int, int]], architectures: list[int]) -> Iterator[dict[str, Any]]:
    """Every kernel at every size; svd and auto go backward as lu."""
    for r, d in sizes:
        for architecture in architectures:
            for direction in DIRECTIONS:
                for solver in SOLVERS:
                    if direction == "backward" and solver in ("svd", "auto"):
                        continue
                    row = compile_solve(direction, solver, r, d, architecture)
                    print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    yield row


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["32x32", "64x64"], metavar="RxD")
    parser.add_argument("--sm", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to write")
    options = parser.parse_args()
    sizes = [(int(r), int(d)) for r, d in (size.split("x") for size in options.sizes)]
    rows = list(table(sizes, options.sm))
    if options.out:
        header = {"benchmark": "compiled", **record.machine("cpu")}
        record.write_lines(options.out, [header, *rows])


if __name__ == "__main__":
    main()
