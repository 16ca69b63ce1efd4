"""Is one checkout, or one backend, slower than another? `python -m bench.compare`; exit code 1 where it is.

The rule. Base and candidate are two copies each, A1, A2, B1 and B2: four processes, started anew for each of the
`--sets` in random order, on inputs that each prepares anew, since a process and the place of its inputs make an
operator faster or slower for as long as it lives. In a round each copy is timed once, in the order ABBA or BAAB by the
toss of a coin, so that a drift of the machine cancels. A CPU is timed by the processor's clock, one thread (unless
OMP_NUM_THREADS says more), which stands still while others have it. In logarithms, a set says the median over its
rounds of

    change = (B1 + B2 - A1 - A2) / 2        null = (A1 + B1 - A2 - B2) / 2

Nothing but chance moves the null. Where B costs what A does, swapping them turns the sign of the change, so that
Wilcoxon's signed-rank test is exact for it. `ratio` is the Hodges-Lehmann estimate of the change over all sets, with
its signed-rank interval; `noise` is the further end of the null's own interval, the band that this run cannot see into.
All lines of a run hold together with 99 % (each has its share of the 1 %, after Bonferroni).

SLOWER is told where the lower end of the interval exceeds the tolerance and the ratio exceeds the noise. Nothing is
compared with a time of another run.

    python -m bench.compare --checkouts OLD NEW
    python -m bench.compare --backends reference torch
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.operators import DIRECTIONS, DTYPES, FAMILIES, OPERATORS, NumericsError
from srm_kernels.checks import current_name

ROOT = Path(__file__).resolve().parent.parent
SETS = 20
ROUNDS = 4
TOLERANCE = 0.05  # a slowdown by less is nobody's concern
ALPHA = 0.01  # of a false statement anywhere in a run
COPIES = ("A1", "B1", "B2", "A2")
_WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); import srm_kernels; sys.path.insert(0, sys.argv[2]); "
    "from bench.worker import serve; serve(sys.argv[1])"
)
Measure = Callable[[], float]
Pair = tuple[float, float]  # change and null of one set


class Verdict(NamedTuple):
    """Ratios of time, candidate to base, with their interval, and the noise of this run."""

    ratio: float
    low: float
    high: float
    noise: float  # 1.04: two copies of the same may seem to differ by 4 %
    slower: bool


def one_set(copies: dict[str, Measure], rounds: int, random: np.random.Generator) -> Pair:
    """Change and null of one set: the four `copies`, by name, timed in turn `rounds` times."""
    changes, nulls = [], []
    for _ in range(rounds):
        first, second = ("A", "B") if random.random() < 0.5 else ("B", "A")
        ones, twos = (random.permutation((1, 2)) for _ in range(2))
        order = (f"{first}{ones[0]}", f"{second}{twos[0]}", f"{second}{twos[1]}", f"{first}{ones[1]}")
        logs = {name: math.log(copies[name]()) for name in order}
        changes.append((logs["B1"] + logs["B2"] - logs["A1"] - logs["A2"]) / 2)
        nulls.append((logs["A1"] + logs["B1"] - logs["A2"] - logs["B2"]) / 2)
    return statistics.median(changes), statistics.median(nulls)


def judge(sets: Sequence[Pair], *, tolerance: float = TOLERANCE, lines: int = 1) -> Verdict:
    """The rule above, of one of `lines` lines. ValueError where so few sets could not tell any slowdown."""
    level = ALPHA / 2 / lines
    fewest = math.ceil(-math.log2(level))
    if len(sets) < fewest:
        raise ValueError(
            f"{len(sets)} sets cannot tell a slowdown among {lines} lines: expected at least {fewest}"
        )
    changes, nulls = zip(*sets, strict=True)
    ratio, low, high = signed_rank(changes, level)
    noise = max(abs(end) for end in signed_rank(nulls, level)[1:])
    slower = low > math.log1p(tolerance) and ratio > noise
    return Verdict(*(math.exp(value) for value in (ratio, low, high, noise)), slower)


def signed_rank(values: Sequence[float], level: float) -> tuple[float, float, float]:
    """Hodges-Lehmann estimate of the centre of symmetry, and its interval that errs at each end with at most `level`.

    The interval is Wilcoxon's test turned round: the centres that it does not reject, by its exact distribution.
    """
    means = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2))
    ways = np.zeros(len(means) + 1)  # of the signs, by the sum of the positive ranks
    ways[0] = 1
    for rank in range(1, len(values) + 1):
        ways[rank:] += ways[:-rank].copy()
    cut = int(np.searchsorted(np.cumsum(ways) / 2 ** len(values), level, side="right"))
    if cut == 0:
        return statistics.median(means), -math.inf, math.inf
    return statistics.median(means), means[cut - 1], means[-cut]


class Worker:
    """A process that times the operators of a checkout."""

    def __init__(self, checkout: Path) -> None:
        if not (checkout / "srm_kernels" / "__init__.py").is_file():
            raise ValueError(f"{checkout}: no checkout with srm_kernels in it")
        command = [sys.executable, "-c", _WORKER, str(checkout.resolve()), str(ROOT)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            process_group=0,  # Ctrl-C is this process's to answer: theirs would be four tracebacks
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


class Line:
    """One operator, family and direction, and what the sets said of it."""

    def __init__(self, operator: str, family: str, direction: str, options: argparse.Namespace) -> None:
        self.name = f"{operator:22} {family:17} {direction:9} "
        base, candidate = options.backends or [options.backend] * 2
        self.requests = {
            copy: {
                "operator": operator,
                "family": family,
                "direction": direction,
                "backend": base if copy[0] == "A" else candidate,
                "dtype": options.dtype,
                "device": options.device,
            }
            for copy in COPIES
        }
        self.sets: list[Pair] = []
        self.refusal = ""

    def measure(self, workers: dict[str, Worker], rounds: int, random: np.random.Generator) -> None:
        """One set more; numbers are verified in the first one, since inputs are the same in all."""
        try:
            copies = {
                copy: workers[copy].prepare({**request, "verify": not self.sets})
                for copy, request in self.requests.items()
            }
        except NumericsError as reason:
            self.refusal = str(reason)
        else:
            self.sets.append(one_set(copies, rounds, random))


def main(arguments: Sequence[str] | None = None) -> int:
    """One line per operator, family and direction; 1 if any is slower, 2 if none could be compared."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except ValueError as error:  # not 1, which says that something is slower
        print(f"python -m bench.compare: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise ValueError(f"rounds={options.rounds}: expected at least 1")
    base, candidate = (Path(path) for path in options.checkouts or (ROOT, ROOT))
    product = itertools.product(options.operators, options.families, options.directions)
    lines = [Line(*names, options) for names in product]
    judge([(0.0, 0.0)] * options.sets, lines=len(lines))  # too few sets are refused before they are measured
    try:
        _measure(lines, base, candidate, options)
    except KeyboardInterrupt:
        print("interrupted; what is told is of the sets that were finished", file=sys.stderr)
        try:
            _tell(lines, options.tolerance)
        except ValueError as error:
            print(error, file=sys.stderr)
        return 130
    return _tell(lines, options.tolerance)


def _measure(lines: Sequence[Line], base: Path, candidate: Path, options: argparse.Namespace) -> None:
    random = np.random.default_rng(options.seed)
    for number in range(1, options.sets + 1):
        workers: dict[str, Worker] = {}
        try:
            for copy in random.permutation(COPIES):
                workers[str(copy)] = Worker(base if copy[0] == "A" else candidate)
            for line in lines:
                if not line.refusal:
                    line.measure(workers, options.rounds, random)
        finally:
            for worker in workers.values():
                worker.close()
        if all(line.refusal for line in lines):
            break
        print(f"set {number} of {options.sets}", file=sys.stderr, flush=True)


def _tell(lines: Sequence[Line], tolerance: float) -> int:
    compared = sum(not line.refusal for line in lines)
    verdicts = [None if e.refusal else judge(e.sets, tolerance=tolerance, lines=compared) for e in lines]
    slower = 0
    print(f"{'operator':22} {'family':17} {'direction':9} {'ratio':>7} {'interval':>16} {'noise':>7}")
    for line, found in zip(lines, verdicts, strict=True):
        if found is None:
            print(f"{line.name}not compared: {line.refusal}")
            continue
        interval = f"{found.low:.3f} to {found.high:.3f}"
        print(
            f"{line.name}{found.ratio:7.3f} {interval:>16} {found.noise:7.3f}{'  SLOWER' if found.slower else ''}"
        )
        slower += found.slower
    print(f"{compared} compared, {slower} slower than the noise and {tolerance:.0%}")
    return 2 if not compared else int(slower > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkouts", nargs=2, metavar=("OLD", "NEW"), help="folders of two checkouts")
    what.add_argument(
        "--backends",
        type=current_name,
        nargs=2,
        metavar=("BASE", "CANDIDATE"),
        help="two backends of this one",
    )
    parser.add_argument(
        "--backend", type=current_name, default=None, help="of both checkouts (default: the fastest)"
    )
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=tuple(OPERATORS))
    parser.add_argument("--families", nargs="+", default=["stage 3", "stage 2"], choices=tuple(FAMILIES))
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sets", type=int, default=SETS, help="of four processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="in each set (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
