"""Count the multiply-accumulates of the operators, for the FLOP counters of torch and fvcore (docs/METHOD.md §2.2).

The article's equation 30 gives the multiply-accumulates of one link for one image and head. They are the sum
of these terms:

    2 N_q r d           the logits of L, and L X
    2 r N_k d + r² d    the logits of R, R V, and the logits of W
    2 N_k d² + d³/3     the leverage scores: Gram matrix and scores, Cholesky factorisation
    r³/3 + r² d         X: a factorisation, and two triangular solves with d columns

`import srm_kernels` registers the formulas of `MACS` with torch's counter. The counter reports two FLOPs for
each multiply-accumulate. `fvcore_handles()` returns the arguments for fvcore's
`FlopCountAnalysis.set_op_handle`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .attention import _attention, _blocks, _context, _query_side
from .conditioning import _solve
from .gate import _logits
from .landmarks import LANDMARK_METHODS, _leverage, _select
from .landmarks.reference import leverage_macs
from .neck import _merge, _pooled, _project
from .options import QuerySides

Shape = tuple[int, ...]


def attention_macs(queries: int, keys: int, rank: int, d: int) -> int:
    """Count the multiply-accumulates of L, R, R V, W, X and L X for one head, without the choice of landmarks."""
    return query_side_macs(queries, rank, d) + key_side_macs(keys, rank, d) + solve_macs(rank, d)


def query_side_macs(queries: int, rank: int, d: int) -> int:
    """Count the multiply-accumulates of L and L X for one head."""
    return 2 * queries * rank * d


def key_side_macs(keys: int, rank: int, d: int) -> int:
    """Count the multiply-accumulates of R, R V and the logits of W for one head."""
    return 2 * rank * keys * d + rank**2 * d


def solve_macs(rank: int, d: int) -> int:
    """Count the multiply-accumulates of X for one head: r³/3 (factorisation) + r² d (two triangular solves)."""
    return rank**3 // 3 + rank**2 * d


def link_macs(queries: int, keys: int, rank: int, d: int) -> int:
    """Count the multiply-accumulates of a link with `leverage` landmarks, for one image and head (article, eq. 30)."""
    return attention_macs(queries, keys, rank, d) + leverage_macs(keys, d)


def _heads(shape: Shape) -> int:
    return shape[0] * shape[1]


def _attention_op(query: Shape, key: Shape, value: Shape, landmarks: Shape, *_: Any) -> int:
    return _heads(query) * attention_macs(query[2], key[2], landmarks[2], query[3])


def _query_side_op(query: Shape, keys: Shape, *_: Any) -> int:
    return _heads(query) * query_side_macs(query[2], keys[2], query[3])


def _project_op(tokens: Shape, key_weights: Sequence[Shape], *_: Any) -> int:
    B, N, C = tokens
    return 2 * len(key_weights) * B * N * C * C


def _pooled_op(*args: Any) -> int:
    """Count the multiply-accumulates of T, Q and the logits at every position.

    Some backends compute fewer multiply-accumulates than the returned number, because they fold consecutive products
    into one.
    """
    given = dict(zip(QuerySides.NAMES, args, strict=False))
    total = 0
    for target, align, key in zip(given["targets"], given["align_weights"], given["keys"], strict=True):
        (C, channels), (B, H, rank, d) = align, key
        _, _, h, w = given["maps"][target]
        total += B * h * w * (channels * C + C * C + H * rank * d)
    return total


def _merge_op(
    pooled: Shape, probabilities: Shape, xs: Sequence[Shape], align_weights: Sequence[Shape], *_: Any
) -> int:
    B, cells, channels = pooled
    C = align_weights[0][0]
    links = sum(heads * cells * rank * d + cells * C * C for _, heads, rank, d in xs)
    return B * (cells * channels * C + links)


def _logits_op(maps: Sequence[Shape], *_: Any) -> int:
    """Count the multiply-accumulates of the readouts, without GELUs and means."""
    return len(maps) * maps[0][0] * maps[0][1]


def _blocks_op(
    key: Shape, value: Shape, landmarks: Shape | None, rank: int, method: str = "leverage", *_: Any
) -> int:
    chosen = _select_op(key, None, rank, method) if landmarks is None else 0
    return _heads(key) * key_side_macs(key[2], rank, key[3]) + chosen


def _context_op(
    key: Shape, value: Shape, landmarks: Shape | None, rank: int, method: str = "leverage", *_: Any
) -> int:
    return _blocks_op(key, value, landmarks, rank, method) + _heads(key) * solve_macs(rank, key[3])


def _solve_op(logits: Shape, rhs: Shape, *_: Any) -> int:
    return math.prod(logits[:-2]) * solve_macs(logits[-1], rhs[-1])


def _leverage_op(key: Shape, *_: Any) -> int:
    return _heads(key) * leverage_macs(key[2], key[3])


def _select_op(key: Shape, random: Shape | None, rank: int, method: str = "leverage", *_: Any) -> int:
    return _heads(key) * LANDMARK_METHODS[method].macs(rank, key[2], key[3])


MACS: dict[Any, Callable[..., int]] = {
    _attention: _attention_op,
    _context: _context_op,
    _blocks: _blocks_op,
    _query_side: _query_side_op,
    _project: _project_op,
    _pooled: _pooled_op,
    _merge: _merge_op,
    _logits: _logits_op,
    _solve: _solve_op,
    _leverage: _leverage_op,
    _select: _select_op,
}
# A backward pass repeats the forward pass, and computes two products for each product of the forward pass.
BACKWARD_FACTOR = 3


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence the logger `name` and all warnings, because importing torch's counter without Triton causes warnings."""
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


def _register() -> None:
    with _quiet("torch.utils.flop_counter"):
        from torch.utils.flop_counter import register_flop_formula

    def formula(macs: Callable[..., int], factor: int, first: int) -> Callable[..., int]:
        def flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
            return 2 * factor * macs(*args[first:])

        return flops

    for operator, macs in MACS.items():
        packet = operator.overloadpacket
        register_flop_formula(packet)(formula(macs, 1, 0))
        derivative = getattr(torch.ops.srm, f"{packet.__name__}_backward", None)
        if derivative is not None:  # its first arguments are grads and results
            register_flop_formula(derivative)(formula(macs, BACKWARD_FACTOR, 2))


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Return the handles with which fvcore counts multiply-accumulates of the operators.

    Returns:
        A dict from operator name to handle. Pass each pair to `FlopCountAnalysis.set_op_handle(name, handle)`.
    """

    def handle(macs: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
        def count(inputs: list[Any], outputs: list[Any]) -> int:
            return macs(*(_shape_or_value(value) for value in inputs))

        return count

    return {operator.name(): handle(macs) for operator, macs in MACS.items()}


def _shape_or_value(value: Any) -> Any:
    """Return the shape of a traced tensor, the shapes of a list of tensors, or the value of a constant."""
    kind = value.type()
    if value.node().kind() == "prim::ListConstruct":
        return [_shape_or_value(item) for item in value.node().inputs()]
    sizes = kind.sizes() if kind.kind() == "TensorType" else None
    return tuple(sizes) if sizes is not None else value.toIValue()


_register()
