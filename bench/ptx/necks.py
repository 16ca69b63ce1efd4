"""Test cases for `python -m bench.ptx --matrix` that run forward and backward passes of the fused neck."""

from __future__ import annotations

from typing import NamedTuple

from srm_model import SRMConfig


class NeckCase(NamedTuple):
    """A neck and four input maps. For each map, `grids` has the size (h, w) and `channels` the number of channels."""

    name: str
    config: SRMConfig
    grids: tuple[tuple[int, int], ...]
    channels: tuple[int, ...] = (16, 32, 64, 48)
    batch: int = 2
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    sample: tuple[tuple[str, int], ...] = ()
    architectures: tuple[int, ...] = (80, 86, 89, 90, 120)


_SMALL = SRMConfig(channels=64, heads=2, rank=16, pool_size=4, image_size=128, landmarks="leverage")
_UNIFORM = _SMALL.replace(landmarks="uniform")  # for cases in which rounding could change the landmarks
_EVEN = ((32, 32), (16, 16), (8, 8), (4, 4))
_ODD = ((27, 25), (14, 13), (9, 8), (5, 5))
_SQUARE = ((12, 12), (10, 10), (9, 9), (8, 8))  # 64 keys on a small grid
_ARTICLE = SRMConfig(channels=256, heads=8, rank=64, pool_size=4, image_size=256, landmarks="leverage")
_HALF = _ARTICLE.replace(channels=128, heads=4)  # has the same tiles of r, d and positions


def neck_cases() -> list[NeckCase]:
    """Return the cases in a fixed order."""
    cases = [
        NeckCase("article, DyT", _ARTICLE, _SQUARE, batch=1, sample=(("bf16", 89),)),
        NeckCase("half as wide, DyT", _HALF, _SQUARE, batch=1, sample=(("fp32", 90),)),
        NeckCase("half as wide", _HALF.replace(dyt=False), _SQUARE, batch=1, sample=(("bf16", 90),)),
        NeckCase("even maps, DyT", _SMALL, _EVEN, sample=(("fp16", 120),)),
        NeckCase("even maps", _SMALL.replace(dyt=False), _EVEN, sample=(("bf16", 120), ("fp16", 89))),
        NeckCase(
            "odd maps, DyT, normalised queries", _UNIFORM.replace(heads=4, rank=17, qk_norm="both"), _ODD,
            sample=(("fp32", 89),),
        ),
        NeckCase(
            "odd maps, no normalisation", _UNIFORM.replace(heads=4, rank=17, qk_norm=None, dyt=False), _ODD,
            sample=(("fp32", 90),),
        ),
        NeckCase(
            "no statistics, P=3, DyT in the gate",
            _UNIFORM.replace(channels=48, rank=9, pool_size=3, tau=False, gate_dyt=True, links=((4, 2),)), _ODD,
            batch=3, sample=(("fp16", 90),),
        ),
        NeckCase(
            "heads of 64", _UNIFORM.replace(channels=128, rank=64, links=((4, 1), (3, 1))), _SQUARE, batch=1,
            sample=(("fp32", 86),),
        ),
        NeckCase(
            "128 landmarks", _UNIFORM.replace(channels=128, rank=128, dyt=False, links=((4, 2),)),
            ((12, 12),) * 4, batch=1, architectures=(80, 90), sample=(("bf16", 80), ("bf16", 90)),
        ),
        NeckCase(
            "128 landmarks, DyT", _UNIFORM.replace(channels=128, rank=128, links=((4, 2),)), ((12, 12),) * 4,
            batch=1, architectures=(80, 90),
        ),
        NeckCase(
            "heads of 128, DyT", _UNIFORM.replace(channels=256, rank=64, links=((4, 2),)), _SQUARE,
            batch=1, architectures=(80, 90),
        ),
        NeckCase(
            "another solver, pivoted Cholesky",
            _SMALL.replace(solver="lu", landmarks="pivoted_cholesky", links=((4, 3),)), _EVEN, batch=1,
            sample=(("bf16", 86),),
        ),
    ]  # fmt: skip
    return cases
