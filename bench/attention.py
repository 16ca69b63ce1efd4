"""Nyström attention against exact attention, forward, as ratios in one run: `python -m bench.attention`.

Interleaved calls of both, medians. On a CPU the times are wall clock and only their ratio means something; on a
GPU they are CUDA events.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from srm_kernels import full_attention, nystrom_attention

SHAPES = (
    (16_384, 256, 1 / 3),
    (65_536, 1_024, 1 / 6),
    (65_536, 4_096, 1 / 20),
)  # N_q, N_k, most of exact's time


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """One call, by CUDA events on a GPU, else by the wall clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def compare(queries: int, keys: int, options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each implementation at one shape."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    make = torch.Generator(device).manual_seed(0)
    shape = (options.batch, options.heads, queries, options.width)
    query = torch.randn(shape, generator=make, device=device).to(dtype)
    key, value = (
        torch.randn((*shape[:2], keys, options.width), generator=make, device=device).to(dtype)
        for _ in range(2)
    )
    calls: dict[str, Callable[[], object]] = {
        "exact": lambda: full_attention(query, key, value, qk_norm="keys"),
        "nystrom": lambda: nystrom_attention(query, key, value, options.rank, qk_norm="keys"),
        "reference": lambda: nystrom_attention(
            query, key, value, options.rank, qk_norm="keys", backend="reference"
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for repeat in range(-options.warmup, options.repeats):
            for name, call in calls.items():
                elapsed = milliseconds(call, device)
                if repeat >= 0:
                    times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print one line per shape; a ratio above its limit is marked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=32, help="d, of one head")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    options = parser.parse_args()
    processor = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(
        f"torch {torch.__version__}, {processor}, {torch.get_num_threads()} threads, {options.dtype}, "
        f"B={options.batch} H={options.heads} d={options.width} r={options.rank}, forward, solver cholesky"
    )
    print(f"{'N_q':>8} {'N_k':>6} {'nystrom/exact':>14} {'limit':>8} {'reference/exact':>16}")
    for queries, keys, limit in SHAPES:
        times = compare(queries, keys, options)
        ratio, plain = times["nystrom"] / times["exact"], times["reference"] / times["exact"]
        verdict = "" if ratio <= limit else "  over the limit"
        shares = [f"1/{1 / share:.1f}" for share in (ratio, limit, plain)]
        print(f"{queries:8} {keys:6} {shares[0]:>14} {shares[1]:>8} {shares[2]:>16}{verdict}")


if __name__ == "__main__":
    main()
