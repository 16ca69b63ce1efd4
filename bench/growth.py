"""Measure how attention's cost grows, and when Nyström is faster than exact attention: `python -m bench.growth`.

Each sweep changes one size: N_q, N_k, N (N_q and N_k together), r, d, H or B. The times of a sweep are fitted
to the power law c·x^p, where x is the size. The crossover table then shows the time of Nyström attention
divided by the time of exact attention, for several N_k and B. A sweep is timed in rounds: each round calls every
implementation once at every size of the sweep. For the crossover table, each pair of N_k and B has its own rounds,
which call every implementation once.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.harness import Call, Recorder, attention_inputs, available_backends, effort_of, timing_parser
from srm_kernels import flops, full_attention, nystrom_attention
from srm_kernels.checks import current_name
from srm_model.profiling import measure_together
from srm_model.profiling.machines import sentence
from srm_model.profiling.memory import peak
from srm_model.profiling.sweep import describe
from srm_model.profiling.tables import number

EXACT = "exact"
DIRECTIONS = ("forward", "backward")
Rows = list[dict[str, Any]]


class Sizes(NamedTuple):
    """Sizes of one call. The fields have the names of the sweeps."""

    B: int
    H: int
    N_q: int
    N_k: int
    r: int
    d: int


class Scale(NamedTuple):
    """Sizes of all sweeps and of the crossover table.

    Attributes:
        base: Value of each size that a sweep or the crossover table does not change.
        values: Dictionary from the name of a sweep to the values of the size that the sweep changes. The
            sweep N sets N_q and N_k to the same value.
        keys: Values of N_k for the crossover table.
        batches: Values of B for the crossover table.
    """

    base: Sizes
    values: dict[str, tuple[int, ...]]
    keys: tuple[int, ...]
    batches: tuple[int, ...]


SCALES = {
    "tiny": Scale(
        Sizes(1, 2, 64, 32, 8, 8),
        {"N_q": (32, 64, 128), "N_k": (16, 32, 64), "N": (32, 64, 128), "B": (1, 2, 4)},
        (16, 64),
        (1, 2),
    ),
    "cpu": Scale(
        Sizes(1, 8, 4_096, 1_024, 64, 32),
        {
            "N_q": (1_024, 2_048, 4_096, 8_192, 16_384),
            "N_k": (256, 512, 1_024, 2_048, 4_096),
            "N": (512, 1_024, 2_048, 4_096),
            "r": (8, 16, 32, 64, 128),
            "d": (16, 32, 64, 128),
            "H": (1, 2, 4, 8, 16),
            "B": (1, 2, 4, 8),
        },
        (64, 128, 256, 512, 1_024, 2_048),
        (1, 2, 4, 8),
    ),
    "gpu": Scale(
        Sizes(4, 8, 16_384, 1_024, 64, 32),
        {
            "N_q": (4_096, 8_192, 16_384, 32_768, 65_536, 131_072, 262_144),
            "N_k": (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384),
            "N": (1_024, 2_048, 4_096, 8_192, 16_384, 32_768),
            "r": (16, 32, 64, 128),
            "d": (16, 32, 64, 128),
            "H": (1, 2, 4, 8, 16, 32),
            "B": (1, 2, 4, 8, 16, 32),
        },
        (49, 64, 100, 144, 196, 256, 400, 576, 784, 1_024, 2_048, 4_096, 8_192),
        (1, 2, 4, 8, 16, 32),
    ),
}


class Fit(NamedTuple):
    """Least-squares fit of log y = log c + exponent · log x."""

    exponent: float
    error: float  # standard error of the exponent; NaN with two points
    points: int

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ± {self.error:.2f}"


def power_law(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Fit a power law y = c·x^exponent; return the exponent and the standard error of the exponent.

    Raises:
        ValueError: `x` and `y` have fewer than two values, different lengths, or a value that is not positive.
    """
    if len(x) < 2 or len(x) != len(y) or min(*x, *y) <= 0:
        raise ValueError(f"x={list(x)}, y={list(y)}: expected at least two pairs of positive numbers")
    a, b = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    spread = float(((a - a.mean()) ** 2).sum())
    exponent = float(((a - a.mean()) * b).sum()) / spread
    rest = b - b.mean() - exponent * (a - a.mean())
    error = math.sqrt(float((rest**2).sum()) / (len(x) - 2) / spread) if len(x) > 2 else math.nan
    return Fit(exponent, error, len(x))


