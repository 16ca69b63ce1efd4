"""Shapes for which `bench.resources` compiles the Triton kernels of the package, and functions that launch the kernels.

The functions launch the forward and backward kernels in the same way as the operators. By default, the
tensors are on the meta device, because `bench.resources` only records the launches and runs no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from srm_kernels.conditioning import SOLVERS_OF_KERNELS
from srm_kernels.landmarks import METHODS_OF_KERNELS
from srm_kernels.options import KeySide, LandmarkOptions, QuerySides, SolveOptions


def without_memory(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor on the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Case(NamedTuple):
    """A case of Nyström attention: r, d, N_k, the name of the dtype, and options that decide which kernels run."""

    rank: int
    d: int
    keys: int = 256
    dtype: str = "bfloat16"
    method: str = "leverage"
    solver: str = "cholesky"
    qk_norm: str | None = "both"


class Schedule(NamedTuple):
    """The links of a neck, and options that decide which kernels run.

    `maps` has one pair per link: the channels C_i and the side h = w of the square map that the link reads.
    """

    maps: tuple[tuple[int, int], ...]
    heads: int
    d: int
    rank: int
    dtype: str
    dyt: bool
    statistics: bool = True
    qk_norm: str | None = "keys"


class System(NamedTuple):
    """A landmark system, given by r, d and the solver."""

    rank: int
    d: int
    solver: str
    dtype: str = "float32"


class Choice(NamedTuple):
    """A choice of r landmarks among N_k keys of width d: r, d, N_k, the name of the dtype, and the method."""

    rank: int
    d: int
    keys: int
    dtype: str
    method: str


# The first cases launch every kernel, with every option, at the largest size at which no kernel may spill.
# Smaller sizes follow, because the launch rules have other branches for them. The last cases are larger sizes, at which
# kernels may spill.
CASES = (
    Case(64, 64, keys=4096),
    Case(64, 64, dtype="float32", method="pivoted_cholesky"),
    Case(64, 64, dtype="float16", solver="lu"),
    Case(64, 64, method="pivoted_cholesky"),
    Case(64, 64),
    Case(64, 64, keys=4096, dtype="float16"),
    Case(64, 64, keys=4096, dtype="float32", solver="lu"),
    Case(64, 32),
    Case(64, 32, keys=4096),
    Case(64, 32, dtype="float32"),
    Case(64, 32, dtype="float16"),
    Case(32, 64),
    Case(32, 64, dtype="float32"),
    Case(32, 64, dtype="float16"),
    Case(32, 32, solver="lu"),
    Case(64, 32, method="uniform"),
    Case(16, 24, dtype="float32", qk_norm=None),
    Case(128, 128, dtype="float32"),
    Case(128, 128, dtype="float16", method="pivoted_cholesky"),
    Case(128, 128, solver="lu"),
    Case(64, 128, dtype="float32"),
    Case(128, 64),
    Case(32, 128, dtype="float16"),
    Case(128, 32, dtype="float32"),
    Case(128, 128),
)
# The first schedules are the default links with pvt_v2_b2 at 512². The others cover the widest and narrowest stages of
# the four backbones, both values of `dyt`, other values of H and d, and grids that P = 8 does not divide.
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


def attention(case: Case) -> None:
    """Launch Nyström attention.

    For a case with the method "pivoted_cholesky" and the dtype bfloat16 or float16, also launch the kernels of two
    standalone operators: `ridge_leverage_scores`, and `select_landmarks` with every method that has kernels.
    """
    from srm_kernels.attention import key_kernels, query_kernels
    from srm_kernels.conditioning import kernels as conditioning
    from srm_kernels.landmarks import kernels as landmarks

    shapes = ((2, 4, tokens, case.d) for tokens in (16_384, case.keys, case.keys))
    query, key, value = (without_memory(*shape, dtype=getattr(torch, case.dtype)) for shape in shapes)
    tau, scale = without_memory(4), case.d**-0.5
    side = KeySide(key, value, None, LandmarkOptions(case.rank, case.method), scale, case.qk_norm)
    if case.solver == "cholesky":
        results = key_kernels.landmark_context(side, 1e-3)
        key_kernels.landmark_context_backward(results[:2], results, side, 1e-3)
    else:
        results = key_kernels.landmark_blocks(side)
        system = (*results[1:3], SolveOptions(solver=case.solver))
        solved = conditioning.landmark_solve(*system)
        conditioning.landmark_solve_backward(solved[:1], solved, *system)
        key_kernels.landmark_blocks_backward(results[:3], results, side)
    if case.method == "pivoted_cholesky" and case.dtype != "float32":
        landmarks.ridge_leverage_scores(key, 1e-3)
        for method in METHODS_OF_KERNELS:
            landmarks.select_landmarks(key, None, LandmarkOptions(case.rank, method), scale)
    arguments = (query, results[0], results[0], tau, scale, case.qk_norm, True)
    outputs = query_kernels.landmark_attention(*arguments)
    query_kernels.landmark_attention_backward(outputs[:1], outputs, *arguments)


def neck(case: Schedule, make: Callable[..., Tensor] = without_memory, batch: int = 2) -> None:
    """Launch the kernels of a neck: projections of the sources, links, scale, gate and pooling.

    The choice of landmarks and the solve are not launched, because the function `attention` launches both.

    Args:
        case: The links.
        make: Function (*shape, dtype=…) → tensor.
        batch: B.
    """
    from srm_kernels.gate import kernels as gate
    from srm_kernels.neck import backward_kernels as backward
    from srm_kernels.neck import end_kernels as ends
    from srm_kernels.neck import forward_kernels as forward
    from srm_kernels.pool import kernels as pool
    from srm_kernels.scale import kernels as scale

    kind = getattr(torch, case.dtype)
    C, B, P, L = case.heads * case.d, batch, 8, len(case.maps)

    def tensor(*shape: int) -> Tensor:
        return make(*shape, dtype=kind)

    def wide(*shape: int) -> Tensor:
        return make(*shape, dtype=torch.float32)

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
    results = forward.pooled_links(sides)
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
    """Launch the landmark solve alone."""
    from srm_kernels.conditioning import kernels

    system = (without_memory(4, case.rank, case.rank), without_memory(4, case.rank, case.d))
    arguments = (*system, SolveOptions(solver=case.solver))
    results = kernels.landmark_solve(*arguments)
    kernels.landmark_solve_backward(results[:1], results, *arguments)


def choose(case: Choice) -> None:
    """Launch `select_landmarks`; if the method is "leverage", also launch `ridge_leverage_scores`."""
    from srm_kernels.landmarks import kernels

    key = without_memory(2, 4, case.keys, case.d, dtype=getattr(torch, case.dtype))
    kernels.select_landmarks(key, None, LandmarkOptions(case.rank, case.method), case.d**-0.5)
    if case.method == "leverage":
        kernels.ridge_leverage_scores(key, 1e-3)
