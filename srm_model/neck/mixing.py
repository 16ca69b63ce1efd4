"""Align a pyramid and apply the links; the results are the maps that the gate reads (docs/METHOD.md §1.1 to §1.5).

By default, the links run in the pooled form of §1.5. In these cases, the links are called one by one instead:

- exact attention, `solve_dtype="model"` or `return_pyramid=True`;
- modules with adapters or parametrisations;
- sizes that the kernels of the pooled form do not support.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srm_kernels import landmark_side, merge_links, pooled_links, project_sources, serves_pooled_links
from srm_kernels.landmarks import LANDMARK_METHODS
from srm_kernels.registration import no_autocast
from srm_model.config import STAGES, SRMConfig
from srm_model.modules import autocast_dtype, is_plain, rounded
from srm_model.statistics import BatchStatistics

from .links import Link, link_name

Pair = tuple[int, int]  # source and target stage
Affine = tuple[Tensor, Tensor]  # weight A (C, C_s) and bias a (C,) of an alignment


class Step(nn.Module):
    """A step of the links' pooled form (docs/METHOD.md §1.5), as a module that hooks can observe.

    The input of the module is a function without arguments, which computes the step.
    """

    def forward(self, call: Callable[[], Any]) -> Any:
        """Return the result of `call`."""
        return call()


def align_sources(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Compute A F (B, C, h, w), the alignment without its bias a, for each source map F. `key_sides` adds the bias."""
    products = [A.expand(m.shape[0], -1, -1) @ m.flatten(2) for m, A in zip(maps, weights, strict=True)]
    return [product.unflatten(-1, m.shape[2:]) for product, m in zip(products, maps, strict=True)]


