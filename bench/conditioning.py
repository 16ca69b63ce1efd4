"""Every solver of the landmark system, and the search for keys that break its bounds.

`python -m bench.conditioning` times every solver at every size as a share of the SVD's time in the same run, with
torch.linalg's own factorisations beside them, and the solve's part in the whole attention; where an aim is missed the
line says so. On a CPU the default solver takes at most a fifth of the SVD's time at r = 32 and 64. On a GPU the fused
one is at least 50 times faster than the SVD at r = 64, and twice as fast as torch.linalg's own LU and Cholesky.
Attention spends at most 30 % in its solve. `python -m bench.conditioning --search` looks for keys that exceed the
bounds of docs/CONDITIONING.md, and exits with 1 where it finds any. Both write JSON lines to `--out`, the machine in
the first; times are written size by size, so that Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import bounds, record
from srm_kernels import backends, landmark_solve, nystrom_attention
from srm_kernels.conditioning import SOLVERS, SOLVERS_OF_KERNELS
from srm_model.profiling.timing import cpu_clock

BATCHES = (8, 64, 512)
RANKS = (64, 32, 16, 128)  # in the order of what depends on them, as a run on a GPU may be cut short
WIDTHS = (32, 64)
LIMIT = 1 / 5  # of the SVD's time, on a CPU, at the ranks below
LIMITED = (32, 64)
FUSED = "cholesky@triton"  # on a GPU: what is at least so many times faster than these, at these ranks
AIMS = {
    "torch.linalg.svd": (50, (64,)),
    "torch.linalg.lu_factor_ex": (2, RANKS),
    "torch.linalg.cholesky_ex": (2, RANKS),
}
LARGEST_SHARE = 0.3  # of the attention's time
QUEUED = 10  # calls between two events of a GPU
ROUNDING = 1e-6  # by which a computed ratio to a bound may exceed 1
TRUSTED = 1e12  # κ up to which an fp64 solve says something about the gain


def milliseconds(function: Callable[[], object], device: torch.device, queued: int = QUEUED) -> float:
    """One call: by CUDA events around `queued` of them, one behind the other, on a GPU, else by `cpu_clock`."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(queued):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / queued
    begin = cpu_clock()
    function()
    return (cpu_clock() - begin) * 1e3


