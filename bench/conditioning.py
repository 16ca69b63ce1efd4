"""Time the solvers of the landmark system, or search for violated bounds: `python -m bench.conditioning`.

The solvers of this package are timed. Three solvers that call torch.linalg directly are timed for comparison: the SVD,
LU and Cholesky. Each time is divided by the time of this package's solver `svd`, at the same size in the same run. The
time of the default solver is also divided by the time of Nyström attention. `!` marks a missed target. These are the
targets:

- on a CPU, the default solver takes at most a fifth of the time of `svd`, at r = 32 and 64;
- on a GPU, the default solver with the backend "triton" is at least 50 times as fast as the SVD of torch.linalg, at
  r = 64;
- on a GPU, this solver is also at least twice as fast as LU and Cholesky of torch.linalg, at every r;
- the default solver takes at most 30 % of the time of Nyström attention.

With `--search`, the program does not measure times. It searches for sets of keys that violate a bound of
docs/CONDITIONING.md, and exits with 1 if it finds any. `--out` writes JSON lines; the first line describes the machine.
Times are written after each size, so all finished sizes are kept after Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import bounds
from bench.harness import DEVICE, Call, attention_inputs, machine_with_load, parser, write_lines
from bench.stopwatch import milliseconds
from srm_kernels import backends, landmark_solve, nystrom_attention
from srm_kernels.conditioning import SOLVERS, SOLVERS_OF_KERNELS

BATCHES = (8, 64, 512)
RANKS = (64, 32, 16, 128)  # the most important first, because a run on a GPU may be stopped early
WIDTHS = (32, 64)
CPU_TARGET = 1 / 5  # largest share of the SVD's time on a CPU, at CPU_RANKS
CPU_RANKS = (32, 64)
FUSED = "cholesky@triton"
GPU_TARGETS = {  # least speedup of the fused solver, and the ranks to which it applies
    "torch.linalg.svd": (50, (64,)),
    "torch.linalg.lu_factor_ex": (2, RANKS),
    "torch.linalg.cholesky_ex": (2, RANKS),
}
LARGEST_SHARE = 0.3  # largest accepted ratio of the time of the solve to the time of attention
QUEUED = 10  # calls between two CUDA events
ROUNDING = 1e-6  # a computed κ divided by its bound may exceed 1 by this much
TRUSTED = 1e12  # largest κ at which an fp64 solve is accurate enough to judge the gain


def system(batch: int, r: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the logits of random normalised landmarks, and a random right-hand side R V, both in fp32.

    Their shapes are (batch, r, r) and (batch, r, d).
    """
    make = torch.Generator().manual_seed(0)
    keys = bounds.normalise(torch.randn(batch, r, d, generator=make)).to(device)
    return keys @ keys.mT / math.sqrt(d), torch.randn(batch, r, d, generator=make).to(device)


def plain(name: str, logits: Tensor, rhs: Tensor) -> Tensor:
    """Solve as a user of torch.linalg would: by one factorisation of W_λ, or of S + λI for "cholesky_ex"."""
    r = logits.shape[-1]
    eye = torch.eye(r, dtype=logits.dtype, device=logits.device)
    if name == "cholesky_ex":
        half = logits.logsumexp(-1) / 2
        S = (logits - half[..., :, None] - half[..., None, :]).exp()
        S = S + 1e-3 * S.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye
        scale = (half - half.amax(-1, keepdim=True)).exp()[..., None]
        return torch.cholesky_solve(rhs * scale, torch.linalg.cholesky_ex(S).L) / scale
    W = logits.softmax(-1)
    A = W + 1e-3 * W.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye
    if name == "lu_factor_ex":
        return torch.linalg.lu_solve(*torch.linalg.lu_factor_ex(A)[:2], rhs)
    U, sigma, Vh = torch.linalg.svd(A)
    return Vh.mT @ ((U.mT @ rhs) / sigma[..., None])


