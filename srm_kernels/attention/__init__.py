"""Nyström cross-attention, and exact attention to compare with (docs/METHOD.md §2, article 3.3)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import autocast
from ..checks import check_choice, check_number, check_tensors, check_tokens, transforming, wide_dtype
from ..conditioning import DIAGNOSTICS, LandmarkSolution, diagnosed, has_kernels, solve_options, solved
from ..landmarks import METHODS_OF_KERNELS, kernel_limits, landmark_options, selected
from ..options import AttentionOptions, LandmarkOptions, SolveOptions
from ..registration import later, no_autocast, register_operator
from ..runtime import choose_backend, choose_kernels, few_threads, kept, triton_refusal
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

_KEY_KERNELS, _KERNELS = f"{__name__}.key_kernels", f"{__name__}.kernels"


def _fake_key_side(
    key: Tensor, value: Tensor, landmarks: Tensor | None, rank: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K̃, (X or R V), logsumexp, I."""
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


# The road of the kernels: key side, then query side.
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
    {"reference": reference.landmark_attention, "triton": later(_KERNELS, "landmark_attention")},
    fake=_fake_query_side,
    differentiable=("query", "keys", "x", "tau"),
    like="query",
    derivatives={"triton": later(_KERNELS, "landmark_attention_backward")},
    constant=(1, 2),
    autocast=lambda query, keys, x, *rest: (query, *autocast.widened((keys, x), query), *rest),
)


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
    """Nyström cross-attention on r landmark keys, linear in N_q and in N_k (docs/METHOD.md §2, article 3.3).

    query: (B, H, N_q, d); key, value: (B, H, N_k, d); one dtype (float64, float32, bfloat16, float16) and one
    device, any strides. Where dtypes differ and autocast is on, all three are cast to autocast's dtype.
    rank: r ≥ 1, clamped to N_k. No masks. Exact when r = N_k and ridge = 0.

    landmarks: indices (B, H, r) int64 to use instead of choosing; `rank` must equal their count.
    method, gamma, generator: as in `select_landmarks`. ridge, solver, equilibrate, kappa_max, neumann_order,
    neumann_gate: as in `landmark_solve`.
    qk_norm: RMS-normalise per head and token, before landmarks are chosen: None, "keys" or "both". Without
    normalised keys no bound on κ(W_λ) or on the output's size holds: one outlying key can make the output
    many orders larger than exact attention's.
    scale: s, 1/√d by default. solve_dtype: "model" forms L, W and R in the inputs' dtype before W is cast and
    solved (the article's reading, an ablation); "fp32" keeps them wide.
    tau: (H,), a factor of Y per head (docs/METHOD.md §3.3), floating point.

    Returns Y (B, H, N_q, d) in the query's dtype, laid out as the query is; with `diagnostics` True or "estimate" (see
    `landmark_solve`) Y and the `LandmarkSolution`, whose fields carry no gradient. Differentiable in query, key, value
    and tau, landmarks being constants; twice through the reference. A sample's output and gradient do not depend on the
    rest of the batch; a NaN stays in its own (b, h).

    backend: "triton" takes fp32, bf16 and fp16, d from 8 to 128, r up to 128 and solve_dtype "fp32". The solve has a
    kernel for "cholesky" and "lu", not equilibrated; else it is torch.linalg's between the kernels of the rest, and
    "svd" and "auto" wait for the device, as the exact κ of `diagnostics=True` does. None takes it where the verdict
    about the device does.
    Raises TypeError for dtypes, ValueError for shapes and values, NotImplementedError for a backend that cannot run.
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
    """Nyström cross-attention, and what `rms_scale` gives for Y before τ, which kernels take from the same pass.

    Arguments as in `nystrom_attention`, landmarks and solver as by its defaults. The statistic carries no gradient.
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
    """The solution of the system of these landmarks, and what is known about it."""
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
    """Return the key side of Nyström attention: landmark keys K̃ as stored, and X (docs/METHOD.md §2, article 3.3).

    Arguments as in `nystrom_attention`. Returns (K̃, X), (B, H, r, d) each in fp32 (fp64 for fp64): K̃ = key[I], not
    normalised, exact in the key's dtype; X = (W + λI)⁻¹ (R V). Y is softmax(Q K̃ᵀ s) X, K̃ normalised there as
    `qk_norm` asks. Differentiable in key and value; twice through the reference.
    backend: "torch", the default on the CPU, has csrc's C++ for the solver "cholesky" where it is built, else the
    reference's. "triton" as for `nystrom_attention`.
    Raises TypeError for dtypes, ValueError for shapes and values, NotImplementedError for a backend that cannot run.
    """
    key, value = autocast.lowered(key, value)
    d = _check_attention(key, key, value, qk_norm, scale)
    options = _options(
        d, rank, method, gamma, generator, qk_norm, scale, "fp32",
        ridge=ridge, solver=solver, equilibrate=equilibrate, kappa_max=kappa_max, neumann_order=neumann_order,
        neumann_gate=neumann_gate,
    )  # fmt: skip
    rank = options.choice.rank
    variant, call = _variant(landmarks, options), (key.shape, rank)
    chosen = kept(backend, key, "landmark_side", variant, call) or choose_kernels(
        backend,
        key,
        "landmark_side",
        partial(_limits, d, rank, key.shape[2]),
        sizes=lambda: (key.shape[2], min(rank, key.shape[2]), d),
        call=call,
        plain=("torch", "reference"),
        variant=variant,
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
    """Checked options of a head width of d; `qk_norm` and `scale` are checked already."""
    check_choice("solve_dtype", solve_dtype, SOLVE_DTYPES)
    s = 1 / math.sqrt(d) if scale is None else float(scale)
    choice = landmark_options(rank, method, gamma, generator)
    return AttentionOptions(choice, solve_options(**solve), s, qk_norm, solve_dtype)


def _landmark_side(
    key: Tensor, value: Tensor, landmarks: Tensor | None, options: AttentionOptions, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(K̃, X, I); kernels choose the landmarks themselves where they can, and solve where the solver is the default."""
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
    """Exact cross-attention softmax(Q Kᵀ s) V, quadratic: the baseline (article 3.8.5).

    query: (B, H, N_q, d); key, value: (B, H, N_k, d), as in `nystrom_attention`, with its `qk_norm` and `scale`.
    backend None or "torch" is torch's scaled_dot_product_attention; "reference" writes the softmax out.
    A second derivative needs "reference", which None takes under torch.func and in forward mode: torch's own kernel
    has neither on the CPU.
    Returns (B, H, N_q, d) in the query's dtype. Raises TypeError for dtypes, ValueError for shapes and values.
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


def _limits(d: int, rank: int, keys: int) -> str | None:
    return kernel_limits(d, min(rank, keys))


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
    return kept(requested, query, "nystrom_attention", variant, call) or _decided(
        requested, query, key, rank, narrow, variant, call
    )


def _decided(
    requested: str | None,
    query: Tensor,
    key: Tensor,
    rank: int,
    narrow: bool,
    variant: str,
    call: tuple[Any, ...],
) -> str:
    plain = ("reference",) if narrow else ("torch", "reference")

    def refusal(name: str) -> str | None:
        if name not in (*plain, "triton"):
            return "it has no form for these arguments"
        if name != "triton":
            return None
        blocks = (
            'its kernels keep the softmax blocks in float32, and solve_dtype is "model"' if narrow else None
        )
        return triton_refusal(query) or _limits(query.shape[3], rank, key.shape[2]) or blocks

    return choose_backend(
        requested,
        (*plain, "triton"),
        "nystrom_attention",
        refusal,
        tensor=query,
        sizes=lambda: (query.shape[2], key.shape[2], min(rank, key.shape[2]), query.shape[3]),
        variant=variant,
        call=call,
    )


def _variant(landmarks: Tensor | None, options: AttentionOptions, diagnostics: bool = False) -> str:
    """What of the options is decided apart: other kernels run for it."""
    method, solve = options.choice.method, options.solve
    if landmarks is not None or method not in METHODS_OF_KERNELS or method == METHODS_OF_KERNELS[0]:
        method = ""
    if solve.default and not diagnostics:
        return method
    solver = ("", "") if solve.default else (solve.solver, "equilibrated" if solve.equilibrate else "")
    return ", ".join(filter(None, (method, *solver, "diagnostics" if diagnostics else "")))


def _over_batch(mean: Tensor, spread: Tensor, tokens: int) -> RMSScale:
    """Mean (H, d) and RMS (H,) over batch and tokens from the means (B, H, d) and M₂ (B, H) of the samples."""
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
