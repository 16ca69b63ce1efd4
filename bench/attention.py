"""Nyström attention against its rivals, as ratios of medians in one run: `python -m bench.attention`.

Rivals: exact attention (torch's fused kernel), the same algorithm in eager PyTorch with Cholesky (`reference`) and with
`torch.linalg.svd` (`svd`), the identity Y = SDPA(Q, K̃, X), R V = SDPA(K̃, K, V) with torch's Cholesky (`torch`), and
all of them under `torch.compile` with --compile. Calls are interleaved and queued. On a GPU the times are CUDA events;
on a CPU wall clock, or with one thread the time that it had a processor, and only their ratio means something.
`--crossover` gives tables of Nyström against exact attention over N_k and B instead, losses marked.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.harness import DTYPES, Recorder
from srm_kernels import backends, full_attention, nystrom_attention
from srm_kernels.attention import reference, sdpa
from srm_kernels.landmarks import reference as landmarks
from srm_kernels.options import LandmarkOptions, SolveOptions
from srm_model.profiling.timing import Effort, Times, measure_together
from srm_model.profiling.traces import most_expensive

SHAPES = (
    (16_384, 256, 1 / 3),
    (65_536, 1_024, 1 / 6),
    (65_536, 4_096, 1 / 20),
)  # N_q, N_k, most of exact's time
CROSSOVER_KEYS = (49, 64, 100, 144, 196, 256, 400, 576, 784, 1_024, 2_048, 4_096)
CROSSOVER_BATCHES = (1, 2, 4, 8, 16, 32)
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def times_of(
    calls: dict[str, Callable[[], object]], options: argparse.Namespace, repeats: int | None = None
) -> dict[str, Times]:
    """Times of each call, all of them interleaved."""
    effort = Effort(options.warmup, repeats or options.repeats, options.seconds)
    return measure_together(calls, torch.device(options.device), effort)


def tokens(queries: int, keys: int, batch: int, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V, standard normal; they ask for gradients where the backward pass is timed too."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    make = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn((batch, options.heads, n, options.width), generator=make, device=device)
        .to(dtype)
        .requires_grad_(options.backward)
        for n in (queries, keys, keys)
    )
    return query, key, value


def rivals(options: argparse.Namespace) -> dict[str, Call]:
    """What is compared, by name; `exact` is the measure."""

    def nystrom(backend: str | None, **more: object) -> Call:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            y = nystrom_attention(
                query,
                key,
                value,
                options.rank,
                qk_norm="keys",
                backend=backend,
                **more,  # type: ignore[arg-type]
            )
            assert isinstance(y, Tensor)
            return y

        return call

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return full_attention(query, key, value, qk_norm="keys")

    calls: dict[str, Call] = {"exact": exact, "default": nystrom(None)}
    if options.device == "cuda":
        calls["triton"] = nystrom("triton")
    calls["reference"] = nystrom("reference")
    calls["svd"] = nystrom("reference", solver="svd")
    calls["torch"] = nystrom("torch")
    if options.compile:
        visible = {
            "reference": plain(reference.nystrom_attention, options.rank),
            "svd": plain(reference.nystrom_attention, options.rank, "svd"),
            "torch": plain(sdpa.nystrom_attention, options.rank),
        }
        calls |= {
            f"{name} compiled": torch.compile(call, dynamic=False) for name, call in (calls | visible).items()
        }
    return calls


def plain(function: Callable[..., Tensor], rank: int, solver: str = "cholesky") -> Call:
    """The body of an operator of plain PyTorch, landmarks included: as an operator torch.compile would not look in."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = 1 / math.sqrt(key.shape[-1])
        normalised = reference.normalised_key(key.detach(), "keys")
        chosen = landmarks.select_landmarks(
            normalised, None, LandmarkOptions(rank).clamped(key.shape[2]), scale
        )
        return function(query, key, value, chosen, scale, "keys", "fp32", SolveOptions(solver=solver))

    return call


def compare(
    queries: int, keys: int, batch: int, options: argparse.Namespace, names: set[str] | None = None
) -> dict[str, Times]:
    """Times of each rival at one shape, forward, or forward and backward."""
    inputs = tokens(queries, keys, batch, options)
    weight = torch.ones_like(inputs[0])

    def timed(call: Call) -> Callable[[], object]:
        if not options.backward:
            return lambda: call(*inputs)
        return lambda: torch.autograd.grad(call(*inputs), inputs, weight)

    calls = {name: timed(call) for name, call in rivals(options).items() if names is None or name in names}
    return times_of(calls, options)


def row_of(
    queries: int, keys: int, times: dict[str, Times], options: argparse.Namespace
) -> dict[str, object]:
    """One shape as JSON values; `typical` is what is told of each rival, in milliseconds."""
    return {
        "B": options.batch,
        "H": options.heads,
        "N_q": queries,
        "N_k": keys,
        "r": options.rank,
        "d": options.width,
        "dtype": next(name for name, kind in DTYPES.items() if kind == getattr(torch, options.dtype)),
        "direction": "backward" if options.backward else "forward",
        "repeats": options.repeats,
        "milliseconds": {name: each.to_dict() for name, each in times.items()},
        "typical": {name: each.typical for name, each in times.items()},
        "error": None,
    }


