"""Test that results have the same bits in every call, in every batch, and for every order of the warps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from bench import neck_numerics
from bench.ptx import emulated_device, matrix
from bench.ptx.cases import DTYPES, normal
from srm_kernels import gated_fusion, nystrom_attention, rms_scale
from srm_model import SRMConfig

TARGETS = [("bf16", 89), ("fp32", 90)]
CONFIG = SRMConfig(channels=32, heads=2, rank=9, pool_size=2, image_size=64, links=((4, 1),))
GRIDS = ((9, 8), (5, 5), (3, 3), (3, 3))


def attention(tokens: list[Tensor]) -> list[Tensor]:
    """Return Y and the gradients of Q, K and V."""
    leaves = [x.clone().requires_grad_() for x in tokens]
    y = nystrom_attention(*leaves, 16, qk_norm="keys", backend="triton")
    weight = torch.linspace(-1, 1, y[0].numel()).view_as(y[0]).to(y)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)]


def tokens_of(dtype: str) -> list[Tensor]:
    return [normal(i, 3, 2, n, 24, dtype=DTYPES[dtype]) for i, n in enumerate((70, 40, 40))]


@pytest.mark.parametrize(("dtype", "architecture"), TARGETS)
def test_attention_is_the_same_twice_and_in_any_batch(dtype, architecture):
    tokens = tokens_of(dtype)
    with emulated_device(architecture, poison=True):
        together, again = attention(tokens), attention(tokens)
        alone = attention([x[1:2].clone() for x in tokens])
    for one, other, single in zip(together, again, alone, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[1:2], single)


@pytest.mark.parametrize("dyt", [True, False])
def test_the_neck_is_the_same_twice_and_in_any_batch(dyt):
    config = CONFIG.replace(dyt=dyt)
    neck = neck_numerics.make_neck(config, GRIDS, (8, 8, 8, 8)).eval()
    fused = neck_numerics.with_backend(neck, "triton").eval()
    pyramid = neck_numerics.make_pyramid(3, GRIDS, (8, 8, 8, 8))
    with emulated_device(89, poison=True), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        together, again = fused(pyramid), fused(pyramid)
        alone = fused([m[1:2].clone() for m in pyramid])
    for name in ("fused", "weights", "gain", "norm"):
        assert torch.equal(getattr(together, name), getattr(again, name))
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))


def test_the_gate_is_the_same_in_any_batch():
    maps, logits = normal(0, 3, 3, 24, 4, 4), normal(1, 3, 3)
    with emulated_device(90, poison=True):
        together = gated_fusion(maps, logits, cap=torch.tensor(2.0), backend="triton")
        alone = gated_fusion(maps[1:2].clone(), logits[1:2].clone(), cap=torch.tensor(2.0), backend="triton")
    for one, single in zip(together, alone, strict=True):
        assert torch.equal(one[1:2], single)


def test_the_statistic_is_the_same_twice():
    y = normal(0, 2, 2, 300, 24)
    with emulated_device(89, poison=True):
        found = [rms_scale(y, backend="triton") for _ in range(2)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


SMALL = (
    "attention Nq=77 Nk=33 d=24 r=9 leverage both",
    "even maps, DyT",
    "no statistics, P=3, DyT in the gate",
)
REVERSED = [run for run in matrix.runs(sample=True, orders=("reversed",)) if run.case.name in SMALL]


@pytest.mark.parametrize("run", REVERSED, ids="{0.case.name}-{0.dtype}-sm_{0.architecture}".format)
def test_the_order_of_warps_changes_no_bit(run):
    row = matrix.judge(run)
    assert row["passed"], row
    assert row["bits"] == matrix.judge(run._replace(order="together"))["bits"]
