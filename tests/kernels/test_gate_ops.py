"""Tests of gain-capped fusion, and of the gate's logits and losses. Most tolerances are those of `oracle.agree`."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import tokens
from torch import Tensor

from srm_kernels import biased_gelu, gate_logits, gate_losses, gated_fusion

LOW = (torch.float32, torch.bfloat16, torch.float16)
UNIT = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def inputs(
    seed: int = 0, b: int = 4, s: int = 3, c: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    maps = (
        tokens(seed, b, s, c, 5, 4) * torch.logspace(-1, 1, b, dtype=torch.float64)[:, None, None, None, None]
    )
    return maps.to(dtype), tokens(seed + 1, b, s, dtype=dtype)


def by_definition(m: Tensor, b: Tensor) -> Tensor:
    """Return GELU by its definition: x Φ(x) with x = m + b."""
    x = m + b[:, None, None]
    return x * (1 + torch.special.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gates_logits_by_definition(dtype):
    """In half precision, the tolerance of the logits allows for rounding of the activations only.

    The mean and the result of the linear layer must not be rounded to half precision.
    """
    maps, biases = [3 * tokens(i, 2, 5, 3, 4) for i in range(3)], [tokens(i, 5) for i in range(3)]
    weights, offsets = [tokens(10 + i, 1, 5) for i in range(3)], [tokens(20 + i, 1) for i in range(3)]
    maps, biases, weights, offsets = ([t.to(dtype) for t in g] for g in (maps, biases, weights, offsets))
    exact = torch.stack([by_definition(m.double(), b.double()) for m, b in zip(maps, biases, strict=True)])
    plain = torch.stack(
        [torch.nn.functional.gelu(m + b[:, None, None]) for m, b in zip(maps, biases, strict=True)]
    )
    found = biased_gelu(maps, biases)
    assert found.dtype == dtype
    narrow = dtype != torch.float64
    oracle.agree(found, exact, plain if narrow else None)
    w, v = torch.stack(weights)[:, 0].double(), torch.cat(offsets).double()
    logits, of_plain = (torch.einsum("sbchw,sc->bs", a.double(), w) / 12 + v for a in (exact, plain))
    found = gate_logits(maps, biases, list(zip(weights, offsets, strict=True)))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    oracle.agree(found, logits, of_plain.to(found.dtype) if narrow else None)


def plain_fusion(maps: Tensor, logits: Tensor, cap: float | None, unit: float) -> tuple[Tensor, ...]:
    weights = torch.softmax(logits.float(), -1)
    M = (weights[:, :, None, None, None] * maps.float()).sum(1)
    norm = M.flatten(1).norm(dim=1)
    gain = torch.ones_like(norm) if cap is None else (cap * (1 - 2 * unit) / (norm + 1e-6)).clamp(max=1)
    return (gain[:, None, None, None] * M).to(maps.dtype), weights, gain, norm


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("cap", [None, 0.5, 5.0, 1e6])
@pytest.mark.parametrize("stages", [1, 3, 4])
def test_values_in_fp64(stages, cap, temperature):
    maps, logits = inputs(s=stages)
    found = gated_fusion(maps, logits, cap=cap, temperature=temperature)
    assert found._fields == ("fused", "weights", "gain", "norm")
    for name, exact in zip(
        found._fields, oracle.fusion(maps, logits, cap=cap, temperature=temperature), strict=True
    ):
        assert getattr(found, name).dtype == torch.float64
        oracle.agree(getattr(found, name), exact)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("dtype", LOW)
def test_values_in_lower_dtypes(dtype, cap):
    maps, logits = inputs(2, dtype=dtype)
    found = gated_fusion(maps, logits, cap=cap)
    assert found.fused.dtype == dtype
    exact = oracle.fusion(maps, logits, cap=cap, unit=UNIT[dtype])
    plain = plain_fusion(maps, logits, cap, UNIT[dtype])
    oracle.agree(found.fused, exact[0], plain[0])
    oracle.agree(found.gain, exact[2], plain[2])
    oracle.agree(found.norm, exact[3], plain[3])
    assert found.gain.dtype == found.norm.dtype == torch.float32


def test_eps_is_in_the_denominator():
    maps, logits = inputs(3)
    found = gated_fusion(maps, logits, cap=1.0, eps=0.5)
    oracle.agree(found.gain, oracle.fusion(maps, logits, cap=1.0, eps=0.5)[2])


def test_the_cap_leaves_small_maps_alone_and_bounds_large_ones():
    maps, logits = inputs(4)
    norm = gated_fusion(maps, logits, cap=None).norm
    cap = float(norm.median())
    found = gated_fusion(maps, logits, cap=cap)
    assert ((found.gain < 1) == (norm + 1e-6 > cap)).all()
    assert torch.equal(gated_fusion(maps, logits, cap=None).gain, torch.ones(4, dtype=torch.float64))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, *LOW]),
    exponent=st.floats(-4, 4),
    ratio=st.floats(0.05, 1.5),
    constant=st.booleans(),
)
def test_the_fused_norm_never_exceeds_the_cap(seed, dtype, exponent, ratio, constant):
    """In bf16 and fp16, the norm never exceeds the cap, because the cap is first multiplied by 1 − 2u.

    u is the unit roundoff of the dtype, so the factor leaves room for rounding. In fp32 and fp64, there is no such
    factor, and the norm may exceed the cap by at most 1e-6 of the cap in fp32, and by at most 1e-12 of the cap in fp64.
    The scale of fp16 maps is at least 0.1, to avoid subnormal numbers.
    """
    scale = 10.0 ** (max(exponent, -1) if dtype == torch.float16 else exponent)
    maps = scale * tokens(seed, 2, 3, 8, 4, 4)
    if constant:  # every entry rounds the same way
        maps = torch.full_like(maps, scale * (1 + (seed % 1000) / 1000))
    maps = maps.clamp(-6e4, 6e4).to(dtype)
    logits = tokens(seed + 1, 2, 3, dtype=dtype)
    cap = ratio * float(oracle.fusion(maps, logits, cap=None)[3].mean())
    found = gated_fusion(maps, logits, cap=cap)
    slack = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 0.0)
    assert (found.fused.double().flatten(1).norm(dim=1) <= cap * (1 + slack)).all()
    assert ((found.gain > 0) & (found.gain <= 1)).all()
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(
        found.weights.double().sum(1), ones, rtol=0, atol=4 * torch.finfo(found.weights.dtype).eps
    )


@pytest.mark.parametrize("cap", [None, 1.0])
def test_nan_stays_nan_in_its_own_sample(cap):
    maps, logits = inputs(5, dtype=torch.float32)
    expected = gated_fusion(maps, logits, cap=cap)
    maps[1, 0, 0, 0, 0] = math.nan
    found = gated_fusion(maps, logits, cap=cap)
    keep = [0, 2, 3]
    assert found.fused[1].isnan().any()
    assert found.norm[1].isnan()
    if cap is not None:
        assert found.fused[1].isnan().all()
        assert found.gain[1].isnan()
    assert torch.equal(found.fused[keep], expected.fused[keep])


def test_nan_logits_stay_nan():
    maps, logits = inputs(6, dtype=torch.float32)
    logits[2, 1] = math.nan
    found = gated_fusion(maps, logits, cap=1.0)
    assert found.fused[2].isnan().all()
    assert found.fused[[0, 1, 3]].isfinite().all()


def test_maps_of_zeros_are_left_alone_and_have_finite_gradients():
    maps, logits = torch.zeros(2, 3, 4, 2, 2, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    found = gated_fusion(maps, logits, cap=1.0)
    assert found.gain.tolist() == [1.0, 1.0]
    grads = torch.autograd.grad(found.fused.sum(), (maps, logits))
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(grads[0], torch.full_like(maps, 1 / 3))


def test_strides_do_not_matter():
    maps, logits = inputs(7)
    exact = oracle.fusion(maps, logits, cap=1.0)[0]
    channels_last = maps.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    stage_major = maps.transpose(0, 1).contiguous().transpose(0, 1)
    for variant in (channels_last, stage_major):
        oracle.agree(gated_fusion(variant, logits.mT.contiguous().mT, cap=1.0).fused, exact)
    expanded = maps[:, :1].expand_as(maps)
    oracle.agree(gated_fusion(expanded, logits, cap=1.0).fused, oracle.fusion(expanded, logits, cap=1.0)[0])


def test_fusion_under_autocast_is_fp32():
    maps, logits = inputs(8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_fusion(maps, logits, cap=1.0)
    assert found.fused.dtype == torch.float32
    oracle.agree(
        found.fused, oracle.fusion(maps, logits, cap=1.0)[0], plain_fusion(maps, logits, 1.0, 0.0)[0]
    )


# Losses


@pytest.mark.parametrize("floor", [0.0, 0.5, 0.7 * math.log(3), 2.0])
def test_losses_by_definition(floor):
    weights = oracle.softmax(2 * tokens(9, 7, 3))
    entropy, balance = gate_losses(weights, entropy_floor=floor)
    assert entropy.shape == balance.shape == ()
    expected = oracle.losses(weights, floor)
    assert entropy.item() == pytest.approx(expected[0], rel=1e-10, abs=1e-15)
    assert balance.item() == pytest.approx(expected[1], rel=1e-10)


def test_losses_by_hand():
    """The logarithm is natural, and the floor is in nats, not a fraction of ln S.

    The entropy loss applies the floor to each image. The balance loss uses the mean of the weights over the images.
    """
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    entropy, balance = gate_losses(weights, entropy_floor=0.6)
    assert entropy.item() == pytest.approx(
        0.3, rel=1e-12
    )  # ((0.6 − 0) + 0)/2: the entropy of the second image is above the floor
    assert balance.item() == pytest.approx(2 * 0.25**2, rel=1e-12)
    even = torch.full((2, 4), 0.25, dtype=torch.float64)
    entropy, balance = gate_losses(even, entropy_floor=2.0)
    assert entropy.item() == pytest.approx(2 - math.log(4), rel=1e-12)
    assert balance.item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_hot_weights_have_finite_gradients(dtype):
    weights = torch.eye(3, dtype=dtype).requires_grad_()
    entropy, balance = gate_losses(weights, entropy_floor=0.7)
    assert entropy.item() == pytest.approx(0.7, rel=1e-6)
    (grad,) = torch.autograd.grad(entropy + balance, weights)
    assert grad.isfinite().all()
    tiny = torch.tensor([[1 - 1e-30, 1e-30, 0.0]], dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(gate_losses(tiny, entropy_floor=0.7)[0], tiny)
    assert grad.isfinite().all()


def test_one_dead_stage_of_three_breaks_the_default_floor():
    """With one weight of zero, the entropy is at most ln 2. The default floor, 0.7 ln 3, is larger."""
    weights = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    entropy, _ = gate_losses(weights, entropy_floor=0.7 * math.log(3))
    assert entropy.item() == pytest.approx(0.7 * math.log(3) - math.log(2), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_weights_are_taken_in_fp32(dtype):
    weights = oracle.softmax(tokens(10, 16, 3)).to(dtype)
    entropy, balance = gate_losses(weights, entropy_floor=1.0)
    expected = oracle.losses(weights, 1.0)
    assert entropy.double().item() == pytest.approx(expected[0], rel=1e-5)
    assert balance.double().item() == pytest.approx(expected[1], rel=1e-4)


def gradients(maps: Tensor, logits: Tensor, **options) -> tuple[Tensor, ...]:
    """Return the gradients of a weighted sum of all elements of the fused map, the gain and the norm."""
    maps, logits = (x.detach().clone().requires_grad_() for x in (maps, logits))
    found = gated_fusion(maps, logits, **options)
    weighed = [
        (x.double() * torch.linspace(-1, 2, x.numel()).double().view_as(x)).sum()
        for x in (found.fused, found.gain, found.norm)
    ]
    return torch.autograd.grad(sum(weighed), (maps, logits))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(
    ("cap", "factor"),
    [(torch.tensor(math.inf), 1.0), (torch.tensor(3e38), 1e3), (1e38, 1.0), (1e300, 2.0)],
)
def test_a_cap_out_of_reach_has_the_gradients_of_none(cap, factor, dtype, backend):
    maps, logits = inputs(7, dtype=dtype)
    maps[0] = 0  # its norm is 0, below every cap
    found = gradients(maps, logits, cap=cap, cap_factor=factor, backend=backend)
    for grad, expected in zip(found, gradients(maps, logits, cap=None, backend=backend), strict=True):
        assert grad.abs().max() > 0
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("dtype", UNIT)
def test_a_cap_of_zero_leaves_the_norms_gradients_alone(dtype, eps):
    maps, logits = inputs(8, dtype=dtype)
    maps[0] = 0
    found = gated_fusion(maps, logits, cap=torch.tensor(0.0), eps=eps)
    assert (found.fused == 0).all()
    for grad in gradients(maps, logits, cap=torch.tensor(0.0), eps=eps):
        assert grad.isfinite().all()
        assert grad[1:].abs().max() > 0


def test_a_second_derivative_under_a_cap_out_of_reach():
    maps, logits = inputs(9, b=2, c=2)
    maps, logits = maps[..., :2, :2].clone().requires_grad_(), logits.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda m, g: gated_fusion(m, g, cap=torch.tensor(math.inf, dtype=torch.float64)).fused, (maps, logits)
    )
