"""Arguments of `pooled_links` for tests: a single link, and a small schedule of three links."""

from __future__ import annotations

from typing import Any

import torch
from kernel_rule import DEVICE
from oracle import tokens
from torch import Tensor

from srm_kernels import pooled_links
from srm_kernels.neck import PooledLinks

SHAPES: dict[str, dict[str, Any]] = {
    "square that the grid divides": {"grid": (8, 8), "channels": 16},
    "three to two, one image": {"grid": (12, 8), "b": 1, "d": 24, "channels": 20},
    "odd": {"grid": (7, 13), "b": 3, "heads": 1},
    "two strips of cells": {"grid": (3, 70), "b": 1, "heads": 1},
    "cells wider than a tile": {"grid": (3, 300), "b": 1, "heads": 2, "channels": 2},
    "smaller than the grid": {"grid": (2, 3), "rank": 1},
    "many channels, many landmarks": {"grid": (4, 5), "b": 1, "channels": 100, "rank": 20},
}


def inputs(
    seed: int = 0,
    *,
    b: int = 2,
    heads: int = 2,
    d: int = 8,
    channels: int = 6,
    grid: tuple[int, int] = (9, 13),
    rank: int = 5,
    dtype: torch.dtype = torch.float32,
    dyt: bool = False,
    device: str = DEVICE,
) -> list[Tensor]:
    """Return random tensors F, A, a, W_Q, K̃ and X; with `dyt`, also the three parameters of DyT.

    The scales of the tensors keep the logits of order 1.
    """
    C = heads * d
    shapes = [(b, channels, *grid), (C, channels), (C,), (C, C), (b, heads, rank, d), (b, heads, rank, d)]
    scales = [1, channels**-0.5, 0.1, 2 * C**-0.5, 1, 1]
    made = [
        tokens(seed + i, *shape, dtype=dtype, scale=s).to(device)
        for i, (shape, s) in enumerate(zip(shapes, scales, strict=True))
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made[4], made[5] = made[4].to(wide), made[5].to(wide)
    if dyt:
        made += [tokens(seed + 6 + i, n, dtype=dtype, scale=0.7).to(device) for i, n in enumerate((1, C, C))]
    return made


def pooled(
    f: Tensor, a: Tensor, bias: Tensor, w: Tensor, k: Tensor, *dyt: Tensor, **options: Any
) -> PooledLinks:
    """Call `pooled_links` with a single link."""
    xs = options.pop("x", None)
    return pooled_links(
        [f],
        [(a, bias)],
        [w],
        [k],
        [0],
        dyt=[dyt] if dyt else None,
        xs=None if xs is None else [xs],
        **options,
    )


def results(size: int, **options: Any):
    """Return a function that computes P̄ and pool(F) of a single link; `follow_the_rule` accepts this function.

    The function takes all tensors of the link except X.
    """

    def call(*tensors: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
        return pooled(*tensors, size=size, backend=backend, **options)[:2]

    return call


def schedule(
    dtype: torch.dtype = torch.float32, *, b: int = 2, dyt: bool = True, device: str = DEVICE
) -> list[Tensor]:
    """Return the tensors of three maps and three links, as `several` takes them.

    The first map is the target of two links, with ranks 5 and 3. The second map is the target of one link, with rank 5.
    The third map is the target of no link.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [
        tokens(40 + i, b, c, *grid, dtype=dtype)
        for i, (c, grid) in enumerate(((6, (9, 7)), (20, (4, 5)), (3, (2, 2))))
    ]
    links = [
        inputs(50 + 10 * i, b=b, channels=c, rank=r, dtype=dtype, dyt=True, device=device)
        for i, (c, r) in enumerate(((6, 5), (6, 3), (20, 5)))
    ]
    flat = [m.to(device) for m in maps]
    for position in (1, 2, 3, 4, 6, 7, 8) if dyt else (1, 2, 3, 4):
        flat += [link[position].to(wide if position == 4 else dtype) for link in links]
    return flat


def several(*t: Tensor, backend: str | None = None, **options: Any) -> PooledLinks:
    groups = [t[3 + 3 * i : 6 + 3 * i] for i in range((len(t) - 3) // 3)]
    return pooled_links(
        t[:3], list(zip(groups[0], groups[1], strict=True)), groups[2], groups[3], [0, 0, 1], size=3,
        dyt=list(zip(*groups[4:], strict=True)) or None, qk_norm="keys", backend=backend, **options,
    )  # fmt: skip
