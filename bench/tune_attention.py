"""Time the launch configurations of the Triton attention kernels on a GPU: `python -m bench.tune_attention`.

For every rule of `srm_kernels/attention/configurations.py` and the usual sizes, the alternatives are put in the rule's
place one at a time, and the medians of a forward or backward pass are printed with the rule's own choice marked. The
numbers in the rule are then changed by hand: nothing is tuned while a program runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import product

import torch

from srm_kernels import backends, nystrom_attention
from srm_kernels.attention import configurations

RULES = {
    "query_forward": False,
    "query_backward": True,
    "key_side": True,
    "key_tokens": True,
}  # times the backward?
SIZES = ((32, 32), (64, 32), (64, 64), (128, 64))  # r, d


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls by CUDA events, after three that warm up."""
    times = []
    for repeat in range(-3, repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 0:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    """Print the table, or one sentence where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--queries", type=int, default=16_384)
    parser.add_argument("--keys", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"bench.tune_attention needs a CUDA device: {backends()['triton'].reason}")
    print(
        f"{torch.cuda.get_device_name()}, {options.dtype}, B={options.batch}, {options.queries} × {options.keys}"
    )
    dtype, target = getattr(torch, options.dtype), torch.cuda.get_device_capability()
    for rank, d in SIZES:
        inputs = [
            torch.randn(options.batch, 8, n, d, device="cuda", dtype=dtype, requires_grad=True)
            for n in (options.queries, options.keys, options.keys)
        ]
        weight = torch.ones_like(inputs[0])

        def forward(inputs: list[torch.Tensor] = inputs, rank: int = rank) -> torch.Tensor:
            y = nystrom_attention(*inputs, rank, qk_norm="keys", backend="triton")
            assert isinstance(y, torch.Tensor)
            return y

        for name, backward in RULES.items():
            rule = getattr(configurations, name)
            choice = rule(rank, d, dtype, target)
            y = forward()

            def backwards(y=y, inputs=inputs, weight=weight) -> object:  # type: ignore[no-untyped-def]
                return torch.autograd.grad(y, inputs, weight, retain_graph=True)

            for block, warps, stages in product((16, 32, 64, 128), (4, 8), (1, 2)):
                candidate = choice._replace(block=block, warps=warps, stages=stages)
                setattr(configurations, name, lambda *_, candidate=candidate: candidate)
                try:
                    time = f"{median_ms(backwards if backward else forward, options.repeats):9.3f} ms"
                except Exception as error:  # too much shared memory is an answer too
                    time = f"  refused: {type(error).__name__}"
                finally:
                    setattr(configurations, name, rule)
                mark = "  <- the rule" if candidate == choice else ""
                print(
                    f"{name:15} r={rank:<3} d={d:<3} block={block:<3} warps={warps} stages={stages} {time}{mark}"
                )


if __name__ == "__main__":
    main()
