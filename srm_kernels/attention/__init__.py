"""Nyström cross-attention, and exact attention as a baseline (docs/METHOD.md §2; section 3.3 of the article)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import autocast
from ..checks import check_choice, check_number, check_tensors, check_tokens, transforming, wide_dtype
from ..conditioning import DIAGNOSTICS, LandmarkSolution, diagnosed, has_kernels, solve_options, solved
from ..dispatch import choose_backend, choose_kernels, few_threads, kept
from ..landmarks import METHODS_OF_KERNELS, kernel_limits, landmark_options, selected
from ..options import AttentionOptions, LandmarkOptions, SolveOptions
from ..registration import later, no_autocast, register_operator
from ..scale import RMSScale, rms_scale
from . import reference, sdpa

QK_NORMS = (None, "keys", "both")
SOLVE_DTYPES = ("fp32", "model")


def _cast_key_side(key: Tensor, value: Tensor, *rest: object) -> tuple[object, ...]:
    return (*autocast.lowered(key, value), *rest)


_attention = register_operator(
    "nystrom_attention",
    "Tensor query, Tensor key, Tensor value, Tensor landmarks, float scale, str? qk_norm, str solve_dtype, "
    "SolveOptions solve",
    "Tensor",
    {"reference": reference.nystrom_attention, "torch": sdpa.nystrom_attention},
    fake=lambda query, *_: torch.empty_like(query),
    differentiable=("query", "key", "value"),
    like="query",
    autocast=lambda query, key, value, *rest: (*autocast.lowered(query, key, value), *rest),
)

_system = register_operator(
    "landmark_system",
    "Tensor key, Tensor value, Tensor landmarks, float scale, str? qk_norm, str solve_dtype",
    "(Tensor, Tensor)",
    {"reference": reference.landmark_system},
    fake=lambda key, value, landmarks, *_: (
        key.new_empty((*landmarks.shape, landmarks.shape[-1]), dtype=wide_dtype(key.dtype)),
        key.new_empty((*landmarks.shape, key.shape[-1]), dtype=wide_dtype(key.dtype)),
    ),
    autocast=_cast_key_side,
)

_KEY_KERNELS, _QUERY_KERNELS = f"{__name__}.key_kernels", f"{__name__}.query_kernels"


def _fake_key_side(
    key: Tensor, value: Tensor, landmarks: Tensor | None, rank: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors for the results of `_context`: K̃, X, the base-2 logsumexp of each row of K̃ Kᵀ s, and I.

    `_fake_blocks` uses the second tensor for R V, which has the same shape and dtype as X.
    """
    wide = wide_dtype(key.dtype)
    index = (*key.shape[:2], rank)
    return (
        key.new_empty((*index, key.shape[-1]), dtype=wide),
        key.new_empty((*index, key.shape[-1]), dtype=wide),
        key.new_empty(index, dtype=wide),
        key.new_empty(index, dtype=torch.int64),
    )


