"""What a neck does on a batch: figures of its links, its update and its gate (Tables 1 and 2, Figures 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from srm_kernels.attention.reference import normalised_query
from srm_model.modules import evaluating

from .links import Link, link_name, logits
from .output import NeckOutput

if TYPE_CHECKING:
    from .srm import SRMNeck

SHARES = {"median": 0.5, "p90": 0.9}


class Attending(NamedTuple):
    """An acting link, and what it attends with on a batch."""

    source: int
    target: int
    link: Link
    q: Tensor  # (B, H, N_q, d)
    k: Tensor  # (B, H, N_k, d)
    v: Tensor
    grid: torch.Size  # (h, w) of the source map


class Measured(NamedTuple):
    """Figures of one batch."""

    links: dict[str, dict[str, Tensor]]  # by link and figure: (B, H), and (H,) for those of τ and σ̄
    update_ratio: dict[int, float]  # ‖β U‖ / ‖F‖ of the pooled maps, by target stage
    output: NeckOutput


def attending(neck: SRMNeck, aligned: Mapping[int, Tensor]) -> Iterator[Attending]:
    """Every acting link with its projections of aligned maps (B, C, h, w) by stage."""
    for source, target in neck.acting:
        link = neck.link(source, target)
        q, k, v = link.project(aligned[target], aligned[source])
        yield Attending(source, target, link, q, k, v, aligned[source].shape[-2:])


@torch.no_grad()
def measure(neck: SRMNeck, pyramid: Sequence[Tensor]) -> Measured:
    """Every figure of a neck on one batch, in evaluation mode, sources not pooled."""
    with evaluating(neck):
        aligned = neck.aligned(pyramid)
        links = {link_name(one.source, one.target): _figures(one) for one in attending(neck, aligned)}
        maps = neck.maps(pyramid, pool_sources=False)
        ratios = {}
        for stage, after in zip(neck.config.fused_stages, maps.unbind(1), strict=True):
            if stage in {target for _, target in neck.acting}:
                before = neck.pooled(aligned[stage])
                ratios[stage] = float((after - before).norm() / before.norm())
        return Measured(links, ratios, neck.fuse(maps))


def _figures(one: Attending) -> dict[str, Tensor]:
    link, c = one.link, one.link.config
    scores = logits(normalised_query(one.q, c.qk_norm), link.attended(one.k))
    count = scores.shape[-1]
    # An average of weights that began before σ̄ holds the share `sigma_started` of it.
    started = link.sigma_started.clamp(min=torch.finfo(link.sigma.dtype).tiny)
    sigma = link.sigma / started / link.reference_scale
    figures = {
        "logit_std": scores.std(-1, correction=0).mean(-1),
        "attention_entropy": torch.special.entr(scores.softmax(-1)).sum(-1).mean(-1)
        / max(math.log(count), 1e-12),
        "tau": link.tau(),
        "sigma_before_tau": sigma,
        "sigma_after_tau": sigma * link.tau(),
    }
    if link.attention == "nystrom":
        _, solution = link.attend(one.q, one.k, one.v, diagnostics=True)
        figures |= {name: getattr(solution, name) for name in ("kappa", "residual", "gain")}
    return figures


def summary(measured: Measured, stages: int) -> dict[str, Any]:
    """Figures of one batch of a neck with so many fused stages as plain JSON values, images and heads by quantiles."""
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
            name: {
                figure: value.tolist() if value.dim() == 1 else quantiles(value)
                for figure, value in figures.items()
            }
            for name, figures in measured.links.items()
        },
    }


def quantiles(values: Tensor, shares: Mapping[str, float] = SHARES) -> dict[str, float]:
    """Entries of sorted values at shares of their number; NaN, which a singular matrix gives, counts as infinite."""
    ordered = values.double().flatten().nan_to_num(nan=math.inf, posinf=math.inf).sort().values
    last = len(ordered) - 1
    return {name: float(ordered[math.ceil(share * last)]) for name, share in shares.items()}
