"""Compare the fused neck with the quadratic neck and with the unfused neck: `python -m bench.fused_neck`.

The necks are measured without a backbone, on random maps of the sizes that a backbone produces. In one run,
the necks are called alternately. `--direction forward` times the forward pass in evaluation mode.
`--direction both` times forward and backward together in training mode. `plain` is the Nyström neck in plain
PyTorch, `unfused` calls the kernels one by one, and `fused` uses `pooled_links`. Memory is the peak memory
that a call allocates, without the maps and the parameters. On a GPU, the profiler counts the launches.

The floor is a lower bound of the forward time. It is the time to read the maps once at the device's memory bandwidth,
or the time to compute the neck's matrix products at the device's rate of matrix products, whichever is longer.
Bandwidth and rate are measured first, by a large copy and a large matrix product. `--bandwidth` and `--rate` replace
the measured values.

On a CPU, all necks use the default backend and no Triton kernels. `plain` and `fused` are then the same neck,
and `unfused` computes its links one by one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import DTYPES, Call, Recorder, effort_of, timing_parser
from srm_model import SRMConfig, SRMNeck
from srm_model.graphs import Graphed
from srm_model.profiling import measure_together
from srm_model.profiling.ceilings import ceilings
from srm_model.profiling.machines import sentence
from srm_model.profiling.memory import bytes_of, is_out_of_memory, peak
from srm_model.profiling.sweep import launches

WIDTHS = {
    "pvt_v2_b2": (64, 128, 320, 512),
    "swin_tiny": (96, 192, 384, 768),
    "convnext_tiny": (96, 192, 384, 768),
    "mobilenetv3_large_100": (24, 40, 112, 960),
}
STRIDES = (4, 8, 16, 32)
# (direction, image side): (least speedup over the quadratic neck, largest memory divided by that of the quadratic neck)
TARGETS = {
    ("forward", 512): (3, 1 / 4),
    ("forward", 1024): (6, 1 / 4),
    ("both", 512): (2, 1 / 3),
    ("both", 1024): (4, 1 / 3),
}
FORWARD_TARGETS = {
    True: (3, 2),
    False: (5, 3),
}  # whether DyT is on: (least speedup over the eager quadratic neck, over the compiled quadratic neck)
MOST_FLOORS = 3


def add_neck_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `neck_of` reads from the command line."""
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)


