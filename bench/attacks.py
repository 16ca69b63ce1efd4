"""Images × steps per second of each attack, and its overhead over bare forward and backward passes.

`python -m bench.attacks --necks srm quadratic --backends triton reference`. Each attack is timed in turn with the bare
passes that it needs (model and gradient in the images, the same batch, no weight gradients). The overhead is its
least time over their least, and beside it, in the rows of `--out`, the median of the ratios to the two bare runs
around each attack. Rates are medians by the wall clock, the device's work included. Overheads are by the wall clock
on a GPU, and on a CPU by the processor time of the process, which other processes disturb less. What an attack does
once, such as drawing its start, is a share of all its steps: the default is half the article's 40 steps, and one
restart of 5. On a CPU memory is kept, as `srm-iqa attack` keeps it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import record
from srm_model import SRMConfig, build_model
from srm_model.attacks import MSE, Drift, PairInversion, apgd, fgsm, pgd, square
from srm_model.cli.runs import keep_memory

LIMITS = {"cpu": 0.10, "cuda": 0.05}  # of PGD's overhead
OBJECTIVES = (MSE(), Drift(), PairInversion())
EPS = {"linf": 1 / 255, "l2": 1.0}


class Plan(NamedTuple):
    """An attack, and the passes that it cannot do without."""

    attack: Callable[[nn.Module], object]
    forward: int
    backward: int
    units: int  # steps or queries


def plans(images: Tensor, mos: Tensor, steps: int) -> dict[str, Plan]:
    """Every attack by name: method, objective, norm."""
    found = {
        "fgsm mse linf": Plan(lambda model: fgsm(model, images, mos, MSE(), eps=EPS["linf"]), 0, 1, 1),
        "square mse linf": Plan(
            lambda model: square(model, images, mos, MSE(), eps=EPS["linf"], queries=steps), steps, 0, steps
        ),
    }
    for method in (pgd, apgd):
        for norm, eps in EPS.items():
            for objective in OBJECTIVES if method is pgd else OBJECTIVES[:1]:

                def attack(
                    model: nn.Module,
                    method: Any = method,
                    norm: str = norm,
                    eps: float = eps,
                    on: Any = objective,
                ) -> object:
                    return method(model, images, mos, on, norm=norm, eps=eps, steps=steps, restarts=1)

                forward = 1 + getattr(objective, "uses_clean_scores", True)  # the last iterate; the images
                found[f"{method.__name__} {objective.name} {norm}"] = Plan(attack, forward, steps, steps)
    return found


def seconds(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """One call by the wall clock, the device's work included, and by the clock that overheads are taken from."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin, worked = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, worked = time.perf_counter() - begin, time.process_time() - worked
    return wall, wall if device.type == "cuda" else worked


def bare(model: nn.Module, images: Tensor, *, forward: int, backward: int) -> Callable[[], None]:
    """So many forward passes, and so many with a gradient in the images."""

    def run() -> None:
        for _ in range(backward):
            x = images.detach().requires_grad_()
            torch.autograd.grad(model(x).sum(), x)
        with torch.no_grad():
            for _ in range(forward):
                model(images)

    return run


def measure(plan: Plan, model: nn.Module, images: Tensor, repeats: int) -> dict[str, float]:
    """Bare passes and attack in turn, each once before it counts."""
    passes = bare(model, images, forward=plan.forward, backward=plan.backward)
    device = images.device
    seconds(lambda: plan.attack(model), device)
    seconds(passes, device)
    plain, taken = [seconds(passes, device)], []
    for _ in range(repeats):
        taken.append(seconds(lambda: plan.attack(model), device))
        plain.append(seconds(passes, device))
    work = len(images) * plan.units
    around = [(before[1] + after[1]) / 2 for before, after in pairwise(plain)]
    return {
        "images_steps_per_second": round(work / statistics.median(wall for wall, _ in taken), 2),
        "bare": round(work / statistics.median(wall for wall, _ in plain), 2),
        "overhead": round(min(own for _, own in taken) / min(own for _, own in plain) - 1, 4),
        "overhead_paired": round(
            statistics.median(own / by for (_, own), by in zip(taken, around, strict=True)) - 1, 4
        ),
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
                        if not options.attacks or any(word in name for word in options.attacks):
                            found = measure(plan, model, images, options.repeats)
                            yield {**subject, "attack": name, **found}


def main(arguments: list[str] | None = None) -> None:
    """Print a line per row; PGD over its limit is marked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbones", nargs="+", default=["test_convnext"])
    parser.add_argument(
        "--necks", nargs="+", default=["srm", "quadratic"], choices=("srm", "quadratic", "none")
    )
    parser.add_argument("--attacks", nargs="+", metavar="WORD", help="only those whose name has one of these")
    parser.add_argument(
        "--backends", nargs="+", default=[None], help="of the srm neck's operators (default: the fastest)"
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
    if options.out:
        record.write_lines(options.out, [header, *lines])


if __name__ == "__main__":
    main()
