"""Tests of Nyström attention and of full attention, its quadratic baseline, with the tolerances of `oracle.agree`."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from oracle import tokens
from torch import Tensor

from srm_kernels import (
    diagnosed_attention,
    full_attention,
    landmark_solve,
    nystrom_attention,
    select_landmarks,
)
from srm_kernels.landmarks import LANDMARK_METHODS

DIRECT = ("cholesky", "lu", "svd", "auto")
LOW = (torch.float32, torch.bfloat16, torch.float16)
QK_NORMS = (None, "keys", "both")
RANK = 20  # with 16 landmarks or more, torch's fused attention runs; with fewer, as in SMALL, the reference
SMALL = 8


def inputs(
    seed: int = 0,
    b: int = 2,
    h: int = 3,
    nq: int = 37,
    nk: int = 40,
    d: int = 24,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        tokens(seed, b, h, nq, d, dtype=dtype),
        tokens(seed + 1, b, h, nk, d, dtype=dtype),
        tokens(seed + 2, b, h, nk, d, dtype=dtype),
    )


def plain_full(query: Tensor, key: Tensor, value: Tensor, qk_norm: str | None = None) -> Tensor:
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    if qk_norm is not None:
        key = oracle.normalise(key)
    if qk_norm == "both":
        query = oracle.normalise(query)
    return (torch.softmax(query @ key.mT / math.sqrt(key.shape[-1]), -1) @ value).to(dtype)


@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("equilibrate", [False, True])
@pytest.mark.parametrize("solver", DIRECT)
@pytest.mark.parametrize("rank", [SMALL, RANK])
def test_values_in_fp64(solver, equilibrate, qk_norm, rank):
    q, k, v = inputs()
    landmarks = select_landmarks(k, rank, method="uniform")
    y = nystrom_attention(
        q, k, v, rank, landmarks=landmarks, solver=solver, equilibrate=equilibrate, qk_norm=qk_norm
    )
    assert y.dtype == torch.float64
    oracle.agree(y, oracle.nystrom(q, k, v, landmarks, equilibrate=equilibrate, qk_norm=qk_norm))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("solver", DIRECT)
@pytest.mark.parametrize("rank", [SMALL, RANK])
def test_values_in_lower_dtypes(solver, qk_norm, dtype, rank):
    q, k, v = inputs(dtype=dtype)
    landmarks = select_landmarks(k, rank, method="uniform")
    y = nystrom_attention(q, k, v, rank, landmarks=landmarks, solver=solver, qk_norm=qk_norm)
    assert y.dtype == dtype
    plain = oracle.plain_nystrom(
        q, k, v, landmarks, qk_norm=qk_norm, solver="svd" if solver == "svd" else "lu"
    )
    oracle.agree(y, oracle.nystrom(q, k, v, landmarks, qk_norm=qk_norm), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("nq", "nk", "d", "r"),
    [
        (1, 1, 1, 1),
        (5, 30, 40, 1),
        (30, 5, 59, 5),
        (17, 33, 24, 32),
        (64, 64, 32, 64),
        (3, 12, 8, 7),
        (130, 9, 3, 4),
    ],
)
def test_any_size(nq, nk, d, r, dtype):
    q, k, v = inputs(3, nq=nq, nk=nk, d=d, dtype=dtype)
    landmarks = select_landmarks(k, r)
    y = nystrom_attention(q, k, v, r, qk_norm="keys", landmarks=landmarks)
    exact = oracle.nystrom(q, k, v, landmarks, qk_norm="keys")
    if dtype == torch.float64:
        oracle.agree(y, exact)
    else:
        oracle.agree(y, exact, oracle.plain_nystrom(q, k, v, landmarks, qk_norm="keys"))


@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0])
def test_scale_replaces_the_default(scale):
    q, k, v = inputs(4)
    for rank in (SMALL, RANK):
        landmarks = select_landmarks(k, rank)
        y = nystrom_attention(q, k, v, rank, landmarks=landmarks, scale=scale)
        oracle.agree(y, oracle.nystrom(q, k, v, landmarks, scale=scale))
    oracle.agree(full_attention(q, k, v, scale=scale), oracle.full(q, k, v, scale=scale))


@pytest.mark.parametrize("nk", [12, 18])
@pytest.mark.parametrize("solver", ["lu", "svd", "auto"])
@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_every_key_a_landmark_and_no_ridge_is_full_attention(solver, qk_norm, nk):
    """For these keys, κ(W) is below 5, so rounding errors stay below 1e-10, the tolerance of `oracle.agree`."""
    q, k, v = inputs(5, nk=nk)
    y = nystrom_attention(q, k, v, nk, ridge=0.0, solver=solver, qk_norm=qk_norm)
    oracle.agree(y, oracle.full(q, k, v, qk_norm=qk_norm))


@pytest.mark.parametrize("solver", DIRECT)
def test_the_order_of_landmarks_does_not_matter(solver):
    q, k, v = inputs(6)
    landmarks = select_landmarks(k, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    y = nystrom_attention(q, k, v, 9, landmarks=landmarks, solver=solver)
    permuted = nystrom_attention(q, k, v, 9, landmarks=landmarks[..., order], solver=solver)
    oracle.agree(permuted, y)


@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_landmarks_are_chosen_among_the_normalised_keys(method, qk_norm):
    q, k, v = inputs(7, nk=40)
    k = k * torch.linspace(0.1, 4, 40, dtype=torch.float64)[:, None]
    seen = k if qk_norm is None else oracle.normalise(k)
    landmarks = select_landmarks(seen, RANK, method=method)
    y = nystrom_attention(q, k, v, RANK, method=method, qk_norm=qk_norm)
    oracle.agree(y, oracle.nystrom(q, k, v, landmarks, qk_norm=qk_norm))


def test_gamma_and_generator_reach_the_choice_of_landmarks():
    q, k, v = inputs(8, nk=40)
    landmarks = select_landmarks(
        k, 5, method="leverage_sample", gamma=3.0, generator=torch.Generator().manual_seed(9)
    )
    y = nystrom_attention(
        q, k, v, 5, method="leverage_sample", gamma=3.0, generator=torch.Generator().manual_seed(9)
    )
    oracle.agree(y, oracle.nystrom(q, k, v, landmarks))


@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_no_generator_means_seed_zero_and_leaves_the_global_generator_alone(method):
    q, k, v = inputs(9)
    before = torch.get_rng_state()
    y = nystrom_attention(q, k, v, 6, method=method)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(
        y, nystrom_attention(q, k, v, 6, method=method, generator=torch.Generator().manual_seed(0))
    )


def test_rank_over_the_number_of_keys_is_clamped():
    q, k, v = inputs(10, nk=7)
    assert torch.equal(nystrom_attention(q, k, v, 64), nystrom_attention(q, k, v, 7))


def test_rank_must_be_the_number_of_given_landmarks():
    q, k, v = inputs(11)
    with pytest.raises(ValueError, match="rank"):
        nystrom_attention(q, k, v, 7, landmarks=select_landmarks(k, 6))


def test_neumann_inside_attention():
    q, k, v = inputs(12)
    landmarks = select_landmarks(k, 6)
    s = 1 / math.sqrt(24)
    chosen = oracle.gather(k, landmarks)
    right = oracle.softmax(chosen @ k.mT * s) @ v
    x = landmark_solve(chosen @ chosen.mT * s, right, solver="neumann").x
    y = nystrom_attention(q, k, v, 6, landmarks=landmarks, solver="neumann")
    oracle.agree(y, oracle.softmax(q @ chosen.mT * s) @ x)


def test_diagnostics_are_those_of_the_solve():
    q, k, v = inputs(13)
    landmarks = select_landmarks(oracle.normalise(k), RANK)
    y, found = nystrom_attention(q, k, v, RANK, qk_norm="keys", diagnostics=True)
    assert torch.equal(y, nystrom_attention(q, k, v, RANK, qk_norm="keys"))
    chosen = oracle.gather(oracle.normalise(k), landmarks)
    logits = chosen @ chosen.mT / math.sqrt(24)
    right = oracle.softmax(chosen @ oracle.normalise(k).mT / math.sqrt(24)) @ v
    expected = landmark_solve(logits, right, diagnostics=True)
    assert found._fields == expected._fields == ("x", "kappa", "residual", "gain", "solver")
    oracle.agree(found.x, expected.x)
    for name in ("kappa", "gain"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=0)
    assert torch.equal(found.solver, expected.solver)
    for estimate, kind in ((False, True), (True, "estimate")):
        again = diagnosed_attention(q, k, v, RANK, qk_norm="keys", estimate=estimate)
        assert torch.equal(again[0], y)
        by_flag = nystrom_attention(q, k, v, RANK, qk_norm="keys", diagnostics=kind)[1]
        assert all(map(torch.equal, again[1], by_flag))
    assert found.kappa.shape == (2, 3)


def test_normalised_keys_bound_condition_and_output_whatever_the_keys():
    """The bound κ(W_λ) ≤ r (1 + λ)/λ ≤ r (1 + r/λ0) holds even if one key is multiplied by 1000."""
    q, k, v = inputs(14, nk=40)
    k[:, :, 3] *= 1000
    _, found = nystrom_attention(q, k, v, 16, qk_norm="keys", diagnostics=True)
    assert found.kappa.max() <= 16 * (1 + 16 / 1e-3)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_full_attention_in_lower_dtypes(qk_norm, dtype, backend):
    """With normalised tokens in half precision, the tolerance of the output is 8 eps of the largest |V|.

    The tolerance is larger than that of `oracle.agree`, because the normalised tokens are rounded to the dtype of the
    inputs: scaled_dot_product_attention needs Q, K and V in one dtype.
    """
    q, k, v = inputs(15, dtype=dtype)
    y = full_attention(q, k, v, qk_norm=qk_norm, backend=backend)
    assert y.dtype == dtype
    exact = oracle.full(q, k, v, qk_norm=qk_norm)
    if qk_norm is None or dtype == torch.float32:
        oracle.agree(y, exact, plain_full(q, k, v, qk_norm))
    else:
        assert (y.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * v.abs().max()


@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_full_attention_in_fp64(qk_norm):
    q, k, v = inputs(16)
    oracle.agree(full_attention(q, k, v, qk_norm=qk_norm), oracle.full(q, k, v, qk_norm=qk_norm))


@pytest.mark.parametrize("rank", [SMALL, RANK])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_storage_only(dtype, rank):
    """Blocks and X are fp32, so the output is that of the same inputs in fp32, rounded once to half precision.

    Less than 1 % of the elements may differ, because rounding errors in fp32 can change to which half-precision value
    an element is rounded.
    """
    q, k, v = inputs(28, dtype=dtype)
    landmarks = select_landmarks(k, rank)
    y = nystrom_attention(q, k, v, rank, landmarks=landmarks, qk_norm="both")
    wide = nystrom_attention(q.float(), k.float(), v.float(), rank, landmarks=landmarks, qk_norm="both")
    assert (y != wide.to(dtype)).double().mean() < 0.01


@pytest.mark.parametrize("dtype", LOW)
def test_model_solve_dtype_forms_the_blocks_in_the_models_dtype(dtype):
    """`solve_dtype="model"` is an ablation. With fp32 inputs, its output satisfies `oracle.agree`.

    With half-precision inputs, the blocks are rounded to half precision, so the error is larger than with the default
    `solve_dtype`. The error is at most twice the error of plain PyTorch with blocks in half precision, plus 2 eps of
    the largest exact value.
    """
    q, k, v = inputs(17, dtype=dtype, nk=64)
    landmarks = select_landmarks(k, 12)
    exact = oracle.nystrom(q, k, v, landmarks, qk_norm="keys")
    y = nystrom_attention(q, k, v, 12, landmarks=landmarks, qk_norm="keys", solve_dtype="model")
    assert y.dtype == dtype
    if dtype == torch.float32:
        oracle.agree(y, exact, oracle.plain_nystrom(q, k, v, landmarks, qk_norm="keys"))
        return
    key = oracle.normalise(k.float()).to(dtype)
    chosen = key.gather(2, landmarks[..., None].expand(*landmarks.shape, 24))
    s = 1 / math.sqrt(24)
    L, W, R = (torch.softmax(a @ b.mT * s, -1) for a, b in ((q, chosen), (chosen, chosen), (chosen, key)))
    lam = 1e-3 * W.float().diagonal(dim1=-2, dim2=-1).sum(-1) / 12
    X = torch.linalg.solve(W.float() + lam[..., None, None] * torch.eye(12), (R @ v).float())
    plain = (L.float() @ X).to(dtype)
    error = (y.double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    default = nystrom_attention(q, k, v, 12, landmarks=landmarks, qk_norm="keys")
    assert error > (default.double() - exact).abs().max()


@pytest.mark.parametrize("rank", [SMALL, RANK])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_logits_accumulate_in_fp32(backend, rank):
    """The products q·k reach about 1.8e5, beyond the range of fp16. The scale of 1e-4 makes the logits small again."""
    q, k, v = inputs(18, dtype=torch.float16)
    q, k = q * 90, k * 90
    assert (q.double() @ k.double().mT).abs().max() > 65504
    landmarks = select_landmarks(k, rank)
    y = nystrom_attention(q, k, v, rank, landmarks=landmarks, scale=1e-4, backend=backend)
    exact = oracle.nystrom(q, k, v, landmarks, scale=1e-4)
    oracle.agree(y, exact, oracle.plain_nystrom(q, k, v, landmarks, scale=1e-4))
    assert full_attention(q, k, v, scale=1e-4, backend=backend).isfinite().all()


@pytest.mark.parametrize("call", ["nystrom", "full"])
def test_strides_do_not_matter(call):
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nystrom_attention(q, k, v, RANK) if call == "nystrom" else full_attention(q, k, v)

    q, k, v = inputs(19)
    expected = run(q, k, v)
    heads_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    channels_first = [x.mT.contiguous().mT for x in (q, k, v)]
    strided = [torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    offset = [torch.cat([torch.full_like(x, math.nan), x], 2)[:, :, x.shape[2] :] for x in (q, k, v)]
    for variant in (heads_last, channels_first, strided, offset):
        assert not all(x.is_contiguous() for x in variant)
        oracle.agree(run(*variant), expected)
    shared = [x[:1, :1].expand_as(x) for x in (q, k, v)]
    oracle.agree(run(*shared), run(*(x.contiguous() for x in shared)))


def test_inputs_are_left_as_they_are():
    tensors = inputs(20)
    copies = [x.clone() for x in tensors]
    nystrom_attention(*tensors, RANK, qk_norm="both")
    full_attention(*tensors, qk_norm="both")
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("solver", [*DIRECT, "neumann"])
@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_nan_in_a_key_stays_in_its_head_and_sample(method, solver):
    q, k, v = inputs(21, dtype=torch.float32)
    expected = nystrom_attention(q, k, v, RANK, method=method, solver=solver)
    k[0, 1, 4, 2] = math.nan
    y = nystrom_attention(q, k, v, RANK, method=method, solver=solver)
    assert y[0, 1].isnan().all()
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[0, 1] = False
    assert torch.equal(y[keep], expected[keep])


def test_nan_in_a_query_token_stays_in_that_token():
    q, k, v = inputs(22, dtype=torch.float32)
    expected = nystrom_attention(q, k, v, RANK)
    q[1, 0, 5, 0] = math.nan
    y = nystrom_attention(q, k, v, RANK)
    assert y[1, 0, 5].isnan().all()
    keep = torch.ones(2, 3, 37, dtype=torch.bool)
    keep[1, 0, 5] = False
    assert torch.equal(y[keep], expected[keep])


@pytest.mark.parametrize("nk", [3, 8, 21, 64])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_nan_is_never_laundered_into_a_number(nk, dtype):
    """A query with NaN has an output of NaN, although torch's fused attention returns zeros if there are few keys."""
    q, k, v = inputs(25, b=1, h=1, nk=nk, dtype=dtype)
    q[0, 0, 2] = math.nan
    assert nystrom_attention(q, k, v, nk)[0, 0, 2].isnan().all()
    assert full_attention(q, k, v)[0, 0, 2].isnan().all()