def _fake_blocks(
    key: Tensor, value: Tensor, landmarks: Tensor | None, rank: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    keys, rhs, lse, index = _fake_key_side(key, value, landmarks, rank)
    return keys, rhs.new_empty((*index.shape, rank)), rhs, lse, index


def _fake_query_side(
    query: Tensor,
    keys: Tensor,
    x: Tensor,
    tau: Tensor | None,
    scale: float,
    qk_norm: str | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, _, d = query.shape
    shapes = ((B, H, d), (B, H)) if statistics else ((0,), (0,))
    mean, spread = (x.new_empty(shape) for shape in shapes)
    return torch.empty_like(query), mean, spread


# The backend "triton" runs attention as two operators, the key side and the query side.
_context = register_operator(
    "landmark_context",
    "KeySide side, float ridge",
    "(Tensor, Tensor, Tensor, Tensor)",
    {
        "reference": few_threads(reference.landmark_context),
        "torch": few_threads(sdpa.landmark_context),
        "triton": later(_KEY_KERNELS, "landmark_context"),
    },
    fake=_fake_key_side,
    differentiable=("key", "value"),
    derivatives={"triton": later(_KEY_KERNELS, "landmark_context_backward")},
    constant=(2,),
    recalled={"landmarks": 3},
    autocast=_cast_key_side,
)

_blocks = register_operator(
    "landmark_blocks",
    "KeySide side",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    dict.fromkeys(("reference", "torch"), reference.landmark_blocks)
    | {"triton": later(_KEY_KERNELS, "landmark_blocks")},
    fake=_fake_blocks,
    differentiable=("key", "value"),
    derivatives={"triton": later(_KEY_KERNELS, "landmark_blocks_backward")},
    constant=(3,),
    recalled={"landmarks": 4},
    autocast=_cast_key_side,
)

_query_side = register_operator(
    "landmark_attention",
    "Tensor query, Tensor keys, Tensor x, Tensor? tau, float scale, str? qk_norm, bool statistics",
    "(Tensor, Tensor, Tensor)",
    {"reference": reference.landmark_attention, "triton": later(_QUERY_KERNELS, "landmark_attention")},
    fake=_fake_query_side,
    differentiable=("query", "keys", "x", "tau"),
    like="query",
    derivatives={"triton": later(_QUERY_KERNELS, "landmark_attention_backward")},
    constant=(1, 2),
    autocast=lambda query, keys, x, *rest: (query, *autocast.widened((keys, x), query), *rest),
)


class AttentionKeywords(TypedDict, total=False):
    """Keyword arguments of `nystrom_attention`, except `diagnostics`."""

    landmarks: Tensor | None
    method: str
    gamma: float
    ridge: float
    solver: str
    equilibrate: bool
    kappa_max: float
    neumann_order: int
    neumann_gate: bool
    qk_norm: str | None
    scale: float | None
    solve_dtype: str
    generator: torch.Generator | None
    tau: Tensor | None
    backend: str | None


@overload
def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rank: int,
    *,
    diagnostics: Literal[False] = False,
    **options: Unpack[AttentionKeywords],
) -> Tensor: ...


@overload
def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rank: int,
    *,
    diagnostics: bool | str,
    **options: Unpack[AttentionKeywords],
) -> Tensor | tuple[Tensor, LandmarkSolution]: ...


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rank: int,
    *,
    landmarks: Tensor | None = None,
    method: str = "leverage",
    gamma: float = 1e-3,
    ridge: float = 1e-3,
    solver: str = "cholesky",
    equilibrate: bool = False,
    kappa_max: float = 1e6,
    neumann_order: int = 3,
    neumann_gate: bool = True,
    qk_norm: str | None = None,
    scale: float | None = None,
    solve_dtype: str = "fp32",
    generator: torch.Generator | None = None,
    tau: Tensor | None = None,
    diagnostics: bool | str = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LandmarkSolution]:
    """Compute Nyström cross-attention with r landmark keys, at a cost linear in N_q and N_k.

    Source: docs/METHOD.md §2; section 3.3 of the article.

    The output is τ Y with Y = L (W + λI)⁻¹ (R V), where L = softmax(Q K̃ᵀ s), W = softmax(K̃ K̃ᵀ s) and
    R = softmax(K̃ Kᵀ s). The rows of K̃ are the r landmark keys. With r = N_k and ridge = 0, Y is exact
    attention. Attention masks are not supported.

    The operator is differentiable in query, key, value and tau. The choice of the landmarks is not
    differentiated. With every backend, second derivatives are computed by the code of the backend
    "reference". The output and the gradient of an image do not depend on the other images of the batch. A NaN
    affects only the results of its own image and head.

    The backend "triton" supports float32, bfloat16 and float16, d from 8 to 128, r up to 128 and solve_dtype "fp32". It
    has kernels for the solvers "cholesky" and "lu" without equilibration, and uses torch.linalg for other solvers.

    On a GPU, the solvers "svd" and "auto" make the host wait for the device, with every backend.
    The docstring of `landmark_solve` describes when other solvers make the host wait. `diagnostics=True` also
    makes the host wait, because the exact κ is computed from singular values.

    Args:
        query: Q (B, H, N_q, d); float64, float32, bfloat16 or float16, any strides. Query, key and value must
            have the same dtype and device. Under autocast, different dtypes are cast to autocast's dtype.
        key: K (B, H, N_k, d).
        value: V (B, H, N_k, d).
        rank: r, at least 1; clamped to N_k.
        landmarks: Indices (B, H, r) of the landmarks, int64, with r = `rank`. With None, `method` chooses the
            landmarks.
        method: As in `select_landmarks`.
        gamma: As in `select_landmarks`.
        ridge: As in `landmark_solve`.
        solver: As in `landmark_solve`.
        equilibrate: As in `landmark_solve`.
        kappa_max: As in `landmark_solve`.
        neumann_order: As in `landmark_solve`.
        neumann_gate: As in `landmark_solve`.
        qk_norm: Which tokens are RMS-normalised per head, before landmarks are chosen: None, "keys" or "both" (queries
            and keys). Without normalised keys, the condition number of W + λI has no bound, and the output has no
            bound. A single outlier among the keys can then make the output many orders of magnitude larger than the
            output of exact attention.
        scale: s, the factor of the logits. None means 1/√d.
        solve_dtype: "fp32" computes L, W and R in fp32 (fp64 for fp64 inputs). "model" computes L, W and R in the dtype
            of the inputs, and casts W to fp32 before the solve. The article uses "model".
        generator: As in `select_landmarks`.
        tau: τ (H,), floating point: a factor of Y for each head (docs/METHOD.md §3.3). None means 1.
        diagnostics: False, True or "estimate". With True or "estimate", diagnostics are also returned;
            `landmark_solve` describes the difference between True and "estimate". `diagnosed_attention` always
            returns diagnostics, so type checkers know its return type.
        backend: A name of `backends()`, or None.

    Returns:
        The output (B, H, N_q, d) in the dtype and layout of the query. With `diagnostics`, a pair: the output and a
        `LandmarkSolution` without gradient.

    Raises:
        TypeError: A dtype or type is not accepted.
        ValueError: Shapes or devices do not match, or a value is not accepted.
        NotImplementedError: The requested backend cannot run the call.
    """
    query, key, value = autocast.lowered(query, key, value)
    d = _check_attention(query, key, value, qk_norm, scale)
    check_choice("diagnostics", diagnostics, DIAGNOSTICS)
    options = _options(
        d, rank, method, gamma, generator, qk_norm, scale, solve_dtype,
        ridge=ridge, solver=solver, equilibrate=equilibrate, kappa_max=kappa_max, neumann_order=neumann_order,
        neumann_gate=neumann_gate,
    )  # fmt: skip
    y, landmarks, chosen, _ = _attend(
        query, key, value, landmarks, options, tau, backend, diagnostics=bool(diagnostics)
    )
    if not diagnostics:
        return y
    return y, _diagnosed(key, value, landmarks, options, diagnostics == "estimate", chosen)


