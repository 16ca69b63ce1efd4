"""Measure host time and launches of the fused neck without a GPU: `python -m bench.overhead`.

No GPU is needed: a fake driver pretends that there is one, and stubs replace the compiled kernels. Every launch
still goes through Triton's own `JITFunction.run`, which binds and specialises the arguments as on a GPU. The
measured host time of a launch is therefore its host time on a GPU, minus the time of the C launcher and the CUDA
driver (2 to 4 µs per launch). For PyTorch's own operations, the measured time is not their host time on a GPU:
here, the CPU computes these operations, on small maps, but with a GPU, the CPU would only launch them.

A pass is a forward pass or a training step. The CPU time of a pass on one thread, in µs, has three parts:

- `triton`: time inside `JITFunction.run`;
- `library`: time inside the matrix products, convolutions and casts that the neck itself calls;
- `package`: the rest of the time. Examples are this package's Python code, the dispatch of its operators, autograd
  (including the backward pass of the convolutions), views and allocations.

A narrow neck (C = 16) is sufficient for these measurements, because the host time depends on the links of the neck,
not on its width.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.harness import DTYPES, RESULTS, Call, Recorder, parser
from bench.launches import OWN, count_launches, forward_of

CAPABILITY = (9, 0)
LIBRARY = ((torch, "bmm"), (torch, "_foreach_copy_"), (torch.nn.functional, "conv2d"))
MOST_LAUNCHES, MOST_MICROSECONDS = 12, 150  # targets of a forward pass
GATE_CONVOLUTIONS = 6  # launches that MOST_LAUNCHES does not include
NAMES, REPEATS = ("forward", "training step"), (200, 50)


class Clock:
    """Measure the CPU time spent inside watched functions.

    Attributes:
        spent: CPU time in ns, by part.
        mark: Whether stub kernels record their names in torch's profile.
    """

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.mark = False

    def watch(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a timer, which adds the CPU time of each call to `spent[part]`."""

        def timed(*args: Any, **options: Any) -> Any:
            start = time.thread_time_ns()
            try:
                return function(*args, **options)
            finally:
                self.spent[part] += time.thread_time_ns() - start

        return timed


class _Driver:
    """Fake Triton driver that has only the methods that `JITFunction.run` calls."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)


def _stub(clock: Clock) -> Callable[..., Any]:
    """Return a replacement for `JITFunction._do_compile` that makes kernels whose launches compute nothing."""

    def compiled(self: Any, key: str, *_: Any) -> Any:
        name = self.fn.__name__.strip("_")
        self.cache_key  # noqa: B018 - finds the globals that every launch compares with their values

        def run(*_: Any) -> None:
            if clock.mark:
                with record_function(OWN + name):
                    pass

        kernel = SimpleNamespace(
            run=run, function=0, packed_metadata=None, launch_metadata=lambda *_: None, name=name
        )
        self.device_caches[0][0][key] = kernel
        return kernel

    return compiled


@contextmanager
def pretended() -> Iterator[Clock]:
    """Replace kernels by stubs in the `with` block, so that launches accept CPU tensors and need no GPU.

    Apart from the stubs, a launch runs the same host code as on a GPU with the compute capability `CAPABILITY`.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from srm_kernels import devices

    target = devices.LaunchDevice(CAPABILITY, 227 * 1024)

    def device() -> devices.LaunchDevice:  # a mock would cost 30 µs per call
        return target

    clock, before = Clock(), driver._active
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(JITFunction, "_do_compile", _stub(clock)))
        enter(mock.patch.object(JITFunction, "run", clock.watch("triton", JITFunction.run)))
        for owner, name in LIBRARY:
            enter(mock.patch.object(owner, name, clock.watch("library", getattr(owner, name))))
        enter(mock.patch.object(devices, "cpu_launch_device", device))
        stack.callback(setattr, driver, "_active", before)
        driver.set_active(_Driver())  # type: ignore[arg-type]
        yield clock


def passes(*, dyt: bool, training: bool, dtype: torch.dtype) -> Call:
    """Return a function that runs one pass of the neck: a training step if `training`, otherwise a forward pass.

    The neck has the default links. The forward pass is in evaluation mode. The training step has no optimiser.
    """
    module, maps = forward_of(dyt=dyt, side=64, batch=1)
    module, maps = module.to(dtype).train(training), [m.to(dtype).requires_grad_(training) for m in maps]

    def forward() -> object:
        with torch.no_grad():
            return module(maps)

    def step() -> None:
        out = module(maps)
        (out.fused.sum() + sum(out.losses.values())).backward()

    return step if training else forward


