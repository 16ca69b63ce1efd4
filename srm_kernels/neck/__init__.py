"""The fused neck: all links of a schedule, from the backbone's maps to the gate's input (docs/METHOD.md §1 and 3).

`project_sources` and `landmark_side` make the key side, `pooled_links` the query side, `merge_links` the updated maps.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..attention import QK_NORMS, _over_batch
from ..checks import DTYPES, check_choice, check_count, check_number, check_tensors, wide_dtype
from ..landmarks import kernel_limits
from ..registration import later, register_operator
from ..runtime import choose_kernels, interpreting, kept, roomy
from ..scale import RMSScale
from . import reference, tiled

_KERNELS, _BACKWARD, _ENDS = (
    f"{__name__}.{module}" for module in ("kernels", "backward_kernels", "end_kernels")
)
LARGEST_GRID = 32
LARGEST_TILE = 64 * 128  # r·d
MOST_CHANNELS = 256  # of tokens that are held at once
DyTParameters = tuple[Tensor, Tensor, Tensor]


class PooledLinks(NamedTuple):
    """P̄ (L, B, H, P², r) in fp32 (fp64 for fp64), zeros beyond a link's own r; pool(F) (B, P², ΣC_i), the maps beside
    one another; and the statistic of every link's Y = L X where X was given."""

    probabilities: Tensor
    maps: Tensor
    scales: list[RMSScale] | None


def _cast_parameters(like: Tensor, *groups: Sequence[Tensor]) -> list[list[Tensor]]:
    return [autocast.no_narrower(group, like) for group in groups]


def _cast_project(tokens: Tensor, *parameters: Any) -> tuple[Any, ...]:
    *groups, shift = parameters
    *groups, shifts = _cast_parameters(tokens, *groups, [] if shift is None else [shift])
    return tokens, *groups, shifts[0] if shifts else None


def _cast_pooled(maps: Sequence[Tensor], *others: Any) -> tuple[Any, ...]:
    """Six groups of parameters, then keys and xs."""
    maps = autocast.lowered(*maps)
    if not maps:
        return maps, *others
    wide = [autocast.widened(group, maps[0]) for group in others[6:8]]
    return maps, *_cast_parameters(maps[0], *others[:6]), *wide, *others[8:]


def _cast_merge(pooled: Tensor, probabilities: Tensor, xs: Sequence[Tensor], *others: Any) -> tuple[Any, ...]:
    """Five groups of parameters, then the targets."""
    probabilities, *xs = autocast.widened((probabilities, *xs), pooled)
    return pooled, probabilities, xs, *_cast_parameters(pooled, *others[:5]), *others[5:]


_project = register_operator(
    "project_sources",
    "Tensor tokens, Tensor[] key_weights, Tensor[] value_weights, Tensor[] alphas, Tensor[] weights, "
    "Tensor[] biases, Tensor? shift",
    "(Tensor, Tensor)",
    dict.fromkeys(("reference", "torch"), reference.project_sources)
    | {"triton": later(_ENDS, "project_sources")},
    fake=lambda tokens, key_weights, *_: (
        tokens.new_empty((len(key_weights), *tokens.shape)),
        tokens.new_empty((len(key_weights), *tokens.shape)),
    ),
    differentiable=("tokens", "key_weights", "value_weights", "alphas", "weights", "biases", "shift"),
    autocast=_cast_project,
)