def diagnosed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rank: int,
    *,
    estimate: bool = False,
    **options: Unpack[AttentionKeywords],
) -> tuple[Tensor, LandmarkSolution]:
    """Compute Nyström cross-attention, and diagnostics of its landmark systems.

    Args:
        query: As in `nystrom_attention`.
        key: As in `nystrom_attention`.
        value: As in `nystrom_attention`.
        rank: As in `nystrom_attention`.
        estimate: If True, κ is estimated. If False, κ is computed from singular values, and on a GPU the host
            waits for the device.
        **options: Other keyword arguments of `nystrom_attention`.

    Returns:
        A pair: the output as in `nystrom_attention`, and a `LandmarkSolution` without gradient.

    Raises:
        TypeError: As in `nystrom_attention`.
        ValueError: As in `nystrom_attention`.
        NotImplementedError: As in `nystrom_attention`.
    """
    found = nystrom_attention(
        query, key, value, rank, diagnostics="estimate" if estimate else True, **options
    )
    return cast("tuple[Tensor, LandmarkSolution]", found)


def attention_with_scale(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rank: int,
    *,
    landmarks: Tensor | None = None,
    tau: Tensor | None = None,
    qk_norm: str | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, RMSScale]:
    """Compute Nyström cross-attention τ Y with the default solver, and the scale statistic of Y.

    The backend "triton" computes the scale statistic (μ and σ) while it computes the output, so the output is not read
    from memory again.

    Args:
        query: As in `nystrom_attention`.
        key: As in `nystrom_attention`.
        value: As in `nystrom_attention`.
        rank: As in `nystrom_attention`.
        landmarks: As in `nystrom_attention`; None chooses them by leverage.
        tau: As in `nystrom_attention`.
        qk_norm: As in `nystrom_attention`.
        scale: As in `nystrom_attention`.
        backend: A name of `backends()`, or None.

    Returns:
        A pair: the output τ Y as in `nystrom_attention`, and the scale statistic (μ and σ) of Y without τ. `rms_scale`
        defines this statistic. In this function, the statistic carries no gradient.
    """
    query, key, value = autocast.lowered(query, key, value)
    d = _check_attention(query, key, value, qk_norm, scale)
    options = _options(d, rank, "leverage", 1e-3, None, qk_norm, scale, "fp32")
    y, _, _, scales = _attend(query, key, value, landmarks, options, tau, backend, statistics=True)
    assert scales is not None
    return y, scales


