"""The fused neck: all links of a schedule, from the backbone's maps to the gate's input (docs/METHOD.md §1 and 3).

`project_sources` and `landmark_side` compute the key side of the links. `pooled_links` computes the query side, and
`merge_links` computes the pooled updated maps.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..attention import QK_NORMS, _over_batch
from ..autocast import check_parameter
from ..checks import check_choice, check_count, check_number, check_tensors, wide_dtype
from ..devices import interpreting, roomy
from ..dispatch import choose_kernels
from ..landmarks import kernel_limits
from ..options import QuerySides
from ..registration import later, register_operator
from ..scale import RMSScale
from . import batched, reference, tiled

_FORWARD, _BACKWARD, _ENDS = (f"{__name__}.{part}_kernels" for part in ("forward", "backward", "end"))
LARGEST_GRID = 32
LARGEST_TILE = 64 * 128  # largest r·d of the kernels
MOST_CHANNELS = 256  # channels of tokens that a program holds at once
DyTParameters = tuple[Tensor, Tensor, Tensor]


class PooledLinks(NamedTuple):
    """The query side of all links, pooled to the P×P grid.

    Attributes:
        probabilities: P̄ (number of links, B, H, P², r) in fp32 (fp64 for fp64 inputs), with the
            largest r of all links. Entries beyond a link's own r are 0.
        maps: pool(F) (B, P², ΣC_i), the pooled maps of all stages, concatenated along the channels.
        scales: The scale statistic of Y = L X for each link (docs/METHOD.md §3.1), or None if X was not given.
    """

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
    """Cast the arguments of `pooled_links` under autocast.

    `others` contains the arguments after `maps`: six groups of parameters, the keys, `xs`, and arguments without
    tensors.
    """
    maps = autocast.lowered(*maps)
    if not maps:
        return maps, *others
    wide = [autocast.widened(group, maps[0]) for group in others[6:8]]
    return maps, *_cast_parameters(maps[0], *others[:6]), *wide, *others[8:]


def _cast_merge(pooled: Tensor, probabilities: Tensor, xs: Sequence[Tensor], *others: Any) -> tuple[Any, ...]:
    """Cast the arguments of `merge_links` under autocast.

    `others` contains the arguments after `xs`: five groups of parameters, then `targets`.
    """
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


def _fake_links(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = QuerySides(*flat)
    maps, keys, cells = sides.maps, sides.keys, sides.size * sides.size
    B, H, _, d = keys[0].shape
    L, most = len(keys), max(k.shape[2] for k in keys)
    shapes = ((L, B, H, d), (L, B, H)) if sides.xs else ((0,), (0,))
    return (
        keys[0].new_empty((L, B, H, cells, most)),
        maps[0].new_empty((B, cells, sum(m.shape[1] for m in maps))),
        keys[0].new_empty(shapes[0]),
        keys[0].new_empty(shapes[1]),
    )


def _by_tiles(sides: QuerySides) -> Any:
    """Return the module that implements the backend "torch" on the device of the maps."""
    return tiled if sides.maps[0].device.type == "cpu" else batched


_pooled = register_operator(
    "pooled_links",
    "QuerySides sides",
    "(Tensor, Tensor, Tensor, Tensor)",
    {
        "reference": reference.pooled_links,
        "torch": lambda sides: _by_tiles(sides).pooled_links(sides),
        "triton": later(_FORWARD, "pooled_links"),
    },
    fake=_fake_links,
    differentiable=QuerySides.NAMES[:8],  # from the maps to the keys
    derivatives={
        "torch": lambda grads, results, sides: _by_tiles(sides).pooled_links_backward(grads, results, sides),
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
    differentiable="pooled probabilities xs align_weights align_biases output_weights thetas betas".split(),
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
    """Compute K = DyT(T) W_K and V = DyT(T) W_V of all links that share a source (docs/METHOD.md §1.2).

    The backend "triton" computes K and V of all these links in one launch.

    All parameters have the dtype of T or a wider one. W_K, W_V and `shift` are rounded to T's dtype. The
    operator is twice differentiable in all tensors.

    Args:
        tokens: (B, N, C), float64, float32, bfloat16 or float16, any strides. Without `shift`, these are the tokens T.
            With `shift`, they are the tokens before the bias a is added, that is, the product of F and A.
        key_weights: W_K (C, C) of each link, as `torch.nn.Linear` stores it.
        value_weights: W_V (C, C) of each link.
        shift: The bias a (C,), or None. If it is given, T is `tokens` + a.
        dyt: (α, w, b) of each link. None means no DyT: K = T W_K and V = T W_V.
        backend: A name of `backends()`, or None.

    Returns:
        K and V of the L links, (L, B, N, C) each, in the dtype of `tokens`.

    Raises:
        TypeError: A dtype is not accepted.
        ValueError: Shapes, devices or the numbers of tensors do not match.
        NotImplementedError: The requested backend cannot run the call.
    """
    check_tensors(tokens=tokens)
    if tokens.dim() != 3:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected (B, N, C)")
    C, L = tokens.shape[2], len(key_weights)
    _check_counts("key_weights", L, value_weights=value_weights, dyt=dyt)
    for name, group in (("key_weights", key_weights), ("value_weights", value_weights)):
        for weight in group:
            check_parameter(name, weight, (C, C), tokens)
    if shift is not None:
        check_parameter("shift", shift, (C,), tokens)
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
    """Compute the pooled landmark probabilities P̄ of all links, and the pooled maps (docs/METHOD.md §1.5).

    P̄ = pool(L) with L = softmax(Q K̃ᵀ s) and Q = DyT(A F + a) W_Q. Pooling is linear, so pool(L X) = P̄ X.
    `merge_links` computes the product P̄ X, and its backward pass computes the gradient with respect to X: P̄ᵀ times
    the gradient with respect to P̄ X. `pooled_links` is therefore differentiable in all tensors except X. With every
    backend, second derivatives are computed by the code of the backend "reference".

    A NaN in F affects only P̄ and pool(F) of the same image. A NaN in K̃ affects only P̄ of the same image
    and head. All parameters have the dtype of F or a wider one; A, a and W_Q are rounded to F's dtype.

    Backends:

    - "torch" is the default unless the verdict of the device selects another backend (see
      `srm_kernels.choice`). The forward and the backward pass process tiles of positions: on a CPU about 512
      positions of one image, on other devices about 4,096 positions of every image. Tokens, queries and
      probabilities exist for one tile at a time, and never at full resolution.
    - "reference" stores tokens, queries and probabilities at full resolution.
    - "triton": the forward pass writes nothing at full resolution. For the backward pass, it saves only the
      inputs and the results of the operator. The backward pass writes Q and dQ at full resolution. With DyT
      or `qk_norm="both"`, it also writes the input of W_Q and the gradient of T = A F + a at full resolution.
      The kernels support float32, bfloat16 and float16, d from 8 to 128, r up to 128, r·d up to 8,192 and P
      up to 32. With DyT or `qk_norm="both"`, they support C up to 256. If d or r is above 64, the kernels
      need 160 KiB of shared memory per thread block. If both are above 64, the kernels need 200 KiB, and
      bfloat16 is the only supported dtype.

    Args:
        maps: F (B, C_i, h, w) of the backbone's stages, of one dtype, contiguous or channels-last; float64, float32,
            bfloat16 or float16.
        align: (A (C, C_i), a (C,)) of each link, with C = H·d.
        query_weights: W_Q (C, C) of each link, as `torch.nn.Linear` stores it.
        keys: K̃ (B, H, r, d) of each link, as `landmark_side` returns it, in fp32 (fp64 for fp64 inputs). Links can have
            different r.
        targets: For each link, the index of its target in `maps`. A map without a link is allowed.
        size: P of the P×P grid, whose cells are those of adaptive average pooling.
        dyt: (α, w, b) of each link, or None without DyT.
        xs: X (B, H, r, d) of each link, in the dtype of the keys. Only the scale statistic of Y = L X uses X
            (docs/METHOD.md §3.1). X receives no gradient. With None, no statistic is computed.
        qk_norm: As in `nystrom_attention`.
        scale: As in `nystrom_attention`.
        backend: A name of `backends()`, or None.

    Returns:
        P̄, pool(F) and, with `xs`, the scale statistics.

    Raises:
        TypeError: A dtype is not accepted.
        ValueError: Shapes, devices or the numbers of tensors do not match, or a value is not accepted.
        NotImplementedError: The requested backend cannot run the call.
    """
    maps = autocast.lowered(*maps)
    if not maps or not keys:
        raise ValueError(f"there are {len(maps)} maps and {len(keys)} keys; expected at least one of each")
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
    return PooledLinks(pooled, means, list(map(_over_batch, mean, spread, positions)))


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
    """Compute the pooled updated maps pool(F_t + β_t Σ τ L X W_O) from P̄ and pool(F) (docs/METHOD.md §1.3 to 1.5).

    Pooling is linear, so pool(L X) = P̄ X. The product P̄ X is computed in fp32 (fp64 for fp64 inputs),
    because the entries of X can be far larger than the entries of the product. All parameters have the maps'
    dtype or a wider one. The operator is twice differentiable in all tensors.

    Args:
        pooled: The result of `pooled_links`.
        xs: X (B, H, r, d) of each link, as `landmark_side` returns it.
        align: (A (C, C_i), a (C,)) of each map.
        output_weights: W_O (C, C) of each link, as `torch.nn.Linear` stores it.
        targets: For each link, the index of its target map.
        betas: For each link, β of its target map, a tensor of one element.
        thetas: θ (H,) of each link, for τ = exp(θ); None means τ = 1.
        backend: A name of `backends()`, or None.

    Returns:
        The pooled updated maps (B, S, C, P, P) of all S stages, in the maps' dtype. The part `[:, s]` of each stage s
        is contiguous.

    Raises:
        TypeError: A dtype is not accepted.
        ValueError: Shapes, devices or the numbers of tensors do not match.
        NotImplementedError: The requested backend cannot run the call.
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
        check_parameter("align", weight, (C, weight.shape[-1]), maps)
        check_parameter("align", bias, (C,), maps)
    channels = sum(weight.shape[1] for weight, _ in align)
    if channels != maps.shape[2]:
        raise ValueError(f"align reads {channels} channels; expected {maps.shape[2]}")
    for weight in output_weights:
        check_parameter("output_weights", weight, (C, C), maps)
    for theta in thetas or ():
        check_parameter("thetas", theta, (H,), maps)
    for beta in betas:
        check_parameter("betas", beta.reshape(-1), (1,), maps)
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
    """Return whether `pooled_links` supports these sizes with the backend that would run.

    If the result is False, the neck computes its links one by one, without `pooled_links`.

    Args:
        features: A map with the dtype and device of the call.
        d: Channels of one head.
        rank: r, before it is clamped to the number of keys.
        keys: Number of keys of each link.
        size: P of the P×P grid.
        channels: C if the links have DyT or normalised queries, else 0.
        backend: A name of `backends()`, or None.

    Returns:
        False if the backend is "triton" and its kernels do not support these sizes. Otherwise True. With
        `backend=None`, the verdict of the device (the results of `python -m srm_kernels verify`) selects the backend by
        the dtype and d. The other sizes do not affect this choice. `pooled_links` uses the same verdict, so both
        functions prefer the kernels for the same dtypes and values of d.

    Raises:
        NotImplementedError: The requested backend cannot run the call.
    """
    chosen = choose_kernels(backend, features, "pooled_links", sizes=lambda: (d,), call=("any sizes", d))
    if chosen != "triton":
        return True  # before any condition on a shape, because torch.export would add a guard for it
    rank = max(min(rank, count) for count in keys)
    return _refusal(features, rank, d, size, channels) is None


