"""Test the Triton kernels of Nyström attention, on a GPU or in Triton's interpreter on the CPU.

Values and gradients follow the rule of `srm_kernels.numerics`. A gradient can be a small difference of large terms.
The 8 units of fp32 that the rule allows are therefore relative to the largest magnitude among Y and all gradients.
Every output and workspace is filled with NaN, or with indices out of range, before a kernel writes to it. A kernel that
leaves an element unwritten then gives a wrong result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from kernel_rule import within
from oracle import tokens
from torch import Tensor, library
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
from srm_kernels import nystrom_attention, rms_scale, select_landmarks
from srm_kernels.attention import attention_with_scale, key_kernels, launch_rules, query_kernels
from srm_kernels.conditioning import SOLVERS, SOLVERS_OF_KERNELS
from srm_kernels.landmarks import kernels as landmark_kernels
from srm_kernels.options import KeySide, LandmarkOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
QK_NORMS = (None, "keys", "both")
attend = functools.partial(nystrom_attention, backend="triton")


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """Fill every output and workspace with NaN, or with indices out of range, before a kernel runs."""

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(math.nan if tensor.is_floating_point() else 2**40)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (query_kernels, key_kernels, landmark_kernels):
            plain = module.empty
            monkeypatch.setattr(module, "empty", lambda *a, plain=plain: poison(plain(*a)))
        monkeypatch.setattr(query_kernels, "empty_like", lambda tensor: poison(torch.empty_like(tensor)))
        yield


@pytest.fixture
def divided(monkeypatch):
    """Lower the limits of tokens per program, so that several programs share one (b, h) even with few tokens."""
    divide(monkeypatch)


def divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_rules, "MOST_KEYS_OF_ONE_PROGRAM", 16)
    monkeypatch.setattr(launch_rules, "LEAST_KEYS_OF_A_PART", 32)
    monkeypatch.setattr(launch_rules, "LEAST_QUERIES_OF_A_PART", 32)
    monkeypatch.setattr(launch_rules, "LEAST_QUERIES_OF_A_GRADIENT", 32)


def take_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the kernels process K̃ and X in pieces of 16 landmarks, as if they were too large for one tile."""
    monkeypatch.setattr(launch_rules, "MOST_HELD", 0)
    monkeypatch.setattr(launch_rules, "PIECE", 16)


def inputs(
    seed: int = 0,
    b: int = 2,
    h: int = 2,
    nq: int = 37,
    nk: int = 40,
    d: int = 24,
    dtype: torch.dtype = DTYPES[0],
) -> list[Tensor]:
    return [tokens(seed + i, b, h, n, d, dtype=dtype).to(DEVICE) for i, n in enumerate((nq, nk, nk))]


def chosen(query: Tensor, key: Tensor, value: Tensor, rank: int = 16) -> Tensor:
    """Return the indices of the landmarks that the kernels choose by default."""
    side = KeySide(key, value, None, LandmarkOptions(rank), query.shape[-1] ** -0.5, None)
    return key_kernels.landmark_context(side, 1e-3)[3]


def value_and_gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], weight: Tensor
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, weight.to(y.dtype))]


def check(
    tensors: list[Tensor], landmarks: Tensor, found: list[Tensor], weight: Tensor, **options: Any
) -> None:
    """Check that Y, dQ, dK and dV in `found` follow the numerics rule. Expected results use the given landmarks."""
    tensors, landmarks, weight = [x.cpu() for x in tensors], landmarks.cpu(), weight.cpu()
    plain = value_and_gradients(lambda *x: oracle.plain_nystrom(*x, landmarks, **options), tensors, weight)
    exact = value_and_gradients(
        lambda *x: oracle.nystrom(*x, landmarks, **options), [x.double() for x in tensors], weight
    )
    for f, p, e in zip(found, plain, exact, strict=True):
        within(f, p, e, exact)


