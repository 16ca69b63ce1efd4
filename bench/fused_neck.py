"""The fused neck against the quadratic one and against its own parts unfused, as ratios: `python -m bench.fused_neck`.

Necks alone, fed with maps of the sizes that a backbone gives: measured in turn within one run, forward in evaluation
mode, or forward and backward in training mode. `plain` is the Nyström neck in plain PyTorch, `unfused` the same of
kernels one by one, `fused` that of `pooled_links`. Memory is the peak above the maps; launches are the profiler's. The
floor is the larger of the maps' bytes read once and the neck's products at the device's rates, which a large copy and a
large product measure first, or `--bandwidth` and `--rate` give. On a CPU the necks run in plain PyTorch: `plain` and
`fused` are then the same, and `unfused` calls its links one by one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import (
    DTYPES,
    Recorder,
    effort_of,
    is_out_of_memory,
    machine,
    measure_together,
    parser,
    peak,
    sentence,
)
from srm_model import SRMConfig, SRMNeck
from srm_model.graphs import Graphed
from srm_model.profiling.ceilings import ceilings
from srm_model.profiling.sweep import launches

WIDTHS = {
    "pvt_v2_b2": (64, 128, 320, 512),
    "swin_tiny": (96, 192, 384, 768),
    "convnext_tiny": (96, 192, 384, 768),
    "mobilenetv3_large_100": (24, 40, 112, 960),
}
LAST_LEVELS = (4, 8, 16, 32)  # strides
ASKED = {  # least ratio of the quadratic neck's time, most of its memory, by direction and image side
    ("forward", 512): (3, 1 / 4),
    ("forward", 1024): (6, 1 / 4),
    ("both", 512): (2, 1 / 3),
    ("both", 1024): (4, 1 / 3),
}
ASKED_FORWARD = {True: (3, 2), False: (5, 3)}  # least ratios of the eager and compiled one's time, by DyT
MOST_FLOORS = 3


def maps_of(backbone: str, side: int, batch: int, options: argparse.Namespace) -> list[Tensor]:
    """The pyramid of an image, channels-last where the options ask for it."""
    draw = torch.Generator(options.device).manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    maps = []
    for width, stride in zip(WIDTHS[backbone], LAST_LEVELS, strict=True):
        grid = max(side // stride, 1)
        m = torch.randn(batch, width, grid, grid, generator=draw, device=options.device)
        maps.append(m.to(DTYPES[options.dtype]).contiguous(memory_format=layout))
    return maps


def neck_of(
    backbone: str, options: argparse.Namespace, *, backend: str | None, attention: str = "nystrom"
) -> SRMNeck:
    """A neck calibrated on other maps of the same statistics."""
    torch.manual_seed(0)
    config = SRMConfig(
        channels=options.channels, heads=options.heads, rank=options.rank, dyt=not options.no_dyt,
        backend=backend,
    )  # fmt: skip
    plain = SRMNeck(WIDTHS[backbone], config.replace(backend="reference"), attention=attention)
    plain = plain.to(options.device)
    with torch.no_grad():
        plain.calibrate([m.float() for m in maps_of(backbone, 64, 2, options)])
    neck = SRMNeck(WIDTHS[backbone], config, attention=attention).to(options.device, DTYPES[options.dtype])
    neck.load_state_dict(plain.state_dict())
    return neck.train(options.direction == "both")


def call_of(neck: Any, maps: list[Tensor], direction: str) -> Callable[[], object]:
    """Forward without gradients, or forward and backward down to the maps."""

    def forward() -> object:
        with torch.no_grad():
            return neck(maps)

    def both() -> object:
        leaves = [m.detach().requires_grad_() for m in maps]
        out = neck(leaves)
        (out.fused.float().square().mean() + sum(out.losses.values())).backward()
        for parameter in neck.parameters():
            parameter.grad = None
        return out

    return forward if direction == "forward" else both


def contestants(
    backbone: str, maps: list[Tensor], options: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """By name; what has no compiler or no kernels here is left out."""
    backend = "triton" if options.device == "cuda" else None
    fused = neck_of(backbone, options, backend=backend)
    unfused = neck_of(backbone, options, backend=backend)
    unfused.pools = lambda pyramid: False  # type: ignore[method-assign]
    plain = neck_of(backbone, options, backend=None)
    quadratic = neck_of(backbone, options, backend=None, attention="full")
    calls = {
        "quadratic": call_of(quadratic, maps, options.direction),
        "plain": call_of(plain, maps, options.direction),
        "unfused": call_of(unfused, maps, options.direction),
        "fused": call_of(fused, maps, options.direction),
    }
    if options.device == "cuda":
        torch.compiler.reset()
        calls["quadratic, compiled"] = call_of(torch.compile(quadratic), maps, options.direction)
        if options.direction == "forward":
            graphed = Graphed(fused, maps)
            calls["fused, one graph"] = lambda: graphed(maps)
    return calls


def take_rates(options: argparse.Namespace) -> None:
    """Measure what was not given of the device's rates."""
    if options.bandwidth and options.rate:
        return
    device = torch.device(options.device)
    found = ceilings(device, DTYPES[options.dtype], small=device.type == "cpu")
    options.bandwidth = options.bandwidth or found.bandwidth / 1e9
    options.rate = options.rate or 2 * found.matrix_rate / 1e12


