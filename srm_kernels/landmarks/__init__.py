"""Choosing the landmark keys (docs/METHOD.md §2, article 3.3)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number, check_tokens, wide_dtype
from ..options import LandmarkOptions
from ..registration import later, register_operator
from ..runtime import choose_backend, few_threads, triton_refusal
from . import reference
from .reference import METHODS

METHODS_OF_KERNELS = tuple(name for name, method in METHODS.items() if method.kernels)
_IMPLEMENTATIONS = ("reference", "torch", "triton")
_KERNELS = f"{__name__}.kernels"

_leverage = register_operator(
    "ridge_leverage_scores",
    "Tensor key, float gamma",
    "Tensor",
    dict.fromkeys(("reference", "torch"), few_threads(reference.ridge_leverage_scores))
    | {"triton": later(_KERNELS, "ridge_leverage_scores")},
    fake=lambda key, gamma: key.new_empty(key.shape[:3], dtype=wide_dtype(key.dtype)),
    differentiable=("key",),
)

_select = register_operator(
    "select_landmarks",
    "Tensor key, Tensor? random, LandmarkOptions options, float scale",
    "Tensor",
    dict.fromkeys(("reference", "torch"), few_threads(reference.select_landmarks))
    | {"triton": later(_KERNELS, "select_landmarks")},
    fake=lambda key, random, rank, *_: key.new_empty((*key.shape[:2], rank), dtype=torch.int64),
)


def ridge_leverage_scores(key: Tensor, *, gamma: float = 1e-3, backend: str | None = None) -> Tensor:
    """Ridge leverage scores τ_i = k_iᵀ (KᵀK + γI)⁻¹ k_i of every key (docs/METHOD.md §2, article 3.3).

    key: (B, H, N_k, d), float64, float32, bfloat16 or float16, any strides. gamma: γ > 0.
    Returns (B, H, N_k) in fp32 (fp64 for fp64), values in [0, 1). Differentiable, twice through the reference.
    A Gram matrix whose Cholesky breaks down by rounding is given a ridge of rounding size, that matrix alone.
    Raises TypeError for other dtypes, ValueError for other shapes or γ ≤ 0.
    """
    check_tokens("key", key)
    check_number("gamma", gamma, above=0)
    chosen = choose_backend(
        backend,
        _IMPLEMENTATIONS,
        "ridge_leverage_scores",
        partial(_refusal, key, 1, "leverage"),
        tensor=key,
        sizes=lambda: (key.shape[2], key.shape[3]),
        call=(key.shape,),
    )
    return _leverage(key, float(gamma), chosen)


def select_landmarks(
    key: Tensor,
    rank: int,
    *,
    method: str = "leverage",
    gamma: float = 1e-3,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Indices of the r landmark keys of every (b, h), each independent of the rest of the batch (docs/METHOD.md §2).

    key: (B, H, N_k, d). rank: r ≥ 1, clamped to N_k. Methods:

    - "leverage": the r largest ridge leverage scores, descending, ties to the lower index.
    - "leverage_sample": r without replacement, probability ∝ score. Random; for training.
    - "uniform": floor((i + 0.5) N_k / r).
    - "kmeans++": k-means++ seeding and five Lloyd steps on the top-2r leverage candidates, then for each
      centre in turn the nearest key not yet taken. Random.
    - "pivoted_cholesky": r times the key with the largest residual diagonal of exp(K Kᵀ s), ties (within one
      part in 100,000) to the lower index; O(N_k r²). `scale` is s, 1/√d by default; no other method reads it.

    generator: source of the random methods' numbers, the same for every (b, h); None means seed 0.
    Returns (B, H, r) int64, distinct along the last axis. Not differentiable, and but for "uniform" not continuous
    either: where keys change places in the order, what is computed from the landmarks jumps. Of N_k ≤ d
    independent keys all leverage scores are near 1, and by how little they are not is of the order of γ: a small change
    of the keys then changes the choice.
    Raises TypeError for dtypes, ValueError for shapes, rank < 1, γ ≤ 0 or an unknown method.
    """
    check_tokens("key", key)
    options = landmark_options(rank, method, gamma, generator)
    if scale is not None:
        check_number("scale", scale)
    s = 1 / math.sqrt(key.shape[-1]) if scale is None else float(scale)
    return selected(key, options, s, backend)


def selected(key: Tensor, options: LandmarkOptions, scale: float, backend: str | None) -> Tensor:
    """The same by an object of options; arguments are not checked."""
    options = options.clamped(key.shape[2])
    rank, method, random = options.rank, options.method, None
    if options.generator is not None:
        count = METHODS[method].draws(rank, key.shape[2])
        random = reference.uniform_numbers(count, options.generator).to(key.device) if count else None
    chosen = choose_backend(
        backend,
        _IMPLEMENTATIONS,
        "select_landmarks",
        partial(_refusal, key, rank, method),
        tensor=key,
        sizes=lambda: (key.shape[2], rank, key.shape[3]),
        variant=method,
        call=(key.shape, rank),
    )
    return _select(key.detach(), random, *options.flat(), scale, chosen)


def landmark_options(
    rank: int, method: str, gamma: float, generator: torch.Generator | None
) -> LandmarkOptions:
    """How landmarks are chosen as an object; ValueError or TypeError."""
    rank = check_count("rank", rank)
    check_choice("method", method, tuple(METHODS))
    check_number("gamma", gamma, above=0)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator or None")
    return LandmarkOptions(rank, method, float(gamma), generator)


def kernel_limits(d: int, rank: int = 1) -> str | None:
    """Why no kernel takes a head width of d and r landmarks, or None: within these limits all fit in 99 KiB."""
    if not 8 <= d <= 128:
        return f"its kernels take a head width from 8 to 128, and d is {d}"
    if rank > 128:
        return f"its kernels take up to 128 landmarks, and r is {rank}"
    return None


def _refusal(key: Tensor, rank: int, method: str, name: str) -> str | None:
    if name != "triton":
        return None
    reason = triton_refusal(key) or kernel_limits(key.shape[-1], rank)
    if reason is None and method not in METHODS_OF_KERNELS:
        return f"it has kernels for {' and '.join(METHODS_OF_KERNELS)}, not for {method}"
    return reason
