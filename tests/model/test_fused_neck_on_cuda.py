"""Test the fused neck on a CUDA device. Without a CUDA device, these tests are skipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from training_run import agree, training_run

pytest.importorskip("triton")
from srm_model import SRMConfig, SRMNeck
from srm_model.graphs import Graphed
from srm_model.profiling.sweep import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CHANNELS = (64, 128, 320, 512)


def pyramid(
    batch: int = 2, side: int = 64, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> list[Tensor]:
    draw = torch.Generator("cuda").manual_seed(seed)
    shapes = [(batch, c, side // 2**i, side // 2**i) for i, c in enumerate(CHANNELS)]
    return [torch.randn(shape, generator=draw, device="cuda").to(dtype) for shape in shapes]


def neck(dtype: torch.dtype = torch.bfloat16, backend: str | None = "triton", **options: object) -> SRMNeck:
    torch.manual_seed(0)
    made = SRMNeck(CHANNELS, SRMConfig(**options)).cuda()
    made.calibrate(pyramid(4, dtype=torch.float32))
    other = SRMNeck(CHANNELS, SRMConfig(backend=backend, **options)).to("cuda", dtype)
    other.load_state_dict(made.state_dict())
    return other.eval()


@pytest.mark.parametrize("dyt", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_by_the_rule(dtype, dyt):
    """Check that the error is at most twice the reference's error in the same dtype, plus a few units of rounding.

    Both errors are differences from the reference in fp64. A unit is the machine epsilon of the tested dtype times the
    largest absolute value of the exact result. The bound allows 64 units in fp32, and 2 units in bf16 and fp16.

    All 64 keys of stage 4 are landmarks, so the choice of landmarks does not depend on rounding.
    """
    maps = pyramid(dtype=dtype)
    with torch.no_grad():
        found, plain = (neck(dtype, backend, dyt=dyt)(maps).fused for backend in ("triton", "reference"))
        exact = neck(torch.float64, "reference", dyt=dyt)([m.double() for m in maps]).fused
    errors = [(x.double() - exact).abs().max() for x in (found, plain)]
    units = 64 if dtype == torch.float32 else 2
    assert errors[0] <= 2 * errors[1] + units * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dyt", [True, False])
def test_one_graph_gives_what_the_neck_gives(dyt):
    module = neck(dyt=dyt)
    graphed = Graphed(module, pyramid())
    for seed in (1, 2):
        maps = pyramid(seed=seed)
        with torch.no_grad():
            expected = module(maps)
        found = graphed(maps)
        assert torch.equal(found.fused, expected.fused)
        assert torch.equal(found.weights, expected.weights)
    with pytest.raises(ValueError, match="was made for"):
        graphed(pyramid(batch=1))


def test_a_graph_under_autocast_outlives_it():
    module = neck(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        graphed = Graphed(module, pyramid())
    torch.cuda.empty_cache()
    junk = [torch.full((2**20,), float("nan"), device="cuda") for _ in range(64)]
    assert graphed(pyramid(seed=3)).fused.isfinite().all()
    assert len(junk) == 64


def test_nothing_waits_for_the_device():
    module = neck().train()
    maps = [m.requires_grad_() for m in pyramid()]

    def step() -> None:
        out = module(maps)
        (out.fused.float().square().mean() + sum(out.losses.values())).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dyt", [True, False])
def test_forward_takes_no_memory_of_full_resolution(dyt):
    """Check that the peak memory of a forward pass is at most 1.1 times the size of the tensors that must be alive.

    Peak memory does not include the maps and weights, which are allocated before the forward pass. K̃ and X of every
    link are alive until the end. At the beginning, K and V of every link and the aligned map A F of the source stage
    are alive too. At the end, P̄ and pool(F) are alive instead. Without DyT, G is also alive at the end; G is the
    product of K̃, the query weights and the alignment weights. One tenth is added for indices, logsumexps and
    workspaces. Even the smallest aligned map of a target stage, that of stage 3, is larger than this tenth.
    """
    B, L, H, r, d, P, keys = 4, 3, 8, 64, 32, 8, 16 * 16
    C, channels = H * d, sum(CHANNELS[:3])
    landmarks = 2 * L * B * H * r * d * 4
    source = (1 + 2 * L) * B * keys * C * 2
    result = L * B * H * P * P * r * 4 + B * P * P * channels * 2
    absorbed = 0 if dyt else B * H * r * channels * 4
    alive = landmarks + max(source, result + absorbed)
    assert alive / 10 < B * 32 * 32 * C * 2
    module, maps = neck(dyt=dyt), pyramid(B, side=128)
    with torch.no_grad():
        module(maps)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        module(maps)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * alive


@pytest.mark.parametrize("dyt", [True, False])
def test_two_hundred_steps_end_where_the_references_do(dyt):
    """Check that trainings with Triton and with the reference have about the same losses and the same final SROCC.

    Both trainings use fp32 and the same seed. The tolerances are those of the module `training_run`.
    """
    found, plain = (
        training_run(
            backend, SRMConfig(dyt=dyt), CHANNELS, steps=200, side=64, device="cuda", lr=2e-4, batch=4
        )
        for backend in ("triton", "reference")
    )
    agree(found, plain)


@pytest.mark.parametrize("dyt", [True, False])
def test_launches_of_a_forward_pass(dyt):
    """Check that a neck with the default links needs at most 12 launches, plus the convolutions of the gate."""
    module, maps = neck(dyt=dyt), pyramid(side=128)

    def launches(call) -> int:
        with torch.no_grad():
            call()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                call()
                torch.cuda.synchronize()
        return len(kernels(seen))

    read, hidden = (torch.randn(3, 2, c, 8, 8, device="cuda").bfloat16().unbind() for c in (256, 64))
    convolutions = launches(lambda: (module.gate.convolved(read, 0), module.gate.convolved(hidden, 1)))
    assert convolutions >= 6
    assert launches(lambda: module(maps)) - convolutions <= 12
