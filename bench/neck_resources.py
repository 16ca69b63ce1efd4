"""Registers, shared memory and spills of the neck's kernels, compiled without a GPU: `python -m bench.neck_resources`.

What `bench.resources` does for Nyström attention, for the links of a schedule, RMS statistic, DyT, gate and
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
    """A schedule: (C_i, h = w) of the maps its links read, H, d and r, the dtype's name, and which road they take."""

    maps: tuple[tuple[int, int], ...]
    heads: int
    d: int
    rank: int
    dtype: str
    dyt: bool
    statistics: bool = True
    qk_norm: str | None = "keys"


# The default schedule of pvt_v2_b2 at 512² and the widest and narrowest stages of the four backbones, both roads, other
# heads, and grids that P = 8 does not divide.
PVT = ((64, 128), (128, 64), (320, 32))
CASES = (
    Case(PVT, 8, 32, 64, "bfloat16", dyt=False),
    Case(PVT, 8, 32, 64, "bfloat16", dyt=True),
    Case(((24, 37),), 8, 32, 64, "float16", dyt=False, statistics=False),
    Case(PVT, 8, 32, 64, "bfloat16", dyt=True, statistics=False),
    Case(((960, 16), (16, 128)), 8, 32, 64, "float32", dyt=False),
    Case(((96, 50),), 4, 24, 40, "float32", dyt=True, qk_norm="both"),
    Case(((128, 64),), 4, 64, 128, "bfloat16", dyt=False),
    Case(((128, 64),), 2, 128, 64, "float16", dyt=True),
    Case(((960, 32),), 8, 32, 64, "float32", dyt=True),
    Case(((128, 64),), 4, 64, 64, "float32", dyt=True),
    Case(PVT, 8, 32, 64, "bfloat16", dyt=False, statistics=False),
    Case(PVT, 8, 32, 64, "float16", dyt=True),
)


def launches_of(case: Case, architecture: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What forward and backward of a schedule and of everything behind it launch; the tensors have no memory."""
    import torch

    from srm_kernels.gate import kernels as gate
    from srm_kernels.neck import backward_kernels as backward
    from srm_kernels.neck import end_kernels as ends
    from srm_kernels.neck import kernels as neck
    from srm_kernels.pool import kernels as pool
    from srm_kernels.scale import kernels as scale

    kind = getattr(torch, case.dtype)
    C, B, P, L = case.heads * case.d, 2, 8, len(case.maps)

    def tensor(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def wide(*shape: int) -> torch.Tensor:
        return tensor(*shape, dtype=torch.float32)

    features = [tensor(B, channels, side, side) for channels, side in case.maps]
    keys = [wide(B, case.heads, case.rank, case.d) for _ in case.maps]
    align = [tensor(C, channels) for channels, _ in case.maps], [tensor(C)] * L
    square, targets = [tensor(C, C)] * L, list(range(L))
    dyt = [[tensor(1)] * L, [tensor(C)] * L, [tensor(C)] * L] if case.dyt else [[]] * 3
    arguments = (
        features, *align, *dyt, square, keys, keys if case.statistics else [], targets, P, case.d**-0.5,
        case.qk_norm,
    )  # fmt: skip
    maps, logits, cap = tensor(B, 3, C, P, P), tensor(B, 3), wide(1)
    y = tensor(B, case.heads, case.maps[0][1] ** 2, case.d)
    theta = [wide(case.heads)] * L
    with recorded(divmod(architecture, 10)) as launches:
        ends.project_sources(tensor(B, 256, C), square, square, *dyt)
        results = neck.pooled_links(*arguments)
        backward.pooled_links_backward(results[:2], results, *arguments)
        ends.merge_links(results[1], results[0], keys, *align, square, theta, [wide()] * L, targets)
        scale.tau_loss(theta, theta, 1.0, 1e-6)
        moments = scale.rms_scale(y)
        scale.rms_scale_backward(moments, moments, y)
        fusion = gate.gated_fusion(maps, logits, cap, 1.0, 1e-6)
        gate.gated_fusion_backward(fusion, fusion, maps, logits, cap, 1.0, 1e-6)
        losses = gate.gate_losses(fusion[1], 0.7)
        gate.gate_losses_backward(losses, losses, fusion[1], 0.7)
        pooled = pool.adaptive_pool(features[0], P)
        pool.adaptive_pool_backward([pooled], [], features[0], P)
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
        f"{'kernel':24} {'sm':>4} {'case':>4} {'d':>4} {'r':>4} {'dtype':>9} {'warps':>6} {'registers':>10} "
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
                    f"{found.kernel:24} {architecture:4} {index:4} {case.d:4} {case.rank:4} "
                    f"{case.dtype:>9} {found.warps:6} {found.registers:10} {found.spilled:8} "
                    f"{found.shared / 1024:11.1f}{'  !' if bad else ''}",
                    flush=True,
                )
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
