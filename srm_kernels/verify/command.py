"""The command `python -m srm_kernels verify`: check all cases, time the correct ones, save and print results."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import choice, verdicts
from ..verdicts import COMMAND, FAULTS, PASSING, RIGHT, Group, Row, Verdict
from . import table
from .cases import DTYPES, FAMILY, NAMES, OPERATORS, QUICK, SHAPES, Case, cases
from .measure import sizes_of
from .target import CannotRunError, Device, open_device
from .workers import Worker, ask_all

MOST_WORKERS = 4
LONGEST = 300  # characters of a printed reason
Asked = tuple[Case, str]  # a case and a backend
SECONDS = {False: 0.15, True: 0.05}  # for the timed calls of a case in one direction; True: with --quick
DESCRIPTION = """Check the kernels on a GPU and time them. `backend=None` then selects backends from the results.

A kernel is right if it passes four checks: its errors satisfy the numerics rule; two runs give the same bits; a sample
gives the same bits alone and in a batch; the device accepts every launch.
Exit code: 0 if everything is right, 1 if something is wrong, 2 if nothing can be measured, 130 after Ctrl-C.
The next run resumes an interrupted run."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    labels = [operator.label for operator in OPERATORS]
    add = parser.add_argument
    add("--device", default="cuda", help="cuda or cuda:NUMBER (default: the current CUDA device)")
    add("--quick", action="store_true", help=f"measure only the shapes {' and '.join(QUICK)}")
    names = tuple(dict.fromkeys((*NAMES, *labels)))
    add("--only", nargs="+", metavar="NAME", choices=names, help="operators to measure (default: all)")
    add(
        "--dtypes", nargs="+", metavar="DTYPE", choices=tuple(DTYPES), default=tuple(DTYPES),
        help=f"dtypes to measure: {', '.join(DTYPES)} (default: all)",
    )  # fmt: skip
    add(
        "--shapes", nargs="+", metavar="SHAPE", choices=tuple(SHAPES),
        help=f"shapes to measure: {', '.join(SHAPES)} (default: {' '.join(FAMILY)})",
    )  # fmt: skip
    add("--compile", action="store_true", help="also time the reference under torch.compile")
    add("--again", action="store_true", help="also repeat cases that the stored verdict contains")
    add("--json", action="store_true", help="print the rows as JSON lines, and all other text on stderr")
    add("--export", type=Path, metavar="FILE", help="also write the rows as JSON lines, for bench/results")
    add(
        "--jobs", type=_positive(int), metavar="N",
        help="number of processes that compile and check (default: by the number of cores)",
    )  # fmt: skip
    add(
        "--limit", type=_positive(float), default=120.0, metavar="SECONDS",
        help="time limit of one case (default: %(default)g)",
    )  # fmt: skip


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
        return value

    return read


def main(arguments: Sequence[str] | None = None, program: str = "python -m srm_kernels verify") -> int:
    """Run the command and return its exit code."""
    table.tolerate()
    parser = argparse.ArgumentParser(prog=program, usage="%(prog)s [options]", description=DESCRIPTION)
    add_options(parser)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        with _interrupting(signal.SIGTERM, getattr(signal, "SIGHUP", None)):
            with redirect_stdout(sys.stderr if options.json else sys.stdout):
                run, rows = _run(options)
                code = run.report(rows)
            for row in verdicts.with_machine(rows, run.device.key) if options.json else ():
                print(json.dumps(row, allow_nan=False))
            return code
    except CannotRunError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{program}: interrupted; the next run resumes from here", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


