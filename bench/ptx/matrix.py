"""Execute the compiled kernels as PTX on a CPU and check their results: `python -m bench.ptx --matrix`.

The numerics rule of `srm_kernels/numerics.py` gives the bounds of the errors. The output has a row for each
case, dtype, architecture and order of the warps. A row has the largest ratio of an error to its bound, the
reports of the memory checks, the refused launches, and a digest of the code that ran. If a case has the same
code on two architectures and has passed on the first one, the row of the second architecture is a copy, and
the code does not run again.
"""

from __future__ import annotations

import hashlib
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import neck_numerics
from srm_kernels.verify import measure

from .cases import DTYPES, Case, operator_cases
from .device import Device, emulated_device
from .execution import ORDERS
from .necks import NeckCase, neck_cases

ARCHITECTURES = (89, 90, 120, 80, 86)
Row = dict[str, Any]


class Run(NamedTuple):
    """A case in one dtype on one architecture. `order` is one of `execution.ORDERS`."""

    case: Case | NeckCase
    dtype: str
    architecture: int
    order: str = "together"

    def about(self) -> Row:
        """Return the columns that identify the run in its row."""
        kind = "neck" if isinstance(self.case, NeckCase) else "operator"
        return {"kind": kind, "case": self.case.name} | {
            name: getattr(self, name) for name in ("dtype", "architecture", "order")
        }


class Configuration(NamedTuple):
    """A kernel with the options of one launch.

    The launch rules of the package choose the options: each branch of a launch rule leads to a configuration. A test
    compares configurations to check that the runs in continuous integration, a sample of all runs, cover every branch.
    """

    kernel: str
    warps: int
    stages: int | None
    registers: int | None
    landmarks: str = ""  # how a kernel gets its landmarks: the method, or "given"

    @classmethod
    def of(cls, kernel: Any, options: dict[str, Any]) -> Configuration:
        """Return the configuration of a launch from its keyword arguments."""
        values = (options.get("num_warps", 4), options.get("num_stages"), options.get("maxnreg"))
        landmarks = options.get("METHOD", "") if options.get("CHOOSE", True) else "given"
        return cls(kernel.__name__.strip("_"), *values, landmarks)


def runs(
    *,
    sample: bool = False,
    architectures: Sequence[int] = ARCHITECTURES,
    orders: Sequence[str] = ("together",),
) -> Iterator[Run]:
    """Yield the runs of the whole matrix, or only the sample that continuous integration runs."""
    for case in (*operator_cases(), *neck_cases()):
        served = getattr(case, "architectures", ARCHITECTURES)
        for dtype in case.dtypes:
            for architecture in architectures:
                if (sample and (dtype, architecture) not in case.sample) or architecture not in served:
                    continue
                for order in orders:
                    yield Run(case, dtype, architecture, order)


def judge(run: Run) -> Row:
    """Execute a run and return its row.

    `passed` is False if the error of a result exceeds its bound, if the emulator reports a fault or refuses a
    launch, if an exception is raised, or if no kernel is launched.
    """
    row = run.about()
    start = time.perf_counter()
    with emulated_device(run.architecture, order=run.order, poison=True) as device:
        try:
            measured = _neck_ratios(run) if isinstance(run.case, NeckCase) else _operator_ratios(run)
            ratios, row["bits"] = measured
            row["ratio"] = round(max(ratios.values(), default=0.0), 3)
            worst = sorted(ratios.items(), key=lambda item: -item[1])[:4]
            row["ratios"] = {name: round(value, 3) for name, value in worst}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:400]}"
            row["trace"] = traceback.format_exc(limit=-3)
        row |= _observed(device)
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["passed"] = not (
        row.get("error") or row["reports"] or row["refusals"] or not row["kernels"] or row["ratio"] > 1
    )
    return row


def code_of(run: Run) -> str:
    """Return the digest of the code of a run without executing it."""
    with emulated_device(run.architecture, blocks=lambda *_: []) as device:
        _step_of(run)
    return str(_observed(device)["code"])


def _step_of(run: Run) -> None:
    """Execute the forward and backward pass of `run` with the backend "triton", and discard the results."""
    if isinstance(run.case, NeckCase):
        neck, pyramid = _neck(run.case)
        with torch.autocast("cpu", DTYPES[run.dtype], enabled=run.dtype != "fp32"):
            neck_numerics.step(neck_numerics.with_backend(neck, "triton"), pyramid)
    else:
        call, tensors = run.case.make(DTYPES[run.dtype])
        measure.results(lambda *x: call(*x, backend="triton"), tensors)


