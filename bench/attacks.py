"""Measure the throughput (images × steps per second) and the overhead of each attack: `python -m bench.attacks`.

Bare passes are the forward and backward passes that an attack needs, without the other work of the attack.
The attack and its bare passes are timed in alternation on the same batch. No gradients of the weights are
computed. The throughput is computed from the median time of a call. The time of a call is CPU time on a CPU
with one thread, and wall-clock time on a CPU with several threads or on a GPU. On a GPU, the clock is read
when the GPU has finished.

The overhead is the shortest time of the attack divided by the shortest time of its bare passes, minus 1. On a GPU, the
shortest time is the wall-clock time of the fastest call. On a CPU, other processes disturb some steps of every call,
even of the fastest one. Therefore the CPU time of each step is measured separately. For each step, the shortest time
over all calls is taken, and the sum of these times is used as the shortest time of a call. An attack also does some
work only once per call, such as drawing the random start, so the overhead is smaller with more steps.

In this benchmark, an attack has 1 restart and, by default, 20 steps; the article uses 5 restarts and 40 steps. On a
CPU, glibc is set to keep freed memory between calls, as in `srm-iqa attack`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.harness import DEVICE, machine_with_load, parser, write_lines
from srm_kernels.checks import current_name
from srm_model import SRMConfig, build_model
from srm_model.attacks import MSE, Drift, PairInversion, apgd, fgsm, pgd, square
from srm_model.necks import NECKS
from srm_model.runs import keep_memory

LIMITS = {"cpu": 0.10, "cuda": 0.05}  # largest accepted overhead of PGD
OBJECTIVES = (MSE(), Drift(), PairInversion())
EPS = {"linf": 1 / 255, "l2": 1.0}
Tick = Callable[[], object]  # called after each step


class Plan(NamedTuple):
    """Function that runs an attack, and the number of passes that the attack needs.

    Attributes:
        attack: Function (model, tick) → result. The function calls `tick()` after each step, except in FGSM: its only
            step is not followed by `tick()`.
        forward: Number of forward passes without gradients.
        backward: Number of pairs of a forward and a backward pass. The backward pass computes the gradient of
            the scores with respect to the images.
        units: Number of steps of the attack. For the square search, it is the number of queries.
    """

    attack: Callable[[nn.Module, Tick], object]
    forward: int
    backward: int
    units: int


def plans(images: Tensor, mos: Tensor, steps: int) -> dict[str, Plan]:
    """Return a dictionary from the name of each attack, such as "pgd mse linf", to its plan.

    Args:
        images: Images (B, 3, h, w) in [0, 1].
        mos: Opinion scores (B,).
        steps: Number of steps of each attack, except of FGSM, which has one step. For the square search, `steps` is
            the number of queries.
    """

    def stepped(call: Callable[..., object], objective: Any) -> Callable[[nn.Module, Tick], object]:
        return lambda model, tick: call(model, images, mos, objective, on_step=tick)

    eps = EPS["linf"]
    queried = stepped(partial(square, queries=steps, eps=eps), MSE())
    found = {
        "fgsm mse linf": Plan(lambda model, _: fgsm(model, images, mos, MSE(), eps=eps), 0, 1, 1),
        "square mse linf": Plan(queried, steps, 0, steps),
    }
    for method in (pgd, apgd):
        for norm, eps in EPS.items():
            call = partial(method, norm=norm, eps=eps, steps=steps, restarts=1)
            for objective in OBJECTIVES if method is pgd else OBJECTIVES[:1]:
                forward = 1 + getattr(objective, "uses_clean_scores", True)  # last iterate; clean scores
                plan = Plan(stepped(call, objective), forward, steps, steps)
                found[f"{method.__name__} {objective.name} {norm}"] = plan
    return found


def bare(model: nn.Module, images: Tensor, *, forward: int, backward: int) -> Callable[[Tick], None]:
    """Return a function that runs only the bare passes of an attack: `forward` and `backward` passes (see `Plan`)."""

    def run(tick: Tick) -> None:
        for _ in range(backward):
            x = images.detach().requires_grad_()
            torch.autograd.grad(model(x).sum(), x)
            tick()
        with torch.no_grad():
            for _ in range(forward):
                model(images)
                tick()

    return run


class Timed(NamedTuple):
    """Time of one call in seconds: `whole` for the throughput, and `parts` for the overhead.

    The measured function calls `tick()` after each step. `parts` has the time from the start to the first `tick()`, the
    times between successive ticks, and the time from the last tick to the end. On a GPU, `parts` has only `whole`.
    """

    whole: float
    parts: list[float]


def timed(call: Callable[[Tick], object], device: torch.device) -> Timed:
    """Time a call and, on a CPU, each of its steps.

    On a GPU, `parts` contains only the time of the whole call, because timing each step would synchronise the GPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call(lambda: None)
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
        return Timed(wall, [wall])
    begin, ticks = time.perf_counter(), [time.process_time()]
    call(lambda: ticks.append(time.process_time()))
    ticks.append(time.process_time())
    wall, busy = time.perf_counter() - begin, ticks[-1] - ticks[0]
    parts = [after - before for before, after in pairwise(ticks)]
    return Timed(busy if torch.get_num_threads() == 1 else wall, parts)