class _Attended(NamedTuple):
    y: Tensor
    landmarks: Tensor
    backend: str
    scale: RMSScale | None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor | None,
    options: AttentionOptions,
    tau: Tensor | None,
    backend: str | None,
    *,
    statistics: bool = False,
    diagnostics: bool = False,
) -> _Attended:
    if tau is not None:
        _check_tau(tau, query)
    chosen = _choose_backend(backend, query, key, landmarks, options, diagnostics)
    s, qk_norm, scales = options.scale, options.qk_norm, None
    if chosen == "triton":
        keys, x, landmarks = _landmark_side(key, value, landmarks, options, chosen)
        y, mean, spread = _query_side(query, keys, x, tau, s, qk_norm, statistics, chosen)
        if statistics:
            scales = _over_batch(mean, spread, query.shape[2])
    else:
        if landmarks is None:
            landmarks = _select(key, options, chosen)
        else:
            _check_landmarks(landmarks, key, options.choice.rank)
        solve = options.solve.flat()
        y = _attention(query, key, value, landmarks, s, qk_norm, options.solve_dtype, *solve, chosen)
        if statistics:
            scales = rms_scale(y.detach(), backend="reference")
        if tau is not None:
            y = (y * tau[:, None, None]).to(y.dtype)
    return _Attended(y, landmarks, chosen, scales)


@torch.no_grad()
def _diagnosed(
    key: Tensor, value: Tensor, landmarks: Tensor, options: AttentionOptions, estimate: bool, backend: str
) -> LandmarkSolution:
    s, qk_norm = options.scale, options.qk_norm
    if backend == "triton":
        choice = LandmarkOptions(landmarks.shape[-1], options.choice.method, options.choice.gamma)
        _, logits, rhs, _, _ = _blocks(key, value, landmarks, *choice.flat(), s, qk_norm, backend)
    else:
        logits, rhs = _system(key, value, landmarks, s, qk_norm, options.solve_dtype, "reference")
    solving = _backend_of_solve(backend, options.solve)
    return diagnosed(logits, rhs, options.solve, estimate=estimate, backend=solving)


