"""Compare the times of several implementations of attention: `python -m bench.attention`.

`default` is Nyström attention with the default backend. The other implementations are

- `exact`: exact attention by torch's fused kernel;
- `triton`: Nyström attention with the backend `triton`, on a GPU only;
- `reference`: Nyström attention in eager PyTorch, with Cholesky as the solver;
- `svd`: the same as `reference`, with `torch.linalg.svd` as the solver;
- `torch`: Nyström attention by two calls of torch's fused attention, Y = SDPA(Q, K̃, X) and R V = SDPA(K̃, K, V), with
  Cholesky as the solver; on a CPU, the solver runs in C++ if this package's C++ library is built;
- with --compile, also each implementation, including `default`, under `torch.compile`.

All implementations are timed in alternation: each round calls every implementation once. The results are
ratios of median times of one run. Do not compare times of different runs, because the speed of the machine can
change between runs. On a GPU, the calls are queued, and CUDA events measure the time of each call. On a CPU,
CPU time is measured if torch uses one thread, otherwise wall-clock time.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.harness import Call, Recorder, attention_inputs, timing_parser
from srm_kernels import backends, full_attention, nystrom_attention
from srm_kernels.attention import reference, sdpa
from srm_kernels.landmarks import methods as landmarks
from srm_kernels.options import LandmarkOptions, SolveOptions
from srm_model.profiling import Effort, Times, measure_together
from srm_model.profiling.memory import bytes_of, peak
from srm_model.profiling.traces import most_expensive

# (N_q, N_k, target). The target is the largest time of the default backend divided by the time of exact attention.
SHAPES = ((16_384, 256, 1 / 3), (65_536, 1_024, 1 / 6), (65_536, 4_096, 1 / 20))
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def times_of(calls: dict[str, Call], options: argparse.Namespace, least_repeats: int = 1) -> dict[str, Times]:
    """Time the calls in alternation: each round runs every call once."""
    effort = Effort(options.warmup, max(options.repeats, least_repeats), options.seconds)
    return measure_together(calls, torch.device(options.device), effort)


def tokens(queries: int, keys: int, options: argparse.Namespace) -> list[Tensor]:
    """Return Q, K and V. The three tensors require gradients if the backward pass is timed too."""
    shape = (options.batch, options.heads)
    return attention_inputs(shape, queries, keys, options.width, options, gradients=options.backward)


def rivals(options: argparse.Namespace) -> dict[str, Attention]:
    """Return a dictionary from names to implementations. Speedups are relative to `exact`."""
    nystrom = partial(nystrom_attention, rank=options.rank, qk_norm="keys")
    calls: dict[str, Attention] = {"exact": partial(full_attention, qk_norm="keys"), "default": nystrom}
    if options.device == "cuda":
        calls["triton"] = partial(nystrom, backend="triton")
    calls["reference"] = partial(nystrom, backend="reference")
    calls["svd"] = partial(nystrom, backend="reference", solver="svd")
    calls["torch"] = partial(nystrom, backend="torch")
    if options.compile:
        visible = {
            "reference": plain(reference.nystrom_attention, options.rank),
            "svd": plain(reference.nystrom_attention, options.rank, "svd"),
            "torch": plain(sdpa.nystrom_attention, options.rank),
        }
        for name, call in (calls | visible).items():
            calls[f"{name} compiled"] = torch.compile(call, dynamic=False)
    return calls


def plain(function: Callable[..., Tensor], rank: int, solver: str = "cholesky") -> Attention:
    """Return a function that computes attention without custom operators, so that torch.compile can trace into it.

    The returned function chooses the landmarks and then calls `function`, the body of a custom operator.
    """

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = key.shape[-1] ** -0.5
        choice = LandmarkOptions(rank).clamped(key.shape[2])
        normalised = reference.normalised_key(key.detach(), "keys")
        chosen = landmarks.select_landmarks(normalised, None, choice, scale)
        return function(query, key, value, chosen, scale, "keys", "fp32", SolveOptions(solver=solver))

    return call


def compare(queries: int, keys: int, options: argparse.Namespace) -> dict[str, Times]:
    """Time each implementation at one shape, either forward only or forward and backward."""
    inputs = tokens(queries, keys, options)
    weight = torch.ones_like(inputs[0])

    def both(attention: Attention) -> object:
        return torch.autograd.grad(attention(*inputs), inputs, weight)

    calls: dict[str, Call] = {
        name: partial(both, attention) if options.backward else partial(attention, *inputs)
        for name, attention in rivals(options).items()
    }
    return times_of(calls, options)


def row_of(
    queries: int, keys: int, times: dict[str, Times], options: argparse.Namespace
) -> dict[str, object]:
    """Return the row of one shape. Its entry `typical` has the printed time of each implementation, in ms."""
    return {
        "B": options.batch,
        "H": options.heads,
        "N_q": queries,
        "N_k": keys,
        "r": options.rank,
        "d": options.width,
        "dtype": options.dtype,
        "direction": "backward" if options.backward else "forward",
        "repeats": options.repeats,
        "milliseconds": {name: each.to_dict() for name, each in times.items()},
        "typical": {name: each.typical for name, each in times.items()},
        "error": None,
    }


def query_side(options: argparse.Namespace) -> str:
    """Time the query side alone at N_q = 16,384, and compare its memory throughput with the throughput of a copy.

    The query side of Nyström attention and the copy of a large tensor are timed in alternation. On a GPU, the host
    launches the query side while the previous copy is still running, so the measured time includes no launch
    overhead. The copy also evicts Q from the caches.
    """
    from srm_kernels.attention import _query_side

    device = torch.device(options.device)
    query = tokens(16_384, 1, options)[0].detach()
    keys, x = (torch.randn((*query.shape[:2], options.rank, options.width), device=device) for _ in range(2))
    backend = "triton" if options.device == "cuda" else "reference"
    source = torch.empty(2**29 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "query side": lambda: _query_side(query, keys, x, None, 0.2, "keys", False, backend),
    }
    copying, attending = (times.typical for times in times_of(calls, options, 20).values())
    share = (bytes_of(query) / attending) / (bytes_of(source) / copying)
    return (
        f"query side ({backend}), N_q={query.shape[2]}, B={options.batch}: {attending:.3f} ms, "
        f"{100 * share:.0f} % of copy bandwidth"
    )


def peak_memory(queries: int, keys: int, options: argparse.Namespace) -> str:
    """Return a line with the peak memory of each implementation's forward pass, without inputs and output."""
    inputs = [x.detach() for x in tokens(queries, keys, options)]
    found = []
    for name, call in rivals(options).items():
        above = peak(partial(call, *inputs), torch.device(options.device)).above - bytes_of(inputs[0])
        found.append(f"{name} {above / 2**20:.1f}")
    return f"peak MiB beyond Y at {queries} × {keys}: " + ", ".join(found)


