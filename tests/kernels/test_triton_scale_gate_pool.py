"""Test the Triton kernels of the RMS statistic, DyT, the loss of τ, the gate, its losses and pooling.

Unless a test states another tolerance, `kernel_rule` checks the results with the numerics rule.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_rule import DEVICE, DTYPES, follow_the_rule, poisoned, results_and_gradients, within
from oracle import tokens
from torch import library

pytest.importorskip("triton")
from srm_kernels import (
    adaptive_pool,
    biased_gelu,
    dyt,
    gate_logits,
    gate_losses,
    gated_fusion,
    rms_scale,
    tau_loss,
)
from srm_kernels.gate import kernels as gate_kernels
from srm_kernels.pool import kernels as pool_kernels
from srm_kernels.scale import kernels as scale_kernels


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned(scale_kernels, gate_kernels, pool_kernels):
        yield


@pytest.fixture(autouse=True)
def divided(monkeypatch):
    """Lower the block sizes, so that several programs share the work even with few items."""
    monkeypatch.setattr(scale_kernels, "TOKENS", 16)
    monkeypatch.setattr(scale_kernels, "LEAST_TOKENS_OF_A_SHARE", 32)
    monkeypatch.setattr(scale_kernels, "ROWS", 4)
    monkeypatch.setattr(scale_kernels, "COLUMNS", 16)
    monkeypatch.setattr(scale_kernels, "LEAST_ROWS_OF_A_SHARE", 8)
    monkeypatch.setattr(gate_kernels, "BLOCK", 64)
    monkeypatch.setattr(gate_kernels, "IMAGES", 2)
    monkeypatch.setattr(pool_kernels, "ELEMENTS", 64)
    monkeypatch.setattr(pool_kernels, "BLOCK", 64)


def made(seed, *shape, dtype=torch.float32, scale=1.0):
    return tokens(seed, *shape, dtype=dtype, scale=scale).to(DEVICE)


# The RMS statistic


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 70, 24), (1, 3, 5, 59), (2, 1, 33, 8)])
def test_rms_scale(shape, dtype):
    follow_the_rule(rms_scale, [made(0, *shape, dtype=dtype) + 1])


def test_a_large_mean_cancels_nothing():
    """The fp32 input has mean 1e4 and standard deviation 1. The tolerances are those of test_scale_ops.py."""
    y = made(1, 3, 2, 500, 8) + 1e4
    mean, rms = rms_scale(y, backend="triton")
    exact = oracle.rms(y.cpu())
    assert (rms.cpu().double() / exact[1] - 1).abs().max() <= 1e-4
    assert (mean.cpu().double() - exact[0]).abs().max() <= 1e-3


def test_one_token_has_no_spread():
    mean, rms = rms_scale(made(2, 1, 2, 1, 8), backend="triton")
    assert rms.tolist() == [0, 0]
    assert torch.equal(mean, made(2, 1, 2, 1, 8)[0, :, 0])


# DyT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 24), (2, 19, 40), (2, 3, 5, 59), (1, 16)])
def test_dyt(shape, dtype):
    x, weight, bias = (made(i, *s, dtype=dtype) for i, s in enumerate((shape, shape[-1:], shape[-1:])))
    follow_the_rule(dyt, [3 * x, made(3, 1, dtype=dtype), weight, bias])


def test_dyt_keeps_small_numbers_relatively():
    """The relative error of tanh is at most 4 eps for each entry, also for small x.

    The formula tanh x = 1 − 2/(1 + e^{2x}) would round the result to 0 for small x.
    """
    x = torch.logspace(-20, 1.2, 800, device=DEVICE).repeat(2, 1) * torch.tensor(
        [[1.0], [-1.0]], device=DEVICE
    )
    one, zero = torch.ones(800, device=DEVICE), torch.zeros(800, device=DEVICE)
    out = dyt(x, one[:1], one, zero, backend="triton")
    assert ((out.double() / x.double().tanh() - 1).abs() <= 4 * torch.finfo(torch.float32).eps).all()


def test_dyt_saturates_and_keeps_nan():
    x = torch.tensor([[1e30, -1e30, math.nan, math.inf]], device=DEVICE)
    one = torch.ones(4, device=DEVICE)
    out = dyt(x, one[:1] / 2, 2 * one, one, backend="triton")
    assert out[0, [0, 1, 3]].tolist() == [3.0, -1.0, 3.0]
    assert out[0, 2].isnan()


def test_dyt_of_fp16_with_wide_parameters():
    x = made(4, 2, 9, 24, dtype=torch.float16)
    parameters = [made(5, 1), made(6, 24), made(7, 24)]
    follow_the_rule(dyt, [x, *parameters])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("links", "heads"), [(1, 8), (3, 5)])
def test_tau_loss(links, heads, dtype):
    thetas, sigmas = ([made(seed + i, heads, dtype=dtype) for i in range(links)] for seed in (30, 40))

    def loss(*tensors, backend):
        return tau_loss(tensors, [s.to(tensors[0]).abs() for s in sigmas], reference=1.7, backend=backend)

    follow_the_rule(loss, thetas)


def test_any_strides():
    """Results follow the numerics rule. On a GPU, strides may change the order of summation, and so the last bits."""
    x, weight, bias, alpha = made(8, 2, 24, 15), made(9, 24), made(10, 24), made(11, 1)
    follow_the_rule(dyt, [x.mT, alpha, weight, bias])
    follow_the_rule(dyt, [made(12, 2, 24, 3, 5).movedim(1, -1), alpha, weight, bias])
    heads_last = made(13, 2, 3, 20, 8).transpose(1, 2).contiguous().transpose(1, 2)
    exact = rms_scale(heads_last.cpu().double(), backend="reference").rms
    plain = rms_scale(heads_last.cpu(), backend="reference").rms
    within(rms_scale(heads_last, backend="triton").rms, plain, exact)
    maps, logits = made(14, 2, 3, 6, 5, 4), made(15, 2, 3)
    channels_last = maps.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)

    def fused(m, g, backend):
        return tuple(gated_fusion(m, g, cap=1.0, backend=backend))

    follow_the_rule(fused, [channels_last, logits])
    follow_the_rule(
        lambda m, g, backend: fused(m.expand_as(maps), g.mT, backend), [maps[:, :1], logits.mT.contiguous()]
    )
    last = made(16, 2, 6, 13, 9).contiguous(memory_format=torch.channels_last)
    follow_the_rule(lambda m, backend: adaptive_pool(m, 4, backend=backend), [last])


# The gate's logits


def of_gate(seed, *, b=2, stages=3, c=5, grid=(4, 7), dtype=torch.float32):
    """Return one list: all maps, then all biases, all readout weights and all readout offsets."""
    shapes = [(b, c, *grid), (c,), (1, c), (1,)]
    return [
        made(seed + stages * i + s, *shape, dtype=dtype)
        for i, shape in enumerate(shapes)
        for s in range(stages)
    ]


def activations(*tensors, backend="triton"):
    half = len(tensors) // 2
    return biased_gelu(tensors[:half], tensors[half:], backend=backend)


def logits_of(*tensors, backend="triton"):
    S = len(tensors) // 4
    maps, biases, weights, offsets = (tensors[S * i : S * (i + 1)] for i in range(4))
    return gate_logits(maps, biases, list(zip(weights, offsets, strict=True)), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stages", [1, 3])
def test_the_gates_activations_and_logits(stages, dtype):
    tensors = of_gate(50, stages=stages, dtype=dtype)
    follow_the_rule(activations, tensors[: 2 * stages])
    follow_the_rule(logits_of, tensors)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_gate_takes_wider_parameters(dtype):
    maps, parameters = of_gate(51, dtype=dtype)[:3], of_gate(51)[3:]
    follow_the_rule(activations, maps + parameters[:3])
    follow_the_rule(logits_of, maps + parameters)


def test_the_gate_reads_any_strides_and_an_image_alone_is_the_same_to_the_bit():
    maps, parameters = of_gate(52, b=3)[:3], of_gate(52, b=3)[3:]
    expected = activations(*maps, *parameters[:3]), logits_of(*maps, *parameters)
    last = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    slices = torch.stack(maps, 1).unbind(1)
    for strided in (last, slices, [last[0], maps[1], slices[2]]):
        torch.testing.assert_close(activations(*strided, *parameters[:3]), expected[0])
        torch.testing.assert_close(logits_of(*strided, *parameters), expected[1])
    maps[1][2, 0, 1, 1] = math.nan
    for i in range(2):
        alone = [m[i : i + 1] for m in maps]
        assert torch.equal(activations(*alone, *parameters[:3]), expected[0][:, i : i + 1])
        assert torch.equal(logits_of(*alone, *parameters), expected[1][i : i + 1])
    assert logits_of(*maps, *parameters).isnan().tolist() == [[False] * 3, [False] * 3, [False, True, False]]


# Fusion


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("stages", [1, 3, 4])
def test_gated_fusion(stages, cap, dtype):
    """The scales of the three images are 0.1, 1 and 10, so a cap of 5 scales down only some of them."""
    maps = (
        made(17, 3, stages, 6, 5, 4, dtype=torch.float64)
        * torch.logspace(-1, 1, 3, device=DEVICE)[:, None, None, None, None]
    )
    maps, logits = maps.to(dtype), made(18, 3, stages, dtype=dtype)
    if cap and stages == 3:
        assert len(set((gated_fusion(maps, logits, cap=cap, backend="triton").gain < 1).tolist())) == 2
    follow_the_rule(
        lambda m, g, backend: tuple(gated_fusion(m, g, cap=cap, temperature=0.7, backend=backend)),
        [maps, logits],
    )


def test_a_caps_factor_is_part_of_it():
    maps, logits, m0 = made(53, 2, 3, 6, 5, 4), made(54, 2, 3), torch.tensor(2.0, device=DEVICE)

    def run(**cap):
        return results_and_gradients(
            lambda m, g: tuple(gated_fusion(m, g, backend="triton", **cap)), [maps, logits]
        )

    for found, expected in zip(run(cap=m0, cap_factor=1.5), run(cap=3.0), strict=True):
        assert torch.equal(found, expected)
    follow_the_rule(
        lambda m, g, backend: tuple(gated_fusion(m, g, cap=m0.to(m.device), cap_factor=1.5, backend=backend)),
        [maps, logits],
    )


@settings(max_examples=12, phases=(Phase.explicit, Phase.generate))
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    exponent=st.floats(-4, 4),
    ratio=st.floats(0.05, 1.5),
    constant=st.booleans(),
)
def test_the_fused_norm_never_exceeds_the_cap(seed, dtype, exponent, ratio, constant):
    """In half precision the norm is at most the cap. In fp32, rounding may make it up to 1 + 1e-6 times the cap."""
    scale = 10.0 ** (max(exponent, -1) if dtype == torch.float16 else exponent)  # only normal numbers of fp16
    maps = made(seed, 2, 3, 8, 4, 4, dtype=torch.float64, scale=scale)
    if constant:  # every entry rounds the same way
        maps = torch.full_like(maps, scale * (1 + (seed % 1000) / 1000))
    maps, logits = maps.clamp(-6e4, 6e4).to(dtype), made(seed + 1, 2, 3, dtype=dtype)
    cap = ratio * float(gated_fusion(maps, logits, cap=None, backend="triton").norm.mean())
    found = gated_fusion(maps, logits, cap=cap, backend="triton")
    slack = 1e-6 if dtype == torch.float32 else 0.0
    assert (found.fused.double().flatten(1).norm(dim=1) <= cap * (1 + slack)).all()
    assert ((found.gain > 0) & (found.gain <= 1)).all()
    exact = gated_fusion(maps.double(), logits.double(), cap=None, backend="reference").norm
    assert (found.norm.double() / exact - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", sorted({*DTYPES, torch.bfloat16}, key=str))
@pytest.mark.parametrize(("cap", "factor"), [(math.inf, 1.0), (3e38, 1e3), (1e30, 1.0), (0.0, 1.0)])
def test_any_cap_has_finite_and_right_gradients(cap, factor, dtype):
    maps, logits = made(21, 4, 3, 6, 5, 4, dtype=dtype), made(22, 4, 3, dtype=dtype)
    maps[0] = 0
    limit = torch.tensor(cap)

    def function(m, g, backend):
        return tuple(gated_fusion(m, g, cap=limit.to(m.device), cap_factor=factor, backend=backend))

    found = results_and_gradients(lambda m, g: function(m, g, "triton"), [maps, logits])
    assert all(x.isfinite().all() for x in found)
    follow_the_rule(function, [maps, logits])


@pytest.mark.parametrize("cap", [None, 1.0, math.inf])
def test_nan_stays_nan_in_its_own_image(cap):
    maps, logits = made(19, 4, 3, 6, 5, 4), made(20, 4, 3)
    cap = None if cap is None else torch.tensor(cap, device=DEVICE)
    expected = gated_fusion(maps, logits, cap=cap, backend="triton")
    maps[1, 0, 0, 0, 0] = math.nan
    logits[2, 1] = math.nan
    found = gated_fusion(maps, logits, cap=cap, backend="triton")
    assert found.norm[[1, 2]].isnan().all()
    assert found.gain[[1, 2]].isnan().all()
    assert torch.equal(found.fused[[0, 3]], expected.fused[[0, 3]])


def test_maps_of_zeros_have_finite_gradients():
    maps, logits = torch.zeros(2, 3, 4, 2, 2, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    found = results_and_gradients(
        lambda m, g: gated_fusion(m, g, cap=1.0, backend="triton").fused, [maps, logits]
    )
    assert all(x.isfinite().all() for x in found)
    assert found[1].abs().max() > 0


# Losses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("floor", [0.0, 0.6, 2.0])
def test_gate_losses(floor, dtype):
    weights = oracle.softmax(2 * tokens(21, 5, 3)).to(dtype).to(DEVICE)
    follow_the_rule(lambda a, backend: tuple(gate_losses(a, entropy_floor=floor, backend=backend)), [weights])


def test_one_hot_weights_have_finite_gradients_and_nan_stays():
    eye = torch.eye(3, device=DEVICE)
    *losses, grad = results_and_gradients(
        lambda a: tuple(gate_losses(a, entropy_floor=0.7, backend="triton")), [eye]
    )
    assert losses[0].item() == pytest.approx(0.7, rel=1e-6)
    assert grad.isfinite().all()
    eye[0, 0] = math.nan
    assert all(loss.isnan() for loss in gate_losses(eye, entropy_floor=0.7, backend="triton"))


# Pooling


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "size"), [((8, 16), 4), ((13, 9), 4), ((3, 5), 8), ((1, 1), 3), ((3, 14), 3), ((9, 9), 1)]
)
def test_adaptive_pool(grid, size, dtype):
    x = made(22, 2, 5, *grid, dtype=dtype)
    follow_the_rule(lambda x, backend: adaptive_pool(x, size, backend=backend), [x])
    within(
        adaptive_pool(x, size, backend="triton"),
        F.adaptive_avg_pool2d(x.float(), size).to(dtype),
        F.adaptive_avg_pool2d(x.double().cpu(), size),
    )


# All operators


def test_an_image_alone_and_in_a_batch_bit_for_bit():
    maps, logits = made(23, 3, 3, 6, 5, 4), made(24, 3, 3)
    x, parameters = made(25, 3, 5, 9, 13), [made(26, 1), made(27, 13), made(28, 13)]

    def run(maps, logits, x):
        fused = gated_fusion(maps, logits, cap=5.0, backend="triton").fused
        return fused, dyt(x, *parameters, backend="triton"), adaptive_pool(x, 4, backend="triton")

    together = results_and_gradients(run, [maps, logits, x])
    for i in range(3):
        alone = run(maps[i : i + 1], logits[i : i + 1], x[i : i + 1])
        assert all(torch.equal(t[i : i + 1], a) for t, a in zip(together, alone, strict=False))


def test_the_same_to_the_bit_every_time():
    def run():
        y = results_and_gradients(lambda y: tuple(rms_scale(y, backend="triton")), [made(29, 2, 2, 70, 8)])
        x = [made(30, 40, 24), made(31, 1), made(32, 24), made(33, 24)]
        return y + results_and_gradients(lambda *t: dyt(*t, backend="triton"), x)

    first = run()
    for _ in range(100 if DEVICE == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_opcheck():
    def leaf(seed, *shape):
        return made(seed, *shape).requires_grad_()

    srm = torch.ops.srm
    cases = {
        srm.rms_scale.default: (leaf(34, 2, 2, 9, 8),),
        srm.dyt.default: (leaf(35, 2, 9, 8), leaf(36, 1), leaf(37, 8), leaf(38, 8)),
        srm.gated_fusion.default: (
            leaf(39, 2, 3, 4, 2, 2), leaf(40, 2, 3), torch.tensor(2.0, device=DEVICE), 1.0, 1.0, 1e-6,
        ),
        srm.biased_gelu.default: ([leaf(55, 2, 3, 2, 2)] * 2, [leaf(56, 3)] * 2),
        srm.gate_logits.default: (
            [leaf(57, 2, 3, 2, 2)], [leaf(58, 3)], [leaf(59, 1, 3)], [leaf(60, 1)],
        ),
        srm.gate_losses.default: (leaf(41, 2, 3).detach().softmax(-1).requires_grad_(), 0.7),
        srm.adaptive_pool.default: (leaf(42, 2, 3, 9, 7), 4),
    }  # fmt: skip
    for operator, arguments in cases.items():
        library.opcheck(operator, (*arguments, "triton"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [{"size": 0}, {"x": torch.ones(2, 3, 4)}])
def test_pooling_says_what_it_takes(bad):
    arguments = {"x": torch.ones(1, 2, 3, 3), "size": 2} | bad
    with pytest.raises(ValueError, match="expected"):
        adaptive_pool(**arguments)


@pytest.mark.skipif(DEVICE == "cuda", reason="there the kernels are the choice")
def test_the_interpreter_runs_only_by_name(monkeypatch):
    for module in (scale_kernels, gate_kernels, pool_kernels):
        monkeypatch.setattr(module, "empty", None)
    one = torch.ones(8)
    assert dyt(made(43, 2, 8), one[:1], one, one) is not None
    assert adaptive_pool(made(44, 1, 2, 5, 5), 2) is not None
    with pytest.raises(NotImplementedError, match=r"triton.*float64"):
        rms_scale(tokens(45, 1, 1, 4, 8), backend="triton")