def landmark_side(
    key: Tensor,
    value: Tensor,
    rank: int,
    *,
    landmarks: Tensor | None = None,
    method: str = "leverage",
    gamma: float = 1e-3,
    ridge: float = 1e-3,
    solver: str = "cholesky",
    equilibrate: bool = False,
    kappa_max: float = 1e6,
    neumann_order: int = 3,
    neumann_gate: bool = True,
    qk_norm: str | None = None,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the key side of Nyström attention, the part that needs no queries: landmark keys K̃ and solution X.

    Source: docs/METHOD.md §2; section 3.3 of the article.

    From K̃ and X, attention computes Y = softmax(Q K̃ᵀ s) X. In this formula, K̃ is normalised if `qk_norm` is "keys" or
    "both", and Q is normalised if `qk_norm` is "both".

    The operator is differentiable in key and value. With every backend, second derivatives are computed by
    the code of the backend "reference". The backend "torch" uses C++ for the solver "cholesky" on the CPU, if
    the C++ library is built. The backend "triton" has the same limits as in `nystrom_attention`.

    Args:
        key: As in `nystrom_attention`.
        value: As in `nystrom_attention`.
        rank: As in `nystrom_attention`.
        landmarks: As in `nystrom_attention`.
        method: As in `select_landmarks`.
        gamma: As in `select_landmarks`.
        ridge: As in `landmark_solve`.
        solver: As in `landmark_solve`.
        equilibrate: As in `landmark_solve`.
        kappa_max: As in `landmark_solve`.
        neumann_order: As in `landmark_solve`.
        neumann_gate: As in `landmark_solve`.
        qk_norm: As in `nystrom_attention`.
        scale: As in `nystrom_attention`.
        generator: As in `select_landmarks`.
        backend: A name of `backends()`, or None.

    Returns:
        K̃ = key[I] without normalisation, and X = (W + λI)⁻¹ (R V). Both are (B, H, r, d) in fp32 (fp64 for fp64
        inputs). A cast of K̃ to the dtype of `key` is exact.

    Raises:
        TypeError: A dtype or type is not accepted.
        ValueError: Shapes or devices do not match, or a value is not accepted.
        NotImplementedError: The requested backend cannot run the call.
    """
    key, value = autocast.lowered(key, value)
    d = _check_attention(key, key, value, qk_norm, scale)
    options = _options(
        d, rank, method, gamma, generator, qk_norm, scale, "fp32",
        ridge=ridge, solver=solver, equilibrate=equilibrate, kappa_max=kappa_max, neumann_order=neumann_order,
        neumann_gate=neumann_gate,
    )  # fmt: skip
    rank = options.choice.rank
    chosen = choose_kernels(
        backend,
        key,
        "landmark_side",
        lambda: kernel_limits(d, min(rank, key.shape[2])),
        sizes=lambda: (key.shape[2], min(rank, key.shape[2]), d),
        call=(key.shape, rank),
        plain=("torch", "reference"),
        variant=_variant(landmarks, options),
    )
    keys, x, _ = _landmark_side(key, value, landmarks, options, chosen)
    return keys, x


def _options(
    d: int,
    rank: int,
    method: str,
    gamma: float,
    generator: torch.Generator | None,
    qk_norm: str | None,
    scale: float | None,
    solve_dtype: str,
    **solve: Any,
) -> AttentionOptions:
    check_choice("solve_dtype", solve_dtype, SOLVE_DTYPES)
    s = 1 / math.sqrt(d) if scale is None else float(scale)
    choice = landmark_options(rank, method, gamma, generator)
    return AttentionOptions(choice, solve_options(**solve), s, qk_norm, solve_dtype)


def _landmark_side(
    key: Tensor, value: Tensor, landmarks: Tensor | None, options: AttentionOptions, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return K̃, X and I.

    With the default solver, the operator `_context` computes K̃ and X. With other solvers, the operator
    `_blocks` computes K̃, R V and the logits of W, and the solver then runs as a separate operator.

    If no landmarks are given, they are chosen in one of two places. If the backend is "triton" and the landmark
    method has kernels, `_context` or `_blocks` chooses the landmarks. Otherwise, the landmarks are chosen before
    `_context` or `_blocks` is called.
    """
    choice = options.choice
    if landmarks is not None:
        _check_landmarks(landmarks, key, choice.rank)
    else:
        choice = choice.clamped(key.shape[2])
        if backend != "triton" or choice.method not in METHODS_OF_KERNELS:
            landmarks = _select(key, options, "reference")
    side = (key, value, landmarks, *choice.flat(), options.scale, options.qk_norm)
    if options.solve.default:
        keys, x, _, landmarks = _context(*side, options.solve.ridge, backend)
        return keys, x, landmarks
    keys, logits, rhs, _, landmarks = _blocks(*side, backend)
    x, _, _ = solved(logits, rhs, options.solve, _backend_of_solve(backend, options.solve))
    return keys, x, landmarks


def _backend_of_solve(backend: str, options: SolveOptions) -> str:
    return "reference" if backend == "triton" and not has_kernels(options) else backend


def _select(key: Tensor, options: AttentionOptions, backend: str) -> Tensor:
    keys = few_threads(reference.normalised_key)(key.detach(), options.qk_norm)
    return selected(keys, options.choice, options.scale, backend)


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    qk_norm: str | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute exact cross-attention softmax(Q Kᵀ s) V, the quadratic baseline (section 3.8.5 of the article).

    To compute a second derivative with torch.autograd, set `backend="reference"`, because scaled_dot_product_attention
    has no second derivative on the CPU.

    Args:
        query: As in `nystrom_attention`.
        key: As in `nystrom_attention`.
        value: As in `nystrom_attention`.
        qk_norm: As in `nystrom_attention`.
        scale: As in `nystrom_attention`.
        backend: "torch" (scaled_dot_product_attention), "reference" (an explicit softmax) or None. None selects
            "reference" under torch.func and forward-mode differentiation, and "torch" otherwise.

    Returns:
        (B, H, N_q, d) in the query's dtype.

    Raises:
        TypeError: A dtype is not accepted.
        ValueError: Shapes or devices do not match, or a value is not accepted.
        NotImplementedError: The requested backend cannot run the call.
    """
    query, key, value = autocast.lowered(query, key, value)
    d = _check_attention(query, key, value, qk_norm, scale)
    order = ("reference", "torch") if transforming() else ("torch", "reference")
    chosen = choose_backend(backend, order, "full_attention")
    s = 1 / math.sqrt(d) if scale is None else float(scale)
    with no_autocast((query,)):
        if qk_norm is not None:
            key = reference.normalised_key(key, qk_norm).to(key.dtype)
            query = reference.normalised_query(query, qk_norm).to(query.dtype)
        if chosen == "reference" or key.shape[2] < sdpa.FEWEST_KEYS:
            return reference.full_attention(query, key, value, s)
        return scaled_dot_product_attention(query, key, value, scale=s)


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, qk_norm: str | None, scale: float | None
) -> int:
    check_tensors(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tokens(name, tensor)
    if key.shape != value.shape:
        raise ValueError(
            f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}; expected the same"
        )
    if query.shape[:2] != key.shape[:2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; expected the same B, H and d"
        )
    check_choice("qk_norm", qk_norm, QK_NORMS)
    if scale is not None:
        check_number("scale", scale)
    return query.shape[-1]


def _choose_backend(
    requested: str | None,
    query: Tensor,
    key: Tensor,
    landmarks: Tensor | None,
    options: AttentionOptions,
    diagnostics: bool = False,
) -> str:
    narrow = options.solve_dtype == "model" and query.dtype in (torch.bfloat16, torch.float16)
    rank, variant = options.choice.rank, _variant(landmarks, options, diagnostics)
    call = (query.shape, key.shape, rank, narrow)
    chosen = kept(requested, query, "nystrom_attention", variant, call)
    if chosen is not None:
        return chosen

    def refusal() -> str | None:
        blocks = 'its kernels compute the softmax blocks in float32, and solve_dtype is "model"'
        return kernel_limits(query.shape[3], min(rank, key.shape[2])) or (blocks if narrow else None)

    return choose_kernels(
        requested,
        query,
        "nystrom_attention",
        refusal,
        plain=("reference",) if narrow else ("torch", "reference"),
        sizes=lambda: (query.shape[2], key.shape[2], min(rank, key.shape[2]), query.shape[3]),
        variant=variant,
        call=call,
    )


def _variant(landmarks: Tensor | None, options: AttentionOptions, diagnostics: bool = False) -> str:
    """Return the variant of the operator: calls that belong to different variants run different kernels.

    With `backend=None`, the backend is selected separately for each variant. One variant contains the calls with
    leverage landmarks, with uniform landmarks, and with landmarks that are chosen before the operator runs. `verify`
    checks the results of all three kinds of calls, but measures only the times of the calls with leverage landmarks,
    because these calls are the slowest.
    """
    method, solve = options.choice.method, options.solve
    if landmarks is not None or method not in METHODS_OF_KERNELS or method in ("leverage", "uniform"):
        method = ""
    if solve.default and not diagnostics:
        return method
    solver = ("", "") if solve.default else (solve.solver, "equilibrated" if solve.equilibrate else "")
    return ", ".join(filter(None, (method, *solver, "diagnostics" if diagnostics else "")))


def _over_batch(mean: Tensor, spread: Tensor, tokens: int) -> RMSScale:
    """Return μ (H, d) and σ (H,) over batch and tokens, from the mean (B, H, d) and Σ‖y − mean‖² (B, H) per sample."""
    overall = mean.mean(0)
    total = spread.sum(0) + tokens * (mean - overall).square().sum((0, -1))
    return RMSScale(overall, (total / (mean.shape[0] * tokens)).sqrt())


def _check_tau(tau: Tensor, query: Tensor) -> None:
    check_tensors(tau=tau)
    if tau.shape != query.shape[1:2]:
        raise ValueError(f"tau has shape {tuple(tau.shape)}; expected (H,) = {tuple(query.shape[1:2])}")
    if tau.device != query.device:
        raise ValueError(f"tau is on {tau.device} and query on {query.device}; expected one device")


def _check_landmarks(landmarks: Tensor, key: Tensor, rank: int) -> None:
    if not isinstance(landmarks, Tensor) or landmarks.dtype != torch.int64:
        kind = landmarks.dtype if isinstance(landmarks, Tensor) else type(landmarks).__name__
        raise TypeError(f"landmarks is {kind}; expected an int64 tensor")
    if landmarks.shape != (*key.shape[:2], rank):
        raise ValueError(
            f"landmarks has shape {tuple(landmarks.shape)}; expected (B, H, rank) = {(*key.shape[:2], rank)}"
        )
    if landmarks.device != key.device:
        raise ValueError(f"landmarks is on {landmarks.device} and key on {key.device}; expected one device")