def _fake_links(
    maps: list[Tensor],
    align_weights: list[Tensor],
    align_biases: list[Tensor],
    alphas: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    query_weights: list[Tensor],
    keys: list[Tensor],
    xs: list[Tensor],
    targets: list[int],
    size: int,
    *others: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, _, d = keys[0].shape
    L, most = len(keys), max(k.shape[2] for k in keys)
    shapes = ((L, B, H, d), (L, B, H)) if xs else ((0,), (0,))
    return (
        keys[0].new_empty((L, B, H, size * size, most)),
        maps[0].new_empty((B, size * size, sum(m.shape[1] for m in maps))),
        keys[0].new_empty(shapes[0]),
        keys[0].new_empty(shapes[1]),
    )


_pooled = register_operator(
    "pooled_links",
    "QuerySides sides",
    "(Tensor, Tensor, Tensor, Tensor)",
    {
        "reference": reference.pooled_links,
        "torch": tiled.pooled_links,
        "triton": later(_KERNELS, "pooled_links"),
    },
    fake=_fake_links,
    differentiable=(
        "maps",
        "align_weights",
        "align_biases",
        "alphas",
        "weights",
        "biases",
        "query_weights",
        "keys",
    ),
    derivatives={
        "torch": tiled.pooled_links_backward,
        "triton": later(_BACKWARD, "pooled_links_backward"),
    },
    constant=(2, 3),
    autocast=_cast_pooled,
)


def _fake_merged(
    pooled: Tensor,
    probabilities: Tensor,
    xs: list[Tensor],
    align_weights: list[Tensor],
    align_biases: list[Tensor],
    *_: object,
) -> Tensor:
    size = math.isqrt(pooled.shape[1])
    return pooled.new_empty((len(align_weights), pooled.shape[0], align_biases[0].shape[0], size, size))


_merge = register_operator(
    "merge_links",
    "Tensor pooled, Tensor probabilities, Tensor[] xs, Tensor[] align_weights, Tensor[] align_biases, "
    "Tensor[] output_weights, Tensor[] thetas, Tensor[] betas, int[] targets",
    "Tensor",
    dict.fromkeys(("reference", "torch"), reference.merge_links) | {"triton": later(_ENDS, "merge_links")},
    fake=_fake_merged,
    differentiable=(
        "pooled",
        "probabilities",
        "xs",
        "align_weights",
        "align_biases",
        "output_weights",
        "thetas",
        "betas",
    ),
    autocast=_cast_merge,
)


def project_sources(
    tokens: Tensor,
    key_weights: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    *,
    shift: Tensor | None = None,
    dyt: Sequence[DyTParameters] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """K = W_K DyT(T) and V = W_V DyT(T) of all links that share a source, in one launch (docs/METHOD.md §1.2).

    tokens: T (B, N, C), or A F where `shift` is a (C,) and T = A F + a; float64, float32, bfloat16 or float16, any
    strides. key_weights, value_weights: (C, C) for every link, in T's dtype or a wider one, as `shift` is, from which
    they are rounded. dyt: (α, w, b) for every link, no narrower than T, or None. Returns K and V (L, B, N, C) in T's
    dtype. Differentiable in everything, twice.
    backend: as in `pooled_links`. Raises TypeError for dtypes, ValueError for shapes.
    """
    check_tensors(tokens=tokens)
    if tokens.dim() != 3:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected (B, N, C)")
    C, L = tokens.shape[2], len(key_weights)
    _check_counts("key_weights", L, value_weights=value_weights, dyt=dyt)
    for name, group in (("key_weights", key_weights), ("value_weights", value_weights)):
        for weight in group:
            _check_weight(name, weight, (C, C), tokens)
    if shift is not None:
        _check_weight("shift", shift, (C,), tokens)
    squashing = _dyt_lists(dyt, tokens, C)
    chosen = choose_kernels(
        backend, tokens, "project_sources", sizes=lambda: (tokens.shape[1], C), call=(tokens.shape,)
    )
    keys, values = _project(tokens, list(key_weights), list(value_weights), *squashing, shift, chosen)
    return keys, values


def pooled_links(
    maps: Sequence[Tensor],
    align: Sequence[tuple[Tensor, Tensor]],
    query_weights: Sequence[Tensor],
    keys: Sequence[Tensor],
    targets: Sequence[int],
    *,
    size: int,
    dyt: Sequence[DyTParameters] | None = None,
    xs: Sequence[Tensor] | None = None,
    qk_norm: str | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> PooledLinks:
    """P̄ = pool(softmax(Q K̃ᵀ s)), Q = W_Q DyT(A F + a), of all links of a schedule, and pool(F) of the maps they read.

    maps: F (B, C_i, h, w) each, maps of the backbone, float64, float32, bfloat16 or float16, contiguous or
    channels-last, of one dtype. targets: for every link the number of the map that it reads; a map may have no link.
    align: (A (C, C_i), a (C,)) for every link; query_weights: W_Q (C, C) likewise, in F's dtype or a wider one, from
    which they are rounded. keys: K̃ (B, H, r, d) for every link with C = H·d, landmark keys as `landmark_side` gives
    them, fp32 (fp64 for fp64); r may differ. size: P of the P×P grid, whose cells are those of adaptive average
    pooling. dyt: (α, w, b) for every link, no narrower than F, or None for T itself. xs: X (B, H, r, d) for every link
    in the keys' dtype, for the statistic of Y = L X over batch and positions alone; it receives no gradient.
    qk_norm, scale: as in `nystrom_attention`.

    Then pool(L X) = P̄ X, and the gradient of X is P̄ᵀ times that of the pooled Y. Differentiable in all but X; twice
    through the reference. Kernels write nothing at full resolution in forward, neither tokens nor queries, with DyT or
    without; in backward Q, dQ and, with DyT, DyT(T) of the links exist for the time of the call. For the backward pass
    F, K̃, weights and P̄ are kept. A NaN stays in its image and head.
    backend: "torch", the default on CPU tensors, works on tiles of about 512 positions, one image at a time, forward
    and backward: neither tokens, queries nor probabilities exist at full resolution. On CUDA tensors "torch" and the
    default are the reference. "triton" takes fp32, bf16 and fp16, d from 8 to 128, r up to 128, r·d up to 8,192, P up
    to 32, and C up to 256 where `dyt` is given or queries are normalised.
    Raises TypeError for dtypes, ValueError for shapes and values, NotImplementedError for a backend that cannot run.
    """
    maps = autocast.lowered(*maps)
    if not maps or not keys:
        raise ValueError(f"there are {len(maps)} maps and {len(keys)} keys; expected one at least of each")
    keys, xs = autocast.widened(keys, maps[0]), None if xs is None else autocast.widened(xs, maps[0])
    targets, C = _check_links(maps, align, query_weights, keys, targets, dyt, xs)
    features, d = maps[0], keys[0].shape[-1]
    size = check_count("size", size)
    check_choice("qk_norm", qk_norm, QK_NORMS)
    if scale is not None:
        check_number("scale", scale)
    alphas, weights, biases = _dyt_lists(dyt, features, C)
    s = 1 / math.sqrt(d) if scale is None else float(scale)
    channels = C if dyt is not None or qk_norm == "both" else 0
    chosen = _choose_backend(backend, features, max(k.shape[2] for k in keys), d, size, channels)
    pooled, means, mean, spread = _pooled(
        list(maps), [weight for weight, _ in align], [bias for _, bias in align], alphas, weights, biases,
        list(query_weights), list(keys), [x.detach() for x in xs or ()], targets, size, s, qk_norm, chosen,
    )  # fmt: skip
    if xs is None:
        return PooledLinks(pooled, means, None)
    positions = [maps[t].shape[2] * maps[t].shape[3] for t in targets]
    return PooledLinks(
        pooled, means, [_over_batch(*one) for one in zip(mean, spread, positions, strict=True)]
    )


def merge_links(
    pooled: PooledLinks,
    xs: Sequence[Tensor],
    align: Sequence[tuple[Tensor, Tensor]],
    output_weights: Sequence[Tensor],
    targets: Sequence[int],
    betas: Sequence[Tensor],
    *,
    thetas: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """pool(F_t + β_t Σ τ L X W_O) of every map from P̄ and pool(F), as pooling is linear (docs/METHOD.md §1.3 to 1.5).

    pooled: as `pooled_links` gives it. xs: X (B, H, r, d) for every link, as `landmark_side` gives it. align: (A
    (C, C_i), a (C,)) for every map; output_weights: W_O (C, C) for every link; all in the maps' dtype or a wider one.
    targets: for every link the number of its map; betas: β of that map, one element. thetas: θ (H,) for every link,
    τ = exp(θ), or None for τ = 1. Returns (B, S, C, P, P) in the maps' dtype, every stage contiguous. P̄ X is
    taken in fp32: X may be far larger than Y. Differentiable in everything, twice.
    backend: as in `pooled_links`. Raises TypeError for dtypes, ValueError for shapes.
    """
    maps, probabilities = pooled.maps, pooled.probabilities
    probabilities, *xs = autocast.widened((probabilities, *xs), maps)
    check_tensors(maps=maps)
    check_tensors(probabilities=probabilities, **{f"xs[{i}]": x for i, x in enumerate(xs)})
    L, B, H, _, most = probabilities.shape
    _check_counts(
        "probabilities", L, xs=xs, output_weights=output_weights, targets=targets, betas=betas, thetas=thetas
    )
    targets = _check_targets(targets, len(align))
    for x in xs:
        if x.dim() != 4 or x.shape[:2] != (B, H) or x.shape[2] > most:
            raise ValueError(f"xs has shape {tuple(x.shape)}; expected ({B}, {H}, up to {most}, d)")
    C = H * xs[0].shape[3]
    for weight, bias in align:
        _check_weight("align", weight, (C, weight.shape[-1]), maps)
        _check_weight("align", bias, (C,), maps)
    if sum(weight.shape[1] for weight, _ in align) != maps.shape[2]:
        raise ValueError(
            f"align reads {sum(w.shape[1] for w, _ in align)} channels; expected {maps.shape[2]}"
        )
    for name, group, shape in (("output_weights", output_weights, (C, C)), ("thetas", thetas or (), (H,))):
        for weight in group:
            _check_weight(name, weight, shape, maps)
    for beta in betas:
        _check_weight("betas", beta.reshape(-1), (1,), maps)
    chosen = choose_kernels(backend, maps, "merge_links", sizes=lambda: (most, C), call=(most, C))
    merged = _merge(
        maps, probabilities, list(xs), [weight for weight, _ in align], [bias for _, bias in align],
        list(output_weights), list(thetas or ()), list(betas), targets, chosen,
    )  # fmt: skip
    return merged.transpose(0, 1)


def serves_pooled_links(
    features: Tensor,
    d: int,
    rank: int,
    keys: Sequence[int],
    size: int,
    channels: int = 0,
    *,
    backend: str | None = None,
) -> bool:
    """Return whether `pooled_links` serves maps like these: what a neck decides its form by.

    Args:
        features: a map, of which dtype and device count.
        d: width of a head.
        rank: r, landmarks at most; no link has more than its keys.
        keys: number of keys of every link.
        size: P.
        channels: C where DyT is on or queries are normalised, else 0.
        backend: as in `pooled_links`.

    Returns:
        False where the backend's kernels serve attention of these sizes, but not this form of it. With `backend` None
        the verdict about the device decides, for all maps of a dtype and d alike.

    Raises:
        NotImplementedError: `backend` names what cannot run at all.
    """
    chosen = choose_kernels(backend, features, "pooled_links", sizes=lambda: (d,), call=("any sizes", d))
    if chosen != "triton":
        return True  # before anything is asked of shapes, which torch.export would guard
    rank = max(min(rank, count) for count in keys)
    return rank * d <= LARGEST_TILE and size <= LARGEST_GRID and channels <= MOST_CHANNELS


def _choose_backend(
    requested: str | None, features: Tensor, rank: int, d: int, size: int, channels: int
) -> str:
    """By d alone of the sizes, as `serves_pooled_links` answers before the keys are there."""
    tiled_here = features.device.type == "cpu"
    call = (rank, d, size, channels)
    chosen = kept(requested, features, "pooled_links", "", call) or choose_kernels(
        requested,
        features,
        "pooled_links",
        partial(_refusal, features, rank, d, size, channels),
        plain=("torch", "reference") if tiled_here else ("reference", "torch"),
        sizes=lambda: (d,),
        call=call,
    )
    # A GPU is faster with all images and positions at once, which is the reference's form.
    return "reference" if chosen == "torch" and not tiled_here else chosen


def _refusal(features: Tensor, rank: int, d: int, size: int, channels: int) -> str | None:
    """Why kernels do not serve these sizes."""
    refusal = kernel_limits(d, rank)
    if refusal is None and max(d, rank) > 64 and not roomy(features):
        refusal = f"its kernels take d and r up to 64 in this device's shared memory, and d is {d}, r {rank}"
    narrow = features.dtype == torch.bfloat16 and roomy(features, 200)
    if refusal is None and min(d, rank) > 64 and not interpreting() and not narrow:
        refusal = (
            f"its kernels take d and r both above 64 only in bfloat16 and 200 KiB, and d is {d}, r {rank}"
        )
    if refusal is None and size > LARGEST_GRID:
        refusal = f"its kernels take a grid of up to {LARGEST_GRID}, and P is {size}"
    if refusal is None and rank * d > LARGEST_TILE:
        refusal = f"its kernels take r·d of up to {LARGEST_TILE}, and r is {rank} and d {d}"
    if refusal is None and channels > MOST_CHANNELS:
        refusal = f"its kernels hold tokens of up to {MOST_CHANNELS} channels at once, and C is {channels}"
    return refusal


def _check_links(
    maps: Sequence[Tensor],
    align: Sequence[tuple[Tensor, Tensor]],
    query_weights: Sequence[Tensor],
    keys: Sequence[Tensor],
    targets: Sequence[int],
    dyt: Sequence[DyTParameters] | None,
    xs: Sequence[Tensor] | None,
) -> tuple[list[int], int]:
    """Tensors of links that fit together; their targets and C."""
    check_tensors(**{f"maps[{i}]": m for i, m in enumerate(maps)})
    check_tensors(**{f"keys[{i}]": k for i, k in enumerate(keys)})
    features, first = maps[0], keys[0]
    if first.dtype != wide_dtype(features.dtype):
        raise TypeError(
            f"keys are {first.dtype} and maps {features.dtype}; expected keys in fp32 (fp64 for fp64)"
        )
    if first.device != features.device:
        raise ValueError(f"keys are on {first.device} and maps on {features.device}; expected one device")
    _check_counts(
        "keys", len(keys), align=align, query_weights=query_weights, targets=targets, dyt=dyt, xs=xs
    )
    if any(m.dim() != 4 or m.shape[0] != features.shape[0] for m in maps):
        raise ValueError(f"maps have shapes {[tuple(m.shape) for m in maps]}; expected (B, C_i, h, w), one B")
    one = (features.shape[0], *first.shape[1::2])
    if any(k.dim() != 4 or (k.shape[0], *k.shape[1::2]) != one for k in keys):
        raise ValueError(
            f"keys have shapes {[tuple(k.shape) for k in keys]}; expected (B, H, r, d), one B, H and d"
        )
    C = first.shape[1] * first.shape[3]
    targets = _check_targets(targets, len(maps))
    for (weight, bias), query, target in zip(align, query_weights, targets, strict=True):
        _check_weight("align", weight, (C, maps[target].shape[1]), features)
        _check_weight("align", bias, (C,), features)
        _check_weight("query_weights", query, (C, C), features)
    for k, x in zip(keys, xs or (), strict=False):
        check_tensors(keys=k, xs=x)
        if x.shape != k.shape:
            raise ValueError(f"xs has shape {tuple(x.shape)} and keys {tuple(k.shape)}; expected the same")
    return targets, C


def _check_counts(name: str, count: int, **groups: Sequence[object] | None) -> None:
    for other, group in groups.items():
        if group is not None and len(group) != count:
            raise ValueError(
                f"{other} has {len(group)} entries and {name} {count}; expected one for every link"
            )


def _check_targets(targets: Sequence[int], maps: int) -> list[int]:
    if not all(isinstance(t, numbers.Integral) and 0 <= t < maps for t in targets):
        raise ValueError(f"targets is {list(targets)}; expected numbers of maps, 0 to {maps - 1}")
    return [int(t) for t in targets]


def _check_weight(name: str, weight: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A parameter of this shape on the device of `like`, in its dtype or, but for autocast, a wider one."""
    check_tensors(**{name: weight})
    if DTYPES.index(weight.dtype) > DTYPES.index(like.dtype) and not autocast.enabled(like):
        raise TypeError(f"{name} is {weight.dtype} and the maps are {like.dtype}; expected it no narrower")
    if weight.device != like.device:
        raise ValueError(f"{name} is on {weight.device} and the maps on {like.device}; expected one device")
    if weight.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected {shape}")


def _dyt_lists(
    dyt: Sequence[DyTParameters] | None, like: Tensor, C: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    for alpha, weight, bias in dyt or ():
        for parameter, shape in ((alpha.reshape(-1), (1,)), (weight, (C,)), (bias, (C,))):
            _check_weight("dyt", parameter, shape, like)
    alphas, weights, biases = ([group[i] for group in dyt or ()] for i in range(3))
    return alphas, weights, biases
