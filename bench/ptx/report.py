"""Estimate each kernel's time and limiting unit on five GPUs from instruction counts; nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bench.pages import markdown

from .bounds import bound
from .rates import GPUS, Gpu
from .workloads import WORKLOADS, Workload, counted

UNITS = ("mma", "fp32", "alu", "imad", "xu", "lsu", "issue", "dram")
NAMES = {"mma": "tensor cores", "alu": "integer", "imad": "integer multiply", "xu": "special functions",
         "lsu": "shared memory", "dram": "DRAM"}  # fmt: skip
Row = dict[str, Any]


class Target(NamedTuple):
    """Target of a kernel's simulated time.

    `before` is the time in µs before the kernel was tuned. `target` is the largest accepted time in µs. If
    the workload launches the kernel several times, `before` and `target` are sums over these launches. If the
    kernel replaced a kernel of another name, `replaced` is the name of the replaced kernel.
    """

    workload: str
    kernel: str
    before: float
    target: float
    replaced: str = ""


TUNED = "RTX 4090"
TARGETS = (
    Target("neck, DyT, training", "tokens_kernel", 645, 330),
    Target("neck, training", "absorbed_kernel", 386, 220),
    Target("neck, DyT, training", "attention_backward_kernel", 466, 250),
    Target("neck, key sides", "tokens_backward_kernel", 83, 25),
    Target("attention", "backward_kernel", 338, 240),
    Target("neck, DyT, training", "squash_kernel", 175, 88, replaced="dyt_kernel"),
    Target("neck, DyT, training", "squash_backward_kernel", 267, 134, replaced="dyt_backward_kernel"),
    Target("neck, key sides", "context_kernel", 64, 40),
    Target("neck, key sides, uniform landmarks", "context_kernel", 64, 40),
    Target("neck, key sides", "system_backward_kernel", 42, 25),
    Target("attention", "forward_kernel", 134, 134),
)


def place(row: Row) -> tuple[int, int]:
    """Return the sort key of a row: by GPU, then by workload."""
    return list(GPUS).index(row["gpu"]), [one.name for one in WORKLOADS].index(row["workload"])


def by_architecture(gpus: Iterable[str]) -> list[tuple[str, ...]]:
    """Return one tuple of GPU names for each architecture; all GPUs of one architecture run the same code."""
    groups: dict[int, list[str]] = {}
    for name in gpus:
        groups.setdefault(GPUS[name].capability, []).append(name)
    return [tuple(group) for group in groups.values()]


def rows(
    gpus: Sequence[str] = tuple(GPUS), workloads: Sequence[Workload] = WORKLOADS, dtype: str = "bfloat16"
) -> Iterator[Row]:
    """Yield a row for each GPU, workload and launch.

    Args:
        gpus: Names of GPUs in `rates.GPUS`. The kernels are compiled for the architecture of each GPU, and the
            instructions of the compiled code are counted.
        workloads: Workloads to launch. The instructions are counted for one image. To estimate times, the counts are
            multiplied by the batch size of the workload.
        dtype: Dtype of the tokens and maps.
    """
    for group in by_architecture(gpus):
        cards = [GPUS[name] for name in group]
        architecture = cards[0].capability
        for workload, launch in counted(workloads, architecture, getattr(torch, dtype)):
            for gpu in cards:
                yield row_of(workload, launch, gpu, dtype)


def row_of(workload: Workload, launch: Any, gpu: Gpu, dtype: str) -> Row:
    """Return the row of a counted launch on a GPU."""
    found = bound(launch, gpu, batch=workload.batch)
    floor = floor_of(found, gpu)
    return {
        "gpu": gpu.name,
        "workload": workload.name,
        "kernel": launch.name,
        "dtype": dtype,
        "batch": workload.batch,
        "us": round(found["us"], 2),
        "limit": found["bottleneck"],
        "busy_us": {unit: round(found["busy"][unit], 2) for unit in UNITS},
        "floor_us": round(floor, 2),
        "share_of_floor": round(floor / found["us"], 3) if found["us"] else 1.0,
        "repeated_products": round(found["repeated"], 2),
        "bank_conflicts": round(found["conflicts"], 2),
        "warps": found["warps"],
        "registers": found["registers"],
        "shared_bytes": launch.shared,
        "blocks": found["blocks"],
        "resident": found["resident"],
        "uneven": round(found["uneven"], 3),
    }


def floor_of(found: Row, gpu: Gpu) -> float:
    """Return the floor, a lower bound of the time of a launch in µs.

    The floor is the larger of two times. The first is the number of DRAM bytes, divided by the bandwidth. The
    second is the number of fused multiply-adds in distinct matrix products, divided by the rate of the tensor
    cores. If several warps of a thread block compute the same product by mma.sync, this product counts once.
    Every wgmma counts as a distinct product.
    """
    products = found["products"]
    fma = products.get("bf16", 0) / gpu.bf16 + products.get("tf32", 0) / gpu.tf32
    useful = fma / max(1.0, found["repeated"]) / (gpu.sms * gpu.ghz * 1000)
    return float(max(found["dram_bytes"] / gpu.dram / 1000, useful))


def page(found: Iterable[Row]) -> str:
    """Return a Markdown page with one table of rows for each GPU."""
    parts = [
        "# Simulated limits of the kernels\n",
        "Written by `python -m bench.ptx --report`; the rows are in `kernels.jsonl` in the same folder. **No GPU has "
        "run this.** Instructions are counted on the PTX emulator at the article's shapes (512² image, pvt_v2_b2 maps, "
        "C = 256, H = 8, r = 64, and B = 8 unless the workload names it). A time is that of the busiest unit and "
        "includes no latency. The floor is the larger of bytes over bandwidth and distinct matrix products over their "
        "rate; the share of the floor is the floor divided by the time. The H100 appears twice because its mma.sync "
        "reaches half of the rate of wgmma.\n",
    ]
    by_gpu: dict[str, list[Row]] = {}
    for row in found:
        by_gpu.setdefault(row["gpu"], []).append(row)
    if TUNED in by_gpu:
        parts += [_targets(by_gpu[TUNED])]
    header = ["workload", "kernel", "time, µs", "limited by", "floor, µs", "share of the floor, %"]
    header += [f"{NAMES.get(unit, unit)}, µs" for unit in UNITS] + ["products repeated", "warps", "registers"]
    for gpu, lines in by_gpu.items():
        table = [
            [
                row["workload"], row["kernel"], f"{row['us']:.1f}", NAMES.get(row["limit"], row["limit"]),
                f"{row['floor_us']:.1f}", f"{100 * row['share_of_floor']:.0f}",
                *(f"{row['busy_us'][unit]:.1f}" for unit in UNITS), f"{row['repeated_products']:.1f}",
                str(row["warps"]), str(row["registers"]),
            ]
            for row in lines
        ]  # fmt: skip
        parts += [f"## {gpu}\n", markdown(header, table)]
    return "\n".join(parts)


def _targets(rows: Sequence[Row]) -> str:
    """Return a table for one GPU: simulated time before tuning, target, and simulated time now."""
    lines = []
    for target in TARGETS:
        launches = [
            row for row in rows if (row["workload"], row["kernel"]) == (target.workload, target.kernel)
        ]
        if launches:
            time, floor = (sum(row[name] for row in launches) for name in ("us", "floor_us"))
            now = f"{time:.0f}{' (missed)' if round(time) > target.target else ''}"
            kernel = target.kernel + (f" ×{len(launches)}" if len(launches) > 1 else "")
            limit = launches[0]["limit"]
            lines.append(
                [
                    target.workload, f"{kernel}, before {target.replaced}" if target.replaced else kernel,
                    f"{target.before:.0f}", f"{target.target:.0f}", now, f"{100 * floor / time:.0f}",
                    NAMES.get(limit, limit),
                ]
            )  # fmt: skip
    header = [
        "workload",
        "kernel",
        "before, µs",
        "target, µs",
        "now, µs",
        "share of the floor, %",
        "limited by",
    ]
    words = (
        "Before: the kernels as they were when this emulator first counted them, with leverage landmarks. Uniform "
        "landmarks are the neck's default now. The two rows of `squash` kernels "
        "compare different work. Before, DyT and its gradient were passes of their own over full-resolution tensors, "
        "and the matrix products before and after DyT were separate launches of PyTorch, which are not in the "
        "numbers. Now one kernel computes DyT together with these products, so its time includes the bytes that the "
        "products need.\n\n"
        "Reasons for the other missed targets:\n\n"
        "- `absorbed_kernel`: its floor is 99 % of its time and above the target. The numerics rule needs three passes "
        "of the tensor cores for a product of two fp32 factors, and two passes if one factor is stored in bf16.\n"
        "- `tokens_kernel`: its floor is 96 % of its time and just below the target.\n"
        "- `context_kernel` and `system_backward_kernel` eliminate the columns of W one after the other. Each step "
        "needs the result of the step before. The time is therefore set by the number of instructions that are issued. "
        "The target of `context_kernel` is met with uniform landmarks, which need no scores.\n"
    )
    return f"## Tuned by these counts: {TUNED}\n\n{markdown(header, lines, words=2)}\n{words}"