def key_sides(
    sources: Mapping[int, Tensor], affine: Mapping[int, Affine], links: Mapping[Pair, Link], c: SRMConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute K̃ and X (B, H, r, d) of every link.

    A and a are the weight and the bias of a stage's alignment, and F is the backbone's map. `sources` contains A F
    (B, C, h, w) for each source stage, and `affine` contains the pair (A, a) for each stage.

    Links with the same source share kernel launches. With `landmarks="leverage_sample"`, every link has its own
    launches instead, because every link samples its own landmarks.
    """
    groups = [[pair for pair in links if pair[0] == source] for source in sources]
    if LANDMARK_METHODS[c.landmarks].evaluated is not None:
        groups = [[pair] for pair in links]  # each link samples its own landmarks
    sides: dict[Pair, tuple[Tensor, Tensor]] = {}
    for pairs in filter(None, groups):
        group, source = [links[pair] for pair in pairs], pairs[0][0]
        k, v = project_sources(
            sources[source].flatten(2).mT,
            [link.key.weight for link in group],
            [link.value.weight for link in group],
            shift=affine[source][1],
            dyt=[link.dyt_key.tensors for link in group] if c.dyt else None,
            backend=c.backend,
        )
        k, v = (t.unflatten(-1, (c.heads, c.head_dim)).transpose(-2, -3).flatten(0, 1) for t in (k, v))
        both = landmark_side(k, v, c.rank, **group[0].key_options())
        parts = (t.unflatten(0, (len(group), -1)).unbind() for t in both)
        sides |= dict(zip(pairs, zip(*parts, strict=True), strict=True))
    return [sides[pair][0] for pair in links], [sides[pair][1] for pair in links]


class Mixer(nn.Module):
    """Alignment of four maps and the links between them."""

    def __init__(self, in_channels: Sequence[int], config: SRMConfig, attention: str) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.align = nn.ModuleList(nn.Conv2d(width, config.channels, 1) for width in in_channels)
        for conv in self.align:
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.links = nn.ModuleDict({link_name(*pair): Link(config, attention) for pair in config.links})
        targets = sorted({target for _, target in config.links})
        self.beta = nn.ParameterDict(
            {str(t): nn.Parameter(torch.full((1,), config.beta_init)) for t in targets}
        )
        self.sources, self.key_sides, self.query_sides, self.merge = (Step() for _ in range(4))

    @property
    def acting(self) -> list[Pair]:
        """The links into fused stages. All other links change only maps that the gate does not read."""
        return [pair for pair in self.config.links if pair[1] in self.config.fused_stages]

    def link(self, source: int, target: int) -> Link:
        """Return the link between two stages."""
        return cast(Link, self.links[link_name(source, target)])

    def aligned(self, pyramid: Sequence[Tensor], *, every: bool = False) -> dict[int, Tensor]:
        """Align the maps (B, C_s, h, w) of a pyramid; return a dictionary from stage to aligned map (B, C, h, w).

        With `every`, all maps are aligned. Otherwise only the maps that a link or the gate reads are aligned.
        """
        used = {*self.config.fused_stages, *(stage for pair in self.config.links for stage in pair)}
        return {
            stage: self.align[stage - 1](pyramid[stage - 1]) for stage in STAGES if every or stage in used
        }

    def pooled(self, m: Tensor) -> Tensor:
        """Average a map (B, C, h, w) to (B, C, P, P)."""
        P = self.config.pool_size
        # Do not compare shapes while tracing: a program for dynamic sizes would exclude the size P.
        same = not torch.compiler.is_compiling() and m.shape[-2:] == (P, P)
        return m if same else F.adaptive_avg_pool2d(m, P)

    def pools(self, pyramid: Sequence[Tensor]) -> bool:
        """Return whether the links run in the pooled form for this pyramid."""
        c = self.config
        if self.attention != "nystrom" or c.solve_dtype != "fp32" or not self.acting:
            return False
        read = [self.align, *(self.link(*pair) for pair in self.acting)]
        if not all(is_plain(part) for one in read for part in one.modules()):
            return False  # the pooled form reads weights; adapters and parametrised modules must be called
        like = pyramid[0].new_empty(0, dtype=autocast_dtype(pyramid[0]))
        counts = [pyramid[source - 1][0, 0].numel() for source, _ in self.acting]
        held = c.channels if c.dyt or c.qk_norm == "both" else 0
        return serves_pooled_links(like, c.head_dim, c.rank, counts, c.pool_size, held, backend=c.backend)

    def maps(
        self, pyramid: Sequence[Tensor], statistics: BatchStatistics | None = None, pool_sources: bool = True
    ) -> Tensor:
        """Update the maps of the S fused stages, average each map to P×P, and return them as (B, S, C, P, P).

        Args:
            pyramid: Four maps (B, C_s, h, w), shallowest first.
            statistics: Object that collects the σ of every link. Nothing is added if `statistics.finished` is True.
                Default: no σ is collected.
            pool_sources: Whether to apply stochastic pooling (docs/METHOD.md §1.8) if the config enables it.
        """
        if self.pools(pyramid):
            return self._pooled_form(pyramid, statistics, pool_sources)
        aligned = self.aligned(pyramid)
        updated = self._called(aligned, statistics, pool_sources, pooled=True)
        return torch.stack([updated[stage] for stage in self.config.fused_stages], 1)

    def whole(
        self, pyramid: Sequence[Tensor], statistics: BatchStatistics | None = None
    ) -> dict[int, Tensor]:
        """Return a dictionary from each of the four stages to its updated map (B, C, h, w), at full resolution."""
        return self._called(self.aligned(pyramid, every=True), statistics, pool_sources=True, pooled=False)

    def _pooled_form(
        self, pyramid: Sequence[Tensor], statistics: BatchStatistics | None, pool_sources: bool
    ) -> Tensor:
        c, dtype = self.config, autocast_dtype(pyramid[0])
        sources = sorted({source for source, _ in c.links})
        read = sorted({*sources, *c.fused_stages})
        affine = {stage: self._affine(stage) for stage in read}
        align = [affine[stage] for stage in c.fused_stages]
        links = {pair: self.link(*pair) for pair in self.acting}
        targets = [c.fused_stages.index(target) for _, target in links]
        betas = [self._beta(target) for _, target in links]
        dyt = [link.dyt_query.tensors for link in links.values()] if c.dyt else None
        thetas = [link.theta for link in links.values()] if c.tau else None
        with no_autocast(pyramid[:1]):  # the operators choose their own precision
            taken = rounded([*(pyramid[s - 1] for s in read), *(affine[s][0] for s in sources)], dtype)
            maps = dict(zip(read, taken, strict=False))
            step: Callable[..., Any] = partial(
                align_sources, [maps[stage] for stage in sources], taken[len(read) :]
            )
            found = self._pool_sources(dict(zip(sources, self.sources(step), strict=True)), pool_sources)
            keys, xs = self.key_sides(partial(key_sides, found, affine, links, c))
            track = statistics is not None and not statistics.finished
            step = partial(
                pooled_links, size=c.pool_size, qk_norm=c.qk_norm, dyt=dyt, xs=xs if track else None
            )
            queries = [link.query.weight for link in links.values()]
            fused, aligning = [maps[stage] for stage in c.fused_stages], [align[target] for target in targets]
            step = partial(step, fused, aligning, queries, keys, targets, backend=c.backend)
            pooled = self.query_sides(step)
            if statistics is not None and pooled.scales is not None:
                for pair, scale in zip(links, pooled.scales, strict=True):
                    positions = len(pyramid[0]) * pyramid[pair[1] - 1].shape[2:].numel()
                    statistics.add_scale(link_name(*pair), scale, positions)
            outputs = [link.output.weight for link in links.values()]
            step = partial(merge_links, pooled, xs, align, outputs, targets, betas)
            merged: Tensor = self.merge(partial(step, thetas=thetas, backend=c.backend))
            return merged

    def _called(
        self, aligned: dict[int, Tensor], given: BatchStatistics | None, pool_sources: bool, *, pooled: bool
    ) -> dict[int, Tensor]:
        """Call the links and return a dictionary from stage t to its updated map F_t + β_t fold(Σ U).

        With `pooled`, the result has only the maps of the fused stages, averaged to P×P. Otherwise the result has the
        maps of all stages at full resolution.
        """
        sources = self._pool_sources({stage: aligned[stage] for stage, _ in self.config.links}, pool_sources)
        P, updates = self.config.pool_size, dict[int, Tensor]()
        for source, target in self.acting if pooled else self.config.links:
            link, grid = self.link(source, target), aligned[target].shape[-2:]
            y = link(aligned[target], sources[source])  # (B, H, N_q, d)
            if given is not None and not given.finished:
                given.add_link(link_name(source, target), y.detach(), backend=self.config.backend)
            if pooled:
                H, d = y.shape[1], y.shape[3]
                folded = y.transpose(1, 2).flatten(2).mT.unflatten(-1, grid)  # (B, C, h, w), channels last
                y = self.pooled(folded).flatten(2).mT.unflatten(-1, (H, d)).transpose(1, 2)
            update = link.merge(y).mT.unflatten(-1, (P, P) if pooled else grid)
            updates[target] = updates[target] + update if target in updates else update
        if pooled:
            aligned = {stage: self.pooled(aligned[stage]) for stage in self.config.fused_stages}
        return aligned | {t: aligned[t] + self._beta(t) * update for t, update in updates.items()}

    def _pool_sources(self, sources: dict[int, Tensor], allowed: bool) -> dict[int, Tensor]:
        """Apply stochastic pooling (docs/METHOD.md §1.8)."""
        p, on = self.config.kv_pool_prob, self.training or self.config.kv_pool_eval
        for stage in sorted(sources) if allowed and p > 0 and on else ():
            if float(torch.rand(())) < p:
                sources[stage] = F.avg_pool2d(sources[stage], 2, ceil_mode=True, count_include_pad=False)
        return sources

    def _affine(self, stage: int) -> Affine:
        conv = cast(nn.Conv2d, self.align[stage - 1])
        assert conv.bias is not None
        return conv.weight.flatten(1), conv.bias

    def _beta(self, target: int) -> Tensor:
        """Return β as a 0-d tensor, which does not promote a map's dtype.

        The parameter for β is stored with the shape (1,), because FSDP does not support 0-d parameters.
        """
        return cast(Tensor, self.beta[str(target)]).reshape(())