def calls(logits: Tensor, rhs: Tensor) -> dict[str, Call]:
    """Return a dictionary from names to solvers. The names of the Triton kernels' solvers end with `@triton`."""

    def solve(solver: str, backend: str) -> Tensor:
        return landmark_solve(logits, rhs, solver=solver, backend=backend).x

    found: dict[str, Call] = {name: partial(solve, name, "torch") for name in SOLVERS}
    if logits.is_cuda and backends()["triton"].available:
        found |= {f"{name}@triton": partial(solve, name, "triton") for name in SOLVERS_OF_KERNELS}
    for name in ("svd", "lu_factor_ex", "cholesky_ex"):
        found[f"torch.linalg.{name}"] = partial(plain, name, logits, rhs)
    return found


def best(functions: dict[str, Call], device: torch.device, repeats: int) -> dict[str, float]:
    """Time calls alternately (first, second, …, first, second, …); return the shortest time of each in ms.

    The shortest time is used instead of the median, because other work on the machine can only add time. Each call is
    measured `repeats` times. On a CPU, a measurement is the time of one call; on a GPU, it is the mean time of `QUEUED`
    calls in a row. A call that takes longer than 0.1 s is measured at most twice, and each of its measurements is the
    time of one call, also on a GPU.
    """
    first = {name: milliseconds(call, device, 1) for name, call in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats):
        for name, call in functions.items():
            slow = min(times[name], default=first[name]) > 100
            if repeat > 1 and slow:
                continue
            single = slow or device.type == "cpu"
            times[name].append(milliseconds(call, device, 1 if single else QUEUED))
    return {name: min(values) for name, values in times.items()}


def missed(times: dict[str, float], device: torch.device, r: int) -> list[str]:
    """Return a sentence for each target that the times of one size miss."""
    if device.type == "cpu":
        over = r in CPU_RANKS and times["cholesky"] > CPU_TARGET * times["svd"]
        return [f"cholesky over 1/{1 / CPU_TARGET:.0f}"] if over else []
    return [
        f"{FUSED} {times[rival] / times[FUSED]:.1f} times as fast as {rival}, target {least}"
        for rival, (least, ranks) in GPU_TARGETS.items()
        if FUSED in times and r in ranks and times[rival] < least * times[FUSED]
    ]