shapes = st.fixed_dictionaries(
    {
        "b": st.integers(1, 2),
        "h": st.integers(1, 2),
        "nq": st.integers(1, 70),
        "nk": st.integers(1, 70),
        "d": st.sampled_from((8, 24, 40, 59)),
    }
)


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))  # shrinking would take minutes
@given(
    shape=shapes,
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    qk_norm=st.sampled_from(QK_NORMS),
    method=st.sampled_from(("leverage", "pivoted_cholesky", "uniform")),
    split=st.booleans(),
    pieces=st.booleans(),
)
@example({"b": 1, "h": 1, "nq": 1, "nk": 1, "d": 8}, 1, torch.float32, "both", "leverage", False, False)
@example({"b": 1, "h": 1, "nq": 70, "nk": 70, "d": 59}, 33, torch.float16, "both", "leverage", True, True)
@example(
    {"b": 1, "h": 2, "nq": 17, "nk": 65, "d": 40}, 20, torch.float32, "keys", "pivoted_cholesky", True, False
)
@example({"b": 1, "h": 1, "nq": 5, "nk": 130, "d": 128}, 65, torch.float16, "keys", "uniform", False, False)
def test_values_and_gradients(shape, rank, dtype, qk_norm, method, split, pieces):
    with pytest.MonkeyPatch.context() as monkeypatch:
        if split:
            divide(monkeypatch)
        if pieces:
            take_pieces(monkeypatch)
        q, k, v = inputs(rank, dtype=dtype, **shape)
        weight = tokens(7, *q.shape).to(DEVICE)
        r, s = min(rank, k.shape[2]), k.shape[-1] ** -0.5
        side = KeySide(k, v, None, LandmarkOptions(r, method), s, qk_norm)
        used = key_kernels.landmark_context(side, 1e-3)[3]
        found = value_and_gradients(
            lambda *x: attend(*x, rank, method=method, qk_norm=qk_norm), [q, k, v], weight
        )
        assert found[0].dtype == dtype
        check([q, k, v], used, found, weight, qk_norm=qk_norm)


@pytest.mark.parametrize(
    ("solver", "equilibrate"),
    [
        ("cholesky", False),
        ("lu", False),
        ("cholesky", True),
        ("svd", False),
        ("auto", False),
        ("neumann", False),
    ],
)
def test_other_solvers(solver, equilibrate, divided, monkeypatch):
    """Every solver agrees with the reference backend.

    Without equilibration, `cholesky` and `lu` have kernels and do not call torch.linalg.
    """
    tensors = inputs(1, nk=50)
    landmarks = select_landmarks(tensors[1], 12, method="uniform")
    weight = tokens(8, *tensors[0].shape).to(DEVICE)
    options = {
        "landmarks": landmarks,
        "solver": solver,
        "qk_norm": "keys",
        "equilibrate": equilibrate,
        "neumann_gate": False,
    }

    def plain(*x: Tensor) -> Tensor:
        return nystrom_attention(*x, 12, **options, backend="reference")

    exact = value_and_gradients(plain, [x.double() for x in tensors], weight.double())
    same = value_and_gradients(plain, tensors, weight)
    if solver in SOLVERS_OF_KERNELS and not equilibrate:
        for name in ("cholesky_ex", "lu_factor_ex", "lu_solve", "svd", "svdvals"):
            monkeypatch.setattr(torch.linalg, name, None)
    found = value_and_gradients(lambda *x: attend(*x, 12, **options), tensors, weight)
    for f, p, e in zip(found, same, exact, strict=True):
        within(f, p, e, exact)