def _choose_backend(
    requested: str | None, features: Tensor, rank: int, d: int, size: int, channels: int
) -> str:
    """Choose the backend.

    The verdict of the device (the results of `python -m srm_kernels verify`) ranks the backends. Of all sizes, only d
    affects this ranking. The other sizes only decide whether the kernels can run. `serves_pooled_links` uses the same
    ranking, so `pooled_links` and `serves_pooled_links` prefer the kernels for the same dtypes and values of d.
    """
    return choose_kernels(
        requested,
        features,
        "pooled_links",
        lambda: _refusal(features, rank, d, size, channels),
        plain=("torch", "reference"),
        sizes=lambda: (d,),
        call=(rank, d, size, channels),
    )


def _refusal(features: Tensor, rank: int, d: int, size: int, channels: int) -> str | None:
    sizes = f"d is {d} and r {rank}"
    if refusal := kernel_limits(d, rank):
        return refusal
    if max(d, rank) > 64 and not roomy(features):
        return f"its kernels support d and r up to 64 with the shared memory of this device, and {sizes}"
    if min(d, rank) > 64 and not (
        interpreting() or (features.dtype == torch.bfloat16 and roomy(features, 200))
    ):
        return f"its kernels support d and r both above 64 only in bfloat16 with 200 KiB, and {sizes}"
    if size > LARGEST_GRID:
        return f"its kernels support P up to {LARGEST_GRID}, and P is {size}"
    if rank * d > LARGEST_TILE:
        return f"its kernels support r·d up to {LARGEST_TILE}, and {sizes}"
    if channels > MOST_CHANNELS:
        return (
            f"its kernels support C up to {MOST_CHANNELS} with DyT or normalised queries, and C is {channels}"
        )
    return None


