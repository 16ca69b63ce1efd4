"""The fused neck: a link from a map of the backbone, pooled before anything is written (SPEC 1, article 3.2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import QK_NORMS, _over_batch
from ..checks import DTYPES, check_choice, check_count, check_number, check_tensors, wide_dtype
from ..landmarks import kernel_limits
from ..registration import later, register_operator
from ..runtime import kernels_by_name, roomy
from ..scale import RMSScale
from . import reference

_KERNELS = f"{__name__}.kernels"
LARGEST_GRID = 32
LARGEST_TILE = 64 * 128  # r·d


class PooledLink(NamedTuple):
    """P̄ (B, H, P², r) in fp32 (fp64 for fp64), and the statistic of Y = L X where X was given."""

    probabilities: Tensor
    scale: RMSScale | None


def _fake(
    features: Tensor,
    align_weight: Tensor,
    align_bias: Tensor,
    alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    query_weight: Tensor,
    keys: Tensor,
    x: Tensor | None,
    size: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, rank, d = keys.shape
    shapes = ((0,), (0,)) if x is None else ((B, H, d), (B, H))
    return (
        keys.new_empty((B, H, size * size, rank)),
        keys.new_empty(shapes[0]),
        keys.new_empty(shapes[1]),
    )


_pooled = register_operator(
    "pooled_probabilities",
    "Tensor features, Tensor align_weight, Tensor align_bias, Tensor? alpha, Tensor? weight, Tensor? bias, "
    "Tensor query_weight, Tensor keys, Tensor? x, int size, float scale, str? qk_norm",
    "(Tensor, Tensor, Tensor)",
    dict.fromkeys(("reference", "sdpa"), reference.pooled_probabilities)
    | {"triton": later(_KERNELS, "pooled_probabilities")},
    fake=_fake,
    differentiable=(
        "features",
        "align_weight",
        "align_bias",
        "alpha",
        "weight",
        "bias",
        "query_weight",
        "keys",
    ),
    derivatives={"triton": later(_KERNELS, "pooled_probabilities_backward")},
    constant=(1, 2),
)


def pooled_link(
    features: Tensor,
    align_weight: Tensor,
    align_bias: Tensor,
    query_weight: Tensor,
    keys: Tensor,
    *,
    size: int,
    dyt: tuple[Tensor, Tensor, Tensor] | None = None,
    x: Tensor | None = None,
    qk_norm: str | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> PooledLink:
    """P̄ = pool(softmax(Q K̃ᵀ s)) with Q = W_Q DyT(A F + a): the query side of a link, pooled (SPEC 1, article 3.2).

    features: F (B, C_i, h, w), a map of the backbone, float64, float32, bfloat16 or float16, contiguous or
    channels-last. align_weight: A (C, C_i); align_bias: a (C,); query_weight: W_Q (C, C), in F's dtype.
    keys: K̃ (B, H, r, d) with C = H·d, landmark keys as `landmark_side` gives them, fp32 (fp64 for fp64).
    size: P of the P×P grid, whose cells are those of adaptive average pooling. dyt: (α, w, b), no narrower than F,
    or None for T itself. x: X (B, H, r, d) in the keys' dtype, for the statistic of Y = L X over batch and positions
    alone; it receives no gradient. qk_norm, scale: as in `nystrom_attention`.

    Then pool(L X) = P̄ X, and the gradient of X is P̄ᵀ times that of the pooled Y. Differentiable in all but X; twice
    through the reference. Kernels write nothing at full resolution in forward where `dyt` is None and queries are not
    normalised, else T and Q for the time of the call; for the backward pass F, K̃, weights and P̄ are kept.
    A NaN stays in its image and head.
    backend: "triton" takes fp32, bf16 and fp16, d from 8 to 128, r up to 128, r·d up to
    8,192, P up to 32. They are taken by name only.
    Raises TypeError for dtypes, ValueError for shapes and values, NotImplementedError for a backend that cannot run.
    """
    check_tensors(
        features=features, align_weight=align_weight, align_bias=align_bias, query_weight=query_weight
    )
    check_tensors(keys=keys, **({} if x is None else {"x": x}))
    if keys.dtype != wide_dtype(features.dtype):
        raise TypeError(
            f"keys is {keys.dtype} and features {features.dtype}; expected keys in fp32 (fp64 for fp64)"
        )
    if keys.device != features.device:
        raise ValueError(f"keys is on {keys.device} and features on {features.device}; expected one device")
    if features.dim() != 4 or keys.dim() != 4 or keys.shape[0] != features.shape[0]:
        raise ValueError(
            f"features has shape {tuple(features.shape)} and keys {tuple(keys.shape)}; "
            "expected (B, C_i, h, w) and (B, H, r, d)"
        )
    C = keys.shape[1] * keys.shape[3]
    shapes = {"align_weight": (C, features.shape[1]), "align_bias": (C,), "query_weight": (C, C)}
    for name, tensor in (
        ("align_weight", align_weight),
        ("align_bias", align_bias),
        ("query_weight", query_weight),
    ):
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shapes[name]}")
    if x is not None and x.shape != keys.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and keys {tuple(keys.shape)}; expected the same")
    check_count("size", size)
    check_choice("qk_norm", qk_norm, QK_NORMS)
    if scale is not None:
        check_number("scale", scale)
    if dyt is not None:
        _check_dyt(dyt, features, C)
    s = 1 / math.sqrt(keys.shape[-1]) if scale is None else float(scale)
    chosen = _choose_backend(backend, features, keys.shape[2], keys.shape[3], size)
    constant = None if x is None else x.detach()
    pooled, mean, spread = _pooled(
        features, align_weight, align_bias, *(dyt or (None, None, None)), query_weight, keys, constant, size, s,
        qk_norm, chosen,
    )  # fmt: skip
    statistic = None if x is None else _over_batch(mean, spread, features.shape[2] * features.shape[3])
    return PooledLink(pooled, statistic)


def fuses(features: Tensor, d: int, rank: int, size: int, *, backend: str | None = None) -> bool:
    """Whether `pooled_link` would run as kernels for maps like these: what a neck decides its path by.

    features: a map, of which dtype and device count; d, rank, size: as in `pooled_link`. False where kernels serve
    attention but not this form of it. Raises NotImplementedError where `backend` names what cannot run at all.
    """
    if rank * d > LARGEST_TILE or size > LARGEST_GRID:
        return False
    return _choose_backend(backend, features, rank, d, size) == "triton"


def _choose_backend(requested: str | None, features: Tensor, rank: int, d: int, size: int) -> str:
    refusal = kernel_limits(d, rank)
    if refusal is None and max(d, rank) > 64 and not roomy(features):
        refusal = f"its kernels take d and r up to 64 in this device's shared memory, and d is {d}, r {rank}"
    narrow = features.dtype == torch.bfloat16 and roomy(features, 200)
    if refusal is None and min(d, rank) > 64 and features.is_cuda and not narrow:
        refusal = (
            f"its kernels take d and r both above 64 only in bfloat16 and 200 KiB, and d is {d}, r {rank}"
        )
    if refusal is None and size > LARGEST_GRID:
        refusal = f"its kernels take a grid of up to {LARGEST_GRID}, and P is {size}"
    if refusal is None and rank * d > LARGEST_TILE:
        refusal = f"its kernels take r·d of up to {LARGEST_TILE}, and r is {rank} and d {d}"
    return kernels_by_name(requested, features, "pooled_link", refusal)


def _check_dyt(dyt: tuple[Tensor, Tensor, Tensor], features: Tensor, C: int) -> None:
    alpha, weight, bias = dyt
    check_tensors(alpha=alpha, weight=weight, bias=bias)
    if DTYPES.index(alpha.dtype) > DTYPES.index(features.dtype):
        raise TypeError(f"dyt is {alpha.dtype} and features {features.dtype}; expected dyt no narrower")
    if alpha.device != features.device:
        raise ValueError(f"dyt is on {alpha.device} and features on {features.device}; expected one device")
    if alpha.numel() != 1 or weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(
            f"dyt has shapes {tuple(alpha.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}; "
            f"expected one element, ({C},) and ({C},)"
        )
