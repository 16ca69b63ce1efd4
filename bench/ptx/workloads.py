"""Launch kernels at the article's shapes, and count their instructions on an emulated GPU.

The shapes are those of one image of 512×512 pixels, with pvt_v2_b2 maps, C = 256, H = 8, r = 64 and the links
4→3, 4→2 and 4→1. In a large grid, only every n-th program runs. If the grid has programs of several kinds,
their proportions stay the same. Programs that do not run leave their part of the results uninitialised.
`_FilledMemory` therefore fills uninitialised memory with valid values when PyTorch allocates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import shapes
from srm_kernels.options import KeySide, LandmarkOptions, SolveOptions

from .device import Launch, emulated_device

HEADS, WIDTH, RANK, QUERIES, KEYS = 8, 32, 64, 128 * 128, 256
LEAST_PROGRAMS = 8  # least number of programs of a grid that run
MOST_STRIDE = 32  # divides the neck's number of programs of each kind except pooling, for one image


class Workload(NamedTuple):
    """Launches that are counted together.

    Attributes:
        name: Name of the workload in the report.
        call: Function that launches the kernels for one image. Its argument is the dtype of tokens and maps.
        batch: Batch size for which times are computed: the instruction counts of one image are multiplied by `batch`.
    """

    name: str
    call: Callable[[torch.dtype], None]
    batch: int = 8


class _FilledMemory(TorchDispatchMode):
    """Fill tensors that PyTorch allocates uninitialised, so that instruction counts do not depend on their old values.

    The emulator runs only some of the programs of each launch (see `sample`). Later launches also read the memory that
    the other programs would have written, so this memory must have valid values.
    Floating-point numbers are random and between 0.5 and 1.5, so they can be used as sums, norms and probabilities.
    They are random and not constant, because the emulator would count matrix products with equal operands as
    repetitions of one product. Integers are valid landmark indices, and distinct for each head.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _UNINITIALISED:
            if made.is_floating_point():
                made.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
            elif made.dtype == torch.int64:
                made.copy_(torch.arange(made.numel()).reshape(made.shape) % RANK)
        return made


_UNINITIALISED = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return standard normal random numbers; calls with the same shape return the same numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def sample(name: str, grid: Sequence[int]) -> list[int] | None:
    """Return the indices of the programs that the emulator runs: every n-th program of the grid.

    n is the largest power of two up to `MOST_STRIDE` with which at least `LEAST_PROGRAMS` programs run. If n is 1, all
    programs run, and the function returns None.
    """
    count = math.prod(grid)
    stride = min(MOST_STRIDE, 1 << max(0, (count // LEAST_PROGRAMS).bit_length() - 1))
    return None if stride == 1 else list(range(stride // 2, count, stride))


def attention(dtype: torch.dtype) -> None:
    """Launch the query side of Nyström attention, forward and backward."""
    from srm_kernels.attention import query_kernels

    query = random(1, HEADS, QUERIES, WIDTH, dtype=dtype)
    keys = random(1, HEADS, RANK, WIDTH, dtype=dtype).float()
    x = random(1, HEADS, RANK, WIDTH, dtype=torch.float32)
    side = (keys, x, torch.ones(HEADS), WIDTH**-0.5, "keys", False)
    results = query_kernels.landmark_attention(query, *side)
    query_kernels.landmark_attention_backward(results[:1], results, query, *side)


def key_sides(links: int, keys: int = KEYS, method: str = "leverage") -> Callable[[torch.dtype], None]:
    """Return a function that launches the forward and backward kernels of the key sides of several links together.

    The key side of a link computes the landmark keys K̃ and the solution X from K and V.

    Args:
        links: Number of links.
        keys: Number of keys of each link.
        method: Method that chooses the landmarks.
    """

    def call(dtype: torch.dtype) -> None:
        from srm_kernels.attention import key_kernels

        key, value = (random(1, links * HEADS, keys, WIDTH, dtype=dtype) for _ in range(2))
        side = (KeySide(key, value, None, LandmarkOptions(RANK, method), WIDTH**-0.5, "keys"), 1e-3)
        results = key_kernels.landmark_context(*side)
        key_kernels.landmark_context_backward(results[:2], results, *side)

    return call


def neck(dyt: bool, statistics: bool) -> Callable[[torch.dtype], None]:
    """Return a function that launches the forward and backward kernels of the fused neck, except its key sides.

    The key side of a link computes the landmark keys K̃ and the solution X from K and V. `key_sides` launches these
    kernels.
    """

    def call(dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        schedule = shapes.Schedule(shapes.PVT, HEADS, WIDTH, RANK, name, dyt=dyt, statistics=statistics)
        shapes.neck(schedule, random, batch=1)

    return call


def solve(dtype: torch.dtype) -> None:
    """Launch the kernels that solve the landmark systems of one link, forward and backward.

    The systems are fp32 for every `dtype`.
    """
    from srm_kernels.conditioning import kernels

    keys = random(HEADS, RANK, WIDTH, dtype=torch.float32)
    system = (keys @ keys.mT * WIDTH**-0.5, keys, SolveOptions())
    results = kernels.landmark_solve(*system)
    kernels.landmark_solve_backward(results[:1], results, *system)


WORKLOADS = (
    Workload("attention", attention),
    Workload("key side", key_sides(1)),
    Workload("key side, B = 1", key_sides(1), batch=1),
    Workload("key side, 1,024 keys", key_sides(1, 1024)),
    Workload("key side, 1,024 keys, B = 1", key_sides(1, 1024), batch=1),
    Workload("neck, key sides", key_sides(3)),
    Workload("neck, key sides, uniform landmarks", key_sides(3, method="uniform")),
    Workload("neck, DyT, training", neck(dyt=True, statistics=True)),
    Workload("neck, DyT, evaluation", neck(dyt=True, statistics=False)),
    Workload("neck, training", neck(dyt=False, statistics=True)),
    Workload("neck, evaluation", neck(dyt=False, statistics=False)),
    Workload("solve", solve),
)


def counted(
    workloads: Iterable[Workload] = WORKLOADS,
    architecture: int = 89,
    dtype: torch.dtype = torch.bfloat16,
    names: set[str] | None = None,
) -> Iterator[tuple[Workload, Launch]]:
    """Yield (workload, launch) for each executed launch; `launch.counters` has the launch's instruction counts.

    Args:
        workloads: Workloads to launch.
        architecture: Compute capability times ten.
        dtype: Dtype of tokens and maps.
        names: Names of the kernels to execute, or None for all.
    """
    for workload in workloads:
        emulated = emulated_device(architecture, check=False, count=True, blocks=sample, names=names)
        with emulated as device, _FilledMemory():
            workload.call(dtype)
        for launch in device.launches:
            yield workload, launch