@torch.no_grad()
def table(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of `shares` first; then, for each size, yield a list with one row for each solver."""
    device = torch.device(options.device)
    yield shares(device, options.repeats)
    shown = False
    for r in RANKS:
        for d in WIDTHS:
            for batch in BATCHES:
                times = best(calls(*system(batch, r, d, device)), device, options.repeats)
                if not shown:
                    print(f"{'B·H':>5} {'r':>4} {'d':>4} {'SVD ms':>9}  share of the SVD's time: 1/…")
                    print(" " * 25 + " ".join(f"{name:>25}" for name in times if name != "svd"))
                    shown = True
                base = times["svd"]
                line = " ".join(f"{base / t:25.1f}" for name, t in times.items() if name != "svd")
                marks = "".join(f"  ! {words}" for words in missed(times, device, r))
                print(f"{batch:5} {r:4} {d:4} {base:9.2f} {line}{marks}", flush=True)
                size = {"batch": batch, "r": r, "d": d}
                yield [
                    {**size, "solver": name, "ms": round(t, 4), "share_of_svd": round(t / base, 5)}
                    for name, t in times.items()
                ]


def shares(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Measure the time of the solve divided by the time of Nyström attention; return one row per backend.

    The sizes are H = 8, N_q = 16,384, N_k = 256, r = 64 and d = 32; B is 8 on a GPU and 1 on a CPU. The default backend
    is measured, and on a GPU also the backend "triton". The solve is timed as a separate call of `landmark_solve`,
    because attention with the backend "triton" computes the solve inside a larger kernel.
    """
    batch = 8 if device.type == "cuda" else 1
    options = argparse.Namespace(device=device, dtype="fp32")
    tokens = attention_inputs((batch, 8), 16_384, 256, 32, options)
    logits, rhs = system(batch * 8, 64, 32, device)
    rows = []
    for backend in (None, "triton") if device.type == "cuda" and backends()["triton"].available else (None,):
        parts: dict[str, Call] = {
            "attention": partial(nystrom_attention, *tokens, 64, qk_norm="keys", backend=backend),
            "solve": partial(landmark_solve, logits, rhs, backend=backend),
        }
        times = best(parts, device, repeats)
        part = times["solve"] / times["attention"]
        mark = f"  ! target {LARGEST_SHARE:.0%}" if part > LARGEST_SHARE else ""
        print(
            f"the solve takes {part:.1%} of Nyström attention at B={batch} H=8 N_q=16384 N_k=256 r=64 d=32, "
            f"backend {backend or 'by default'}{mark}",
            flush=True,
        )
        name = "cholesky" if backend is None else f"cholesky@{backend}"
        size = {"batch": batch * 8, "r": 64, "d": 32}
        rows.append({**size, "solver": name, "share_of_attention": round(part, 4)})
    return rows


def search(options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Search for violated bounds; return rows of figures, and the number of violations.

    There is one row for each combination of key family, objective of the gradient ascent, and normalisation
    (on or off). A row has the largest value of each figure in `bounds.Figures`.
    """
    lines: list[dict[str, Any]] = []
    exceeded = 0
    for normalised, count in ((True, options.cases), (False, max(1, options.cases // 5))):
        worst: dict[tuple[str, str | None], dict[str, Any]] = {}
        for case, figures in bounds.search(count, normalised=normalised):
            row = worst.setdefault(
                (case.family, case.optimised),
                {"normalised": normalised, "family": case.family, "optimised": case.optimised, "cases": 0},
            )
            row["cases"] += len(figures.kappa)
            trusted = figures._replace(gain=figures.gain[figures.kappa < TRUSTED])
            for name, values in trusted._asdict().items():
                finite = values[values.isfinite()]
                if len(finite):
                    row[name] = max(row.get(name, 0.0), float(finite.max()))
            held = figures.certificate, figures.symmetric, *([figures.landmark] if normalised else [])
            exceeded += int(sum((ratio > 1 + ROUNDING).sum() for ratio in held))
        lines += worst.values()
        print_search(normalised, count, list(worst.values()))
    print(f"{exceeded} key sets exceeded a bound")
    return lines, exceeded


def print_search(normalised: bool, count: int, rows: list[dict[str, Any]]) -> None:
    """Print the largest value of each figure, for each row and for all rows together."""
    names = bounds.Figures._fields
    print(f"{count} key sets, keys {'normalised' if normalised else 'not normalised'}; the largest of")
    print(f"{'family':12} {'ascent on':10} " + " ".join(f"{name:>12}" for name in names))
    for row in rows:
        figures = " ".join(f"{row.get(name, math.nan):12.4g}" for name in names)
        print(f"{row['family']:12} {row['optimised'] or '-':10} {figures}")
    overall = " ".join(f"{max(row.get(name, 0.0) for row in rows):12.4g}" for name in names)
    print(f"{'all':23} {overall}", flush=True)


def main() -> int:
    """Time the solvers, or search for violated bounds; return the exit status.

    The exit status is 1 if the search finds a violated bound, 130 if Ctrl-C stops the timing, and 0 otherwise.
    """
    made = parser("conditioning", __doc__)
    made.add_argument("--search", action="store_true", help="search for keys that exceed the bounds")
    made.add_argument(
        "--cases", type=int, default=100_000, help="key sets of the search (default: %(default)s)"
    )
    made.add_argument("--device", default=DEVICE)
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines to FILE")
    options = made.parse_args()
    header = machine_with_load("cpu" if options.search else options.device)
    if options.search:
        lines, exceeded = search(options)
        header |= {"benchmark": "conditioning --search", "cases": options.cases, "exceeded": exceeded}
        write_lines(options.out, [header, *lines])
        return int(exceeded > 0)
    lines = [header | {"benchmark": "conditioning", "dtype": "float32"}]
    try:
        for rows in table(options):
            lines += rows
            write_lines(options.out, lines)
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
