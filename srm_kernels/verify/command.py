"""The command `python -m srm_kernels verify`: check every case, time what is right, keep and print what was found."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import choice, verdicts
from ..verdicts import COMMAND, FAULTS, PASSING, RIGHT, Group, Row, Verdict
from . import table
from .cases import DTYPES, FAMILY, NAMES, OPERATORS, QUICK, SHAPES, Case, cases
from .devices import CannotRunError, Device, open_device
from .measure import sizes_of
from .workers import Worker, ask_all

MOST_WORKERS = 4
LONGEST = 300  # characters of a reason
Asked = tuple[Case, str]  # and the implementation
SECONDS = {False: 0.15, True: 0.05}  # of measured calls in one direction of a case; with --quick
DESCRIPTION = """Check on a GPU that the kernels are right, time them, and let `backend=None` follow what was found.

Right: errors within the numerics rule, the same bits twice and for a sample alone and in a batch, no launch refused.
Exit code: 0 where all is right, 1 where something is wrong, 2 where nothing can be measured, 130 after Ctrl-C.
An interrupted run is resumed by the next one."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    labels = [operator.label for operator in OPERATORS]
    add = parser.add_argument
    add("--device", default="cuda", help="cuda or cuda:NUMBER (default: the current CUDA device)")
    add("--quick", action="store_true", help=f"measure the shapes {' and '.join(QUICK)} alone")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=tuple(dict.fromkeys((*NAMES, *labels))),
        help="operators (default: all)",
    )
    add(
        "--dtypes",
        nargs="+",
        metavar="DTYPE",
        choices=tuple(DTYPES),
        default=tuple(DTYPES),
        help=f"of {' '.join(DTYPES)} (default: all)",
    )
    add(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        choices=tuple(SHAPES),
        help=f"of {' '.join(SHAPES)} (default: {' '.join(FAMILY)})",
    )
    add("--compile", action="store_true", help="also time the reference as torch.compile makes it")
    add("--again", action="store_true", help="measure again what the kept verdict has")
    add("--export", type=Path, metavar="FILE", help="also write the rows as JSON lines, for bench/results")
    add(
        "--jobs",
        type=_positive(int),
        metavar="N",
        help="processes that compile and check at once (default: by cores)",
    )
    add(
        "--limit",
        type=_positive(float),
        default=120.0,
        metavar="SECONDS",
        help="of one case (default: %(default)g)",
    )


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Return a reader of numbers above zero, for argparse."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
        return value

    return read


def main(arguments: Sequence[str] | None = None, program: str = "python -m srm_kernels verify") -> int:
    """Run the command; returns the exit code."""
    table.tolerate()
    parser = argparse.ArgumentParser(prog=program, usage="%(prog)s [options]", description=DESCRIPTION)
    add_options(parser)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        with _interrupting(signal.SIGTERM, getattr(signal, "SIGHUP", None)):
            return _run(options)
    except CannotRunError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{program}: interrupted; the next run goes on from here", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


