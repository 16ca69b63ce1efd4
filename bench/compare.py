"""Is one checkout, or one backend, slower than another? `python -m bench.compare`; exit code 1 where it is.

Both are measured in turn, round by round in a random order, beside a second copy of the first one: what the two copies
differ by is this run's noise. Where inputs happen to lie in memory makes an operator faster or slower for as long as it
is called on them: in the course of a run all are prepared anew twenty times, and whole preparations are resampled.
A slowdown is told where the median of paired ratios, less its own uncertainty, exceeds both that noise and the
tolerance. Nothing is compared with a time of another run.

    python -m bench.compare --checkouts OLD NEW
    python -m bench.compare --backends reference sdpa
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.operators import DIRECTIONS, DTYPES, FAMILIES, OPERATORS, NumericsError
from bench.worker import prepared

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 80
PREPARATIONS = 20
TOLERANCE = 0.05  # a slowdown by less is nobody's concern
CONFIDENCE = 0.99
RESAMPLES = 1000
_WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); import srm_kernels; sys.path.insert(0, sys.argv[2]); "
    "from bench.worker import serve; serve(sys.argv[1])"
)
Measure = Callable[[], float]
Three = tuple[Measure, Measure, Measure]  # base, a second copy of it, candidate


class Verdict(NamedTuple):
    """Ratios of time, candidate to base: the median with its interval, and the noise of this run."""

    ratio: float
    low: float
    high: float
    noise: float  # 1.04: two copies of the same differ by up to 4 %
    slower: bool


def compare(
    prepare: Callable[[], Three],
    *,
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Verdict:
    """Whether the candidate of `prepare` is slower than its base; each of its three returns one time."""
    if rounds < 5:
        raise ValueError(f"rounds={rounds}: expected at least 5")
    random = np.random.default_rng(seed)
    each = math.ceil(rounds / PREPARATIONS)
    logs = np.empty((math.ceil(rounds / each), each, 3))
    for part in logs:
        contestants = prepare()
        for row in part:
            for index in random.permutation(len(contestants)):
                row[index] = math.log(contestants[index]())
    change = logs[..., 2] - logs[..., :2].mean(-1)
    low, high = _interval(change, random)
    noise = max(abs(end) for end in _interval(logs[..., 1] - logs[..., 0], random))
    slower = bool(low > max(noise, math.log1p(tolerance)))
    return Verdict(math.exp(float(np.median(change))), math.exp(low), math.exp(high), math.exp(noise), slower)


def _interval(values: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    """Where the median lies, by resampling of whole preparations, the rows of `values`."""
    drawn = values[random.integers(len(values), size=(RESAMPLES, len(values)))]
    medians = np.median(drawn.reshape(RESAMPLES, -1), axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


class Worker:
    """A process that times the operators of another checkout."""

    def __init__(self, checkout: Path) -> None:
        if not (checkout / "srm_kernels" / "__init__.py").is_file():
            raise ValueError(f"{checkout}: no checkout with srm_kernels in it")
        command = [sys.executable, "-c", _WORKER, str(checkout.resolve()), str(ROOT)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout
        )

    def prepare(self, request: dict[str, Any]) -> Measure:
        answer = self._ask(json.dumps(request))
        if "error" in answer:
            raise NumericsError(answer["error"])
        return lambda: float(self._ask("")["milliseconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that times a checkout ended with code {self.process.wait()}")
        return json.loads(answer)


def main(arguments: Sequence[str] | None = None) -> int:
    """One line per operator, family and direction; 1 if any is slower, 2 if none could be compared."""
    options = _parser().parse_args(arguments)
    workers: list[Worker] = []
    try:
        if options.checkouts:
            old, new = (Path(path) for path in options.checkouts)
            for path in (old, old, new):
                workers.append(Worker(path))
        return _run(options, workers)
    except ValueError as error:  # not 1, which says that something is slower
        print(f"python -m bench.compare: {error}", file=sys.stderr)
        return 2
    finally:
        for worker in workers:
            worker.close()


def _run(options: argparse.Namespace, workers: list[Worker]) -> int:
    backends = options.backends or [options.backend] * 2
    compared = slower = 0
    print(f"{'operator':22} {'family':17} {'direction':9} {'ratio':>7} {'99 % interval':>16} {'noise':>7}")
    for operator in options.operators:
        for family in options.families:
            for direction in options.directions:
                requests = [
                    {
                        "operator": operator,
                        "family": family,
                        "direction": direction,
                        "backend": backend,
                        "dtype": options.dtype,
                        "device": options.device,
                    }
                    for backend in (backends[0], backends[0], backends[1])
                ]
                line = f"{operator:22} {family:17} {direction:9} "
                makers = [worker.prepare for worker in workers] or [prepared] * len(requests)

                def prepare(makers=makers, requests=requests) -> Three:
                    base, again, candidate = (m(r) for m, r in zip(makers, requests, strict=True))
                    return base, again, candidate

                try:
                    prepare()  # whatever cannot run says so here
                except (NotImplementedError, NumericsError, ValueError) as reason:
                    print(f"{line}not compared: {reason}")
                    continue
                found = compare(prepare, rounds=options.rounds, tolerance=options.tolerance)
                interval = f"{found.low:.3f} to {found.high:.3f}"
                verdict = "  SLOWER" if found.slower else ""
                print(f"{line}{found.ratio:7.3f} {interval:>16} {found.noise:7.3f}{verdict}", flush=True)
                compared += 1
                slower += found.slower
    print(f"{compared} compared, {slower} slower than the noise and {options.tolerance:.0%}")
    return 2 if not compared else int(slower > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkouts", nargs=2, metavar=("OLD", "NEW"), help="folders of two checkouts")
    what.add_argument("--backends", nargs=2, metavar=("BASE", "CANDIDATE"), help="two backends of this one")
    parser.add_argument("--backend", default=None, help="of both checkouts (default: the fastest)")
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=tuple(OPERATORS))
    parser.add_argument("--families", nargs="+", default=["stage 3", "stage 2"], choices=tuple(FAMILIES))
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