def query_side(options: argparse.Namespace) -> str:
    """The query side alone at N_q = 16,384: the share of the copy bandwidth at which Q is read and Y written.

    The two are timed in turn: while a device copies, the next launch is queued, and its caches forget Q.
    """
    from srm_kernels.attention import _query_side

    device = torch.device(options.device)
    query = tokens(16_384, 1, options.batch, options)[0].detach()
    keys, x = (torch.randn((*query.shape[:2], options.rank, options.width), device=device) for _ in range(2))
    backend = "triton" if options.device == "cuda" else "reference"
    source = torch.empty(2**29 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    measured = times_of(
        {
            "copy": lambda: target.copy_(source),
            "query side": lambda: _query_side(query, keys, x, None, 0.2, "keys", False, backend),
        },
        options,
        max(options.repeats, 20),
    )
    times = {name: each.typical for name, each in measured.items()}
    moved = {"copy": 2 * source.numel(), "query side": 2 * query.numel() * query.element_size()}
    rate = {name: moved[name] / times[name] for name in moved}
    return (
        f"query side ({backend}), N_q={query.shape[2]}, B={options.batch}: {times['query side']:.3f} ms, "
        f"{100 * rate['query side'] / rate['copy']:.0f} % of copy bandwidth"
    )


def peak_memory(queries: int, keys: int, options: argparse.Namespace) -> str:
    """Bytes at the peak of a forward pass beyond inputs and output, of each implementation, on a GPU."""
    inputs = [x.detach() for x in tokens(queries, keys, options.batch, options)]
    found = []
    for name, call in rivals(options).items():
        call(*inputs)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = call(*inputs)
        extra = torch.cuda.max_memory_allocated() - before - y.numel() * y.element_size()
        found.append(f"{name} {extra / 2**20:.1f}")
    return f"peak MiB beyond Y at {queries} × {keys}: " + ", ".join(found)


def kernels(queries: int, keys: int, options: argparse.Namespace) -> str:
    """The ten most expensive kernels of one call of the fused form, by the profiler; on a CPU its operators."""
    on_gpu = options.device == "cuda"
    inputs = tokens(queries, keys, options.batch, options)
    call = rivals(options)["triton" if on_gpu else "default"]

    def once() -> None:
        y = call(*inputs)
        if options.backward:
            torch.autograd.grad(y, inputs, torch.ones_like(y))
        if on_gpu:
            torch.cuda.synchronize()

    once()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        once()
    return most_expensive(profiled, cuda=on_gpu)


def crossover(options: argparse.Namespace) -> None:
    """Exact attention's time over Nyström's, by the kernels too on a GPU; below 1 it is a loss, and marked."""
    names = ("default", "triton") if options.device == "cuda" else ("default",)
    rows: dict[str, list[str]] = {name: [] for name in names}
    for keys in CROSSOVER_KEYS:
        ratios: dict[str, list[float]] = {name: [] for name in names}
        for batch in CROSSOVER_BATCHES:
            times = compare(options.queries, keys, batch, options, {"exact", *names})
            for name in names:
                ratios[name].append(times["exact"].typical / times[name].typical)
        for name in names:
            cells = (f"{ratio:7.2f}{'-' if ratio < 1 else ' '}" for ratio in ratios[name])
            rows[name].append(f"{keys:6} {' '.join(cells)}")
            print(f"{name:8} {rows[name][-1]}", file=sys.stderr, flush=True)
    direction = "forward and backward" if options.backward else "forward"
    for name in names:
        print(f"exact / {name} at N_q={options.queries}, {direction}; - marks a loss")
        print(f"{'N_k':>6} " + " ".join(f"{f'B={batch}':>7} " for batch in CROSSOVER_BATCHES))
        print("\n".join(rows[name]), flush=True)


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
    parser.add_argument("--seconds", type=float, default=60.0, help="of measured calls a shape, about")
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--compile", action="store_true", help="rivals under torch.compile too")
    parser.add_argument("--kernels", action="store_true", help="where the fused form's time goes, too")
    parser.add_argument("--crossover", action="store_true", help="the table over N_k and B instead")
    parser.add_argument("--queries", type=int, default=16_384, help="N_q of the crossover table")
    parser.add_argument("--shapes", type=int, nargs="*", help="N_q N_k N_q N_k …, instead of the usual ones")
    parser.add_argument("--out", help="also keep rows, in OUT/<gpu or cpu>/attention.jsonl")
    parser.add_argument("--note", help="kept in every row, and told by the report")
    options = parser.parse_args()
    recorder = options.out and Recorder(options.out, "attention", torch.device(options.device), options.note)
    processor = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(
        f"torch {torch.__version__}, {processor}, {torch.get_num_threads()} threads, {options.dtype}, "
        f"B={options.batch} H={options.heads} d={options.width} r={options.rank}, "
        f"{'forward and backward' if options.backward else 'forward'}, solver cholesky; "
        f"triton: {backends()['triton'].reason}"
    )
    if options.crossover:
        crossover(options)
        return
    given = options.shapes or ()
    shapes = [(*pair, None) for pair in zip(given[::2], given[1::2], strict=True)] or SHAPES
    for queries, keys, limit in shapes:
        measured = compare(queries, keys, options.batch, options)
        if recorder:
            recorder.write(row_of(queries, keys, measured, options))
        times = {name: each.typical for name, each in measured.items()}
        measure = times.pop("exact")
        shares = [f"{name} 1/{measure / each:.2f}" for name, each in times.items()]
        over = "" if limit is None or times["default"] <= limit * measure else "  default over its limit of "
        if over:
            over += f"1/{1 / limit:.0f}"
        print(f"{queries:8} × {keys:<6} exact {measure:.3f} ms; of it: {', '.join(shares)}{over}", flush=True)
        if options.device == "cuda" and not options.backward:
            print("         " + peak_memory(queries, keys, options))
        if options.kernels:
            print(kernels(queries, keys, options), flush=True)
    if not options.backward:
        print(query_side(options), flush=True)


if __name__ == "__main__":
    main()
