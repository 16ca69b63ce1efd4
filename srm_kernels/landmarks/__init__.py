"""The choice of the landmark keys (docs/METHOD.md §2.0; section 3.3 of the article)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number, check_tokens, wide_dtype
from ..dispatch import choose_kernels, few_threads
from ..options import LandmarkOptions
from ..registration import later, register_operator
from . import methods, reference
from .methods import LANDMARK_METHODS

METHODS_OF_KERNELS = tuple(name for name, method in LANDMARK_METHODS.items() if method.kernels)
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
    dict.fromkeys(("reference", "torch"), few_threads(methods.select_landmarks))
    | {"triton": later(_KERNELS, "select_landmarks")},
    fake=lambda key, random, rank, *_: key.new_empty((*key.shape[:2], rank), dtype=torch.int64),
)


def ridge_leverage_scores(key: Tensor, *, gamma: float = 1e-3, backend: str | None = None) -> Tensor:
    """Compute the ridge leverage scores τ_i = k_iᵀ (KᵀK + γI)⁻¹ k_i of all keys.

    Source: docs/METHOD.md §2.0; section 3.3 of the article.

    The Cholesky factorisation of KᵀK + γI can fail because of rounding. In this case, γ is increased by an estimate of
    the rounding error, and the matrix is factorised again. The operator is differentiable. With every
    backend, second derivatives are computed by the code of the backend "reference".

    Args:
        key: K (B, H, N_k, d); float64, float32, bfloat16 or float16, any strides.
        gamma: γ, above 0.
        backend: A name of `backends()`, or None.

    Returns:
        τ (B, H, N_k) in fp32 (fp64 for fp64 inputs), in [0, 1).

    Raises:
        TypeError: The dtype is not accepted.
        ValueError: The shape is not (B, H, N_k, d), or γ is not above 0.
        NotImplementedError: The requested backend cannot run the call.
    """
    check_tokens("key", key)
    check_number("gamma", gamma, above=0)
    chosen = choose_kernels(
        backend,
        key,
        "ridge_leverage_scores",
        lambda: kernel_limits(key.shape[3]),
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
    """Choose the r landmark keys of every image and head, independently of the other images (docs/METHOD.md §2.0).

    The indices are not differentiable. With every method except "uniform", a small change of the keys can
    change the indices, and results that are computed from the landmarks then jump. If the keys are linearly
    independent, which requires N_k ≤ d, all leverage scores are nearly equal: they differ from 1 by amounts
    of the order of γ. The methods "leverage" and "kmeans++" sort the keys by these scores, so even a very small
    change of such keys can change the indices.

    Args:
        key: K (B, H, N_k, d); float64, float32, bfloat16 or float16, any strides.
        rank: r, at least 1; clamped to N_k.
        method: A name in `LANDMARK_METHODS`. The module `srm_kernels.landmarks.methods` describes the
            methods.
        gamma: γ of the leverage scores, above 0.
        scale: s of "pivoted_cholesky"; 1/√d by default.
        generator: Generator for the random methods. All images and heads use the same random numbers. None means seed
            0.
        backend: A name of `backends()`, or None.

    Returns:
        Indices (B, H, r), int64, distinct along the last axis.

    Raises:
        TypeError: The dtype of `key` or the type of another argument is not accepted.
        ValueError: The shape is not (B, H, N_k, d), a number is outside its range, or the method is unknown.
        NotImplementedError: The requested backend cannot run the call.
    """
    check_tokens("key", key)
    options = landmark_options(rank, method, gamma, generator)
    if scale is not None:
        check_number("scale", scale)
    s = 1 / math.sqrt(key.shape[-1]) if scale is None else float(scale)
    return selected(key, options, s, backend)


def selected(key: Tensor, options: LandmarkOptions, scale: float, backend: str | None) -> Tensor:
    """Choose landmarks as `select_landmarks` does, without checks of the arguments."""
    options = options.clamped(key.shape[2])
    rank, method, random = options.rank, options.method, None
    if options.generator is not None:
        count = LANDMARK_METHODS[method].draws(rank, key.shape[2])
        random = methods.uniform_numbers(count, options.generator).to(key.device) if count else None
    chosen = choose_kernels(
        backend,
        key,
        "select_landmarks",
        lambda: kernel_limits(key.shape[3], rank) or _without_kernels(method),
        sizes=lambda: (key.shape[2], rank, key.shape[3]),
        variant=method,
        call=(key.shape, rank),
    )
    return _select(key.detach(), random, *options.flat(), scale, chosen)


def landmark_options(
    rank: int, method: str, gamma: float, generator: torch.Generator | None
) -> LandmarkOptions:
    """Return the arguments as `LandmarkOptions`; raise ValueError or TypeError if an argument is not accepted."""
    rank = check_count("rank", rank)
    check_choice("method", method, tuple(LANDMARK_METHODS))
    check_number("gamma", gamma, above=0)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator is a {type(generator).__name__}; expected a torch.Generator or None")
    return LandmarkOptions(rank, method, float(gamma), generator)


def kernel_limits(d: int, rank: int = 1) -> str | None:
    """Return the reason why no kernel supports these sizes, or None.

    Every supported GPU has at least 99 KiB of shared memory per thread block. With supported sizes, the kernels
    for landmarks and attention fit in the shared memory of every supported GPU.
    """
    if not 8 <= d <= 128:
        return f"its kernels support d from 8 to 128, and d is {d}"
    if rank > 128:
        return f"its kernels support r up to 128, and r is {rank}"
    return None


def _without_kernels(method: str) -> str | None:
    if method in METHODS_OF_KERNELS:
        return None
    *others, last = METHODS_OF_KERNELS
    return f"it has kernels for {', '.join(others)} and {last}, not for {method}"
