"""Compare the `srm` neck with the quadratic neck on one thread of a CPU: `python -m bench.cpu_neck`.

The necks are measured without a backbone, in fp32 and with one image. Their inputs are random maps of the
sizes that a backbone produces. The quadratic neck uses scaled_dot_product_attention. The necks of a comparison
are called alternately in one process, and times are medians of CPU time. Memory is the peak memory that a call
allocates. This memory includes the gradients of a backward pass, but not the maps and the parameters. The row
`srm, not compiled` is the `srm` neck without the compiled library of csrc/. `!` marks a missed target.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch

from bench.fused_neck import WIDTHS, add_neck_options, call_of, common_columns, maps_of, neck_of
from bench.harness import Call, Recorder, effort_of, timing_parser
from srm_kernels import native
from srm_model.profiling import measure_together
from srm_model.profiling.machines import sentence
from srm_model.profiling.memory import peak

CPU = torch.device("cpu")
TARGETS = {  # largest share of the quadratic neck's time, by direction, image side and DyT
    ("forward", 256, True): 0.95,
    ("forward", 256, False): 0.95,
    ("forward", 512, True): 0.40,
    ("forward", 512, False): 0.35,
    ("forward", 1024, True): 0.15,
    ("forward", 1024, False): 0.15,
    ("both", 512, True): 0.60,
    ("both", 512, False): 0.60,
}
# Largest share of the quadratic neck's memory, by direction and image side.
MEMORY_TARGETS = {("both", 512): 0.25}


def not_compiled(call: Call) -> Call:
    """Return a function that makes the call without the compiled library of csrc/."""

    def plain() -> object:
        with mock.patch.object(native, "BUILT", False):
            return call()

    return plain


def compare(side: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each neck: time, memory, and their ratios to the time and memory of the quadratic neck."""
    maps = maps_of(options.backbone, side, 1, options)
    quadratic = neck_of(options.backbone, options, attention="full")
    call = call_of(neck_of(options.backbone, options), maps, options.direction)
    calls = {
        "quadratic": call_of(quadratic, maps, options.direction),
        "srm": call,
        "srm, not compiled": not_compiled(call),
    }
    times = measure_together(calls, CPU, effort_of(options))
    memory = {name: peak(call, CPU).above for name, call in calls.items()}
    return [
        common_columns("cpu_neck", name, options.backbone, side, 1, options)
        | {
            "ms": taken.to_dict(),
            "share_of_time": taken.processor / times["quadratic"].processor,
            "memory_above": memory[name],
            "share_of_memory": memory[name] / memory["quadratic"],
        }
        for name, taken in times.items()
    ]


def line_of(row: dict[str, Any]) -> str:
    """Return a row as a line of the table, with its target; `!` marks a missed target."""
    target = TARGETS.get((row["direction"], row["side"], row["dyt"]))
    compared = row["neck"] != "quadratic"
    late = compared and target is not None and row["share_of_time"] > target
    most = MEMORY_TARGETS.get((row["direction"], row["side"]))
    large = compared and most is not None and row["share_of_memory"] > most
    return (
        f"{row['side']:5} {row['direction']:8} {'yes' if row['dyt'] else 'no':4} {row['neck']:18} "
        f"{row['ms']['processor']:9.1f} {row['share_of_time']:6.2f} {target if compared and target else '-':>6} "
        f"{row['memory_above'] / 2**20:8.1f} {row['share_of_memory']:6.2f}{' !' if late or large else ''}"
    )


def main() -> None:
    """Print a line for each neck, image side and direction, with DyT and without."""
    parser = timing_parser("cpu_neck", __doc__)
    parser.add_argument("--backbone", choices=tuple(WIDTHS), default="pvt_v2_b2")
    parser.add_argument(
        "--sides", type=int, nargs="*", default=[256, 512, 1024], help="image sides in pixels"
    )
    parser.add_argument("--directions", nargs="*", choices=("forward", "both"), default=["forward", "both"])
    parser.add_argument(
        "--largest-training-side", type=int, default=512, help="measure larger sides forward only"
    )
    add_neck_options(parser)
    options = parser.parse_args()
    options.device, options.channels_last = "cpu", False
    torch.set_num_threads(1)
    recorder = Recorder(options.out, "cpu_neck", CPU, options.note)
    print(sentence(recorder.machine))
    columns = ("ms", 9), ("share", 6), ("target", 6), ("MiB", 8), ("share", 6)
    print(f"{'side':>5} {'':8} {'DyT':4} {'neck':18}", *(f"{name:>{width}}" for name, width in columns))
    for side in options.sides:
        for direction in options.directions:
            if direction == "both" and side > options.largest_training_side:
                continue
            for no_dyt in (False, True):
                case = argparse.Namespace(**vars(options), direction=direction, no_dyt=no_dyt)
                for row in compare(side, case):
                    print(line_of(recorder.write(row)), flush=True)


if __name__ == "__main__":
    main()