def test_diagnostics_are_the_same_under_autocast():
    q, k, v = inputs(26, dtype=torch.float32)
    _, expected = nystrom_attention(q, k, v, RANK, diagnostics=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = nystrom_attention(q, k, v, RANK, diagnostics=True)
    for name in ("x", "kappa", "residual", "gain"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_full_attention_under_autocast_keeps_the_querys_dtype(backend):
    q, k, v = inputs(27, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = full_attention(q, k, v, backend=backend)
    assert y.dtype == torch.float32
    oracle.agree(y, oracle.full(q, k, v), plain_full(q, k, v))


def test_autocast_does_not_reach_inside():
    """If the inputs are fp32, autocast to bf16 around the call does not round the blocks to bf16."""
    q, k, v = inputs(23, dtype=torch.float32)
    expected = nystrom_attention(q, k, v, RANK)
    with torch.autocast("cpu", torch.bfloat16):
        y = nystrom_attention(q, k, v, RANK)
    assert y.dtype == torch.float32
    oracle.agree(y, oracle.nystrom(q, k, v, select_landmarks(k, RANK)), expected)


@pytest.mark.parametrize("backward", [False, True])
def test_no_tensor_of_queries_by_keys_is_ever_held(backward):
    """No operator has an input of N_q × N_k elements. The largest input that is needed has N_q × max(r, d) elements."""
    nq, nk, r, d = 1024, 512, 16, 8
    q, k, v = (
        x.requires_grad_(backward) for x in inputs(24, b=1, h=1, nq=nq, nk=nk, d=d, dtype=torch.float32)
    )
    with torch.profiler.profile(record_shapes=True) as profile:
        y = nystrom_attention(q, k, v, r)
        if backward:
            y.sum().backward()
    sizes = [
        math.prod(shape)
        for event in profile.events()
        for shape in event.input_shapes
        if shape and all(isinstance(n, int) for n in shape)
    ]
    assert sizes
    assert max(sizes) < nq * nk // 4
