"""Train a neck and a head on synthetic feature maps, and check that two runs agree.

The lower the quality of an image, the more noise its maps have. Two runs agree if their mean losses over the last tenth
of the steps differ by at most 2 % and their SROCCs on held-out images by at most 0.02.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from srm_model import SRMConfig, SRMNeck
from srm_model.metrics import srocc
from srm_model.model import Head


class Run(NamedTuple):
    """Losses of all steps, and the SROCC on held-out images after the last step."""

    losses: list[float]
    srocc: float


def pictures(seed: int, count: int, channels: Sequence[int], side: int) -> tuple[list[Tensor], Tensor]:
    """Return the maps and labels of `count` images.

    A map is a pattern plus noise. All images have the same pattern. The label is 1 minus the amplitude of the noise.
    """
    shapes = [(c, max(side >> i, 2), max(side >> i, 2)) for i, c in enumerate(channels)]
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
    mos = torch.rand(count, generator=own)
    maps = [
        torch.randn(shape, generator=shared)
        + (1 - mos)[:, None, None, None] * torch.randn(count, *shape, generator=own)
        for shape in shapes
    ]
    return maps, mos


def training_run(
    backend: str,
    config: SRMConfig,
    channels: Sequence[int],
    *,
    steps: int,
    side: int,
    device: str,
    lr: float = 1e-3,
    batch: int = 8,
    held_out: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """Train with a backend. Initial weights, images and their order depend on the seed, not on the backend."""

    def drawn(seed: int, count: int) -> tuple[list[Tensor], Tensor]:
        maps, mos = pictures(seed, count, channels, side)
        return [m.to(device, dtype) for m in maps], mos.to(device, dtype)

    torch.manual_seed(seed)
    start = SRMNeck(channels, config.replace(backend="reference")).to(dtype)
    head = Head(config.channels).to(device, dtype)
    start.calibrate([m.to(dtype) for m in pictures(-1, 8, channels, side)[0]])
    neck = SRMNeck(channels, config.replace(backend=backend)).to(device, dtype)
    neck.load_state_dict(start.state_dict())
    optimiser = torch.optim.AdamW([*neck.parameters(), *head.parameters()], lr=lr)
    losses = []
    for number in range(steps):
        maps, mos = drawn(1000 * seed + number, batch)
        out = neck(maps)
        loss = (head(out.fused) - mos).square().mean() + config.weight_tau * out.losses["tau"]
        loss = loss + config.weight_entropy * out.losses["entropy"]
        loss = loss + config.weight_balance * out.losses["balance"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        neck.clamp_()
        losses.append(loss.detach())
    maps, mos = drawn(10**6, held_out)
    with torch.no_grad():
        scores = head(neck.eval()(maps).fused)
    return Run(torch.stack(losses).tolist(), srocc(scores.cpu().double(), mos.cpu().double()))


def agree(found: Run, plain: Run) -> None:
    """Check that two runs agree, as the docstring of the module defines. The SROCC of `plain` must be above 0.5."""
    last = -max(len(plain.losses) // 10, 1)
    means = [sum(run.losses[last:]) for run in (found, plain)]
    assert plain.srocc > 0.5, f"nothing to compare: SROCC {plain.srocc:.3f}"
    assert means[0] == pytest.approx(means[1], rel=0.02)
    assert found.srocc == pytest.approx(plain.srocc, abs=0.02)