def _check_links(
    maps: Sequence[Tensor],
    align: Sequence[tuple[Tensor, Tensor]],
    query_weights: Sequence[Tensor],
    keys: Sequence[Tensor],
    targets: Sequence[int],
    dyt: Sequence[DyTParameters] | None,
    xs: Sequence[Tensor] | None,
) -> tuple[list[int], int]:
    """Check the tensors of all links; return the target of each link, and the number of channels C."""
    check_tensors(**{f"maps[{i}]": m for i, m in enumerate(maps)})
    check_tensors(**{f"keys[{i}]": k for i, k in enumerate(keys)})
    features, first = maps[0], keys[0]
    if first.dtype != wide_dtype(features.dtype):
        raise TypeError(
            f"keys are {first.dtype} and maps {features.dtype}; expected keys in {wide_dtype(features.dtype)}"
        )
    if first.device != features.device:
        raise ValueError(f"keys are on {first.device} and maps on {features.device}; expected one device")
    _check_counts(
        "keys", len(keys), align=align, query_weights=query_weights, targets=targets, dyt=dyt, xs=xs
    )
    if any(m.dim() != 4 or m.shape[0] != features.shape[0] for m in maps):
        raise ValueError(
            f"maps have shapes {[tuple(m.shape) for m in maps]}; expected (B, C_i, h, w) with the same B"
        )
    one = (features.shape[0], *first.shape[1::2])
    if any(k.dim() != 4 or (k.shape[0], *k.shape[1::2]) != one for k in keys):
        raise ValueError(
            f"keys have shapes {[tuple(k.shape) for k in keys]}; expected (B, H, r, d) with the same B, H and d"
        )
    C = first.shape[1] * first.shape[3]
    targets = _check_targets(targets, len(maps))
    for (weight, bias), query, target in zip(align, query_weights, targets, strict=True):
        check_parameter("align", weight, (C, maps[target].shape[1]), features)
        check_parameter("align", bias, (C,), features)
        check_parameter("query_weights", query, (C, C), features)
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
        raise ValueError(f"targets is {list(targets)}; expected indices of maps, 0 to {maps - 1}")
    return [int(t) for t in targets]


def _dyt_lists(
    dyt: Sequence[DyTParameters] | None, like: Tensor, C: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    for alpha, weight, bias in dyt or ():
        for parameter, shape in ((alpha.reshape(-1), (1,)), (weight, (C,)), (bias, (C,))):
            check_parameter("dyt", parameter, shape, like)
    alphas, weights, biases = ([group[i] for group in dyt or ()] for i in range(3))
    return alphas, weights, biases