def kernels(queries: int, keys: int, options: argparse.Namespace) -> str:
    """List the ten most expensive kernels or operators of one call.

    On a GPU, the implementation `triton` is called and its kernels are listed. On a CPU, the implementation `default`
    is called and its PyTorch operators are listed.
    """
    cuda = options.device == "cuda"
    inputs = tokens(queries, keys, options)
    call = rivals(options)["triton" if cuda else "default"]

    def once() -> None:
        y = call(*inputs)
        if options.backward:
            torch.autograd.grad(y, inputs, torch.ones_like(y))
        if cuda:
            torch.cuda.synchronize()

    once()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        once()
    return most_expensive(profiled, cuda=cuda)


def main() -> None:
    """Print a line for each shape; `!` marks a missed target."""
    parser = timing_parser("attention", __doc__, repeats=7, warmup=2, seconds=60.0, out=None)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=32, help="d, the width of a head")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--compile", action="store_true", help="time everything under torch.compile too")
    parser.add_argument(
        "--kernels", action="store_true", help="list the most expensive kernels of the fused form"
    )
    parser.add_argument("--shapes", type=int, nargs="*", help="measure these: N_q N_k N_q N_k …")
    options = parser.parse_args()
    recorder = options.out and Recorder(options.out, "attention", options.device, options.note)
    processor = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(
        f"torch {torch.__version__}, {processor}, {torch.get_num_threads()} threads, {options.dtype}, "
        f"B={options.batch} H={options.heads} d={options.width} r={options.rank}, "
        f"{'forward and backward' if options.backward else 'forward'}, solver cholesky; "
        f"triton: {backends()['triton'].reason}"
    )
    given = options.shapes or ()
    shapes = [(*pair, None) for pair in zip(given[::2], given[1::2], strict=True)] or SHAPES
    for queries, keys, target in shapes:
        measured = compare(queries, keys, options)
        if recorder:
            recorder.write(row_of(queries, keys, measured, options))
        times = {name: each.typical for name, each in measured.items()}
        exact = times.pop("exact")
        speedups = ", ".join(f"{name} {exact / each:.2f}x" for name, each in times.items())
        missed = target is not None and times["default"] > target * exact
        mark = f"  ! target of default: {1 / target:.0f}x" if missed else ""
        print(f"{queries:8} × {keys:<6} exact {exact:.3f} ms; speedup: {speedups}{mark}", flush=True)
        if options.device == "cuda" and not options.backward:
            print("         " + peak_memory(queries, keys, options))
        if options.kernels:
            print(kernels(queries, keys, options), flush=True)
    if not options.backward:
        print(query_side(options), flush=True)


if __name__ == "__main__":
    main()