@contextmanager
def _interrupting(*numbers: signal.Signals | None) -> Iterator[None]:
    """Make signals raise KeyboardInterrupt, so that child processes are killed; ignored signals stay ignored."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    before = {}
    with suppress(ValueError):  # only the main thread can set handlers
        for number in filter(None, numbers):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(options: argparse.Namespace) -> tuple[Run, list[Row]]:
    """Measure the chosen cases; return the `Run` and the rows for its report."""
    device = open_device(options.device)
    shapes = options.shapes or device.shapes or (QUICK if options.quick else FAMILY)
    wanted = list(cases(options.only or NAMES, options.dtypes, shapes))
    if not wanted:
        raise CannotRunError("--only, --dtypes and --shapes select no case")
    if options.export is not None:
        above = next(path for path in options.export.absolute().parents if path.exists())
        if options.export.is_dir() or not above.is_dir():
            raise CannotRunError(f"--export {options.export}: expected the path of a file")
    with verdicts.held(device.key) as alone:
        if not alone:
            raise CannotRunError(
                f"another process is measuring {device.key.device}; wait until it has finished"
            )
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
        if _label_of(row) in labels or (verdicts.group_of(row) in groups and row["status"] in FAULTS)
    ]
    return run, counted


class Run:
    """One run of the command, with its results."""

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
        """Return the cases outside `wanted` that must be measured again because the verdict has a fault for them.

        A group is all cases of one operator in one dtype. If an implementation has a fault in one case, then
        `backend=None` does not use the implementation for any case of the group. A fault in a case outside
        `wanted` therefore also affects the cases of `wanted` in the same group. The method returns only cases
        whose group contains a case of `wanted`.

        Without `--again`, the method returns only cases with a fault that the environment can cause, such as
        "timeout", because a new measurement may succeed. With `--again`, the method also returns cases with
        other faults.
        """
        asked, groups = set(map(_label, wanted)), set(map(_group, wanted))
        faults = verdicts.faults(self.verdict.rows)
        labels = {_label_of(row) for row in faults if row["status"] in PASSING or self.options.again}
        found = [
            case
            for case in cases(shapes=tuple(SHAPES))
            if _group(case) in groups and _label(case) in labels - asked
        ]
        if found:
            names = ", ".join(" ".join(_label(case)) for case in found)
            print(f"repeating cases with an earlier fault: {names}")
        return found

    def measure(self, wanted: Sequence[Case]) -> None:
        """Measure the cases that have no final result in the verdict, and save every row immediately.

        A result that the environment can cause, such as "memory" or "timeout", is not final, so its case is
        measured again. With `--again`, all cases of `wanted` are measured, with or without a final result.
        """
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
            print(f"{kept} of {len(wanted)} cases are in the stored verdict; --again repeats them")
        if todo:
            # The verdict is saved with its first row. If no kernel can run, the file of an earlier verdict is kept.
            unfinished = self.verdict.unfinished | set(map(_group, todo))
            self.verdict = replace(self.verdict, unfinished=unfinished)
            self._judge(asked, judged)
            print(table.line(table.HEADER))
            self._time(todo, judged)
        self._keep(self.verdict.finished(set(map(_group, wanted))))

    def _judge(self, asked: Sequence[Asked], judged: dict[Asked, Row | None]) -> None:
        """Check implementations in parallel processes, because most of the time is spent on compilation."""
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
        for i in failed:  # perhaps because the processes shared the memory of the device
            done -= 1
            finished(i, Worker(self.options.device).alone(requests[i], self.options.limit))

    def _time(self, todo: Sequence[Case], judged: Mapping[Asked, Row | None]) -> None:
        """Time the implementations with the status "right", in one process."""
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
        """Time the implementations in `right` and their baselines.

        The baselines are "reference", "eager" and, with `--compile`, "compiled" (see `measure.timed`). The
        implementations and the baselines are timed in alternation in one process. If an implementation or a
        baseline fails, all are timed again, each in a process of its own.
        """
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

    def report(self, rows: Sequence[Row]) -> int:
        """Print the summary and return the exit code."""
        print(
            "\nSpeedup over the fastest other implementation (geometric mean over shapes): forward pass / forward and "
            "backward pass"
        )
        print("\n".join(table.summary(rows)))
        wrong = verdicts.faults(rows)
        if wrong:
            print(f"\n{len(wrong)} of {len(rows)} cases are not right; their operators use plain PyTorch:")
        for row in wrong:
            case = f"{row['operator']} [{row['backend']}] {row['dtype']} {row['shape']}"
            print(f"  {case}: {row['reason']}")
        if self.verdict.unfinished:
            names = ", ".join(f"{operator} in {dtype}" for operator, dtype in sorted(self.verdict.unfinished))
            print(f"\nNot finished; `{COMMAND}` measures the rest: {names}")
        if self.path is not None:
            print(f"\nSaved in {self.path}; new processes with `backend=None` follow it.")
        return 1 if wrong else 0


def _rows_of(case: Case, judged: Mapping[Asked, Row | None]) -> list[Row | None]:
    return [judged[case, name] for name in case.operator.backends]


def _group(case: Case) -> Group:
    return case.operator.label, case.dtype


def _label(case: Case) -> tuple[str, str, str]:
    return case.operator.label, case.dtype, case.shape


def _label_of(row: Row) -> tuple[str, str, str]:
    return row["operator"], row["dtype"], row["shape"]


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
    """Return the row of an implementation with its times, or with the fault that occurred during timing."""
    if row["status"] != RIGHT:
        return row
    failed, row = answer.get("failed", {}), row | {"measured": now}
    if own := failed.get(row["backend"]):
        return row | {"status": own["status"], "reason": _short(f"while it was timed: {own['reason']}")}
    notes = [f"{name} was not timed: {other['reason']}" for name, other in failed.items()]
    return row | {"milliseconds": answer["milliseconds"], "reason": _short("; ".join(notes) or None)}


def _short(text: str | None) -> str | None:
    """Return a reason as one line of limited length."""
    if text is None:
        return None
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
