"""Nyström cross-attention, and exact attention to compare with (SPEC 2, article 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..checks import check_choice, check_count, check_number, check_tensors, check_tokens, wide_dtype
from ..conditioning import LandmarkSolution, check_solver, landmark_solve
from ..landmarks import METHODS, select_landmarks
from ..registration import no_autocast, register_operator
from ..runtime import choose_backend
from . import reference, sdpa

QK_NORMS = (None, "keys", "both")
SOLVE_DTYPES = ("fp32", "model")


_attention = register_operator(
    "nystrom_attention",
    "Tensor query, Tensor key, Tensor value, Tensor landmarks, float scale, str? qk_norm, str solve_dtype, "
    "float ridge, str solver, bool equilibrate, float kappa_max, int neumann_order, bool neumann_gate",
    "Tensor",
    {"reference": reference.nystrom_attention, "sdpa": sdpa.nystrom_attention},
    fake=lambda query, *_: torch.empty_like(query),
    differentiable=("query", "key", "value"),
    like="query",
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
    diagnostics: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LandmarkSolution]:
    """Nyström cross-attention on r landmark keys, linear in N_q and in N_k (SPEC 2, article 3.3).

    query: (B, H, N_q, d); key, value: (B, H, N_k, d); one dtype (float64, float32, bfloat16, float16) and one
    device, any strides. rank: r ≥ 1, clamped to N_k. No masks. Exact when r = N_k and ridge = 0.

    landmarks: indices (B, H, r) int64 to use instead of choosing; `rank` must equal their count.
    method, gamma, generator: as in `select_landmarks`. ridge, solver, equilibrate, kappa_max, neumann_order,
    neumann_gate: as in `landmark_solve`.
    qk_norm: RMS-normalise per head and token, before landmarks are chosen: None, "keys" or "both". Without
    normalised keys no bound on κ(W_λ) or on the output's size holds: one outlying key can make the output
    many orders larger than exact attention's.
    scale: s, 1/√d by default. solve_dtype: "model" forms L, W and R in the inputs' dtype before W is cast and
    solved (the article's reading, an ablation); "fp32" keeps them wide.

    Returns Y (B, H, N_q, d) in the query's dtype, laid out as the query is; with `diagnostics=True`,
    (Y, `LandmarkSolution`), whose fields carry no gradient. Differentiable in query, key and value, landmarks
    being constants; twice through the reference. A sample's output and gradient do not depend on the rest of
    the batch; a NaN stays in its own (b, h).
    Raises TypeError for dtypes, ValueError for shapes and values.
    """
    d = _check_attention(query, key, value, qk_norm, scale)
    check_count("rank", rank)
    check_choice("method", method, METHODS)
    check_number("gamma", gamma, above=0)
    check_choice("solve_dtype", solve_dtype, SOLVE_DTYPES)
    check_solver(ridge, solver, equilibrate, kappa_max, neumann_order, neumann_gate)
    narrow = solve_dtype == "model" and query.dtype in (torch.bfloat16, torch.float16)
    implementations = ("reference",) if narrow else ("sdpa", "reference")
    chosen = choose_backend(backend, implementations, "nystrom_attention")
    s = 1 / math.sqrt(d) if scale is None else float(scale)
    if landmarks is None:
        keys = reference.normalised_key(key.detach(), qk_norm)
        landmarks = select_landmarks(
            keys, rank, method=method, gamma=gamma, scale=s, generator=generator, backend=chosen
        )
    else:
        _check_landmarks(landmarks, key, rank)
    y = _attention(
        query,
        key,
        value,
        landmarks,
        s,
        qk_norm,
        solve_dtype,
        float(ridge),
        solver,
        equilibrate,
        float(kappa_max),
        neumann_order,
        neumann_gate,
        chosen,
    )
    if not diagnostics:
        return y
    with torch.no_grad():
        logits, rhs = _system(key, value, landmarks, s, qk_norm, solve_dtype, "reference")
        solution = landmark_solve(
            logits,
            rhs,
            ridge=ridge,
            solver=solver,
            equilibrate=equilibrate,
            kappa_max=kappa_max,
            neumann_order=neumann_order,
            neumann_gate=neumann_gate,
            diagnostics=True,
            backend=chosen,
        )
    return y, solution


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
    backend None or "sdpa" is torch's scaled_dot_product_attention; "reference" writes the softmax out.
    A second derivative needs "reference": torch's own kernel has none on the CPU.
    Returns (B, H, N_q, d) in the query's dtype. Raises TypeError for dtypes, ValueError for shapes and values.
    """
    d = _check_attention(query, key, value, qk_norm, scale)
    chosen = choose_backend(backend, ("sdpa", "reference"), "full_attention")
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
