"""Measure a neck's links, updates and gate on one batch (article, tables 1 and 2, figures 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from srm_kernels.attention.reference import normalised_query
from srm_model.modules import evaluating

from .links import Link, link_name, logits
from .plain import NeckOutput

if TYPE_CHECKING:
    from .srm import SRMNeck

SHARES = {"median": 0.5, "p90": 0.9}


class Measured(NamedTuple):
    """Measurements of one batch."""

    links: dict[str, dict[str, Tensor]]  # values by link and name: (B, H), or (H,) for values of τ and σ̄
    update_ratio: dict[int, float]  # ‖β U‖ / ‖F‖ of the pooled maps, by target stage
    output: NeckOutput


def attending(
    neck: SRMNeck, aligned: Mapping[int, Tensor]
) -> Iterator[tuple[tuple[int, int], tuple[Link, Tensor, Tensor, Tensor]]]:
    """Yield (source, target) and (link, Q, K, V) for every link into a fused stage.

    `aligned` is a dictionary from each stage to its aligned map (B, C, h, w).
    """
    for source, target in neck.acting:
        link = neck.link(source, target)
        yield (source, target), (link, *link.project(aligned[target], aligned[source]))


@torch.no_grad()
def measure(neck: SRMNeck, pyramid: Sequence[Tensor]) -> Measured:
    """Measure a neck on one batch, in evaluation mode and without stochastic pooling."""
    with evaluating(neck):
        aligned = neck.aligned(pyramid)
        links = {link_name(*pair): _figures(*one) for pair, one in attending(neck, aligned)}
        maps = neck.maps(pyramid, pool_sources=False)
        ratios = {}
        for _, target in neck.acting:
            before = neck.pooled(aligned[target])
            after = maps[:, neck.config.fused_stages.index(target)]
            ratios[target] = float((after - before).norm() / before.norm())
        return Measured(links, ratios, neck.fuse(maps))


def _figures(link: Link, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    scores = logits(normalised_query(q, link.config.qk_norm), link.attended(k))
    entropy = torch.special.entr(scores.softmax(-1)).sum(-1).mean(-1)
    # If a moving average of the weights started before σ̄ was initialised, its σ̄ is too small. Division by
    # `sigma_started` corrects this.
    started = link.sigma_started.clamp(min=torch.finfo(link.sigma.dtype).tiny)
    sigma = link.sigma / started / link.reference_scale
    figures = {
        "logit_std": scores.std(-1, correction=0).mean(-1),
        "attention_entropy": entropy / max(math.log(scores.shape[-1]), 1e-12),
        "tau": link.tau(),
        "sigma_before_tau": sigma,
        "sigma_after_tau": sigma * link.tau(),
    }
    if link.attention == "nystrom":
        _, solution = link.diagnosed(q, k, v)
        figures |= {name: getattr(solution, name) for name in ("kappa", "residual", "gain")}
    return figures


def summary(measured: Measured, stages: int) -> dict[str, Any]:
    """Summarise the measurements of one batch as JSON values.

    The gate weights and the gate entropy are means over images; `gain` and `norm` are quantiles over images. For each
    link, τ and σ̄ have one value per head, and all other measurements are quantiles over images and heads. `stages` is
    the number of fused stages of the neck.
    """
    out = measured.output
    assert out.weights is not None
    assert out.gain is not None
    assert out.norm is not None
    entropy = torch.special.entr(out.weights.float()).sum(-1) / math.log(max(stages, 2))
    return {
        "gate_weights": out.weights.mean(0).tolist(),
        "gate_entropy": float(entropy.mean()),
        "gain": quantiles(out.gain),
        "gain_active": float((out.gain < 1).float().mean()),
        "norm": quantiles(out.norm),
        "update_ratio": {str(stage): ratio for stage, ratio in measured.update_ratio.items()},
        "links": {
            name: {key: x.tolist() if x.dim() == 1 else quantiles(x) for key, x in figures.items()}
            for name, figures in measured.links.items()
        },
    }


def quantiles(values: Tensor, shares: Mapping[str, float] = SHARES) -> dict[str, float]:
    """Return some quantiles of `values` as a dict.

    `shares` contains the probability of each quantile, for example {"median": 0.5}. The result has the same keys. NaN
    values, for example of singular matrices, are treated as infinity.
    """
    ordered = values.double().flatten().nan_to_num(nan=math.inf, posinf=math.inf).sort().values
    last = len(ordered) - 1
    return {name: float(ordered[math.ceil(share * last)]) for name, share in shares.items()}
