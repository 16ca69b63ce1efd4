"""Images × steps per second of each attack, and its overhead over bare forward and backward passes.

`python -m bench.attacks --necks srm quadratic --backends triton reference`. Each attack is timed in turn with the bare
passes that it needs (model and gradient in the images, the same batch, no weight gradients). Rates are medians by the
wall clock, the device's work included, or with one thread on a CPU by the time that the process had a processor, which
others do not lengthen. The overhead is the attack's least time over that of the bare passes: on a GPU
by the wall clock; on a CPU by the processor time of the process, step by step, the least of each step over the repeats
summed, because a whole attack is never left alone by other processes. What an attack does once, such as drawing its
start, is in it, as a share of all its steps: the default is half the article's 40 steps, and one restart of 5. On a
CPU memory is kept, as `srm-iqa attack` keeps it.
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

from bench import record
from srm_kernels.checks import current_name
from srm_model import SRMConfig, build_model
from srm_model.attacks import MSE, Drift, PairInversion, apgd, fgsm, pgd, square
from srm_model.necks import NECKS
from srm_model.runs import keep_memory

LIMITS = {"cpu": 0.10, "cuda": 0.05}  # of PGD's overhead
OBJECTIVES = (MSE(), Drift(), PairInversion())
EPS = {"linf": 1 / 255, "l2": 1.0}


Tick = Callable[[], object]


class Plan(NamedTuple):
    """An attack, and the passes that it cannot do without."""

    attack: Callable[[nn.Module, Tick], object]
    forward: int
    backward: int
    units: int  # steps or queries


def plans(images: Tensor, mos: Tensor, steps: int) -> dict[str, Plan]:
    """Every attack by name: method, objective, norm."""
    linf = {"eps": EPS["linf"]}
    found = {
        "fgsm mse linf": Plan(lambda model, _: fgsm(model, images, mos, MSE(), **linf), 0, 1, 1),
        "square mse linf": Plan(
            lambda model, tick: square(model, images, mos, MSE(), queries=steps, on_step=tick, **linf),
            steps,
            0,
            steps,
        ),
    }
    settings = {"steps": steps, "restarts": 1}
    for method in (pgd, apgd):
        for norm, eps in EPS.items():
            for objective in OBJECTIVES if method is pgd else OBJECTIVES[:1]:
                call = partial(method, norm=norm, eps=eps, **settings)

                def attack(model: nn.Module, tick: Tick, call: Any = call, on: Any = objective) -> object:
                    return call(model, images, mos, on, on_step=tick)

                forward = 1 + getattr(objective, "uses_clean_scores", True)  # the last iterate; the images
                found[f"{method.__name__} {objective.name} {norm}"] = Plan(attack, forward, steps, steps)
    return found


def bare(model: nn.Module, images: Tensor, *, forward: int, backward: int) -> Callable[[Tick], None]:
    """So many forward passes, and so many with a gradient in the images."""

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
    """One call: the seconds of its rate, and those that overheads are taken from, from tick to tick."""

    whole: float
    parts: list[float]


def timed(call: Callable[[Tick], object], device: torch.device) -> Timed:
    """A GPU is not asked at every tick, which would make it wait: its call has one part."""
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
    """The sum over parts of each one's least time."""
    return sum(map(min, zip(*(call.parts for call in calls), strict=True)))


def measure(plan: Plan, model: nn.Module, images: Tensor, repeats: int) -> dict[str, float]:
    """Bare passes and attack in turn, each once before it counts."""
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
    """A row per backbone, size, neck, backend and attack."""
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
    """Print a line per row; PGD over its limit is marked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbones", nargs="+", default=["test_convnext"])
    parser.add_argument("--necks", nargs="+", default=["srm", "quadratic"], choices=tuple(NECKS))
    parser.add_argument(
        "--attacks",
        nargs="+",
        metavar="WORD",
        help="only those whose name has one of these, from the start of a word",
    )
    parser.add_argument(
        "--backends",
        type=current_name,
        nargs="+",
        default=[None],
        help="of the srm neck's operators (default: the fastest)",
    )
    parser.add_argument("--image-size", type=int, nargs="+", default=[256])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=NUMBER", help="a field of SRMConfig"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON lines to write, the machine in the first"
    )
    options = parser.parse_args(arguments)
    kind = torch.device(options.device).type
    if kind == "cpu":
        keep_memory()
    header = {
        **record.machine(options.device),
        "benchmark": "attacks",
        "dtype": "float32",
        "batch": options.batch,
        "steps": options.steps,
        "repeats": options.repeats,
    }
    print(
        f"torch {header['torch']}, {header['device']}, {header['threads']} threads, batch {options.batch}, "
        f"{options.steps} steps, fp32"
    )
    print(
        f"{'backbone':24} {'side':>4} {'neck':10} {'backend':10} {'attack':24} {'images×steps/s':>15} {'overhead':>9}"
    )
    lines = []
    for row in rows(options):
        over = row["attack"].startswith("pgd") and row["overhead"] > LIMITS[kind]
        print(
            f"{row['backbone']:24} {row['image_size']:4} {row['neck']:10} {row['backend'] or 'fastest':10} "
            f"{row['attack']:24} {row['images_steps_per_second']:15.1f} {row['overhead']:9.1%}"
            f"{'  over the limit' if over else ''}",
            flush=True,
        )
        lines.append(row)
        if options.out:  # at once: what a limit of time cuts short keeps its rows
            record.write_lines(options.out, [header, *lines])


if __name__ == "__main__":
    main()