EXTREMES: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "logits of 1e4": lambda q, k, v: (q.mul_(1e4 / 24), k.mul_(1.0)),
    "equal keys": lambda q, k, v: (k.copy_(k[:, :, :1].expand_as(k).clone()),),
    "one huge key": lambda q, k, v: (k[:, :, 3].mul_(1e4),),
    "duplicated keys": lambda q, k, v: (k[:, :, 1::2].copy_(k[:, :, ::2].clone()),),
    "a zero key": lambda q, k, v: (k[:, :, 5].zero_(),),
    "keys of 1e15": lambda q, k, v: (k[0, 1].mul_(1e15),),
    "an infinite key": lambda q, k, v: (k[0, 1, 4].fill_(math.inf),),
    "an infinite value": lambda q, k, v: (v[0, 1, 4, 2].fill_(math.inf),),
    "a NaN in a key": lambda q, k, v: (k[0, 1, 4, 2].fill_(math.nan),),
    "a NaN in a query": lambda q, k, v: (q[1, 0, 5, 0].fill_(math.nan),),
}


@pytest.mark.parametrize("qk_norm", [None, "keys"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_finite_where_the_reference_is_and_right_there(name, qk_norm):
    """The output is finite exactly where the reference is finite, and its finite values follow the numerics rule.

    Every key is a landmark, because r = N_k. For some inputs the landmark system is ill-conditioned, for instance for
    one huge key that is not normalised. The fp32 reference then has a large error, so the rule allows a large error.
    """
    tensors = inputs(2, nk=24)
    EXTREMES[name](*tensors)
    landmarks = torch.arange(24, device=DEVICE).expand(2, 2, 24).contiguous()
    found = attend(*tensors, 24, landmarks=landmarks, qk_norm=qk_norm)
    options = {"landmarks": landmarks.cpu(), "qk_norm": qk_norm, "backend": "reference"}
    plain = nystrom_attention(*(x.cpu() for x in tensors), 24, **options)
    assert torch.equal(found.isfinite().cpu(), plain.isfinite())
    exact = nystrom_attention(*(x.cpu().double() for x in tensors), 24, **options)
    keep = plain.isfinite()
    within(found.cpu()[keep], plain[keep], exact[keep])


def test_a_matrix_that_breaks_down_is_eliminated_with_pivoting(monkeypatch):
    """A matrix for which elimination without pivoting fails is eliminated with partial pivoting.

    In one (b, h), the keys are nearly equal and the ridge is far below the rounding error. Without pivoting, the pivots
    are therefore rounding noise, which can be negative. With partial pivoting, the residual is at most r eps. The
    results of the other matrices do not change.
    """
    _, k, v = inputs(3, nk=24, d=8)
    k[0, 1] *= 0.01
    landmarks = torch.arange(24, device=DEVICE).expand(2, 2, 24).contiguous()
    calls = []
    if DEVICE == "cpu":
        pivoting = key_kernels.eliminate_pivoting
        monkeypatch.setattr(key_kernels, "eliminate_pivoting", lambda *a: calls.append(1) or pivoting(*a))
    side = KeySide(k, v, landmarks, LandmarkOptions(24), 1.0, None)
    x = key_kernels.landmark_context(side, 1e-12)[1]
    assert len(calls) == (DEVICE == "cpu")
    logits = (k @ k.mT).double().cpu()
    system = oracle.system(logits, oracle.softmax(logits) @ v.double().cpu(), 1e-12)
    x = x.double().cpu()
    residual = oracle.frobenius(system.matrix @ x - system.right)
    assert (residual / oracle.frobenius(x)).max() <= 24 * torch.finfo(torch.float32).eps
    side = dataclasses.replace(side, key=k[1:], value=v[1:], landmarks=landmarks[1:])
    healthy = key_kernels.landmark_context(side, 1e-12)[1]
    assert torch.equal(x[1:].float(), healthy.cpu())


def test_a_gradient_through_a_matrix_that_breaks_down_is_that_of_the_transposed_solve():
    """A is the matrix of the test above. The gradient dU solves Aᵀ dU = dX with a small residual."""
    _, k, v = inputs(3, nk=24, d=8)
    k[0, 1] *= 0.01
    landmarks = torch.arange(24, device=DEVICE).expand(2, 2, 24).contiguous()
    arguments = (KeySide(k, v, landmarks, LandmarkOptions(24), 1.0, None), 1e-12)
    results = key_kernels.landmark_context(*arguments)
    dx = tokens(4, *results[1].shape, dtype=torch.float32).to(DEVICE)
    _, dvalue = key_kernels.landmark_context_backward([torch.zeros_like(dx), dx], results, *arguments)
    logits = (k @ k.mT).double().cpu()
    matrix = oracle.system(logits, dx, 1e-12).matrix
    # dV = Rᵀ dU. Every key is a landmark, so R = W, and solving with Wᵀ recovers dU from dV.
    solution = torch.linalg.solve(oracle.softmax(logits).mT, dvalue.double().cpu())
    residual = oracle.frobenius(matrix.mT @ solution - dx.double().cpu())
    assert (residual / oracle.frobenius(solution)).max() <= 1e-4


def test_nan_stays_in_its_head_and_sample_and_in_its_query():
    tensors = inputs(5)
    expected = attend(*tensors, 16)
    tensors[1][0, 1, 4, 2] = math.nan
    tensors[0][1, 0, 5, 0] = math.nan
    y = attend(*tensors, 16)
    assert y[0, 1].isnan().all()
    assert y[1, 0, 5].isnan().all()
    keep = torch.ones(y.shape[:3], dtype=torch.bool)
    keep[0, 1], keep[1, 0, 5] = False, False
    assert torch.equal(y[keep], expected[keep])


def test_an_index_out_of_range_gives_nan_in_its_head_alone():
    tensors = inputs(6)
    landmarks = select_landmarks(tensors[1], 8)
    expected = attend(*tensors, 8, landmarks=landmarks)
    landmarks[0, 0, 3] = 10**12
    y = attend(*tensors, 8, landmarks=landmarks)
    assert y[0, 0].isnan().all()
    assert torch.equal(y[1], expected[1])
    assert torch.equal(y[0, 1], expected[0, 1])


@pytest.mark.parametrize(
    ("split", "dtype", "solver"),
    [
        *((split, dtype, "cholesky") for split in (False, True) for dtype in DTYPES),
        (True, torch.float32, "lu"),  # other solvers use torch.linalg, whose bits may depend on the batch
    ],
)
def test_alone_and_in_any_batch_bit_for_bit(split, dtype, solver, monkeypatch):
    if split:
        divide(monkeypatch)
        take_pieces(monkeypatch)
    small = solver != "cholesky"  # pivoting is slow in the interpreter
    tensors = inputs(7, b=3, h=1 if small else 2, nq=70, nk=70, dtype=dtype)
    weight = tokens(8, *tensors[0].shape).to(DEVICE)

    def run(*x: Tensor) -> Tensor:
        return attend(*x, 9 if small else 20, qk_norm="both", solver=solver)

    together = value_and_gradients(run, tensors, weight)
    for i in range(3):
        alone = value_and_gradients(run, [x[i : i + 1] for x in tensors], weight[i : i + 1])
        for t, a in zip(together, alone, strict=True):
            assert torch.equal(t[i], a[0])


@pytest.mark.parametrize("pieces", [False, True])
def test_the_same_to_the_bit_every_time(pieces, divided, monkeypatch):
    """Repeat 100 times on a GPU. In the interpreter, programs run one after the other, so one repetition is enough."""
    if pieces:
        take_pieces(monkeypatch)
    tensors = inputs(9, nq=70, nk=70)
    weight = tokens(10, *tensors[0].shape).to(DEVICE)
    first = value_and_gradients(lambda *x: attend(*x, 20), tensors, weight)
    for _ in range(100 if DEVICE == "cuda" else 1):
        again = value_and_gradients(lambda *x: attend(*x, 20), tensors, weight)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_attacker_sees_the_same():
    """PGD with 5 sign steps gives the same losses, and the same ranking of images, with kernels and reference.

    The relative tolerance of the losses is 1e-3. Rounding can change the sign of a gradient component near 0, and PGD
    then changes this entry of the image in the other direction. Such a component is smaller than 1e-6 times the largest
    component, so the changed step has little effect on the loss.
    """
    q, k, v, readout = (0.3 * tokens(s, 8, 8, dtype=torch.float32).to(DEVICE) for s in range(30, 34))
    images = tokens(34, 3, 1, 24, 8, dtype=torch.float32).to(DEVICE)
    wanted = torch.linspace(-1, 1, 3, device=DEVICE)

    def scores(x: Tensor, backend: str) -> Tensor:
        y = nystrom_attention(x @ q, x[:, :, ::2] @ k, x[:, :, ::2] @ v, 4, qk_norm="keys", backend=backend)
        return (y @ readout).square().mean((1, 2, 3))

    def attacked(backend: str) -> tuple[Tensor, Tensor]:
        x, losses = images, []
        for _ in range(5):
            x = x.detach().requires_grad_()
            loss = (scores(x, backend) - wanted).square()
            losses.append(loss.detach())
            x = x + 0.04 * torch.autograd.grad(loss.sum(), x)[0].sign()
            x = images + (x - images).clamp(-0.1, 0.1)
        return torch.stack(losses), scores(x.detach(), backend)

    (losses, found), (expected_losses, expected) = attacked("triton"), attacked("reference")
    assert (expected_losses[-1] > 1.02 * expected_losses[0]).all()
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=0)
    assert found.argsort().tolist() == expected.argsort().tolist()


class Watched:
    """A kernel that records the address and the strides of every tensor it is launched with."""

    def __init__(self, kernel: Any, seen: set[tuple[int, tuple[int, ...]]]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> None:
            given = (*args, *options.values())
            self.seen |= {(x.data_ptr(), x.stride()) for x in given if isinstance(x, Tensor)}
            self.kernel[grid](*args, **options)

        return launch


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2],
    "backwards": lambda x: x.flip(0).transpose(0, 1).contiguous().transpose(0, 1).flip(0),
}


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_and_nothing_is_copied_for_them(layout, pieces, divided, monkeypatch):
    """Inputs and the gradient of Y may have any strides. Kernels read the caller's tokens, not copies."""
    if pieces:
        take_pieces(monkeypatch)
    plain = inputs(11)
    weight = tokens(12, *plain[0].shape, dtype=plain[0].dtype).to(DEVICE)
    used = chosen(*plain)
    seen: dict[str, set[tuple[int, tuple[int, ...]]]] = {}
    for module in (query_kernels, key_kernels):
        for name in [n for n in vars(module) if n.startswith("_") and n.endswith("_kernel")]:
            seen[name] = set()
            monkeypatch.setattr(module, name, Watched(getattr(module, name), seen[name]))
    q, k, v = leaves = [LAYOUTS[layout](x).requires_grad_() for x in plain]
    dy = LAYOUTS[layout](weight)
    y = attend(*leaves, 16)
    assert y.stride() == torch.empty_like(q).stride()
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    check(plain, used, found, weight)
    walks = {
        "_gram_kernel": [k],
        "_mix_kernel": [k, v],
        "_tokens_backward_kernel": [k, v],
        "_forward_kernel": [q],
    }
    backwards = ["_queries_backward_kernel", "_pieces_backward_kernel"] if pieces else ["_backward_kernel"]
    for name, read in (walks | {name: [q, dy] for name in backwards}).items():
        assert {(x.data_ptr(), x.stride()) for x in read} <= seen[name], name


