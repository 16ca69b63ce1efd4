"""Time launch configurations of the Triton attention kernels on a GPU: `python -m bench.tune_attention`.

A rule is a function of `srm_kernels/attention/launch_rules.py` that returns a configuration. For each rule,
the command times the configuration that the rule chooses and alternative configurations. The sizes are a few
pairs of r landmarks and d channels per head. The command prints the median time of a forward or backward pass
for each configuration, and marks the configuration that the rule chooses. The command does not change any rule.
To use a faster configuration, edit the rule by hand.

Several processes compile all configurations first, with a shared Triton cache. One process then times them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.harness import DTYPES, Call, Recorder, attention_inputs, effort_of, timing_parser
from srm_kernels import backends, devices, nystrom_attention
from srm_kernels.attention import launch_rules
from srm_kernels.attention.launch_rules import Configuration
from srm_model.profiling import measure

# Rule → whether the backward pass is timed instead of the forward pass.
RULES = {"query_forward": False, "query_backward": True, "key_side": True, "key_tokens": True}
SIZES = ((32, 32), (64, 32), (64, 64), (128, 64))  # r, d
BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2)


class Trial(NamedTuple):
    """A candidate configuration for a rule at one size, and whether the rule itself chooses it."""

    rule: str
    rank: int
    d: int
    candidate: Configuration
    chosen: bool

    def in_place(self) -> Any:
        """Return a context in which the rule returns this candidate for every shape."""
        # A mock with a `return_value` takes 30 µs per call.
        return mock.patch.object(launch_rules, self.rule, lambda *_: self.candidate)  # noqa: PT008


def trials(dtype: torch.dtype, device: torch.device) -> Iterator[Trial]:
    """Yield every candidate configuration, including the configuration that the rule chooses."""
    target = devices.capability(torch.empty(0, device=device))
    for (rank, d), name in product(SIZES, RULES):
        choice = getattr(launch_rules, name)(rank, d, dtype, target)
        candidates = [
            choice._replace(block=block, warps=warps, stages=stages)
            for block, warps, stages in product(BLOCKS, WARPS, STAGES)
        ]
        for candidate in dict.fromkeys([*candidates, choice]):
            yield Trial(name, rank, d, candidate, candidate == choice)


def call_of(trial: Trial, options: argparse.Namespace) -> Call:
    """Return a function that runs only the backward pass if `RULES[trial.rule]` is True, else only the forward pass."""
    shape = (options.batch, options.heads)
    inputs = attention_inputs(shape, options.queries, options.keys, trial.d, options, gradients=True)
    forward = partial(nystrom_attention, *inputs, trial.rank, qk_norm="keys", backend="triton")
    if not RULES[trial.rule]:
        return forward
    y = forward()
    return partial(torch.autograd.grad, y, inputs, torch.ones_like(y), retain_graph=True)


def check_device(trial: Trial, error: str, options: argparse.Namespace) -> None:
    """Raise SystemExit if a failed trial has left the device unusable, because all later trials would then fail."""
    if options.device == "cpu":
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        raise SystemExit(
            f"bench.tune_attention: {trial.rule} at r = {trial.rank}, d = {trial.d} with {trial.candidate} left the "
            f"device unusable for this process ({error}); rows up to it are kept, later ones were not timed"
        ) from None


def compiled(trial: Trial, options: argparse.Namespace) -> str | None:
    """Run a trial once to compile its kernels; return None, or the error as text if the trial fails."""
    try:
        with trial.in_place():
            call_of(trial, options)()
            if options.device != "cpu":
                torch.cuda.synchronize()
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        check_device(trial, text, options)
        return text
    return None


def compiled_side_by_side(wanted: list[Trial], options: argparse.Namespace) -> dict[Trial, str | None]:
    """Run `compiled` in several processes.

    If one of the processes dies, the result contains only the trials before the first unfinished trial.
    """
    context, found = multiprocessing.get_context("spawn"), {}
    try:
        with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
            for trial, error in zip(wanted, pool.map(compiled, wanted, [options] * len(wanted)), strict=True):
                found[trial] = error
                print(f"\r{len(found)} of {len(wanted)} compiled", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    except BrokenProcessPool:
        print("\na compiling process died; the remaining trials are compiled when timed", file=sys.stderr)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the table and write rows to OUT/<gpu>/tuning.jsonl; if there is no GPU, exit with a message."""
    made = timing_parser("tune_attention", __doc__, dtype="bf16", warmup=3, repeats=20, seconds=0.2)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--heads", type=int, default=8)
    made.add_argument("--queries", type=int, default=16_384)
    made.add_argument("--keys", type=int, default=256)
    made.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="compiling processes (default: all cores)"
    )
    options = made.parse_args(arguments)
    if not backends()["triton"].available:
        raise SystemExit(f"bench.tune_attention needs a CUDA device: {backends()['triton'].reason}")
    device = torch.device(options.device)
    recorder = Recorder(options.out, "tuning", device, options.note)
    wanted = list(trials(DTYPES[options.dtype], device))
    refused = compiled_side_by_side(wanted, options) if options.processes > 1 else {}
    for trial in wanted:
        error, times = refused.get(trial) or compiled(trial, options), None
        if error is None:
            with trial.in_place():
                times = measure(call_of(trial, options), device, effort_of(options))
        block, warps, stages, registers = trial.candidate
        recorder.write(
            {
                "rule": trial.rule, "r": trial.rank, "d": trial.d, "dtype": options.dtype, "B": options.batch,
                "N_q": options.queries, "N_k": options.keys, "block": block, "warps": warps, "stages": stages,
                "registers": registers, "chosen": trial.chosen, "error": error,
                "milliseconds": times and times.to_dict(), "typical": times and times.typical,
            }
        )  # fmt: skip
        result = f"  refused: {error}" if times is None else f"{times.typical:9.3f} ms"
        mark = "  <- the rule" if trial.chosen else ""
        print(
            f"{trial.rule:15} r={trial.rank:<3} d={trial.d:<3} block={block:<3} warps={warps} stages={stages} "
            f"{result}{mark}",
            flush=True,
        )


if __name__ == "__main__":
    main()
