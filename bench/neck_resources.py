"""Registers, shared memory and spills of the neck's kernels, compiled without a GPU: `python -m bench.neck_resources`.

What `bench.resources` does for Nyström attention, for the pooled probabilities of a link, RMS statistic, DyT, gate and
pooling: the launches that the package makes for a shape, compiled for an architecture instead of run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any, NamedTuple

from .resources import ARCHITECTURES, SHARED_LIMIT, compile_launch, recorded


class Case(NamedTuple):
    """One link: C_i, h = w, H, d and r of its queries, the dtype's name, and which road they take."""

    channels: int
    side: int
    heads: int
    d: int
    rank: int
    dtype: str
    dyt: bool
    statistics: bool = True


# The widest and narrowest stages of the four backbones, both roads, other heads, and grids that P = 8 does not divide.
CASES = (
    Case(64, 128, 8, 32, 64, "bfloat16", dyt=False),
    Case(64, 128, 8, 32, 64, "bfloat16", dyt=True),
    Case(24, 37, 8, 32, 64, "float16", dyt=False, statistics=False),
    Case(384, 32, 8, 32, 64, "bfloat16", dyt=False),
    Case(960, 16, 8, 32, 64, "float32", dyt=False),
    Case(96, 50, 4, 24, 40, "float32", dyt=True),
    Case(128, 64, 4, 64, 128, "bfloat16", dyt=False),
    Case(128, 64, 2, 128, 64, "float16", dyt=True),
)


def launches_of(case: Case, architecture: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What forward and backward of a link and of everything behind it launch; the tensors have no memory."""
    import torch

    from srm_kernels.gate import kernels as gate
    from srm_kernels.neck import kernels as neck
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
    with recorded(divmod(architecture, 10)) as launches:
        results = neck.pooled_probabilities(*arguments)
        neck.pooled_probabilities_backward(results[:1], results, *arguments)
        moments = scale.rms_scale(y)
        scale.rms_scale_backward(moments, moments, y)
        fusion = gate.gated_fusion(maps, logits, cap, 1.0, 1e-6)
        gate.gated_fusion_backward(fusion, fusion, maps, logits, cap, 1.0, 1e-6)
        losses = gate.gate_losses(fusion[1], 0.7)
        gate.gate_losses_backward(losses, losses, fusion[1], 0.7)
        pooled = pool.adaptive_pool(features, P)
        pool.adaptive_pool_backward([pooled], [], features, P)
    return launches


def main() -> int:
    """One line per kernel, case and architecture; 1 where a kernel spills or asks for more than a block may have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument(
        "--cases", type=int, nargs="*", default=range(len(CASES)), help="indices, all by default"
    )
    options = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):  # kernels decorated under it cannot be compiled
        return subprocess.call([sys.executable, "-m", "bench.neck_resources", *sys.argv[1:]])
    print(
        f"{'kernel':18} {'sm':>4} {'C_i':>4} {'side':>5} {'d':>4} {'r':>4} {'dtype':>9} {'warps':>6} {'registers':>10} "
        f"{'spilled':>8} {'shared KiB':>11}"
    )
    worst = 0
    for index in options.cases:
        case = CASES[index]
        for architecture in options.architectures:
            for launch in launches_of(case, architecture):
                found = compile_launch(launch, architecture)
                bad = found.spilled > 0 or found.shared > SHARED_LIMIT[architecture] * 1024
                worst = max(worst, int(bad))
                print(
                    f"{found.kernel:18} {architecture:4} {case.channels:4} {case.side:5} {case.d:4} {case.rank:4} "
                    f"{case.dtype:>9} {found.warps:6} {found.registers:10} {found.spilled:8} "
                    f"{found.shared / 1024:11.1f}{'  !' if bad else ''}",
                    flush=True,
                )
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
