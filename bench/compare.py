"""Test whether a candidate (checkout or backend) is slower than a base: `python -m bench.compare`.

The exit code is 1 if the candidate is slower. Measurements are repeated in `--sets` sets. Each set starts four new
processes in random order: two copies of the base (A1, A2) and two of the candidate (B1, B2). All processes make the
same inputs. Each set needs new processes, because the memory layout of a process can make an operator faster or slower.

A set has several rounds. A round times each of the four processes once, in the order ABBA or BAAB, where A is a process
of the base and B is a process of the candidate. The order of each round is random. In both orders, a steady change of
the machine's speed affects A and B equally. By default, each process uses one thread, and times on a CPU are CPU times,
which other processes barely affect. If the environment variable OMP_NUM_THREADS sets several threads, times on a CPU
are wall-clock times. Each round gives two differences. In their formulas, A1, A2, B1 and B2 stand for the logarithms of
the times of the four processes:

    change = (B1 + B2 - A1 - A2) / 2        null = (A1 + B1 - A2 - B2) / 2

The change of a set is the median of `change` over the rounds of the set. The null of a set is the median of `null`
over these rounds. The null compares copies of the same version, so the null differs from 0 only by chance. If the
candidate is as fast as the base, the distribution of the change is symmetric around 0. Wilcoxon's signed-rank test of
the change is then exact.

A run prints one line for each operator, family and direction. The line has four values. They are computed from the
changes and nulls, which are differences of logarithms, and are printed as ratios of times:

- `ratio`: the Hodges-Lehmann estimate, from the changes of all sets;
- `low` and `high`: the ends of the confidence interval of the change, from Wilcoxon's signed-rank test;
- `noise`: how much the times of two copies of the same version may differ. It is the largest absolute value in the
  confidence interval of the null. A change smaller than the noise cannot be detected.

SLOWER is printed if `low` exceeds 1 plus the tolerance (`--tolerance`) and `ratio` exceeds `noise`. The
probability that a run wrongly prints SLOWER on at least one line is at most 1 % (Bonferroni correction). Times of
different runs are never compared.

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

from bench.harness import DEVICE, parser
from bench.operators import DIRECTIONS, DTYPES, FAMILIES, OPERATORS, NumericsError
from srm_kernels.checks import current_name

ROOT = Path(__file__).resolve().parent.parent
SETS = 20
ROUNDS = 4
TOLERANCE = 0.05  # largest accepted slowdown, relative
ALPHA = 0.01  # largest probability that at least one interval of the change in a run misses the true change
COPIES = ("A1", "B1", "B2", "A2")
_WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); import srm_kernels; sys.path.insert(0, sys.argv[2]); "
    "from bench.worker import serve; serve(sys.argv[1])"
)
Measure = Callable[[], float]
Pair = tuple[float, float]  # change and null of one set


class Verdict(NamedTuple):
    """Result for one operator, family and direction.

    Attributes:
        ratio: Time of the candidate divided by the time of the base.
        low: Lower end of the confidence interval of `ratio`.
        high: Upper end of the confidence interval of `ratio`.
        noise: Noise as a ratio of times. With 1.04, the times of two copies of the same code may differ by 4 %.
        slower: Whether the candidate is slower.
    """

    ratio: float
    low: float
    high: float
    noise: float
    slower: bool


def one_set(copies: dict[str, Measure], rounds: int, random: np.random.Generator) -> Pair:
    """Time the four copies in several rounds; return the change and the null of the set.

    Args:
        copies: Dictionary from each name in `COPIES` to the function that times this copy.
        rounds: How often each copy is timed.
        random: Generator for the random order of the copies.
    """
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
    """Decide whether the candidate is slower for one operator, family and direction.

    The docstring of this module gives the rule.

    Args:
        sets: Change and null of each set.
        tolerance: Largest accepted slowdown, relative: 0.05 accepts 5 %.
        lines: Number of combinations of operator, family and direction for which the run gives a verdict.

    Raises:
        ValueError: There are too few sets to detect any slowdown.
    """
    level = ALPHA / 2 / lines
    fewest = math.ceil(-math.log2(level))
    if len(sets) < fewest:
        raise ValueError(
            f"{len(sets)} sets cannot detect a slowdown among {lines} lines: expected at least {fewest}"
        )
    changes, nulls = zip(*sets, strict=True)
    ratio, low, high = signed_rank(changes, level)
    noise = max(abs(end) for end in signed_rank(nulls, level)[1:])
    slower = low > math.log1p(tolerance) and ratio > noise
    return Verdict(*(math.exp(value) for value in (ratio, low, high, noise)), slower)


def signed_rank(values: Sequence[float], level: float) -> tuple[float, float, float]:
    """Return the Hodges-Lehmann estimate of the centre of symmetry, and its confidence interval.

    The interval contains all centres that Wilcoxon's exact signed-rank test does not reject.

    Args:
        values: A sample of a symmetric distribution.
        level: Largest probability that the centre is below the interval, and also the largest probability
            that the centre is above the interval. A level of 0.025 gives a 95 % confidence interval.
    """
    means = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2))
    ways = np.zeros(len(means) + 1)  # number of sign patterns, by the sum of the positive ranks
    ways[0] = 1
    for rank in range(1, len(values) + 1):
        ways[rank:] += ways[:-rank].copy()
    cut = int(np.searchsorted(np.cumsum(ways) / 2 ** len(values), level, side="right"))
    if cut == 0:
        return statistics.median(means), -math.inf, math.inf
    return statistics.median(means), means[cut - 1], means[-cut]


class Worker:
    """Process that times the operators of a checkout.

    Raises:
        ValueError: The folder is not a checkout of this project.
    """

    def __init__(self, checkout: Path) -> None:
        if not (checkout / "srm_kernels" / "__init__.py").is_file():
            raise ValueError(f"{checkout}: no srm_kernels in it; expected the folder of a checkout")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(checkout.resolve()), str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            process_group=0,  # Ctrl-C then does not reach the workers, which would print tracebacks
        )

    def prepare(self, request: dict[str, Any]) -> Measure:
        """Prepare an operator, and return a function that measures the operator's time in milliseconds.

        Raises:
            NumericsError: The operator cannot run, or its results are wrong.
        """
        answer = self._ask(json.dumps(request))
        if "error" in answer:
            raise NumericsError(answer["error"])
        return lambda: float(self._ask("")["milliseconds"])

    def close(self) -> None:
        """End the process."""
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
    """Results for one operator, family and direction: one line of the printed table.

    `sets` has the change and the null of each finished set. If the operator cannot be compared, `refusal` is the
    reason; otherwise it is empty.
    """

    def __init__(self, operator: str, family: str, direction: str, options: argparse.Namespace) -> None:
        self.name = f"{operator:22} {family:17} {direction:9} "
        self.request = {"operator": operator, "family": family, "direction": direction}
        self.request |= {"dtype": options.dtype, "device": options.device}
        self.backends = dict(zip("AB", options.backends or [options.backend] * 2, strict=True))
        self.sets: list[Pair] = []
        self.refusal = ""

    def measure(self, workers: dict[str, Worker], rounds: int, random: np.random.Generator) -> None:
        """Time the four copies of the operator in one set, and add the change and the null to `sets`.

        Before the times of the first set, the results of each copy are checked. Later sets need no check, because the
        inputs are the same in all sets.
        """
        request = {**self.request, "verify": not self.sets}
        try:
            copies = {
                copy: workers[copy].prepare({**request, "backend": self.backends[copy[0]]}) for copy in COPIES
            }
        except NumericsError as reason:
            self.refusal = str(reason)
        else:
            self.sets.append(one_set(copies, rounds, random))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per operator, family and direction, and return the exit code.

    The exit code is 1 if the candidate is slower on at least one line, 2 if no operator could be compared or an
    argument is not accepted, 130 after Ctrl-C, and 0 in all other cases.
    """
    options = _options(arguments)
    try:
        return _run(options)
    except ValueError as error:  # the exit code is 2, because 1 means slower
        print(f"python -m bench.compare: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise ValueError(f"rounds={options.rounds}: expected at least 1")
    base, candidate = (Path(path) for path in options.checkouts or (ROOT, ROOT))
    product = itertools.product(options.operators, options.families, options.directions)
    lines = [Line(*names, options) for names in product]
    judge([(0.0, 0.0)] * options.sets, lines=len(lines))  # refuses too few sets before they are measured
    try:
        _measure(lines, base, candidate, options)
    except KeyboardInterrupt:
        print("interrupted; the table is of the finished sets", file=sys.stderr)
        try:
            _print_verdicts(lines, options.tolerance)
        except ValueError as error:
            print(error, file=sys.stderr)
        return 130
    return _print_verdicts(lines, options.tolerance)


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


def _print_verdicts(lines: Sequence[Line], tolerance: float) -> int:
    compared = sum(not line.refusal for line in lines)
    verdicts = [None if e.refusal else judge(e.sets, tolerance=tolerance, lines=compared) for e in lines]
    slower = 0
    print(f"{'operator':22} {'family':17} {'direction':9} {'ratio':>7} {'interval':>16} {'noise':>7}")
    for line, found in zip(lines, verdicts, strict=True):
        if found is None:
            print(f"{line.name}not compared: {line.refusal}")
            continue
        interval, mark = f"{found.low:.3f} to {found.high:.3f}", "  SLOWER" if found.slower else ""
        print(f"{line.name}{found.ratio:7.3f} {interval:>16} {found.noise:7.3f}{mark}")
        slower += found.slower
    print(f"{compared} compared, {slower} slower than the noise and {tolerance:.0%}")
    return 2 if not compared else int(slower > 0)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser("compare", __doc__)
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--checkouts", nargs=2, metavar=("OLD", "NEW"), help="compare two folders with a checkout"
    )
    what.add_argument(
        "--backends", type=current_name, nargs=2, metavar=("BASE", "CANDIDATE"), help="compare two backends"
    )
    made.add_argument("--backend", type=current_name, help="backend in both checkouts (default: the fastest)")
    made.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=tuple(OPERATORS))
    made.add_argument("--families", nargs="+", default=["stage 3", "stage 2"], choices=tuple(FAMILIES))
    made.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    made.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    made.add_argument("--device", default=DEVICE)
    made.add_argument("--sets", type=int, default=SETS, help="sets of four processes (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of a set (default: %(default)s)")
    made.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="accept slowdowns up to this (default: %(default)s)",
    )
    made.add_argument("--seed", type=int, default=0, help="seed of the order (default: %(default)s)")
    return made.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
