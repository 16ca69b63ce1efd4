"""Test the RMS statistic, DyT and the loss of τ.

Unless a test states another tolerance, errors are compared with the tolerance of `oracle.agree`.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from oracle import tokens
from torch import Tensor

from srm_kernels import dyt, rms_scale, tau_loss

LOW = (torch.float32, torch.bfloat16, torch.float16)


def plain_rms(y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.float()
    mean = y.mean((0, 2))
    return mean, (y - mean[:, None]).square().sum(-1).mean((0, 2)).sqrt()


@pytest.mark.parametrize("shape", [(3, 4, 50, 24), (1, 1, 1, 1), (2, 3, 7, 59), (1, 2, 4, 40)])
def test_rms_statistic_in_fp64(shape):
    y = tokens(0, *shape) + 3
    mean, rms = rms_scale(y)
    assert mean.dtype == rms.dtype == torch.float64
    assert mean.shape == (shape[1], shape[3])
    assert rms.shape == (shape[1],)
    exact = oracle.rms(y)
    oracle.agree(mean, exact[0])
    if math.prod(shape) > 1:
        oracle.agree(rms, exact[1])
    else:
        assert rms.item() == 0


@pytest.mark.parametrize("dtype", LOW)
def test_rms_statistic_is_fp32_for_lower_dtypes(dtype):
    y = tokens(1, 3, 4, 50, 24, dtype=dtype) + 1
    found, exact, plain = rms_scale(y), oracle.rms(y), plain_rms(y)
    for part in range(2):
        assert found[part].dtype == torch.float32
        oracle.agree(found[part], exact[part], plain[part])


def test_rms_is_the_norm_over_the_head_not_the_average_per_channel():
    """Standard normal tokens of width d have σ = √d."""
    _, rms = rms_scale(tokens(2, 8, 2, 500, 16))
    assert (rms / 4 - 1).abs().max() < 0.02


def test_each_head_has_its_own_statistic():
    y = tokens(3, 2, 3, 40, 8)
    mean, rms = rms_scale(y)
    scaled = y * torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[:, None, None]
    scaled_mean, scaled_rms = rms_scale(scaled)
    oracle.agree(scaled_rms, rms * torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    oracle.agree(scaled_mean[1], 2 * mean[1])


def test_a_large_offset_does_not_cancel():
    """σ is accurate for fp32 tokens with mean 1e4 and standard deviation 1.

    The formula E[Y²] − E[Y]² would lose all digits of σ. The tolerance of the mean is 1e-3, about one unit in the last
    place of 1e4. An error of 1e-3 in the mean changes σ by less than the relative tolerance of σ, which is 1e-4.
    """
    y = tokens(4, 4, 2, 4096, 8, dtype=torch.float32) + 1e4
    mean, rms = rms_scale(y)
    exact = oracle.rms(y)
    assert (rms.double() / exact[1] - 1).abs().max() <= 1e-4
    assert (mean.double() - exact[0]).abs().max() <= 1e-3


def test_fp16_does_not_overflow():
    y = tokens(5, 2, 2, 100, 8, scale=1e4).clamp(-6e4, 6e4).half()
    found, exact = rms_scale(y), oracle.rms(y)
    oracle.agree(found[1], exact[1], plain_rms(y)[1])


def test_rms_strides_do_not_matter():
    y = tokens(6, 2, 3, 20, 8)
    exact = oracle.rms(y)
    for variant in (y.transpose(1, 2).contiguous().transpose(1, 2), y.mT.contiguous().mT):
        oracle.agree(rms_scale(variant)[1], exact[1])
    expanded = y[:1].expand_as(y)
    oracle.agree(rms_scale(expanded)[1], oracle.rms(expanded)[1])


def test_rms_under_autocast_is_fp32():
    y = tokens(7, 2, 2, 64, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, rms = rms_scale(y)
    oracle.agree(rms, oracle.rms(y)[1], plain_rms(y)[1])


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 40), (2, 3, 9, 59)])
def test_dyt_in_fp64(shape):
    x, weight, bias = 3 * tokens(8, *shape), tokens(9, shape[-1]), tokens(10, shape[-1])
    alpha = torch.tensor(0.7, dtype=torch.float64)
    out = dyt(x, alpha, weight, bias)
    assert out.dtype == torch.float64
    oracle.agree(out, weight * torch.tanh(0.7 * x) + bias)


@pytest.mark.parametrize("dtype", LOW)
def test_dyt_in_lower_dtypes(dtype):
    x, weight, bias = (
        tokens(seed, *shape, dtype=dtype) for seed, shape in ((11, (2, 9, 24)), (12, (24,)), (13, (24,)))
    )
    alpha = torch.tensor(0.7, dtype=dtype)
    out = dyt(x, alpha, weight, bias)
    assert out.dtype == dtype
    exact = weight.double() * torch.tanh(alpha.double() * x.double()) + bias.double()
    plain = (weight.float() * torch.tanh(alpha.float() * x.float()) + bias.float()).to(dtype)
    oracle.agree(out, exact, plain)
    assert (out != plain).double().mean() < 0.01  # the result is rounded once, at the end


def test_dyt_strides_do_not_matter():
    x, weight, bias = tokens(14, 2, 24, 9), tokens(15, 24), tokens(16, 24)
    alpha = torch.tensor(0.5, dtype=torch.float64)
    oracle.agree(dyt(x.mT, alpha, weight, bias), weight * torch.tanh(0.5 * x.mT) + bias)
    expanded = x.mT[:1].expand(4, 9, 24)
    oracle.agree(
        dyt(expanded, alpha, weight[:1].expand(24), bias), weight[0] * torch.tanh(0.5 * expanded) + bias
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_dyt_of_one_vector_has_a_gradient(backend):
    """For a single vector, the gradient of the bias is the upstream gradient, without a sum over vectors."""
    inputs = [
        tokens(seed, *shape).requires_grad_()
        for seed, shape in ((17, (6,)), (18, (1,)), (19, (6,)), (20, (6,)))
    ]
    assert torch.autograd.gradcheck(lambda *given: dyt(*given, backend=backend).square(), inputs)


def test_dyt_saturates_and_keeps_nan():
    one = torch.ones(3, dtype=torch.float32)
    x = torch.tensor([[1e30, -1e30, math.nan]])
    out = dyt(x, torch.tensor(0.5), 2 * one, one)
    assert out[0, :2].tolist() == [3.0, -1.0]
    assert out[0, 2].isnan()


def test_tau_loss_by_hand():
    """Three of the four heads have τ σ̄ = σ_ref and contribute 0. The second head of link 0 has τ σ̄ = e² σ_ref.

    The loss is the mean of log(τ σ̄ / σ_ref)² over the heads: 2²/4 = 1 for both links, and 2²/2 = 2 for link 0 alone.
    """
    e = math.e
    thetas = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])]
    sigmas = [torch.tensor([3.0, 3.0 * e]), torch.tensor([3.0, 3.0])]
    assert tau_loss(thetas, sigmas, reference=3.0, floor=0.0).item() == pytest.approx(1.0, rel=1e-5)
    assert tau_loss(thetas[:1], sigmas[:1], reference=3.0, floor=0.0).item() == pytest.approx(2.0, rel=1e-5)


def test_only_theta_has_a_gradient_and_bad_input_is_said():
    theta, sigma = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    tau_loss([theta], [sigma], reference=2.0).backward()
    assert theta.grad is not None
    assert sigma.grad is None
    with pytest.raises(ValueError, match="one of each for every link"):
        tau_loss([theta], [], reference=2.0)
    with pytest.raises(ValueError, match=r"expected \(H,\) each"):
        tau_loss([theta], [torch.ones(3)], reference=2.0)
    with pytest.raises(ValueError, match="reference=0"):
        tau_loss([theta], [sigma], reference=0)
