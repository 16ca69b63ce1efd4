"""Images × steps per second of each attack, and its overhead over bare forward and backward passes.

`python -m bench.attacks --necks srm quadratic`. Each attack is timed between two runs of the bare passes that it
needs (model and gradient in the images, the same batch, no weight gradients), and the overhead is its least time over
their least. Rates are medians by the wall clock, the device's work included. The overhead is by the wall clock on a
GPU, and on a CPU by the processor time of the process, which other processes disturb less. What an attack does once,
such as drawing its start, is a share of all its steps: the default is half the article's 40 steps, and one restart
of 5. On a CPU memory is kept, as `srm-iqa attack` keeps it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from srm_model import SRMConfig, build_model
from srm_model.attacks import MSE, PairInversion, apgd, fgsm, pgd, square
from srm_model.cli.runs import keep_memory

LIMITS = {"cpu": 0.10, "cuda": 0.05}  # of PGD's overhead


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


def main() -> None:
    """Print a line per neck and attack; PGD over its limit is marked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", default="test_convnext")
    parser.add_argument(
        "--necks", nargs="+", default=["srm", "quadratic"], choices=("srm", "quadratic", "none")
    )
    parser.add_argument("--attacks", nargs="+", metavar="WORD", help="only those whose name has one of these")
    parser.add_argument("--backend", help="of the operators (default: the fastest that can run)")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=NUMBER", help="a field of SRMConfig"
    )
    options = parser.parse_args()
    device, steps = torch.device(options.device), options.steps
    if device.type == "cpu":
        keep_memory()
    changes = {key: int(value) for key, value in (pair.split("=") for pair in options.set)}
    config = SRMConfig(image_size=options.image_size, backend=options.backend, **changes)
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch, 3, config.image_size, config.image_size, generator=draw).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    mos = torch.linspace(0, 1, options.batch)
    once = {"eps": 1 / 255, "steps": steps, "restarts": 1}
    plans: dict[
        str, tuple[Callable[[nn.Module], object], int, int, int]
    ] = {  # call, forward, backward, steps
        "fgsm mse": (lambda model: fgsm(model, images, mos, MSE(), eps=1 / 255), 0, 1, 1),
        "pgd mse linf": (lambda model: pgd(model, images, mos, MSE(), **once), 1, steps, steps),
        "pgd mse l2": (lambda model: pgd(model, images, mos, MSE(), norm="l2", **once), 1, steps, steps),
        "pgd pairs linf": (lambda model: pgd(model, images, mos, PairInversion(), **once), 1, steps, steps),
        "apgd mse linf": (lambda model: apgd(model, images, mos, MSE(), **once), 1, steps, steps),
        "apgd mse l2": (lambda model: apgd(model, images, mos, MSE(), norm="l2", **once), 1, steps, steps),
        "square mse linf": (
            lambda model: square(model, images, mos, MSE(), eps=1 / 255, queries=3 * steps),
            3 * steps,
            0,
            3 * steps,
        ),
    }
    processor = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(
        f"torch {torch.__version__}, {processor}, {torch.get_num_threads()} threads, {options.backbone}, "
        f"{config.image_size}², batch {options.batch}, {steps} steps, fp32, backend {options.backend or 'default'}"
    )
    print(f"{'neck':10} {'attack':16} {'images×steps/s':>15} {'bare':>9} {'overhead':>9}")
    for neck in options.necks:
        torch.manual_seed(0)
        model = build_model(options.backbone, neck=neck, config=config).to(device)
        model.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
        model.calibrate(images)
        for name, (attack, forward, backward, units) in plans.items():
            if options.attacks and not any(word in name for word in options.attacks):
                continue
            passes = bare(model, images, forward=forward, backward=backward)
            times: list[tuple[float, float]] = []
            worked: dict[str, list[float]] = {"attack": [], "bare": []}
            for repeat in range(-1, options.repeats):
                before = seconds(passes, device)
                taken = seconds(lambda call=attack, on=model: call(on), device)  # type: ignore[misc]
                after = seconds(passes, device)
                if repeat >= 0:
                    times.append((taken[0], (before[0] + after[0]) / 2))
                    worked["attack"].append(taken[1])
                    worked["bare"] += [before[1], after[1]]
            rate, plain = (
                options.batch * units / statistics.median(column) for column in zip(*times, strict=True)
            )
            overhead = min(worked["attack"]) / min(worked["bare"]) - 1
            over = name.startswith("pgd") and overhead > LIMITS[device.type]
            mark = "  over the limit" if over else ""
            print(f"{neck:10} {name:16} {rate:15.1f} {plain:9.1f} {overhead:9.1%}{mark}", flush=True)


if __name__ == "__main__":
    main()
