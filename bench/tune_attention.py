"""Time the launch configurations of the Triton attention kernels on a GPU: `python -m bench.tune_attention`.

For every rule of `srm_kernels/attention/configurations.py` and the usual sizes, the alternatives are put in the rule's
place one at a time, and the medians of a forward or backward pass are printed with the rule's own choice marked. The
numbers in the rule are then changed by hand: nothing is tuned while a program runs.

All alternatives are compiled first, by several processes that share Triton's cache, and then timed by one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import torch

from bench.harness import DTYPES, Effort, Recorder, measure, parser
from srm_kernels import backends, nystrom_attention
from srm_kernels.attention import configurations
from srm_kernels.attention.configurations import Configuration

RULES = {
    "query_forward": False,
    "query_backward": True,
    "key_side": True,
    "key_tokens": True,
}  # times the backward?
SIZES = ((32, 32), (64, 32), (64, 64), (128, 64))  # r, d
BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2)


class Trial(NamedTuple):
    """A rule's alternative at one size."""

    rule: str
    rank: int
    d: int
    candidate: Configuration
    chosen: bool  # what the rule says


def trials(dtype: torch.dtype, device: torch.device) -> Iterator[Trial]:
    """Every alternative, the rule's own choice among them or behind them."""
    target = configurations.capability(torch.empty(0, device=device))
    for (rank, d), name in product(SIZES, RULES):
        choice = getattr(configurations, name)(rank, d, dtype, target)
        candidates = [
            choice._replace(block=block, warps=warps, stages=stages)
            for block, warps, stages in product(BLOCKS, WARPS, STAGES)
        ]
        for candidate in dict.fromkeys([*candidates, choice]):
            yield Trial(name, rank, d, candidate, candidate == choice)


@contextmanager
def in_the_rules_place(trial: Trial) -> Iterator[None]:
    """The alternative, whatever the shape."""
    rule = getattr(configurations, trial.rule)
    setattr(configurations, trial.rule, lambda *_: trial.candidate)
    try:
        yield
    finally:
        setattr(configurations, trial.rule, rule)


def call_of(trial: Trial, options: argparse.Namespace) -> Callable[[], object]:
    """A forward pass, or the backward pass of one that was made before."""
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    inputs = [
        torch.randn(options.batch, options.heads, n, trial.d, device=device, dtype=dtype, requires_grad=True)
        for n in (options.queries, options.keys, options.keys)
    ]

    def forward() -> torch.Tensor:
        y = nystrom_attention(*inputs, trial.rank, qk_norm="keys", backend="triton")
        assert isinstance(y, torch.Tensor)
        return y

    if not RULES[trial.rule]:
        return forward
    y = forward()
    weight = torch.ones_like(y)
    return lambda: torch.autograd.grad(y, inputs, weight, retain_graph=True)


def check_device(trial: Trial, error: str, options: argparse.Namespace) -> None:
    """SystemExit where the device answers nothing any more in this process: what follows would seem refused too."""
    if options.device == "cpu":
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        raise SystemExit(
            f"bench.tune_attention: {trial.rule} at r = {trial.rank}, d = {trial.d} with {trial.candidate} left the "
            f"device unusable for this process ({error}); rows up to it are kept, those after it were not timed"
        ) from None


def compiled(trial: Trial, options: argparse.Namespace) -> str | None:
    """Run once, and what was wrong; too much shared memory is an answer too."""
    try:
        with in_the_rules_place(trial):
            call_of(trial, options)()
            if options.device != "cpu":
                torch.cuda.synchronize()
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        check_device(trial, told, options)
        return told
    return None


def compiled_side_by_side(wanted: list[Trial], options: argparse.Namespace) -> dict[Trial, str | None]:
    """What `compiled` says of each, as far as the processes come: a launch that ends one of them ends all."""
    context, found = multiprocessing.get_context("spawn"), {}
    try:
        with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
            for trial, error in zip(wanted, pool.map(compiled, wanted, [options] * len(wanted)), strict=True):
                found[trial] = error
                print(f"\r{len(found)} of {len(wanted)} compiled", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    except BrokenProcessPool:
        print("\na process that compiled was ended; the rest is compiled as it is timed", file=sys.stderr)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the table and keep its rows in OUT/<gpu>/tuning.jsonl, or say in one sentence that there is no GPU."""
    made = parser(__doc__)
    made.set_defaults(dtype="bf16", warmup=3, repeats=20, seconds=0.2)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--heads", type=int, default=8)
    made.add_argument("--queries", type=int, default=16_384)
    made.add_argument("--keys", type=int, default=256)
    made.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile (default: all)")
    options = made.parse_args(arguments)
    if not backends()["triton"].available:
        raise SystemExit(f"bench.tune_attention needs a CUDA device: {backends()['triton'].reason}")
    device = torch.device(options.device)
    effort = Effort(options.warmup, options.repeats, options.seconds)
    recorder = Recorder(options.out, "tuning", device, options.note)
    wanted = list(trials(DTYPES[options.dtype], device))
    refused = compiled_side_by_side(wanted, options) if options.processes > 1 else {}
    for trial in wanted:
        error, times = refused.get(trial) or compiled(trial, options), None
        if error is None:
            with in_the_rules_place(trial):
                times = measure(call_of(trial, options), device, effort)
        block, warps, stages, registers = trial.candidate
        recorder.write(
            {
                "rule": trial.rule, "r": trial.rank, "d": trial.d, "dtype": options.dtype, "B": options.batch,
                "N_q": options.queries, "N_k": options.keys, "block": block, "warps": warps, "stages": stages,
                "registers": registers, "chosen": trial.chosen, "error": error,
                "milliseconds": times and times.to_dict(), "typical": times and times.typical,
            }
        )  # fmt: skip
        told = f"  refused: {error}" if times is None else f"{times.typical:9.3f} ms"
        mark = "  <- the rule" if trial.chosen else ""
        print(
            f"{trial.rule:15} r={trial.rank:<3} d={trial.d:<3} block={block:<3} warps={warps} stages={stages} "
            f"{told}{mark}",
            flush=True,
        )


if __name__ == "__main__":
    main()
