"""Test cases of single operators for `python -m bench.ptx --matrix`, which runs compiled kernels on the PTX emulator.

A case makes the inputs of a call and defines how the results of the call are judged. The inputs are small,
because the code of a kernel does not depend on the size of its grid. The cases of this module and of `necks`
cover every kernel of the package. They also cover every number of warps, every number of pipeline stages and
every register limit that the package can choose for a launch. They do not cover every tile size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import srm_kernels as ops
from srm_kernels import attention as attention_module

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = tuple(DTYPES)
Call = Callable[..., Any]  # (*tensors, backend=…) → a tensor or several


@dataclass(frozen=True)
class Case:
    """One call of an operator, forward and backward.

    Attributes:
        name: Name of the case in rows and on the command line.
        make: Function dtype → (call, inputs).
        dtypes: Dtypes of the case.
        sample: (dtype, architecture) pairs that continuous integration runs.
        shares_size: If True, the term "8 units of fp32" of the numerics rule (`srm_kernels.numerics`) is
            computed from the largest magnitude of all results and gradients of the call. If False, the term is
            computed from the magnitude of the result or gradient that is judged.
    """

    name: str
    make: Callable[[torch.dtype], tuple[Call, list[Tensor]]]
    dtypes: tuple[str, ...] = NAMES
    sample: tuple[tuple[str, int], ...] = ()
    shares_size: bool = field(default=False)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Return normal random numbers with standard deviation `scale`, equal in all dtypes up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def strided(tokens: Tensor, *, heads_inside: bool) -> Tensor:
    """Return tokens (B, H, N, d) with other strides.

    The order of the dimensions in memory is (B, N, H, d) with `heads_inside`, otherwise (B, H, d, N).
    """
    if heads_inside:
        return tokens.transpose(1, 2).contiguous().transpose(1, 2)
    return tokens.mT.contiguous().mT


class _LandmarksOfKernels:
    """Compute attention; backends other than "triton" use the landmarks that "triton" chose in the previous call.

    With the option `given`, all backends use the first `rank` keys as landmarks.
    """

    def __init__(self, rank: int, options: dict[str, Any]) -> None:
        self.rank, self.options, self.chosen = rank, options, torch.empty(0)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, tau: Tensor, *, backend: str) -> Any:
        options = dict(self.options, tau=tau, backend=backend)
        with_scale = options.pop("statistics", False)
        attend = attention_module.attention_with_scale if with_scale else ops.nystrom_attention
        if options.pop("strided", False):  # K and V have different strides
            key, value = strided(key, heads_inside=True), strided(value, heads_inside=False)
        if options.pop("given", False):
            index = torch.arange(self.rank).expand(*key.shape[:2], self.rank)
            return _flat(attend(query, key, value, self.rank, landmarks=index, **options))
        if backend != "triton":
            rank = min(self.rank, key.shape[2])
            return _flat(attend(query, key, value, rank, landmarks=self.chosen, **options))
        plain = attention_module._landmark_side

        def recording(*arguments: Any) -> Any:
            found = plain(*arguments)
            self.chosen = found[2].detach().clone()
            return found

        with mock.patch.object(attention_module, "_landmark_side", recording):
            return _flat(attend(query, key, value, self.rank, **options))


def _flat(outputs: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a possibly nested output as a flat tuple."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    return sum((_flat(one) for one in outputs if one is not None), ())


def attention(
    queries: int,
    keys: int,
    d: int,
    rank: int,
    *sample: tuple[str, int],
    batch: int = 1,
    heads: int = 2,
    dtypes: tuple[str, ...] = NAMES,
    **options: Any,
) -> Case:
    """Return a case that computes Y = τ L X and the gradients of Q, K, V and τ."""
    words = "".join(f" {v if isinstance(v, str) else k}" for k, v in options.items() if v is not None)

    def make(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
        tokens = [normal(i, batch, heads, n, d, dtype=dtype) for i, n in enumerate((queries, keys, keys))]
        return _LandmarksOfKernels(rank, options), [*tokens, normal(7, heads, scale=0.1) + 1]

    name = f"attention Nq={queries} Nk={keys} d={d} r={rank}{words}"
    return Case(name, make, dtypes, sample, shares_size=True)


def operator(
    name: str, shapes: list[tuple[int, ...]], call: Call, *sample: tuple[str, int], wide: tuple[int, ...] = ()
) -> Case:
    """Return a case of an operator on normally distributed inputs.

    `wide` lists the indices of inputs that stay fp32.
    """

    def make(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
        kinds = [torch.float32 if i in wide else dtype for i in range(len(shapes))]
        return call, [normal(i, *s, dtype=k) for i, (s, k) in enumerate(zip(shapes, kinds, strict=True))]

    return Case(name, make, NAMES, sample)


def solve(r: int, d: int, solver: str, *sample: tuple[str, int]) -> Case:
    """Return an fp32 case that solves the landmark system and computes the gradients of keys and right-hand side."""

    def call(keys: Tensor, rhs: Tensor, *, backend: str) -> Tensor:
        logits = keys @ keys.mT / keys.shape[-1] ** 0.5
        return ops.landmark_solve(logits, rhs, solver=solver, backend=backend).x

    def make(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
        return call, [normal(3, 2, r, 16), normal(4, 2, r, d)]

    return Case(f"landmark_solve r={r} d={d} {solver}", make, ("fp32",), sample)


def landmarks(keys: int, d: int, rank: int, method: str, *sample: tuple[str, int]) -> Case:
    """Return a case that chooses landmarks.

    With the backend "triton", the call compares the choice of the kernels with the choice of the reference in
    fp64. It returns 0 if the choice of the kernels is acceptable, otherwise 1. The chosen indices must be
    valid and distinct. Of n indices in total, at most max(1, ⌊n/16⌋) may differ from the choice of the
    reference, because rounding can change the order of nearly equal scores. With another backend, the call
    only returns 0, the expected result.
    """

    def call(key: Tensor, *, backend: str) -> Tensor:
        if backend != "triton":
            return torch.zeros(1, dtype=key.dtype)
        found = ops.select_landmarks(key.detach(), rank, method=method, backend="triton").flatten(0, 1)
        exact = ops.select_landmarks(key.detach().double(), rank, method=method, backend="reference")
        pairs = list(zip(found.tolist(), exact.flatten(0, 1).tolist(), strict=True))
        distinct = all(len(set(one)) == rank and 0 <= min(one) <= max(one) < keys for one, _ in pairs)
        wrong = sum(len(set(one) - set(other)) for one, other in pairs)
        return torch.full((1,), float(not distinct or wrong > max(1, found.numel() // 16)), dtype=key.dtype)

    name = f"select_landmarks {method} Nk={keys} d={d} r={rank}"
    return Case(name, lambda dtype: (call, [normal(0, 1, 2, keys, d, dtype=dtype)]), NAMES, sample)


def _attention_cases() -> Iterator[Case]:
    methods, norms = ("leverage", "uniform", "pivoted_cholesky"), (None, "keys", "both")
    # Every tile (d, r) up to 64 × 64 in the launch rules, with both values of `heavy` and `held`.
    yield attention(77, 33, 24, 9, ("fp32", 80), ("bf16", 90), method="leverage", qk_norm="both")
    yield attention(130, 70, 32, 64, ("bf16", 89), ("fp32", 90), method="leverage", qk_norm="keys")
    yield attention(130, 256, 32, 64, ("fp16", 120), method="leverage", qk_norm="keys", heads=1)
    yield attention(77, 50, 40, 32, ("fp16", 86), method="uniform", qk_norm=None)
    yield attention(77, 80, 64, 64, ("bf16", 120), ("fp32", 86), method="leverage", qk_norm="keys", heads=1)
    yield attention(77, 50, 64, 16, ("fp16", 89), method="pivoted_cholesky", qk_norm="both", heads=1)
    for method, norm in itertools.product(methods, norms):
        sample = [("fp16", 90)] if (method, norm) == ("pivoted_cholesky", None) else []
        yield attention(77, 50, 32, 17, *sample, method=method, qk_norm=norm)
    yield attention(77, 50, 32, 17, ("bf16", 89), solver="lu", qk_norm="keys", method="uniform")
    # The keys of one image and head are divided among programs. In the backward pass, the queries are divided too.
    yield attention(40, 1056, 32, 16, ("bf16", 80), ("fp32", 89), heads=1, qk_norm="keys")
    yield attention(40, 1500, 32, 64, heads=1, dtypes=("fp16",), method="leverage", qk_norm="keys")
    yield attention(1030, 560, 32, 64, ("fp16", 90), heads=1, qk_norm="both")
    yield attention(40, 560, 64, 64, ("fp32", 120), heads=1, qk_norm="keys")
    yield attention(40, 560, 32, 16, heads=1, method="pivoted_cholesky", qk_norm="keys")
    yield attention(40, 560, 32, 16, ("fp16", 120), heads=1, method="uniform", qk_norm="keys")
    # Tiles larger than 64: K̃ and X are read in pieces.
    yield attention(40, 140, 128, 64, ("bf16", 80), heads=1, qk_norm="keys")
    yield attention(40, 140, 64, 128, ("fp16", 90), heads=1, qk_norm="keys")
    yield attention(40, 140, 128, 128, ("fp32", 80), heads=1, qk_norm="keys")
    yield attention(130, 50, 40, 9, ("bf16", 89), statistics=True, qk_norm="keys")
    yield attention(1, 1, 16, 4, ("fp32", 120), qk_norm="both")
    yield attention(77, 50, 32, 17, ("bf16", 90), batch=2, qk_norm="keys", strided=True)
    yield attention(40, 560, 32, 16, batch=2, qk_norm="keys", strided=True)
    yield attention(77, 50, 32, 17, ("fp16", 86), qk_norm="keys", given=True)


def _solve_cases() -> Iterator[Case]:
    samples = {(9, 24, "cholesky"): 89, (9, 24, "lu"): 89, (17, 40, "lu"): 120, (64, 32, "cholesky"): 90}
    for (r, d), solver in itertools.product(
        ((9, 24), (17, 40), (32, 32), (64, 64), (64, 32)), ("cholesky", "lu")
    ):
        sample = samples.get((r, d, solver))
        yield solve(r, d, solver, *([("fp32", sample)] if sample else []))
    yield solve(128, 128, "cholesky", ("fp32", 80))
    yield solve(128, 128, "lu")


def _scale_cases() -> Iterator[Case]:
    yield operator(
        "rms_scale", [(3, 2, 130, 24)], lambda y, backend: tuple(ops.rms_scale(y + 1, backend=backend)),
        ("bf16", 89), ("fp32", 90), ("fp16", 120),
    )  # fmt: skip
    yield operator(
        "rms_scale of many tokens", [(1, 1, 2100, 32)],
        lambda y, backend: tuple(ops.rms_scale(y + 1, backend=backend)), ("bf16", 80),
    )  # fmt: skip
    yield operator(
        "dyt", [(2, 77, 40), (1,), (40,), (40,)],
        lambda x, alpha, w, b, backend: ops.dyt(x, alpha, w, b, backend=backend), ("bf16", 86), ("fp32", 90),
    )  # fmt: skip
    yield operator(
        "tau_loss", [(8,), (8,)],
        lambda theta, rms, backend: ops.tau_loss(
            [theta], [rms.detach().abs() + 0.5], reference=1.0, backend=backend
        ),
        ("fp32", 89), ("fp32", 90), wide=(0, 1),
    )  # fmt: skip


def _gate_cases() -> Iterator[Case]:
    for stages, images, size in ((3, 2, 5), (2, 3, 8), (3, 1, 16)):
        yield operator(
            f"gated_fusion S={stages} B={images} P={size}", [(images, stages, 40, size, size), (images, stages)],
            lambda maps, logits, backend: tuple(
                ops.gated_fusion(maps, logits, cap=torch.tensor(3.0), backend=backend)
            ),
            *([("bf16", 89), ("fp32", 90), ("fp16", 120)] if size == 5 else []),
        )  # fmt: skip
    yield operator(
        "gated_fusion without a cap", [(2, 3, 24, 3, 3), (2, 3)],
        lambda maps, logits, backend: tuple(ops.gated_fusion(maps, logits, cap=None, backend=backend)), ("fp32", 86),
    )  # fmt: skip
    yield operator(
        "gate_losses", [(5, 3)],
        lambda x, backend: tuple(ops.gate_losses(x.softmax(-1), entropy_floor=0.7, backend=backend)),
        ("fp32", 89), ("bf16", 90),
    )  # fmt: skip
    yield operator(
        "biased_gelu", [(2, 24, 5, 7), (24,)],
        lambda x, bias, backend: ops.biased_gelu([x], [bias], backend=backend), ("bf16", 80), ("fp32", 90),
    )  # fmt: skip
    yield operator(
        "gate_logits", [(2, 24, 5, 7), (24,), (1, 24), (1,)],
        lambda x, bias, w, c, backend: ops.gate_logits([x], [bias], [(w, c)], backend=backend),
        ("fp16", 86), ("bf16", 90),
    )  # fmt: skip


def _pool_and_landmark_cases() -> Iterator[Case]:
    for size in (8, 3):
        yield operator(
            f"adaptive_pool P={size}", [(2, 17, 37, 29)],
            lambda x, backend, size=size: ops.adaptive_pool(x, size, backend=backend),
            *([("bf16", 89), ("fp32", 90)] if size == 8 else [("fp16", 80)]),
        )  # fmt: skip
    for keys, d in ((33, 24), (256, 32), (50, 64), (140, 128)):
        yield operator(
            f"ridge_leverage_scores Nk={keys} d={d}", [(1, 2, keys, d)],
            lambda key, backend: ops.ridge_leverage_scores(key, backend=backend),
            *{24: [("fp32", 80)], 64: [("bf16", 89), ("fp16", 90)], 128: [("fp32", 90)]}.get(d, []),
        )  # fmt: skip
    for keys, d, rank in ((33, 24, 9), (256, 32, 64), (50, 64, 32), (140, 128, 128)):
        for method in ("leverage", "pivoted_cholesky", "uniform"):
            sample = {9: [("bf16", 120), ("fp32", 89)], 32: [("fp16", 86)], 128: [("bf16", 80)]}.get(rank, [])
            yield landmarks(keys, d, rank, method, *sample)


def operator_cases() -> list[Case]:
    """Return the cases of single operators, in a fixed order."""
    return [
        *_attention_cases(),
        *_solve_cases(),
        *_scale_cases(),
        *_gate_cases(),
        *_pool_and_landmark_cases(),
    ]