def macs(sizes: Sizes, implementation: str) -> int:
    """Return the multiply-accumulates of a forward pass of Nyström attention (article, eq. 30) or exact attention."""
    heads = sizes.B * sizes.H
    if implementation == EXACT:
        return heads * 2 * sizes.N_q * sizes.N_k * sizes.d
    return heads * flops.link_macs(sizes.N_q, sizes.N_k, min(sizes.r, sizes.N_k), sizes.d)


def calls(sizes: Sizes, backends: Sequence[str], options: argparse.Namespace) -> dict[str, Call]:
    """Return a dictionary from the name of each implementation to a function without arguments that runs it.

    The implementations are exact attention and each backend of Nyström attention. All functions use the same inputs.
    """
    gradients = options.direction == "backward"
    shape = (sizes.B, sizes.H)
    inputs = attention_inputs(shape, sizes.N_q, sizes.N_k, sizes.d, options, gradients=gradients)
    attend: dict[str, Callable[..., Any]] = {EXACT: partial(full_attention, *inputs, qk_norm="keys")}
    for backend in backends:
        attend[_named(backend)] = partial(
            nystrom_attention, *inputs, sizes.r, qk_norm="keys", backend=backend
        )

    def forward(attention: Call) -> object:
        with torch.no_grad():
            return attention()

    def backward(attention: Callable[[], torch.Tensor]) -> object:
        return torch.autograd.grad(attention().float().sum(), inputs)

    return {name: partial(backward if gradients else forward, one) for name, one in attend.items()}


def measured(points: Sequence[Sizes], backends: Sequence[str], options: argparse.Namespace) -> list[Rows]:
    """Measure every implementation with the sizes of every point; return a list of rows for each point.

    A point has one row for each implementation. If an implementation cannot run with the sizes of the point, its row
    has an `error` with the reason. Times are measured in rounds: each round calls every implementation once per point.
    A gradual change of the machine's speed therefore affects neither the ratios of times nor the exponents.
    """
    device, effort = torch.device(options.device), effort_of(options)
    rows: list[dict[str, dict[str, Any]]] = []
    able: dict[tuple[int, str], Call] = {}
    for place, sizes in enumerate(points):
        common = {**sizes._asdict(), "dtype": options.dtype, "direction": options.direction}
        rows.append(
            {
                name: {**common, "implementation": name, "macs": macs(sizes, name), "error": None}
                for name in (EXACT, *map(_named, backends))
            }
        )
        try:
            made = calls(sizes, backends, options)
        except Exception as error:  # for example too little memory; the other points are still measured
            made = {}
            for row in rows[-1].values():
                row["error"] = describe(error)
        for name, call in made.items():
            try:
                call()
                able[place, name] = call
            except Exception as error:
                rows[-1][name]["error"] = describe(error)
        made.clear()
    try:
        longer = dataclasses.replace(effort, seconds=effort.seconds * len(points))
        for (place, name), times in measure_together(able, device, longer).items():
            memory = peak(able[place, name], device)._asdict()
            rows[place][name] |= {"milliseconds": times.to_dict(), "typical": times.typical, "memory": memory}
    except Exception as error:
        for row in (row for point in rows for row in point.values()):
            if "milliseconds" not in row:
                row["error"] = row["error"] or describe(error)
    able.clear()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return [list(row.values()) for row in rows]


def _named(backend: str) -> str:
    return f"nystrom [{backend}]"


def at(base: Sizes, variable: str, value: int) -> Sizes:
    """Return a copy of `base` with one size changed; "N" changes N_q and N_k."""
    return base._replace(**({"N_q": value, "N_k": value} if variable == "N" else {variable: value}))