def measured(call: Call, clock: Clock, repeats: int) -> dict[str, Any]:
    """Return the median CPU time of a call in µs, in total and by part, and the least total time."""
    for _ in range(3):
        call()
    rows = []
    for _ in range(repeats):
        clock.spent.clear()
        start = time.thread_time_ns()
        call()
        total = time.thread_time_ns() - start
        triton, library = clock.spent["triton"], clock.spent["library"]
        rows.append((total, triton, library, total - triton - library))
    names = ("total_us", "triton_us", "library_us", "package_us")
    medians = (statistics.median(column) / 1000 for column in zip(*rows, strict=True))
    found = {name: round(value, 1) for name, value in zip(names, medians, strict=True)}
    return found | {"least_us": round(min(rows)[0] / 1000, 1), "repeats": repeats}


def calibration() -> dict[str, float]:
    """Return the CPU time in µs of a Python call and of an allocation, to compare the speed of machines."""

    def least(call: Call, count: int = 2000) -> float:
        found = []
        for _ in range(9):
            start = time.thread_time_ns()
            for _ in range(count):
                call()
            found.append((time.thread_time_ns() - start) / count / 1000)
        return round(min(found), 3)

    return {"python_call_us": least(lambda: None), "empty_us": least(lambda: torch.empty(1))}


def counted(call: Call) -> dict[str, int]:
    """Count the kernel launches of a pass, and how often the pass calls operators of this package.

    Launches are counted in three groups: (1) the package's own kernels; (2) matrix products and convolutions
    of libraries; (3) all other launches. The method is that of `bench.launches`, but the convolutions of the
    gate are not a separate group: they are counted in group 2. For a training step, the launches of the
    backward pass are included. The backward pass of a convolution counts as one launch, although it needs two
    or more launches on a GPU.
    """
    found = count_launches(call)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return {
        "launches": found.total,
        "own": found.kernels.total(),
        "products": found.products.total(),
        "others": found.others.total(),
        "operators": sum(event.name.startswith("srm::") for event in profiled.events()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print and write four rows: forward pass and training step, each with DyT and without."""
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton reads it when it is imported
        raise SystemExit("bench.overhead binds real launches; expected TRITON_INTERPRET to be unset")
    options = _options(arguments)
    torch.set_num_threads(1)
    recorder = Recorder(options.out, "overhead", "cpu", options.note)
    known = calibration()
    print(f"a Python call {known['python_call_us']} µs, an allocation {known['empty_us']} µs")
    with pretended() as clock:
        for training in (False, True):
            for dyt in (True, False):
                call = passes(dyt=dyt, training=training, dtype=DTYPES[options.dtype])
                clock.mark = False
                times = measured(call, clock, options.repeats or REPEATS[training])
                clock.mark = True
                about = {"pass": NAMES[training], "dyt": dyt, "dtype": options.dtype}
                print(line(recorder.write(about | counted(call) | times | known)))


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of text; `!` marks a missed target of a forward pass."""
    missed = row["pass"] == "forward" and (
        row["launches"] - GATE_CONVOLUTIONS > MOST_LAUNCHES or row["total_us"] > MOST_MICROSECONDS
    )
    return (
        f"{row['pass']}, DyT {'on' if row['dyt'] else 'off'}, {row['dtype']}: {row['launches']} launches "
        f"({row['own']} own kernels, {row['products']} products, {row['others']} others), "
        f"{row['operators']} operators; {row['total_us']} µs "
        f"(Triton {row['triton_us']}, library {row['library_us']}, package {row['package_us']}; "
        f"least {row['least_us']}){' !' if missed else ''}"
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    made = parser("overhead", __doc__)
    made.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    made.add_argument("--repeats", type=int, help="measured passes (default: 200 forward, 50 training)")
    made.add_argument("--note", help="keep this text in every row")
    made.add_argument("--out", default=str(RESULTS), help="folder of results (default: bench/results)")
    return made.parse_args(arguments)


if __name__ == "__main__":
    main()