@contextmanager
def _interrupting(*numbers: signal.Signals | None) -> Iterator[None]:
    """Let signals raise KeyboardInterrupt as Ctrl-C does, so that child processes are ended; not those ignored."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = {}
    with suppress(ValueError):  # signals reach the main thread alone
        for number in filter(None, numbers):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(options: argparse.Namespace) -> int:
    device = open_device(options.device)
    shapes = options.shapes or device.shapes or (QUICK if options.quick else FAMILY)
    wanted = list(cases(options.only or NAMES, options.dtypes, shapes))
    if not wanted:
        raise CannotRunError("no operator has a case of these dtypes and shapes")
    if options.export is not None:
        above = next(path for path in options.export.absolute().parents if path.exists())
        if options.export.is_dir() or not above.is_dir():
            raise CannotRunError(
                f"--export {options.export}: expected the name of a file, in a folder or a new one"
            )
    with verdicts.held(device.key) as alone:
        if not alone:
            raise CannotRunError(f"another process verifies {device.key.device}; times would be wrong")
        run = Run(device, options)
        wanted += run.doubted(wanted)
        run.measure(wanted)
    if options.export is not None:
        verdicts.export(run.verdict, options.export)
        print(f"wrote {options.export}")
    choice.refresh()
    labels, groups = {_label(case) for case in wanted}, set(map(_group, wanted))
    counted = [
        row
        for row in run.verdict.rows
        if (row["operator"], row["dtype"], row["shape"]) in labels
        or (verdicts.group_of(row) in groups and row["status"] in FAULTS)
    ]
    return run.tell(counted)


class Run:
    """One run of the command: what it measures and what it has found."""

    def __init__(self, device: Device, options: argparse.Namespace) -> None:
        self.device, self.options = device, options
        self.seconds = SECONDS[options.quick]
        kept, reason = verdicts.load(device.key)
        self.verdict = kept or Verdict(device.key)
        self.now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        key = device.key
        print(
            f"{key.device}, compute capability {key.capability}, driver {key.driver}, torch {key.torch}, "
            f"triton {key.triton}, kernels {key.sources}"
        )
        if kept is None and reason != verdicts.NOT_VERIFIED:
            print(reason)
        self.path: Path | None = None
        self.progress = table.Progress()

    def doubted(self, wanted: Sequence[Case]) -> list[Case]:
        """Cases of the same operators at other shapes whose kept rows are faults that another attempt may clear.

        A fault at one shape decides for all shapes. `--again` also repeats those that are no matter of luck.
        """
        asked, groups = set(map(_label, wanted)), set(map(_group, wanted))
        faults = verdicts.faults(self.verdict.rows)
        labels = {
            (row["operator"], row["dtype"], row["shape"])
            for row in faults
            if row["status"] in PASSING or self.options.again
        }
        found = [
            case
            for case in cases(shapes=tuple(SHAPES))
            if _group(case) in groups and _label(case) in labels - asked
        ]
        if found:
            names = ", ".join(" ".join(_label(case)) for case in found)
            print(f"these went wrong before and are tried again: {names}")
        return found

    def measure(self, wanted: Sequence[Case]) -> None:
        """Measure the cases that the verdict has not, and keep every row as soon as it is there."""
        rows = [] if self.options.again else self.verdict.rows
        known = {verdicts.identity(row): row for row in rows if row["status"] not in PASSING}
        judged = {
            (case, name): known.get((case.operator.label, name, case.dtype, case.shape))
            for case in wanted
            for name in case.operator.backends
        }
        asked = [pair for pair, row in judged.items() if row is None]
        todo = [
            case
            for case in wanted
            if not all(row and verdicts.is_done(row) for row in _rows_of(case, judged))
        ]
        if len(todo) < len(wanted):
            kept = len(wanted) - len(todo)
            print(f"{kept} of {len(wanted)} cases are in the kept verdict; --again repeats them")
        if todo:
            # Kept with the first row: where no kernel can run, an earlier verdict stays whole.
            unfinished = self.verdict.unfinished | set(map(_group, todo))
            self.verdict = replace(self.verdict, unfinished=unfinished)
            self._judge(asked, judged)
            print(table.line(table.HEADER))
            self._time(todo, judged)
        self._keep(self.verdict.finished(set(map(_group, wanted))))

    def _judge(self, asked: Sequence[Asked], judged: dict[Asked, Row | None]) -> None:
        """Judge implementations, in several processes at once: most of the time is compilation."""
        start, done = time.monotonic(), 0

        def finished(index: int, answer: dict[str, Any]) -> None:
            nonlocal done
            case, name = asked[index]
            judged[case, name] = row = _row(case, name, answer, self.now)
            done += 1
            self._keep(self.verdict.with_row(row))
            self.progress.show(f"checking {table.left(done, len(asked), time.monotonic() - start)}")

        requests = [_request("right", case, [name]) for case, name in asked]
        jobs = self.options.jobs or max(1, min(MOST_WORKERS, (os.cpu_count() or 2) // 2))
        ask_all(self.options.device, requests, jobs, self.options.limit, finished)
        failed = [i for i, pair in enumerate(asked) if (row := judged[pair]) and row["status"] in PASSING]
        for i in failed:  # perhaps for want of memory, which the processes shared
            done -= 1
            finished(i, Worker(self.options.device).alone(requests[i], self.options.limit))

    def _time(self, todo: Sequence[Case], judged: Mapping[Asked, Row | None]) -> None:
        """Time what is right, in one process alone on the device."""
        worker, start = Worker(self.options.device), time.monotonic()
        ends = {_group(case): number for number, case in enumerate(todo)}
        try:
            for number, case in enumerate(todo):
                rows = [row for row in _rows_of(case, judged) if row is not None]
                right = [row["backend"] for row in rows if row["status"] == RIGHT]
                if right:
                    answer = self._times(worker, case, right)
                    rows = [_with_times(row, answer, self.now) for row in rows]
                verdict = self.verdict
                for row in rows:
                    verdict = verdict.with_row(row)
                    self.progress.show("")
                    print(table.result(row), flush=True)
                if ends[_group(case)] == number:
                    verdict = verdict.finished({_group(case)})
                self._keep(verdict)
                elapsed = time.monotonic() - start
                self.progress.show(f"timing {table.left(number + 1, len(todo), elapsed)}")
        finally:
            worker.close()
            self.progress.show("")

    def _times(self, worker: Worker, case: Case, right: Sequence[str]) -> dict[str, Any]:
        """Time implementations and what they are compared with; where one fails, each in a process of its own."""
        names = ["reference", *right, "eager", *(["compiled"] if self.options.compile else [])]
        about = {"seconds": self.seconds}
        answer = worker.ask(_request("fast", case, names) | about, self.options.limit)
        if "milliseconds" in answer:
            return answer
        times: dict[str, dict[str, float]] = {}
        failed = {}
        for name in names:
            answer = worker.alone(_request("fast", case, [name]) | about, self.options.limit)
            for direction, found in answer.get("milliseconds", {}).items():
                times.setdefault(direction, {}).update(found)
            if "milliseconds" not in answer:
                failed[name] = answer
        return {"milliseconds": times, "failed": failed}

    def _keep(self, verdict: Verdict) -> None:
        if verdict != self.verdict:
            self.verdict = verdict
            self.path = verdicts.save(verdict)

    def tell(self, rows: Sequence[Row]) -> int:
        """Print the summary; returns the exit code."""
        print(
            "\nGeometric means over shapes of the gain over the best other implementation: forward / with backward"
        )
        print("\n".join(table.summary(rows)))
        wrong = verdicts.faults(rows)
        if wrong:
            print(
                f"\n{len(wrong)} of {len(rows)} cases are not right; their operators stay with plain PyTorch:"
            )
            for row in wrong:
                print(
                    f"  {row['operator']} [{row['backend']}] {row['dtype']} {row['shape']}: {row['reason']}"
                )
        if self.verdict.unfinished:
            names = ", ".join(f"{operator} in {dtype}" for operator, dtype in sorted(self.verdict.unfinished))
            print(
                f"\nNot finished, and not decided by this verdict until `{COMMAND}` has measured the rest: {names}"
            )
        if self.path is not None:
            print(f"\nKept in {self.path}; `backend=None` follows it from the next process on.")
        return 1 if wrong else 0


def _rows_of(case: Case, judged: Mapping[Asked, Row | None]) -> list[Row | None]:
    return [judged[case, name] for name in case.operator.backends]


def _group(case: Case) -> Group:
    return case.operator.label, case.dtype


def _label(case: Case) -> tuple[str, str, str]:
    return case.operator.label, case.dtype, case.shape


def _request(part: str, case: Case, backends: Sequence[str]) -> dict[str, Any]:
    about = {"operator": case.operator.label, "dtype": case.dtype, "shape": case.shape}
    return {"part": part, "backends": list(backends), **about}


def _row(case: Case, backend: str, answer: dict[str, Any], now: str) -> Row:
    return {
        "operator": case.operator.label,
        "backend": backend,
        "dtype": case.dtype,
        "shape": case.shape,
        "sizes": sizes_of(case),
        "status": answer["status"],
        "reason": _short(answer.get("reason")),
        "ratio": answer.get("ratio"),
        "milliseconds": {},
        "measured": now,
    }


def _with_times(row: Row, answer: dict[str, Any], now: str) -> Row:
    """A row with its times, or with what went wrong while they were taken."""
    if row["status"] != RIGHT:
        return row
    failed, row = answer.get("failed", {}), row | {"measured": now}
    if own := failed.get(row["backend"]):
        return row | {"status": own["status"], "reason": _short(f"while it was timed: {own['reason']}")}
    notes = [f"{name} was not timed: {other['reason']}" for name, other in failed.items()]
    return row | {"milliseconds": answer["milliseconds"], "reason": _short("; ".join(notes) or None)}


def _short(text: str | None) -> str | None:
    """A reason on one line of a table."""
    if text is None:
        return None
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