def system(batch: int, r: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits of normalised random landmarks and R V, fp32."""
    make = torch.Generator().manual_seed(0)
    keys = bounds.normalise(torch.randn(batch, r, d, generator=make)).to(device)
    return keys @ keys.mT / math.sqrt(d), torch.randn(batch, r, d, generator=make).to(device)


def plain(name: str, logits: Tensor, rhs: Tensor) -> Tensor:
    """What one would write with torch.linalg: the factorisation alone on the same W_λ, or S + λI."""
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


def calls(logits: Tensor, rhs: Tensor) -> dict[str, Callable[[], object]]:
    """Name → call. A solver of another backend than the portable one is named `solver@backend`."""
    found: dict[str, Callable[[], object]] = {
        name: lambda name=name: landmark_solve(logits, rhs, solver=name, backend="torch").x
        for name in SOLVERS
    }
    if logits.is_cuda and backends()["triton"].available:
        for name in SOLVERS_OF_KERNELS:
            found[f"{name}@triton"] = lambda name=name: (
                landmark_solve(logits, rhs, solver=name, backend="triton").x
            )
    for name in ("svd", "lu_factor_ex", "cholesky_ex"):
        found[f"torch.linalg.{name}"] = lambda name=name: plain(name, logits, rhs)
    return found


def best(functions: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """The least milliseconds of interleaved calls; fewer of what takes over a tenth of a second, and none in a queue.

    The least, not the median: what else a machine does only ever adds.
    """
    first = {name: milliseconds(call, device, 1) for name, call in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats):
        for name, call in functions.items():
            slow = min(times[name], default=first[name]) > 100
            if repeat > 1 and slow:
                continue
            times[name].append(milliseconds(call, device, 1 if slow else QUEUED))
    return {name: min(values) for name, values in times.items()}


def missed(times: dict[str, float], device: torch.device, r: int) -> list[str]:
    """The aims that times of one size miss, in words."""
    if device.type == "cpu":
        over = r in LIMITED and times["cholesky"] > LIMIT * times["svd"]
        return [f"cholesky over 1/{1 / LIMIT:.0f}"] if over else []
    return [
        f"{FUSED} {times[rival] / times[FUSED]:.1f} times as fast as {rival}, {least} wanted"
        for rival, (least, ranks) in AIMS.items()
        if FUSED in times and r in ranks and times[rival] < least * times[FUSED]
    ]


@torch.no_grad()
def table(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of the share of the attention that its solve takes, then, size by size, times of every solver."""
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
                told = " ".join(f"{base / t:25.1f}" for name, t in times.items() if name != "svd")
                aims = "".join(f"  ! {words}" for words in missed(times, device, r))
                print(f"{batch:5} {r:4} {d:4} {base:9.2f} {told}{aims}", flush=True)
                yield [
                    {
                        "batch": batch,
                        "r": r,
                        "d": d,
                        "solver": name,
                        "ms": round(elapsed, 4),
                        "share_of_svd": round(elapsed / base, 5),
                    }
                    for name, elapsed in times.items()
                ]


def shares(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The solve's part in Nyström attention at B = 8 (1 on a CPU), H = 8, N_q = 16,384, N_k = 256, r = 64, d = 32.

    By the default backend and, on a GPU, by kernels, whose attention has the solve inside a launch of the key side:
    there the part is that of the solve's own launch.
    """
    batch = 8 if device.type == "cuda" else 1
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(batch, 8, n, 32, generator=make).to(device) for n in (16_384, 256, 256))
    logits, rhs = system(batch * 8, 64, 32, device)
    rows = []
    for backend in (None, "triton") if device.type == "cuda" and backends()["triton"].available else (None,):
        attention = partial(nystrom_attention, query, key, value, 64, qk_norm="keys", backend=backend)
        times = best(
            {"attention": attention, "solve": partial(landmark_solve, logits, rhs, backend=backend)},
            device,
            repeats,
        )
        part = times["solve"] / times["attention"]
        print(
            f"the solve takes {part:.1%} of Nyström attention at B={batch} H=8 N_q=16384 N_k=256 r=64 d=32, backend "
            f"{backend or 'by default'}{f'  ! {LARGEST_SHARE:.0%} wanted' if part > LARGEST_SHARE else ''}",
            flush=True,
        )
        name = "cholesky" if backend is None else f"cholesky@{backend}"
        rows.append(
            {"batch": batch * 8, "r": 64, "d": 32, "solver": name, "share_of_attention": round(part, 4)}
        )
    return rows


def search(options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Worst figures per family; returns the lines and how many key sets exceeded a bound."""
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
    """The worst of each kind, and over all."""
    names = bounds.Figures._fields
    print(f"{count} key sets, keys {'normalised' if normalised else 'as they are'}; the largest of")
    print(f"{'family':12} {'ascent on':10} " + " ".join(f"{name:>12}" for name in names))
    for row in rows:
        figures = " ".join(f"{row.get(name, math.nan):12.4g}" for name in names)
        print(f"{row['family']:12} {row['optimised'] or '-':10} {figures}")
    overall = " ".join(f"{max(row.get(name, 0.0) for row in rows):12.4g}" for name in names)
    print(f"{'all':23} {overall}", flush=True)


def main() -> int:
    """Time the solvers, or search; returns 1 where a bound was exceeded, 130 where Ctrl-C ended it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--search", action="store_true", help="look for keys that break the bounds")
    parser.add_argument("--cases", type=int, default=100_000, help="key sets to try (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to write")
    options = parser.parse_args()
    header = record.machine("cpu" if options.search else options.device)
    lines: list[dict[str, Any]] = []
    if options.search:
        lines, exceeded = search(options)
        header |= {"benchmark": "conditioning --search", "cases": options.cases, "exceeded": exceeded}
        if options.out:
            record.write_lines(options.out, [header, *lines])
        return int(exceeded > 0)
    header |= {"benchmark": "conditioning", "dtype": "float32"}
    try:
        for rows in table(options):
            lines += rows
            if options.out:
                record.write_lines(options.out, [header, *lines])
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