@pytest.mark.parametrize("split", [False, True])
def test_keys_and_values_may_have_different_strides(split, monkeypatch):
    if split:
        divide(monkeypatch)
    q, k, v = plain = inputs(11)
    k, v = LAYOUTS["heads last"](k), LAYOUTS["channels first"](v)
    weight = tokens(12, *q.shape, dtype=q.dtype).to(DEVICE)
    found = value_and_gradients(lambda *x: attend(*x, 16), [q, k, v], weight)
    check(plain, chosen(q, k, v), found, weight)


def test_one_memory_for_all_heads():
    shared = [x[:1, :1].expand_as(x) for x in inputs(11)]
    weight = tokens(12, *shared[0].shape, dtype=shared[0].dtype).to(DEVICE)
    leaves = [x.detach().requires_grad_() for x in shared]
    y = attend(*leaves, 16)
    check(shared, chosen(*shared), [y, *torch.autograd.grad(y, leaves, weight)], weight)


def test_offsets_pass_2_to_the_31():
    """Each input, and the gradient of Y, may have offsets that do not fit in 32 bits.

    Rows are 2³⁰ elements apart, so that the third row starts at offset 2³¹. The memory between rows is never used.
    """
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    tensors = [
        *inputs(12, b=1, h=1, nq=3, nk=3, d=8, dtype=torch.float16),
        tokens(13, 1, 1, 3, 8).half().to(DEVICE),
    ]
    far = memory.as_strided((1, 1, 3, 8), (1, 1, 2**30, 1))
    for pieces in (False, True):
        with pytest.MonkeyPatch.context() as monkeypatch:
            if pieces:
                take_pieces(monkeypatch)
                divide(monkeypatch)

            def run(tensors: list[Tensor]) -> list[Tensor]:
                leaves = [x.detach().requires_grad_() for x in tensors[:3]]
                y = attend(*leaves, 3)
                return [y, *torch.autograd.grad(y, leaves, tensors[3])]

            every_key = torch.arange(3, device=DEVICE).expand(1, 1, 3)
            for i, tensor in enumerate(tensors):
                far.copy_(tensor)
                found = run([far if j == i else x for j, x in enumerate(tensors)])
                check(tensors[:3], every_key, found, tensors[3])


