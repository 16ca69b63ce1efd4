"""The query side of a link with pooled probabilities, and the key side alone: definition, kernels, what is kept.

Kernels follow the rule of `kernel_rule`. G, a library product, may round differently beside other images: outputs alone
and in a batch then agree to 16 units of fp32 of the largest value.
"""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from kernel_rule import DEVICE, DTYPES, follow_the_rule, poisoned, results_and_gradients, within
from oracle import tokens
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from srm_kernels import landmark_side, nystrom_attention, pooled_link, select_landmarks

pytest.importorskip("triton")
from srm_kernels.neck import kernels
from srm_kernels.pool import kernels as pool_kernels
from srm_kernels.scale import kernels as scale_kernels


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned(kernels, scale_kernels, pool_kernels):
        yield


def inputs(
    seed: int = 0,
    *,
    b: int = 2,
    heads: int = 2,
    d: int = 8,
    channels: int = 6,
    grid: tuple[int, int] = (9, 13),
    rank: int = 5,
    dtype: torch.dtype = torch.float32,
    dyt: bool = False,
) -> list[Tensor]:
    """F, A, a, W_Q, K̃, X and DyT's three, of sizes that keep logits of order 1."""
    C = heads * d
    shapes = [(b, channels, *grid), (C, channels), (C,), (C, C), (b, heads, rank, d), (b, heads, rank, d)]
    scales = [1, channels**-0.5, 0.1, 2 * C**-0.5, 1, 1]
    made = [
        tokens(seed + i, *shape, dtype=dtype, scale=s).to(DEVICE)
        for i, (shape, s) in enumerate(zip(shapes, scales, strict=True))
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made[4], made[5] = made[4].to(wide), made[5].to(wide)
    if dyt:
        made += [tokens(seed + 6 + i, n, dtype=dtype, scale=0.7).to(DEVICE) for i, n in enumerate((1, C, C))]
    return made


def probabilities(size: int, **options: Any):
    """P̄ as a function of everything but X, for the rule."""

    def call(
        f: Tensor, a: Tensor, bias: Tensor, w: Tensor, k: Tensor, *dyt: Tensor, backend: str | None = None
    ):
        return pooled_link(
            f, a, bias, w, k, size=size, dyt=dyt or None, backend=backend, **options
        ).probabilities

    return call


# The definition, in fp64


@pytest.mark.parametrize("dyt", [False, True])
@pytest.mark.parametrize("qk_norm", [None, "keys", "both"])
def test_by_definition(qk_norm, dyt):
    f, a, bias, w, k, x, *of_dyt = inputs(1, dtype=torch.float64, dyt=dyt)
    found = pooled_link(
        f, a, bias, w, k, size=4, x=x, dyt=of_dyt or None, qk_norm=qk_norm, backend="reference"
    )
    t = F.conv2d(f, a[:, :, None, None], bias).flatten(2).mT
    if dyt:
        t = of_dyt[1] * torch.tanh(of_dyt[0] * t) + of_dyt[2]
    q = (t @ w.mT).unflatten(-1, (2, 8)).transpose(1, 2)
    q = oracle.normalise(q) if qk_norm == "both" else q
    k = oracle.normalise(k) if qk_norm else k
    y = oracle.softmax(q @ k.mT / math.sqrt(8)) @ x
    pooled = F.adaptive_avg_pool2d(y.mT.flatten(1, 2).unflatten(-1, (9, 13)), 4)
    oracle.agree((found.probabilities @ x).mT.flatten(1, 2), pooled.flatten(2))
    for part, exact in zip(found.scale, oracle.rms(y), strict=True):
        oracle.agree(part, exact)


@pytest.mark.parametrize("dyt", [False, True])
def test_gradients_in_fp64(dyt):
    f, a, bias, w, k, _, *of_dyt = inputs(
        2, b=1, d=2, channels=2, grid=(3, 2), rank=2, dtype=torch.float64, dyt=dyt
    )
    leaves = tuple(t.requires_grad_() for t in (f, a, bias, w, k, *of_dyt))
    call = probabilities(2, qk_norm="keys")
    assert gradcheck(call, leaves)
    if not dyt:
        assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("solver", ["cholesky", "lu"])
def test_both_sides_together_are_nystrom_attention_pooled(solver):
    f, a, bias, w, *_ = inputs(3, dtype=torch.float64)
    key, value = (tokens(seed, 2, 2, 20, 8) for seed in (10, 11))
    options: dict[str, Any] = {"solver": solver, "qk_norm": "keys", "method": "uniform"}
    k, x = landmark_side(key, value, 7, **options)
    pooled = pooled_link(f, a, bias, w, k, size=3, qk_norm="keys").probabilities @ x
    q = (F.conv2d(f, a[:, :, None, None], bias).flatten(2).mT @ w.mT).unflatten(-1, (2, 8)).transpose(1, 2)
    y = nystrom_attention(q, key, value, 7, **options)
    exact = F.adaptive_avg_pool2d(y.mT.flatten(1, 2).unflatten(-1, (9, 13)), 3)
    oracle.agree(pooled.mT.flatten(1, 2), exact.flatten(2))


# Kernels

SHAPES: dict[str, dict[str, Any]] = {
    "square that the grid divides": {"grid": (8, 8), "channels": 16},
    "three to two, one image": {"grid": (12, 8), "b": 1, "d": 24, "channels": 20},
    "odd": {"grid": (7, 13), "b": 3, "heads": 1},
    "several blocks of columns": {"grid": (3, 70), "b": 1, "heads": 1},
    "smaller than the grid": {"grid": (2, 3), "rank": 1},
    "many channels, many landmarks": {"grid": (4, 5), "b": 1, "channels": 100, "rank": 20},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("qk_norm", "dyt"), [("keys", False), (None, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, qk_norm, dyt, dtype):
    f, a, bias, w, k, _, *of_dyt = inputs(4, dtype=dtype, dyt=dyt, **SHAPES[shape])
    follow_the_rule(probabilities(4, qk_norm=qk_norm), [f, a, bias, w, k, *of_dyt])


def test_normalised_queries():
    f, a, bias, w, k, _ = inputs(5, dtype=DTYPES[1])
    follow_the_rule(probabilities(4, qk_norm="both"), [f, a, bias, w, k])


def test_960_channels():
    f, a, bias, w, k, _ = inputs(6, b=1, heads=1, channels=960, grid=(2, 4), dtype=torch.float16)
    found, exact = (
        probabilities(2)(*(t.to(kind) for t in (f, a, bias, w)), k.to(wide), backend=backend)
        for backend, kind, wide in (
            ("triton", torch.float16, torch.float32),
            ("reference", torch.float64, torch.float64),
        )
    )
    plain = probabilities(2)(f, a, bias, w, k, backend="reference")
    within(found, plain, exact)


@pytest.mark.parametrize("grid", [(9, 13), (3, 70), (2, 3)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_statistic(offset, grid):
    """With X of mean 1000, what a difference of sums of squares would leave in fp32 is nothing; the rule there is
    1e-3 of the spread, what rounding 1000 to fp32 makes of each of its terms."""
    f, a, bias, w, k, x = inputs(7, grid=grid)
    x += offset
    arguments = [f, a, bias, w, k]
    found = pooled_link(*arguments, size=4, x=x, backend="triton").scale
    exact = pooled_link(*(t.double() for t in arguments), size=4, x=x.double(), backend="reference").scale
    plain = pooled_link(*arguments, size=4, x=x, backend="reference").scale
    if offset:
        torch.testing.assert_close(found.mean.double(), exact.mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.rms.double(), exact.rms, rtol=1e-3, atol=0)
    else:
        for part in range(2):
            within(found[part], plain[part], exact[part])
    assert not found.rms.requires_grad


def test_channels_last_and_expanded_maps():
    f, a, bias, w, k, _ = inputs(8)
    call = probabilities(4)
    last = f.contiguous(memory_format=torch.channels_last)
    found, expected = (
        results_and_gradients(lambda *t: call(*t, backend="triton"), [m, a, bias, w, k]) for m in (last, f)
    )
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    same = f[:1].expand_as(f)
    assert torch.equal(
        call(same, a, bias, w, k, backend="triton"), call(same.contiguous(), a, bias, w, k, backend="triton")
    )


@pytest.mark.parametrize("dyt", [False, True])
def test_an_image_alone_and_in_a_batch(dyt):
    f, a, bias, w, k, _, *of_dyt = inputs(9, b=3, dyt=dyt)

    def run(f: Tensor, k: Tensor) -> list[Tensor]:
        return results_and_gradients(
            lambda f, k: probabilities(4)(f, a, bias, w, k, *of_dyt, backend="triton"), [f, k]
        )

    together = run(f, k)
    other = run(torch.cat([f[:1], 2 * f[1:]]), torch.cat([k[:1], -k[1:]]))
    assert all(torch.equal(x[0], y[0]) for x, y in zip(together, other, strict=True))  # nor on what it holds
    alone = run(f[:1], k[:1])
    for whole, one in zip(together, alone, strict=True):
        limit = 16 * torch.finfo(torch.float32).eps * whole[0].abs().max()
        assert (whole[0] - one[0]).abs().max() <= limit


def test_nan_stays_in_its_image_and_head():
    f, a, bias, w, k, _ = inputs(10)
    call = probabilities(4)
    expected = call(f, a, bias, w, k, backend="triton")
    f[0, 1, 2, 3] = math.nan
    k[1, 1, 2] = math.nan
    found = call(f, a, bias, w, k, backend="triton")
    assert found[0].isnan().any(-1).any(-1).all()
    assert found[1, 1].isnan().all()
    assert torch.equal(found[1, 0], expected[1, 0])


def test_the_same_to_the_bit_every_time():
    f, a, bias, w, k, _ = inputs(11, grid=(3, 70))
    runs = [
        results_and_gradients(lambda *t: probabilities(4)(*t, backend="triton"), [f, a, bias, w, k])
        for _ in range(50 if DEVICE == "cuda" else 2)
    ]
    assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dyt", [False, True])
def test_what_is_kept_for_the_backward_pass_is_the_map_and_small_things(dyt):
    """Neither tokens, nor queries, nor probabilities of every position: F itself, and less than it altogether."""
    f, a, bias, w, k, x, *of_dyt = inputs(12, b=1, grid=(24, 32), channels=8, dyt=dyt)
    leaves = [t.requires_grad_() for t in (f, a, bias, w, k, *of_dyt)]
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        probabilities(2, x=x)(*leaves, backend="triton")
    assert f.data_ptr() in kept
    assert sum(t.numel() for t in kept.values()) <= 1.5 * f.numel()


def test_opcheck():
    f, a, bias, w, k, x, *of_dyt = (
        t.requires_grad_() for t in inputs(13, b=1, heads=1, grid=(5, 4), dyt=True)
    )
    operator = torch.ops.srm.pooled_probabilities.default
    for dyt in (of_dyt, (None,) * 3):
        arguments = (f, a, bias, *dyt, w, k, x.detach(), 2, 0.3, "keys", "triton")
        opcheck(operator, arguments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["leverage", "uniform"])
def test_the_key_side_alone(method):
    """K̃ is exact, X that of the attention with the same landmarks."""
    key, value = (tokens(seed, 2, 2, 20, 8, dtype=torch.float32).to(DEVICE) for seed in (14, 15))
    options: dict[str, Any] = {"method": method, "qk_norm": "keys"}
    k, x = landmark_side(key, value, 7, backend="triton", **options)
    index = select_landmarks(oracle.normalise(key), 7, method=method)
    assert torch.equal(k.cpu(), oracle.gather(key.cpu(), index.cpu()))
    exact = landmark_side(
        key.double(), value.double(), 7, landmarks=index, qk_norm="keys", backend="reference"
    )[1]
    plain = landmark_side(key, value, 7, landmarks=index, qk_norm="keys", backend="reference")[1]
    within(x, plain, exact)


WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "expected one dtype": (TypeError, {"a": torch.ones(16, 6, dtype=torch.float64)}),
    "expected keys in fp32": (TypeError, {"k": torch.ones(2, 2, 5, 8, dtype=torch.float64), "x": None}),
    r"expected \(16, 6\)": (ValueError, {"a": torch.ones(16, 7)}),
    r"expected \(16, 16\)": (ValueError, {"w": torch.ones(16, 8)}),
    r"expected \(B, C_i": (ValueError, {"f": torch.ones(3, 6, 4, 4)}),
    "expected the same": (ValueError, {"x": torch.ones(2, 2, 5, 4)}),
    "at least 1": (ValueError, {"size": 0}),
    "qk_norm": (ValueError, {"qk_norm": "queries"}),
    "dyt no narrower": (
        TypeError,
        {"dyt": (torch.ones(1).half(), torch.ones(16).half(), torch.ones(16).half())},
    ),
    r"expected one element, \(16,\)": (ValueError, {"dyt": (torch.ones(1), torch.ones(8), torch.ones(16))}),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_said_at_the_door(message):
    kind, wrong = WRONG[message]
    f, a, bias, w, k, x = (t.cpu() for t in inputs(16))
    given = {"f": f, "a": a, "w": w, "k": k, "x": x, "size": 4, "qk_norm": None, "dyt": None} | wrong
    with pytest.raises(kind, match=message):
        pooled_link(
            given["f"], given["a"], bias, given["w"], given["k"], size=given["size"], x=given["x"],
            qk_norm=given["qk_norm"], dyt=given["dyt"],
        )  # fmt: skip


def test_what_the_kernels_cannot_take_is_refused_with_the_reason():
    f, a, bias, w, k, _ = inputs(17)
    with pytest.raises(NotImplementedError, match=r"triton.*grid of up to 32"):
        pooled_link(f, a, bias, w, k, size=33, backend="triton")
    wide = [t.double() for t in (f, a, bias, w, k)]
    with pytest.raises(NotImplementedError, match=r"triton.*float64"):
        pooled_link(*wide, size=4, backend="triton")
    with pytest.raises(NotImplementedError, match=r"triton.*float64"):
        landmark_side(wide[-1], wide[-1], 3, backend="triton")