def floor_of(neck: SRMNeck, maps: list[Tensor], options: argparse.Namespace) -> float | None:
    """Milliseconds that reading the maps once, or the products of a forward pass, take at the card's rates."""
    if not options.bandwidth or not options.rate:
        return None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        neck(maps)
    read = sum(m.numel() * m.element_size() for m in maps) / (options.bandwidth * 1e9)
    return max(read, counter.get_total_flops() / (options.rate * 1e12)) * 1e3


def compare(backbone: str, side: int, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each neck: time, memory, launches and their ratios to the quadratic neck's."""
    device = torch.device(options.device)
    maps = maps_of(backbone, side, batch, options)
    calls = contestants(backbone, maps, options)
    times = measure_together(calls, device, effort_of(options))
    memory = {name: peak(call, device).above for name, call in calls.items()}
    floor = floor_of(neck_of(backbone, options, backend="reference").eval(), maps, options)
    rows = []
    for name, call in calls.items():
        row: dict[str, Any] = {
            "benchmark": "fused_neck", "neck": name, "backbone": backbone, "side": side, "batch": batch,
            "direction": options.direction, "dtype": options.dtype, "dyt": not options.no_dyt,
            "rank": options.rank, "channels_last": options.channels_last, "ms": times[name].to_dict(),
            "memory_above": memory[name], "launches": launches(call, device),
            "faster_than_quadratic": times["quadratic"].p50 / times[name].p50,
            "memory_of_quadratic": memory[name] / max(memory["quadratic"], 1),
        }  # fmt: skip
        if "quadratic, compiled" in times:
            row["faster_than_compiled"] = times["quadratic, compiled"].p50 / times[name].p50
        if floor is not None and options.direction == "forward":
            row["times_the_floor"] = times[name].p50 / floor
        rows.append(row)
    return rows


def launches_by_interpreter() -> str:
    """What `bench.launches` says, in a process of its own, or why it cannot."""
    if find_spec("triton") is None:
        return "an unknown number of launches: Triton is not installed\n"
    done = subprocess.run(
        [sys.executable, "-m", "bench.launches"], capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else f"an unknown number of launches: {done.stderr[-500:]}\n"


def main() -> None:
    """A line for each neck at each shape; what is asked of the fused one stands beside it."""
    made = parser(__doc__)
    made.add_argument("--backbones", nargs="*", choices=tuple(WIDTHS), default=list(WIDTHS))
    made.add_argument("--sides", type=int, nargs="*", default=[512, 1024])
    made.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    made.add_argument("--direction", choices=("forward", "both"), default="forward")
    made.add_argument("--channels", type=int, default=256)
    made.add_argument("--heads", type=int, default=8)
    made.add_argument("--rank", type=int, default=64)
    made.add_argument("--no-dyt", action="store_true")
    made.add_argument("--channels-last", action="store_true")
    made.add_argument("--bandwidth", type=float, help="of the card's memory, GB/s; measured if not given")
    made.add_argument("--rate", type=float, help="of its products in this dtype, TFLOP/s; likewise")
    options = made.parse_args()
    recorder = Recorder(options.out, "fused_neck", torch.device(options.device))
    print(sentence(machine(torch.device(options.device))))
    take_rates(options)
    print(f"floors at {options.bandwidth:.4g} GB/s and {options.rate:.4g} TFLOP/s in {options.dtype}")
    if options.device == "cpu":
        print("on a CPU plain and fused are the same neck in plain PyTorch; by kernels a forward pass takes")
        print(launches_by_interpreter(), end="", flush=True)
    titles = ("ms", 9), ("faster", 7), ("compiled", 8), ("memory", 7), ("launches", 8), ("floors", 6)
    print(f"{'backbone':22} {'side':>5} {'batch':>5} {'neck':20}", *(f"{t:>{width}}" for t, width in titles))
    for backbone in options.backbones:
        for side in options.sides:
            for batch in options.batches:
                try:
                    rows = compare(backbone, side, batch, options)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    print(f"{backbone:22} {side:5} {batch:5} out of memory")
                    continue
                for row in map(recorder.write, rows):
                    print(line_of(row), flush=True)


def line_of(row: dict[str, Any]) -> str:
    """One row as it is printed; `!` where a fused neck misses what is asked of it."""
    floors, compiled = row.get("times_the_floor"), row.get("faster_than_compiled")
    missed = " !" if row["neck"].startswith("fused") and row["batch"] == 8 and misses(row) else ""
    return (
        f"{row['backbone']:22} {row['side']:5} {row['batch']:5} {row['neck']:20} {row['ms']['p50']:9.3f} "
        f"{row['faster_than_quadratic']:6.2f}x {'-' if compiled is None else f'{compiled:.2f}x':>8} "
        f"{row['memory_of_quadratic']:7.2f} {row['launches'] or '-':>8} "
        f"{'-' if floors is None else f'{floors:.1f}':>6}{missed}"
    )


def misses(row: dict[str, Any]) -> bool:
    """Whether a row, in the sides that have an aim, is slower or larger than asked; launches are a test's."""
    asked = ASKED.get((row["direction"], row["side"]))
    if asked is None:
        return False
    (speed, share), of_compiled = asked, 0
    if row["direction"] == "forward":
        of_eager, of_compiled = ASKED_FORWARD[row["dyt"]]
        speed = max(speed, of_eager)
    return (
        row["faster_than_quadratic"] < speed
        or row.get("faster_than_compiled", of_compiled) < of_compiled
        or row["memory_of_quadratic"] > share
        or row.get("times_the_floor", MOST_FLOORS) > MOST_FLOORS
    )


if __name__ == "__main__":
    main()