def fits(rows: Iterable[dict[str, Any]]) -> Rows:
    """Fit the exponents of time, memory and multiply-accumulates for every sweep and implementation."""
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        if not row["error"]:
            groups.setdefault((row["variable"], row["implementation"]), []).append(row)
    found = []
    for (variable, implementation), group in groups.items():
        x = [row["value"] for row in group]
        if len(x) < 2:
            continue
        found.append(
            {
                "variable": variable,
                "implementation": implementation,
                "from": min(x),
                "to": max(x),
                "time": power_law(x, [row["typical"] for row in group]),
                "memory": power_law(x, [max(row["memory"]["above"], 1) for row in group]),
                "macs": power_law(x, [row["macs"] for row in group]),
            }
        )
    return found


def growth_table(rows: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table of exponents."""
    header = ["variable", "range", "implementation", "time ∝ x^p, p", "memory, p", "MACs, p"]
    lines = []
    for fit in fits(rows):
        swept = [fit["variable"], f"{fit['from']:,} to {fit['to']:,}", fit["implementation"]]
        lines.append([*swept, str(fit["time"]), str(fit["memory"]), f"{fit['macs'].exponent:.2f}"])
    return header, lines


class Surface(NamedTuple):
    """Time of Nyström attention divided by the time of exact attention, for several N_k and B.

    Attributes:
        keys: Values of N_k.
        batches: Values of B.
        share: Dictionary from (N_k, B) to the time of Nyström attention divided by the time of exact attention. The
            value is None if Nyström attention or exact attention could not run.
        implementation: Name of the implementation of Nyström attention.
    """

    keys: list[int]
    batches: list[int]
    share: dict[tuple[int, int], float | None]
    implementation: str


def surfaces(rows: Iterable[dict[str, Any]]) -> list[Surface]:
    """Return a `Surface` for each implementation of Nyström attention, from the rows of the crossover table."""
    rows = list(rows)
    times = {
        (row["N_k"], row["B"], row["implementation"]): None if row["error"] else row["typical"]
        for row in rows
    }
    keys, batches = sorted({row["N_k"] for row in rows}), sorted({row["B"] for row in rows})
    found = []
    for name in dict.fromkeys(row["implementation"] for row in rows if row["implementation"] != EXACT):
        share: dict[tuple[int, int], float | None] = {}
        for k in keys:
            for b in batches:
                nystrom, exact = times.get((k, b, name)), times.get((k, b, EXACT))
                share[k, b] = nystrom / exact if nystrom and exact else None
        found.append(Surface(keys, batches, share, name))
    return found


def crossing(surface: Surface, batch: int) -> float | None:
    """Return the N_k above which, at one batch size, Nyström attention is faster than exact attention.

    The result is interpolated between the largest N_k at which Nyström attention is not faster and the next measured
    N_k. If Nyström attention is always faster, the result is the smallest measured N_k. If Nyström attention is not
    faster at the largest measured N_k, the result is None.
    """
    row = [(k, surface.share[k, batch]) for k in surface.keys]
    known = [(k, share) for k, share in row if share is not None]
    if not known or known[-1][1] >= 1:
        return None
    lost = [index for index, (_, share) in enumerate(known) if share >= 1]
    if not lost:
        return float(known[0][0])
    (k0, s0), (k1, s1) = known[lost[-1]], known[lost[-1] + 1]
    weight = math.log(s0) / (math.log(s0) - math.log(s1))
    return float(k0 * (k1 / k0) ** weight)


def guide(surface: Surface) -> str:
    """Return a sentence on the N_k below which exact attention is faster than Nyström attention."""
    found = [crossing(surface, batch) for batch in surface.batches]
    name = surface.implementation
    reached = [value for value in found if value is not None]
    if not reached:
        return f"{name}: exact attention was faster up to N_k = {surface.keys[-1]:,} at every batch size measured."
    if not any(share is not None and share >= 1 for share in surface.share.values()):
        return (
            f"{name}: faster than exact attention at every point measured, N_k = {surface.keys[0]:,} and up."
        )
    low, high = min(reached), max(reached)
    one = high / low < 1.1
    span = f"{low:,.0f}" if one else f"{low:,.0f} to {high:,.0f}"
    why = "" if one else " The limit depends on the batch size."
    rest = "" if len(reached) == len(found) else " At some batch sizes, exact attention was always faster."
    return f"{name}: use exact attention if N_k is below about {span}.{why}{rest}"


def crossover_table(surface: Surface) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the crossover table, with a line for each N_k and a column for each B.

    A cell shows the time of Nyström attention divided by the time of exact attention. If this ratio is 1 or more, the
    cell also says "(slower)".
    """
    header = ["N_k", *(f"B = {batch}" for batch in surface.batches)]
    lines = []
    for k in surface.keys:
        shares = [surface.share[k, batch] for batch in surface.batches]
        cells = ["–" if s is None else f"{number(s)}{' (slower)' if s >= 1 else ''}" for s in shares]
        lines.append([f"{k:,}", *cells])
    return header, lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sweeps and the crossover table; write the rows and print tables.

    Rows are written after each sweep and after each cell of the crossover table. After Ctrl-C, the tables show the rows
    that are already written, and the function returns 130 instead of 0.
    """
    options = _parser().parse_args(arguments)
    scale = SCALES[options.scale or ("gpu" if torch.device(options.device).type == "cuda" else "cpu")]
    backends = options.backends or available_backends()
    unknown = set(options.variables or ()) - set(scale.values)
    if unknown:
        raise SystemExit(
            f"--variables {', '.join(sorted(unknown))}: expected some of {', '.join(scale.values)}"
        )
    grown: Rows = []
    crossed: Rows = []
    try:
        if "growth" in options.what:
            recorder = Recorder(options.out, "growth", options.device, options.note)
            for variable in options.variables or scale.values:
                values = scale.values[variable]
                found = measured([at(scale.base, variable, value) for value in values], backends, options)
                for value, rows in zip(values, found, strict=True):
                    for row in rows:
                        grown.append(recorder.write({"variable": variable, "value": value, **row}))
                    _show_point(f"{variable} = {value}", rows)
        if "crossover" in options.what:
            recorder = Recorder(options.out, "crossover", options.device, options.note)
            for keys in scale.keys:
                for batch in scale.batches:
                    (rows,) = measured([scale.base._replace(N_k=keys, B=batch)], backends, options)
                    crossed += [recorder.write(row) for row in rows]
                    _show_point(f"N_k = {keys}, B = {batch}", rows)
    except KeyboardInterrupt:
        print("interrupted; finished sweeps are kept", file=sys.stderr)
        return 130
    finally:
        _print(grown, crossed)
    return 0


def _show_point(where: str, rows: Sequence[dict[str, Any]]) -> None:
    results = (f"{row['implementation']} {row['error'] or number(row['typical']) + ' ms'}" for row in rows)
    print(f"{where}: {', '.join(results)}", file=sys.stderr, flush=True)


def _print(grown: Rows, crossed: Rows) -> None:
    from srm_model.cli.tables import print_table

    if not grown and not crossed:
        return
    first = (grown or crossed)[0]
    print(sentence(first["machine"]))
    print(f"dtype={first['dtype']}, direction={first['direction']}")
    if grown:
        print()
        print_table(*growth_table(grown))
        print("fixed costs lower the exponents of time and memory below that of the MACs")
    for surface in surfaces(crossed):
        title = "time as a share of exact attention's"
        print(f"\n{surface.implementation}: {title}, N_q = {crossed[0]['N_q']:,}")
        print_table(*crossover_table(surface))
        print(guide(surface))


def _parser() -> argparse.ArgumentParser:
    parser = timing_parser("growth", __doc__)
    parser.add_argument("--what", nargs="+", default=["growth", "crossover"], choices=("growth", "crossover"))
    parser.add_argument("--scale", choices=tuple(SCALES), help="sizes to measure (default: by device)")
    parser.add_argument("--variables", nargs="+", metavar="X", help="run these sweeps only")
    parser.add_argument(
        "--backends", type=current_name, nargs="+", metavar="NAME", help="default: all that can run here"
    )
    parser.add_argument("--direction", default="forward", choices=DIRECTIONS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
