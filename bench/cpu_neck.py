"""The `srm` neck against the quadratic one on one thread of a CPU: `python -m bench.cpu_neck`.

Necks alone, in fp32 with one image, fed with maps of the sizes that a backbone gives. The quadratic neck attends by
scaled_dot_product_attention. Times are processor time, medians of calls that take turns within one run. Memory is the
peak above the maps, what backward leaves included. `srm, not compiled` is the same neck without csrc's library. An aim
that is missed is marked by `!`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from bench.fused_neck import WIDTHS, call_of, maps_of, neck_of
from bench.harness import Recorder, effort_of, machine, measure_together, parser, peak, sentence
from srm_kernels import native

CPU = torch.device("cpu")
AIMS = {  # at most this share of the quadratic neck's time, by direction, image side and DyT
    ("forward", 256, True): 0.95,
    ("forward", 256, False): 0.95,
    ("forward", 512, True): 0.40,
    ("forward", 512, False): 0.35,
    ("forward", 1024, True): 0.15,
    ("forward", 1024, False): 0.15,
    ("both", 512, True): 0.60,
    ("both", 512, False): 0.60,
}
MEMORY_AIM = 1 / 4  # of the quadratic neck's, in training


def not_compiled(call: Callable[[], object]) -> Callable[[], object]:
    """The call as it is where csrc was not built."""

    def plain() -> object:
        with mock.patch.object(native, "BUILT", False):
            return call()

    return plain


def compare(side: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each neck: time, memory, and what share of the quadratic neck's they are."""
    maps = maps_of(options.backbone, side, 1, options)
    neck = neck_of(options.backbone, options, backend=None)
    quadratic = neck_of(options.backbone, options, backend=None, attention="full")
    call = call_of(neck, maps, options.direction)
    calls = {
        "quadratic": call_of(quadratic, maps, options.direction),
        "srm": call,
        "srm, not compiled": not_compiled(call),
    }
    times = measure_together(calls, CPU, effort_of(options))
    memory = {name: peak(call, CPU).above for name, call in calls.items()}
    base = times["quadratic"].processor
    rows = []
    for name, taken in times.items():
        assert taken.processor is not None
        assert base is not None
        rows.append({
            "benchmark": "cpu_neck", "neck": name, "backbone": options.backbone, "side": side, "batch": 1,
            "direction": options.direction, "dtype": options.dtype, "dyt": not options.no_dyt,
            "rank": options.rank, "ms": taken.to_dict(), "share_of_time": taken.processor / base,
            "memory_above": memory[name], "share_of_memory": memory[name] / memory["quadratic"],
        })  # fmt: skip
    return rows


def line_of(row: dict[str, Any]) -> str:
    """One row as it is printed, with what was aimed at beside it."""
    aim = AIMS.get((row["direction"], row["side"], row["dyt"]))
    compared = row["neck"] != "quadratic"
    late = compared and aim is not None and row["share_of_time"] > aim
    large = compared and row["direction"] == "both" and row["share_of_memory"] > MEMORY_AIM
    return (
        f"{row['side']:5} {row['direction']:8} {'yes' if row['dyt'] else 'no':4} {row['neck']:18} "
        f"{row['ms']['processor']:9.1f} {row['share_of_time']:6.2f} {aim if compared and aim else '-':>6} "
        f"{row['memory_above'] / 2**20:8.1f} {row['share_of_memory']:6.2f}{' !' if late or large else ''}"
    )


def main() -> None:
    """A line for each neck at every image side, direction, and with DyT and without."""
    made = parser(__doc__)
    made.add_argument("--backbone", choices=tuple(WIDTHS), default="pvt_v2_b2")
    made.add_argument("--sides", type=int, nargs="*", default=[256, 512, 1024])
    made.add_argument("--directions", nargs="*", choices=("forward", "both"), default=["forward", "both"])
    made.add_argument("--largest-training-side", type=int, default=512, help="larger ones: forward only")
    made.add_argument("--channels", type=int, default=256)
    made.add_argument("--heads", type=int, default=8)
    made.add_argument("--rank", type=int, default=64)
    options = made.parse_args()
    options.device, options.channels_last = "cpu", False
    torch.set_num_threads(1)
    recorder = Recorder(options.out, "cpu_neck", CPU, options.note)
    print(sentence(machine(CPU)))
    print(
        f"{'side':>5} {'':8} {'DyT':4} {'neck':18} {'ms':>9} {'share':>6} {'aim':>6} {'MiB':>8} {'share':>6}"
    )
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