@pytest.mark.parametrize("nq", [1, 70])
def test_a_large_mean_cancels_nothing_in_the_statistic(nq, divided):
    """The spread is accurate although the mean of X is 1000.

    In fp32, the formula E[Y²] − E[Y]² would lose all digits of the spread. The relative tolerance of the spread is
    1e-3, because each term of the spread contains the rounding error of a value near 1000.
    """
    q, k, _ = inputs(13, nq=nq)
    x = 1000 + tokens(14, 2, 2, 16, 24, dtype=torch.float32).to(DEVICE)
    arguments = (q, k[:, :, :16].contiguous(), x, None, 0.2, None, True)
    y, mean, spread = torch.ops.srm.landmark_attention(*arguments, "triton")
    wide = torch.ops.srm.landmark_attention(*(z.double() for z in arguments[:3]), *arguments[3:], "reference")
    torch.testing.assert_close(y.double(), wide[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), wide[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(spread.double(), wide[2], rtol=1e-3, atol=1e-5)


def test_tau_and_statistics_compose_as_in_the_other_backends(divided):
    tensors = inputs(13, nq=70)
    tau = torch.tensor([0.5, 3.0], device=DEVICE, requires_grad=True)
    y, scale = attention_with_scale(*tensors, 16, tau=tau, backend="triton")
    plain, plain_scale = attention_with_scale(*tensors, 16, tau=tau, backend="reference")
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale.mean, plain_scale.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale.rms, plain_scale.rms, rtol=1e-4, atol=0)
    assert y.requires_grad
    assert not scale.rms.requires_grad
    assert torch.equal(attend(*tensors, 16, tau=tau), y)
    assert attend(*tensors, 16, tau=tau, diagnostics=True)[1].x.shape == (2, 2, 16, 24)


def test_statistics_of_centred_output_are_the_references(divided):
    tensors = inputs(14, nq=70)
    y, scale = attention_with_scale(*tensors, 16, backend="triton")
    expected = rms_scale(y.double())
    torch.testing.assert_close(scale.rms.double(), expected.rms, rtol=1e-6, atol=0)
    torch.testing.assert_close(scale.mean.double(), expected.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_tau(dtype, pieces, monkeypatch):
    if pieces:
        take_pieces(monkeypatch)
    tensors = inputs(15, dtype=dtype)
    tau = torch.tensor([0.5, 3.0], device=DEVICE, requires_grad=True)
    weight = tokens(16, *tensors[0].shape).to(DEVICE)

    def run(backend: str, wide: bool) -> list[Tensor]:
        leaves = [x.double() if wide else x.clone() for x in tensors]
        leaves = [
            *(x.requires_grad_() for x in leaves),
            (tau.detach().double() if wide else tau.detach()).requires_grad_(),
        ]
        y = nystrom_attention(*leaves[:3], 16, landmarks=index, tau=leaves[3], backend=backend)
        return [y, *torch.autograd.grad(y, leaves, weight.to(y.dtype))]

    index = select_landmarks(tensors[1], 16)
    exact = run("reference", True)
    for found, plain, e in zip(run("triton", False), run("reference", False), exact, strict=True):
        within(found, plain, e, exact)


def test_a_second_derivative_goes_through_the_reference_with_the_same_landmarks():
    def twice(backend: str) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in inputs(17, b=1, h=1, nq=5, nk=12, d=8)]
        y = nystrom_attention(*leaves, 4, qk_norm="keys", backend=backend)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for found, expected in zip(twice("triton"), twice("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_some_inputs_are_those_of_all():
    tensors = inputs(18)
    weight = tokens(19, *tensors[0].shape).to(DEVICE)
    expected = value_and_gradients(lambda *x: attend(*x, 16), tensors, weight)[1:]
    for i in range(3):
        leaf = tensors[i].clone().requires_grad_()
        y = attend(*(leaf if j == i else x for j, x in enumerate(tensors)), 16)
        assert torch.equal(torch.autograd.grad(y, leaf, weight.to(y.dtype))[0], expected[i])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [True, "estimate"])
def test_diagnostics_are_the_references(kind, solver):
    tensors = inputs(20)
    options = {"landmarks": select_landmarks(tensors[1], 16), "qk_norm": "keys", "solver": solver}
    _, found = attend(*tensors, 16, **options, diagnostics=kind)
    _, expected = nystrom_attention(*tensors, 16, backend="reference", **options, diagnostics=kind)
    for name in ("x", "kappa", "residual", "gain"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-5)
    assert torch.equal(found.solver, expected.solver)


@pytest.mark.parametrize("solver", ["cholesky", "lu"])
@pytest.mark.parametrize("method", ["leverage", "uniform", "kmeans++"])
def test_the_flop_counter_sees_what_it_sees_of_the_other_backends(method, solver):
    tensors = inputs(21, nq=50, nk=20)
    counts = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with FlopCounterMode(display=False) as counter:
            y = nystrom_attention(*leaves, 8, method=method, solver=solver, backend=backend)
            forward = counter.get_total_flops()
            y.sum().backward()
        counts.append((forward, counter.get_total_flops() - forward))
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] >= counts[1][1]


REFUSED = {
    "float64": (lambda: (inputs(dtype=torch.float64), {})),
    "d from 8 to 128": (lambda: (inputs(d=4), {})),
    "r up to 128": (lambda: (inputs(nk=140), {"rank": 129})),
    "solve_dtype": (lambda: (inputs(dtype=torch.float16), {"solve_dtype": "model"})),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernels_cannot_take_is_refused_with_the_reason_and_served_otherwise(reason):
    tensors, options = REFUSED[reason]()
    rank = options.pop("rank", 16)
    with pytest.raises(NotImplementedError, match=f"triton.*{reason}"):
        attend(*tensors, rank, **options)
    assert nystrom_attention(*tensors, rank, **options).isfinite().all()


def test_kernels_run_only_by_name(monkeypatch):
    monkeypatch.setattr(query_kernels, "landmark_attention", None)
    assert nystrom_attention(*inputs(), 16) is not None


@pytest.mark.skipif(DEVICE == "cuda", reason="only the CPU needs the interpreter")
def test_without_the_interpreter_the_reason_names_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET"):
        attend(*inputs(), 16)


# Operators in PyTorch: opcheck, compile, export and vmap


def test_opcheck_of_the_operator_with_kernels():
    q, k, v = (x.requires_grad_() for x in inputs(22, b=1, h=2, nq=5, nk=9, d=8))
    tau = torch.tensor([0.5, 2.0], device=DEVICE, requires_grad=True)
    side = (k, v, None, 4, "leverage", 1e-3, 0.3, "keys")
    check = functools.partial(library.opcheck, rtol=1e-4, atol=1e-5)
    check(torch.ops.srm.landmark_context.default, (*side, 1e-3, "triton"))
    check(torch.ops.srm.landmark_blocks.default, (*side, "triton"))
    keys, x = (tokens(i, 1, 2, 4, 8, dtype=torch.float32).to(DEVICE).requires_grad_() for i in range(2))
    check(torch.ops.srm.landmark_attention.default, (q, keys, x, tau, 0.3, "keys", True, "triton"))


@pytest.mark.parametrize("solver", ["cholesky", "lu"])
def test_compiles_without_graph_breaks(solver):
    torch.compiler.reset()
    tensors = inputs(23, b=1, nq=9, nk=9, d=8)
    weight = tokens(24, *tensors[0].shape).to(DEVICE)
    call = functools.partial(attend, rank=4, solver=solver)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        value_and_gradients(lambda *x: compiled(*x), tensors, weight),
        value_and_gradients(lambda *x: call(*x), tensors, weight),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


class Layer(torch.nn.Module):
    """Attention whose keys are multiplied by a trainable matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(8, device=DEVICE))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = attend(q, k @ self.weight, v, 4, qk_norm="keys")
        assert isinstance(y, Tensor)
        return y


def test_a_functional_call_and_its_gradient():
    """`functional_call` uses the given weight instead of the module's weight. The given weight gets the gradient."""
    layer, tensors = Layer(), inputs(29, b=1, h=1, nq=5, nk=9, d=8)
    given = (0.5 * layer.weight.detach()).requires_grad_()
    y = torch.func.functional_call(layer, {"weight": given}, tuple(tensors))
    q, k, v = tensors
    expected = nystrom_attention(q, k @ given, v, 4, qk_norm="keys", backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(
        torch.autograd.grad(y.square().sum(), given),
        torch.autograd.grad(expected.square().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_exports_with_a_dynamic_batch():
    tensors = tuple(inputs(25, b=2, nq=5, nk=9, d=8))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Layer(), tensors, dynamic_shapes=({0: batch},) * 3)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"srm.landmark_context.default", "srm.landmark_attention.default"} <= names
    larger = [x.repeat(2, 1, 1, 1) for x in tensors]
    assert torch.equal(program.module()(*larger), Layer()(*larger))


def test_vmap_is_the_loop():
    tensors = [torch.stack([x, 0.5 * x]) for x in inputs(26, b=1, nq=5, nk=9, d=8)]
    found = torch.func.vmap(lambda *x: attend(*x, 4))(*tensors)
    for i in range(2):
        assert torch.equal(found[i], attend(*(x[i] for x in tensors), 4))


def test_fake_and_meta_tensors_have_the_shapes_of_real_ones():
    tensors = inputs(27, b=1, nq=5, nk=9, d=8)
    real, meta = (
        attention_with_scale(*(x.to(d) for x in tensors), 4, tau=torch.ones(2, device=d), backend="triton")
        for d in (DEVICE, "meta")
    )
    for r, m in zip((real[0], *real[1]), (meta[0], *meta[1]), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())
