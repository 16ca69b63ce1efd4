"""Calibrate a new neck on the first training batch (docs/METHOD.md §1.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from srm_kernels import gated_fusion, rms_scale
from srm_kernels.attention.reference import normalised_query
from srm_model.modules import evaluating

from .links import Link, logits

if TYPE_CHECKING:
    from .srm import SRMNeck

# Largest number of logits that are computed at once. They take 1 GiB in fp32. This is enough for all logits of a link
# with exact attention on 8 images of 512×512 pixels.
MOST_LOGITS = 2**28


@torch.no_grad()
def calibrate(neck: SRMNeck, pyramid: Sequence[Tensor]) -> None:
    """Scale the weights of a neck in place and initialise M₀.

    The mode of the neck, training or evaluation, does not change.
    """
    c = neck.config
    with evaluating(neck):
        for conv, m in zip(neck.align, pyramid, strict=True):
            scale_to_unit(cast(nn.Conv2d, conv), m, c.calibration_range)
        aligned = neck.aligned(pyramid)
        for source, target in c.links:
            calibrate_link(neck.link(source, target), aligned[target], aligned[source])
        maps = neck.maps(pyramid, pool_sources=False)
        norm = gated_fusion(maps, neck.gate(maps.unbind(1)), cap=None, backend=c.backend).norm
        neck.track_norms(norm / neck.root(maps), reset=True)


def scale_to_unit(conv: nn.Conv2d, m: Tensor, limit: float) -> None:
    """Scale the weight of a convolution so that its output for `m` has RMS 1.

    The factor is clamped to [1/limit, limit].
    """
    rms = conv(m).square().mean().sqrt()
    conv.weight.mul_((1 / rms).clamp(1 / limit, limit))


def calibrate_link(link: Link, target: Tensor, source: Tensor) -> None:
    """Scale W_Q of each head so that the logits have standard deviation 1, and W_V so that σ = σ_ref."""
    c = link.config
    q, k, v = link.project(target, source)
    if c.qk_norm != "both":  # otherwise the logits do not depend on the scale of W_Q
        Q, K = normalised_query(q, c.qk_norm), link.attended(k)
        # Compute the logits in pieces, because the memory of all logits is quadratic in the number of pixels.
        some = max(1, MOST_LOGITS // (Q.shape[0] * Q.shape[1] * K.shape[2]))
        spreads = [logits(piece, K).std(-1, correction=0) for piece in Q.split(some, 2)]
        _scale_heads(link, link.query.weight, torch.cat(spreads, 2).mean((0, 2)).reciprocal())
        q = link.project(target, source)[0]
    sigma = rms_scale(link.attend(q, k, v), backend=c.backend).rms
    _scale_heads(link, link.value.weight, link.reference_scale / sigma)


def _scale_heads(link: Link, weight: Tensor, factor: Tensor) -> None:
    limit = link.config.calibration_range
    factor = factor.nan_to_num(nan=1.0).clamp(1 / limit, limit).to(weight.dtype)
    weight.mul_(factor.repeat_interleave(link.config.head_dim)[:, None])