def maps_of(backbone: str, side: int, batch: int, options: argparse.Namespace) -> list[Tensor]:
    """Return random maps (B, C_i, h, w) of the shapes that a backbone produces from images of `side` pixels.

    Args:
        backbone: A name of `WIDTHS`.
        side: Image side in pixels.
        batch: B.
        options: Options with `device`, `dtype` and `channels_last`.
    """
    draw = torch.Generator(options.device).manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    maps = []
    for width, stride in zip(WIDTHS[backbone], STRIDES, strict=True):
        grid = max(side // stride, 1)
        m = torch.randn(batch, width, grid, grid, generator=draw, device=options.device)
        maps.append(m.to(DTYPES[options.dtype]).contiguous(memory_format=layout))
    return maps


def neck_of(
    backbone: str, options: argparse.Namespace, *, backend: str | None = None, attention: str = "nystrom"
) -> SRMNeck:
    """Build the neck to be timed, and calibrate it.

    The neck is calibrated on the maps that `maps_of` returns for two images of 64×64 pixels. The maps on which the neck
    is timed can have other sizes, but their elements have the same distribution.

    Args:
        backbone: A name of `WIDTHS`.
        options: Options with `device`, `dtype`, `direction`, `no_dyt`, `channels`, `heads`, `rank` and `channels_last`.
        backend: Backend of the operators; None takes the default.
        attention: "nystrom", or "full" for the quadratic neck.
    """
    torch.manual_seed(0)
    config = SRMConfig(
        channels=options.channels,
        heads=options.heads,
        rank=options.rank,
        landmarks="leverage",  # the article's
        dyt=not options.no_dyt,
        backend=backend,
    )
    plain = SRMNeck(WIDTHS[backbone], config.replace(backend="reference"), attention=attention)
    plain = plain.to(options.device)
    with torch.no_grad():
        plain.calibrate([m.float() for m in maps_of(backbone, 64, 2, options)])
    neck = SRMNeck(WIDTHS[backbone], config, attention=attention).to(options.device, DTYPES[options.dtype])
    neck.load_state_dict(plain.state_dict())
    return neck.train(options.direction == "both")


def call_of(neck: Any, maps: list[Tensor], direction: str) -> Call:
    """Return a function that runs the neck once.

    If `direction` is "forward", the returned function runs the forward pass without gradients. If `direction` is
    "both", it runs forward and backward, with gradients of the maps and of the parameters.
    """

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


def common_columns(
    benchmark: str, neck: str, backbone: str, side: int, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the columns of a row that describe what was measured."""
    return {
        "benchmark": benchmark, "neck": neck, "backbone": backbone, "side": side, "batch": batch,
        "direction": options.direction, "dtype": options.dtype, "dyt": not options.no_dyt, "rank": options.rank,
    }  # fmt: skip


def contestants(backbone: str, maps: list[Tensor], options: argparse.Namespace) -> dict[str, Call]:
    """Return a dictionary from names to functions that run the necks.

    The compiled quadratic neck is included only on a GPU. The CUDA graph of the fused neck is included only on a GPU,
    and only if the direction is "forward".
    """
    cuda = options.device == "cuda"
    fused, unfused = (neck_of(backbone, options, backend="triton" if cuda else None) for _ in range(2))
    unfused.pools = lambda pyramid: False  # type: ignore[method-assign]
    quadratic = neck_of(backbone, options, attention="full")
    necks = {
        "quadratic": quadratic,
        "plain": neck_of(backbone, options, backend="torch" if cuda else None),
        "unfused": unfused,
        "fused": fused,
    }
    calls = {name: call_of(neck, maps, options.direction) for name, neck in necks.items()}
    if cuda:
        torch.compiler.reset()
        calls["quadratic, compiled"] = call_of(torch.compile(quadratic), maps, options.direction)
        if options.direction == "forward":
            graphed = Graphed(fused, maps)
            calls["fused, one graph"] = lambda: graphed(maps)
    return calls


def take_rates(options: argparse.Namespace) -> None:
    """Set `bandwidth` and `rate` of the options to measured values, unless the command line gives them."""
    if options.bandwidth and options.rate:
        return
    device = torch.device(options.device)
    found = ceilings(device, DTYPES[options.dtype], small=device.type == "cpu")
    options.bandwidth = options.bandwidth or found.bandwidth / 1e9
    options.rate = options.rate or 2 * found.matrix_rate / 1e12


def floor_of(neck: SRMNeck, maps: list[Tensor], options: argparse.Namespace) -> float | None:
    """Return the lower bound of the forward time in milliseconds, as the docstring of this module defines it.

    Return None if `options.bandwidth` or `options.rate` has no value.
    """
    if not options.bandwidth or not options.rate:
        return None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        neck(maps)
    read = bytes_of(maps) / (options.bandwidth * 1e9)
    return max(read, counter.get_total_flops() / (options.rate * 1e12)) * 1e3


def compare(backbone: str, side: int, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each neck: time, memory, launches, and time and memory relative to the quadratic neck."""
    device = torch.device(options.device)
    maps = maps_of(backbone, side, batch, options)
    calls = contestants(backbone, maps, options)
    times = measure_together(calls, device, effort_of(options))
    memory = {name: peak(call, device).above for name, call in calls.items()}
    floor = floor_of(neck_of(backbone, options, backend="reference").eval(), maps, options)
    rows = []
    for name, call in calls.items():
        row = common_columns("fused_neck", name, backbone, side, batch, options) | {
            "channels_last": options.channels_last,
            "ms": times[name].to_dict(),
            "memory_above": memory[name],
            "launches": launches(call, device),
            "faster_than_quadratic": times["quadratic"].p50 / times[name].p50,
            "memory_of_quadratic": memory[name] / max(memory["quadratic"], 1),
        }
        if "quadratic, compiled" in times:
            row["faster_than_compiled"] = times["quadratic, compiled"].p50 / times[name].p50
        if floor is not None and options.direction == "forward":
            row["times_the_floor"] = times[name].p50 / floor
        rows.append(row)
    return rows


def launches_by_interpreter() -> str:
    """Run `bench.launches` in a separate process; return its output, or why it failed."""
    if find_spec("triton") is None:
        return "launches unknown: Triton is not installed\n"
    command = [sys.executable, "-m", "bench.launches"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else f"launches unknown: {done.stderr[-500:]}\n"


def main() -> None:
    """Print a line for each neck and shape; `!` marks a fused neck that misses a target."""
    parser = timing_parser("fused_neck", __doc__)
    parser.add_argument("--backbones", nargs="*", choices=tuple(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--sides", type=int, nargs="*", default=[512, 1024], help="image sides in pixels")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--direction", choices=("forward", "both"), default="forward")
    add_neck_options(parser)
    parser.add_argument("--no-dyt", action="store_true", help="measure necks without DyT")
    parser.add_argument("--channels-last", action="store_true", help="lay the maps out channels-last")
    parser.add_argument("--bandwidth", type=float, help="memory bandwidth in GB/s (default: measured)")
    parser.add_argument("--rate", type=float, help="rate of products in TFLOP/s (default: measured)")
    options = parser.parse_args()
    recorder = Recorder(options.out, "fused_neck", options.device, options.note)
    print(sentence(recorder.machine))
    take_rates(options)
    print(f"floors at {options.bandwidth:.4g} GB/s and {options.rate:.4g} TFLOP/s in {options.dtype}")
    if options.device == "cpu":
        print(
            "on a CPU, plain and fused are the same neck in plain PyTorch; a forward pass by kernels launches:"
        )
        print(launches_by_interpreter(), end="", flush=True)
    titles = ("ms", 9), ("speedup", 7), ("compiled", 8), ("memory", 7), ("launches", 8), ("floors", 6)
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
    """Return a row as a line of the table; `!` marks a fused neck that misses a target."""
    floors, compiled = row.get("times_the_floor"), row.get("faster_than_compiled")
    missed = " !" if row["neck"].startswith("fused") and row["batch"] == 8 and misses(row) else ""
    return (
        f"{row['backbone']:22} {row['side']:5} {row['batch']:5} {row['neck']:20} {row['ms']['p50']:9.3f} "
        f"{row['faster_than_quadratic']:6.2f}x {'-' if compiled is None else f'{compiled:.2f}x':>8} "
        f"{row['memory_of_quadratic']:7.2f} {row['launches'] or '-':>8} "
        f"{'-' if floors is None else f'{floors:.1f}':>6}{missed}"
    )


def misses(row: dict[str, Any]) -> bool:
    """Return whether a row misses its target for time or memory.

    The number of launches has a target too. This function does not check it; `tests/model/test_fused_neck.py` does.
    """
    target = TARGETS.get((row["direction"], row["side"]))
    if target is None:
        return False
    (speed, share), over_compiled = target, 0
    if row["direction"] == "forward":
        over_eager, over_compiled = FORWARD_TARGETS[row["dyt"]]
        speed = max(speed, over_eager)
    return (
        row["faster_than_quadratic"] < speed
        or row.get("faster_than_compiled", over_compiled) < over_compiled
        or row["memory_of_quadratic"] > share
        or row.get("times_the_floor", MOST_FLOORS) > MOST_FLOORS
    )


if __name__ == "__main__":
    main()