def least(calls: list[Timed]) -> float:
    """Find the shortest time of each part over all calls; return the sum of these times."""
    return sum(map(min, zip(*(call.parts for call in calls), strict=True)))


def measure(plan: Plan, model: nn.Module, images: Tensor, repeats: int) -> dict[str, float]:
    """Time an attack and its bare passes in alternation, `repeats` times after one unmeasured round.

    Bare passes are the forward and backward passes of the attack without its other work.
    """
    passes = bare(model, images, forward=plan.forward, backward=plan.backward)
    plain, taken = [], []
    for _ in range(1 + repeats):
        plain.append(timed(passes, images.device))
        taken.append(timed(partial(plan.attack, model), images.device))
    work = len(images) * plan.units
    return {
        "images_steps_per_second": round(work / statistics.median(call.whole for call in taken[1:]), 2),
        "bare": round(work / statistics.median(call.whole for call in plain[1:]), 2),
        "overhead": round(least(taken[1:]) / least(plain[1:]) - 1, 4),
    }


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each combination of image size, backbone, neck, backend and attack."""
    device = torch.device(options.device)
    changes = {key: int(value) for key, value in (pair.split("=") for pair in options.set)}
    for side in options.image_size:
        draw = torch.Generator().manual_seed(0)
        images = torch.rand(options.batch, 3, side, side, generator=draw).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        chosen = plans(images, torch.linspace(0, 1, options.batch), options.steps)
        for backbone in options.backbones:
            for neck in options.necks:
                for backend in options.backends if neck == "srm" else [None]:
                    config = SRMConfig(image_size=side, backend=backend, **changes)
                    torch.manual_seed(0)
                    model = build_model(backbone, neck=neck, config=config).to(device)
                    model.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
                    model.calibrate(images)
                    subject = {"backbone": backbone, "image_size": side, "neck": neck, "backend": backend}
                    for name, plan in chosen.items():
                        if not options.attacks or any(f" {word}" in f" {name}" for word in options.attacks):
                            found = measure(plan, model, images, options.repeats)
                            yield {**subject, "attack": name, **found}


def main(arguments: list[str] | None = None) -> None:
    """Print a line per row; mark each row of a PGD attack whose overhead exceeds the limit in `LIMITS`."""
    made = parser("attacks", __doc__)
    made.add_argument("--device", default=DEVICE)
    made.add_argument("--backbones", nargs="+", default=["test_convnext"])
    made.add_argument("--necks", nargs="+", default=["srm", "quadratic"], choices=tuple(NECKS))
    made.add_argument(
        "--attacks",
        nargs="+",
        metavar="WORD",
        help="measure attacks whose name has a word that starts like this",
    )
    made.add_argument(
        "--backends", type=current_name, nargs="+", default=[None],
        help="backends of the srm neck's operators (default: the fastest)",
    )  # fmt: skip
    made.add_argument("--image-size", type=int, nargs="+", default=[256])
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=NUMBER", help="set a field of SRMConfig"
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines to FILE, the machine first")
    options = made.parse_args(arguments)
    kind = torch.device(options.device).type
    if kind == "cpu":
        keep_memory()
    header = machine_with_load(options.device) | {"benchmark": "attacks", "dtype": "float32"}
    header |= {name: getattr(options, name) for name in ("batch", "steps", "repeats")}
    print(
        f"torch {header['torch']}, {header['device']}, {header['threads']} threads, batch {options.batch}, "
        f"{options.steps} steps, fp32"
    )
    print(f"{'backbone':24} {'side':>4} {'neck':10} {'backend':10} {'attack':24}", end=" ")
    print(f"{'images×steps/s':>15} {'overhead':>9}")
    lines = [header]
    for row in rows(options):
        over = row["attack"].startswith("pgd") and row["overhead"] > LIMITS[kind]
        print(
            f"{row['backbone']:24} {row['image_size']:4} {row['neck']:10} {row['backend'] or 'fastest':10} "
            f"{row['attack']:24} {row['images_steps_per_second']:15.1f} {row['overhead']:9.1%}"
            f"{'  over the limit' if over else ''}",
            flush=True,
        )
        lines.append(row)
        write_lines(options.out, lines)  # after each row, so that a run that is stopped keeps its rows


if __name__ == "__main__":
    main()
