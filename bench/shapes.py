"""Which Triton kernels the package launches for a shape, beside Nyström attention's: what `bench.resources` compiles.

Each function calls forward and backward as the operators do, on tensors without memory; the launches are recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from srm_kernels.conditioning import SOLVERS_OF_KERNELS
from srm_kernels.options import LandmarkOptions, QuerySides, SolveOptions

if TYPE_CHECKING:
    import torch


class Maker(Protocol):
    """Makes a tensor of a shape and dtype."""

    def __call__(self, *shape: int, dtype: torch.dtype) -> torch.Tensor: ...


def without_memory(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the meta device."""
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


class Schedule(NamedTuple):
    """A schedule: (C_i, h = w) of the maps its links read, H, d and r, the dtype's name, and which road they take."""

    maps: tuple[tuple[int, int], ...]
    heads: int
    d: int
    rank: int
    dtype: str
    dyt: bool
    statistics: bool = True
    qk_norm: str | None = "keys"


class System(NamedTuple):
    """One landmark system: r, d and the solver."""

    rank: int
    d: int
    solver: str
    dtype: str = "float32"


class Choice(NamedTuple):
    """Landmarks alone: r of N_k keys of width d, the dtype's name and the method."""

    rank: int
    d: int
    keys: int
    dtype: str
    method: str


# The default schedule of pvt_v2_b2 at 512² and the widest and narrowest stages of the four backbones, both roads, other
# heads, and grids that P = 8 does not divide.
PVT = ((64, 128), (128, 64), (320, 32))
SCHEDULES = (
    Schedule(PVT, 8, 32, 64, "bfloat16", dyt=False),
    Schedule(PVT, 8, 32, 64, "bfloat16", dyt=True),
    Schedule(((24, 37),), 8, 32, 64, "float16", dyt=False, statistics=False),
    Schedule(PVT, 8, 32, 64, "bfloat16", dyt=True, statistics=False),
    Schedule(((960, 16), (16, 128)), 8, 32, 64, "float32", dyt=False),
    Schedule(((96, 50),), 4, 24, 40, "float32", dyt=True, qk_norm="both"),
    Schedule(((128, 64),), 4, 64, 128, "bfloat16", dyt=False),
    Schedule(((128, 64),), 2, 128, 64, "float16", dyt=True),
    Schedule(((960, 32),), 8, 32, 64, "float32", dyt=True),
    Schedule(((128, 64),), 4, 64, 64, "float32", dyt=True),
    Schedule(PVT, 8, 32, 64, "bfloat16", dyt=False, statistics=False),
    Schedule(PVT, 8, 32, 64, "float16", dyt=True),
)
SYSTEMS = tuple(
    System(rank, d, solver)
    for rank, d in ((64, 32), (64, 64), (32, 32), (128, 128))
    for solver in SOLVERS_OF_KERNELS
)
CHOICES = (
    Choice(64, 32, 256, "bfloat16", "leverage"),
    Choice(64, 32, 256, "bfloat16", "pivoted_cholesky"),
    Choice(64, 64, 4096, "float32", "leverage"),
)


def neck(case: Schedule, make: Maker = without_memory, batch: int = 2) -> None:
    """A schedule, its key sides' projections and everything behind it: scale, gate, pooling."""
    import torch

    from srm_kernels.gate import kernels as gate
    from srm_kernels.neck import backward_kernels as backward
    from srm_kernels.neck import end_kernels as ends
    from srm_kernels.neck import kernels
    from srm_kernels.pool import kernels as pool
    from srm_kernels.scale import kernels as scale

    kind = getattr(torch, case.dtype)
    C, B, P, L = case.heads * case.d, batch, 8, len(case.maps)

    def tensor(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return make(*shape, dtype=dtype)

    def wide(*shape: int) -> torch.Tensor:
        return tensor(*shape, dtype=torch.float32)

    features = [tensor(B, channels, side, side) for channels, side in case.maps]
    keys = [wide(B, case.heads, case.rank, case.d) for _ in case.maps]
    align = [tensor(C, channels) for channels, _ in case.maps], [tensor(C)] * L
    square, targets = [tensor(C, C)] * L, list(range(L))
    dyt = [[tensor(1)] * L, [tensor(C)] * L, [tensor(C)] * L] if case.dyt else [[]] * 3
    xs = keys if case.statistics else []
    sides = QuerySides(features, *align, *dyt, square, keys, xs, targets, P, case.d**-0.5, case.qk_norm)
    maps, logits, cap = tensor(B, 3, C, P, P), tensor(B, 3), wide(1)
    y = tensor(B, case.heads, case.maps[0][1] ** 2, case.d)
    theta = [wide(case.heads)] * L
    tokens = tensor(B, 256, C)
    ends.project_sources(tokens, square, square, *dyt, tensor(C))
    if case.dyt:
        squashing = [group[0] for group in dyt]
        scale.dyt(tokens, *squashing)
        scale.dyt_backward([tokens], [], tokens, *squashing)
    results = kernels.pooled_links(sides)
    backward.pooled_links_backward(results[:2], results, sides)
    ends.merge_links(results[1], results[0], keys, *align, square, theta, [wide()] * L, targets)
    scale.tau_loss(theta, theta, 1.0, 1e-6)
    moments = scale.rms_scale(y)
    scale.rms_scale_backward(moments, moments, y)
    hidden, biases = [tensor(B, C // 4, P, P)] * 3, [tensor(C // 4)] * 3
    gate.biased_gelu(hidden, biases)
    gate.gate_logits(hidden, biases, [tensor(1, C // 4)] * 3, [tensor(1)] * 3)
    fusion = gate.gated_fusion(maps, logits, cap, 1.0, 1.0, 1e-6)
    gate.gated_fusion_backward(fusion, fusion, maps, logits, cap, 1.0, 1.0, 1e-6)
    losses = gate.gate_losses(fusion[1], 0.7)
    gate.gate_losses_backward(losses, losses, fusion[1], 0.7)
    pooled = pool.adaptive_pool(features[0], P)
    pool.adaptive_pool_backward([pooled], [], features[0], P)


def solve(case: System) -> None:
    """The landmark solve alone."""
    import torch

    from srm_kernels.conditioning import kernels

    logits = torch.empty(4, case.rank, case.rank, device="meta")
    rhs = torch.empty(4, case.rank, case.d, device="meta")
    arguments = (logits, rhs, SolveOptions(solver=case.solver))
    results = kernels.landmark_solve(*arguments)
    kernels.landmark_solve_backward(results[:1], results, *arguments)


def choose(case: Choice) -> None:
    """Leverage scores alone, and landmarks."""
    import torch

    from srm_kernels.landmarks import kernels

    key = torch.empty(2, 4, case.keys, case.d, dtype=getattr(torch, case.dtype), device="meta")
    kernels.select_landmarks(key, None, LandmarkOptions(case.rank, case.method), case.d**-0.5)
    if case.method == "leverage":
        kernels.ridge_leverage_scores(key, 1e-3)
