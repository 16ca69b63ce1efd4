"""Which Triton kernels the package launches for a shape, beside Nyström attention's: what `bench.resources` compiles.

Each function calls forward and backward as the operators do, on tensors without memory; the launches are recorded.
"""

from __future__ import annotations

from typing import NamedTuple

SOLVERS = ("cholesky", "lu", "svd", "auto", "neumann")


class Link(NamedTuple):
    """One link: C_i, h = w, H, d and r of its queries, the dtype's name, and which road they take."""

    channels: int
    side: int
    heads: int
    d: int
    rank: int
    dtype: str
    dyt: bool
    statistics: bool = True


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


# The first two are the article's widest stage by both roads, the rest the widest and narrowest stages of the four
# backbones, other heads, and grids that P = 8 does not divide.
LINKS = (
    Link(64, 128, 8, 32, 64, "bfloat16", dyt=False),
    Link(64, 128, 8, 32, 64, "bfloat16", dyt=True),
    Link(24, 37, 8, 32, 64, "float16", dyt=False, statistics=False),
    Link(384, 32, 8, 32, 64, "bfloat16", dyt=False),
    Link(960, 16, 8, 32, 64, "float32", dyt=False),
    Link(96, 50, 4, 24, 40, "float32", dyt=True),
    Link(128, 64, 4, 64, 128, "bfloat16", dyt=False),
    Link(128, 64, 2, 128, 64, "float16", dyt=True),
)
SYSTEMS = tuple(System(rank, d, solver) for rank, d in ((64, 32), (64, 64), (32, 32)) for solver in SOLVERS)
CHOICES = (
    Choice(64, 32, 256, "bfloat16", "leverage"),
    Choice(64, 32, 256, "bfloat16", "pivoted_cholesky"),
    Choice(64, 64, 4096, "float32", "leverage"),
)


def neck(case: Link) -> None:
    """A link's query side, and everything behind it: statistics, gate, pooling."""
    import torch

    from srm_kernels.gate import kernels as gate
    from srm_kernels.neck import kernels
    from srm_kernels.pool import kernels as pool
    from srm_kernels.scale import kernels as scale

    kind = getattr(torch, case.dtype)
    C, B, P = case.heads * case.d, 2, 8

    def tensor(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def wide(*shape: int) -> torch.Tensor:
        return tensor(*shape, dtype=torch.float32)

    features = tensor(B, case.channels, case.side, case.side)
    keys = wide(B, case.heads, case.rank, case.d)
    dyt = [tensor(1), tensor(C), tensor(C)] if case.dyt else [None] * 3
    arguments = (
        features, tensor(C, case.channels), tensor(C), *dyt, tensor(C, C), keys,
        keys if case.statistics else None, P, case.d**-0.5, "keys",
    )  # fmt: skip
    maps, logits, cap = tensor(B, 3, C, P, P), tensor(B, 3), wide(1)
    y = tensor(B, case.heads, case.side**2, case.d)
    results = kernels.pooled_probabilities(*arguments)
    kernels.pooled_probabilities_backward(results[:1], results, *arguments)
    moments = scale.rms_scale(y)
    scale.rms_scale_backward(moments, moments, y)
    fusion = gate.gated_fusion(maps, logits, cap, 1.0, 1e-6)
    gate.gated_fusion_backward(fusion, fusion, maps, logits, cap, 1.0, 1e-6)
    losses = gate.gate_losses(fusion[1], 0.7)
    gate.gate_losses_backward(losses, losses, fusion[1], 0.7)
    pooled = pool.adaptive_pool(features, P)
    pool.adaptive_pool_backward([pooled], [], features, P)


def solve(case: System) -> None:
    """The landmark solve alone; `svd` and `auto` go backward as `lu`."""
    import torch

    from srm_kernels.conditioning import kernels

    logits = torch.empty(4, case.rank, case.rank, device="meta")
    rhs = torch.empty(4, case.rank, case.d, device="meta")
    arguments = (logits, rhs, 1e-3, case.solver, False, 1e6, 3, True)
    results = kernels.landmark_solve(*arguments)
    if case.solver not in ("svd", "auto"):
        kernels.landmark_solve_backward(results[:1], results, *arguments)


def choose(case: Choice) -> None:
    """Leverage scores alone, and landmarks."""
    import torch

    from srm_kernels.landmarks import kernels

    key = torch.empty(2, 4, case.keys, case.d, dtype=getattr(torch, case.dtype), device="meta")
    kernels.select_landmarks(key, None, case.rank, case.method, 1e-3, case.d**-0.5)
    if case.method == "leverage":
        kernels.ridge_leverage_scores(key, 1e-3)
