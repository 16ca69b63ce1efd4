"""Test that gradients, σ̄ and M₀ of a neck with Triton kernels do not depend on how a batch is split.

A batch is split across two processes, into micro-batches, or both. The tests run only without a GPU, so the kernels run
in Triton's interpreter. Splitting a batch changes the order of summation. Therefore, gradients may differ by 64 fp32
eps times the largest absolute value of all gradients, and buffers by 64 fp32 eps times the largest absolute value of
all buffers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from srm_model import NeckOutput, SRMConfig, SRMNeck
from srm_model.statistics import BatchStatistics

pytestmark = [
    pytest.mark.forks,
    pytest.mark.skipif(torch.cuda.is_available(), reason="forks processes, which CUDA does not survive"),
]
CONFIG = SRMConfig(
    channels=16, heads=2, rank=3, pool_size=2, image_size=32, entropy_floor=1.0, gain_cap=0.9, backend="triton",
    links=((4, 2), (4, 1)),
)  # fmt: skip
GRIDS = ((5, 4), (3, 2), (2, 2), (2, 2))
IMAGES = 4


def pyramid() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(IMAGES, c, *grid, generator=draw) for c, grid in zip((3, 4, 5, 6), GRIDS, strict=True)
    ]


def make_neck() -> SRMNeck:
    torch.manual_seed(0)
    neck = SRMNeck((3, 4, 5, 6), CONFIG)
    plain = SRMNeck((3, 4, 5, 6), CONFIG.replace(backend="reference"))
    plain.load_state_dict(neck.state_dict())
    plain.calibrate(pyramid())
    neck.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for readout in neck.gate.readouts:  # a uniform gate would have a balance loss of 0
            readout.weight.normal_(std=3.0)
    return neck.train()


class Checkpointed(nn.Module):
    """A neck with gradient checkpointing: the backward pass repeats the forward pass of the neck.

    The repeated pass stops when it has recomputed the last tensor that the backward pass needs. The multiplication
    after the neck saves such a tensor, so the repeated pass runs to the end of the neck.
    """

    def __init__(self, neck: SRMNeck) -> None:
        super().__init__()
        self.neck = neck

    def forward(self, maps: list[Tensor], **options: Any) -> NeckOutput:
        def run(maps: list[Tensor]) -> NeckOutput:
            out = self.neck(maps, **options)
            return out._replace(fused=out.fused * torch.ones_like(out.fused))

        return checkpoint(run, maps, use_reentrant=False)


def step(world: int = 1, rank: int = 0, parts: int = 1, again: bool = False) -> dict[str, Tensor]:
    """Run a training step on this rank's share of the batch, in `parts` micro-batches; return gradients and buffers.

    With `again`, the neck uses gradient checkpointing.
    """
    neck = make_neck()
    assert neck.pools(pyramid())
    one = Checkpointed(neck) if again else neck
    forward = DistributedDataParallel(one) if world > 1 else one
    share = [m.chunk(world)[rank].chunk(parts) for m in pyramid()]
    micro = [[m[number] for m in share] for number in range(parts)]
    statistics = BatchStatistics() if parts > 1 else None
    if statistics is not None:
        with torch.no_grad():
            for maps in micro:
                neck(maps, statistics=statistics)
        statistics.finish()
    for number, maps in enumerate(micro):
        if statistics is not None:
            statistics.current = number
        out = forward(maps, statistics=statistics)
        ((out.fused.square().mean() + sum(out.losses.values())) / parts).backward()
    if statistics is not None:
        neck.track(statistics)
    found = {f"gradient {name}": p.grad for name, p in neck.named_parameters() if p.grad is not None}
    return found | {
        f"buffer {name}": b.detach().clone() for name, b in neck.named_buffers() if b.is_floating_point()
    }


def write(folder: Path, parts: int, again: bool) -> None:
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    torch.save(step(world, rank, parts, again), folder / f"{rank}.pt")


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for kind in ("gradient", "buffer"):
        named = {name: value for name, value in expected.items() if name.startswith(kind)}
        limit = 64 * torch.finfo(torch.float32).eps * max(float(v.abs().max()) for v in named.values())
        for name, value in named.items():
            assert (found[name].double() - value.double()).abs().max() <= limit, name


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return step()


def test_what_is_compared_moves(whole: dict[str, Tensor]):
    start = make_neck()
    for name, buffer in start.named_buffers():
        if name.endswith(("sigma", "median_rms")):
            assert not torch.equal(buffer, whole[f"buffer {name}"]), name
    assert all(whole[f"gradient links.{link}.theta"].abs().min() > 0 for link in ("4to1", "4to2"))
    assert whole["gradient gate.readouts.0.weight"].abs().max() > 0


def test_micro_batches_are_the_same_step(whole: dict[str, Tensor]):
    agree(step(parts=2), whole)


@pytest.mark.parametrize(("parts", "again"), [(1, False), (2, False), (1, True)])
def test_two_processes_are_the_same_step(whole: dict[str, Tensor], tmp_path: Path, parts: int, again: bool):
    """Compare two processes with one process, also with gradient checkpointing (`again`).

    With gradient checkpointing, the repeated forward pass does not communicate between processes.
    """
    on_ranks(2, write, tmp_path, parts, again)
    for rank in range(2):
        agree(torch.load(tmp_path / f"{rank}.pt"), whole)