def configurations_of(run: Run) -> set[Configuration]:
    """Return the kernels of a run with their launch options, without compiling them."""
    found: set[Configuration] = set()

    def record(
        device: Device, compile_: object, kernel: Any, args: object, grid: object, options: Row
    ) -> None:
        found.add(Configuration.of(kernel, options))

    with mock.patch.object(Device, "run", record), emulated_device(run.architecture):
        _step_of(run)
    return found


def _observed(device: Device) -> Row:
    """Return the columns of a row that come from the emulated device: reports, refusals, and the code that ran."""
    ptx = [_normalised(launch.compiled.asm["ptx"]) for launch in device.launches]
    return {
        "reports": device.fault_texts(),
        "refusals": sorted(set(device.refusals)),
        "kernels": sorted({launch.name for launch in device.launches}),
        "code": hashlib.sha256("\n".join(ptx).encode()).hexdigest()[:16],
    }


def _normalised(ptx: str) -> str:
    """Remove the parts of PTX that do not affect results: version, target, comments and debug information."""
    ptx = re.split(r"^\s*\.section\s+\.debug", ptx, maxsplit=1, flags=re.M)[0]
    ptx = re.sub(r"//.*$", "", ptx, flags=re.M)
    ptx = re.sub(
        r"^\s*(\.(target|version|loc|file)\b.*|\$L__(tmp|func_begin|func_end)\d+:)$", "", ptx, flags=re.M
    )
    return re.sub(r"\s*\n\s*", "\n", ptx)


def _operator_ratios(run: Run) -> tuple[dict[str, float], str]:
    case = run.case
    assert isinstance(case, Case)
    call, tensors = case.make(DTYPES[run.dtype])
    found = measure.results(lambda *x: call(*x, backend="triton"), tensors)
    by_name = measure.ratios(
        found, lambda *x: call(*x, backend="reference"), tensors, shares_size=case.shares_size
    )
    return by_name, _bits(found.named())


def _neck(case: NeckCase) -> tuple[Any, list[Tensor]]:
    neck = neck_numerics.make_neck(case.config, case.grids, case.channels)
    return neck, neck_numerics.make_pyramid(case.batch, case.grids, case.channels)


def _neck_ratios(run: Run) -> tuple[dict[str, float], str]:
    assert isinstance(run.case, NeckCase)
    neck, pyramid = _neck(run.case)
    seen: dict[str, Tensor] = {}

    def by_kernels(fused: Any, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        seen.update(neck_numerics.step(fused, maps))
        return seen

    dtype = None if run.dtype == "fp32" else DTYPES[run.dtype]
    return neck_numerics.ratios(neck, pyramid, dtype, by_kernels), _bits(seen)


def _bits(results: dict[str, Tensor]) -> str:
    """Return a digest of all results, bit by bit."""
    digest = hashlib.sha256()
    for name in sorted(results):
        digest.update(name.encode())
        digest.update(results[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def key_of(row: Row) -> tuple[Any, ...]:
    """Return the columns that identify a row."""
    return tuple(row[name] for name in ("kind", "case", "dtype", "architecture", "order"))


def every_key() -> Iterator[tuple[Any, ...]]:
    """Yield the key of every row that the matrix can have, in the order of the file."""
    return (key_of(run.about()) for order in ORDERS for run in runs(orders=(order,)))


def rows(wanted: Sequence[Run], known: Sequence[Row] = ()) -> Iterator[Row]:
    """Yield a row for each run.

    Earlier rows are the rows in `known` and the rows that were already yielded. If an earlier row with the
    same case, dtype, order and code has passed, the run is not executed. If the architecture is also the
    same, the earlier row is yielded unchanged. If only the architecture differs, a copy of the earlier row is
    yielded, with the architecture of the run.

    Args:
        wanted: Runs in the order of their execution.
        known: Rows of earlier commands.
    """
    done: dict[tuple[Any, ...], list[Row]] = {}
    for row in known:
        done.setdefault((row["kind"], row["case"], row["dtype"], row["order"]), []).append(row)
    for run in wanted:
        about = run.about()
        earlier = done.setdefault((about["kind"], about["case"], about["dtype"], run.order), [])
        code = code_of(run) if earlier else None
        same = [row for row in earlier if row["code"] == code and row["passed"]]
        own = next((row for row in same if row["architecture"] == run.architecture), None)
        if own is None and same:
            first = same[0].get("same_code_as", same[0]["architecture"])
            own = {**same[0], **about, "same_code_as": first, "seconds": 0}
        row = own or judge(run)
        earlier.append(row)
        yield row
