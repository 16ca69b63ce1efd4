"""From a pyramid to the maps that the gate reads: alignment, links and what they add (SPEC 1.1 to 1.5, article 3.2).

Links run in the pooled form: P̄, their probabilities averaged over the cells of the P×P grid, then P̄ X, which is
pool(L X), as pooling is linear. Exact attention, blocks in the model's dtype and the full-resolution pyramid have no
pooled form, nor have weights that adapters or parametrisations stand in front of: these links are called one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srm_kernels import (
    PooledLinks,
    landmark_side,
    merge_links,
    pooled_links,
    project_sources,
    serves_pooled_links,
)
from srm_kernels.registration import no_autocast
from srm_model.config import STAGES, SRMConfig
from srm_model.modules import autocast_dtype, is_plain, rounded
from srm_model.statistics import BatchStatistics

from .links import Link, link_name

Pair = tuple[int, int]  # source and target stage
Affine = tuple[Tensor, Tensor]  # A and a


class Step(nn.Module):
    """A step of the pooled form. It has no weights of its own and is a module for the sake of hooks on it."""

    def __init__(self, config: SRMConfig) -> None:
        super().__init__()
        self.config = config


class Sources(Step):
    """A F of every source (B, C, h, w), a left to the key sides: one product each, however F is laid out."""

    def forward(self, maps: Mapping[int, Tensor], weights: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {
            stage: torch.bmm(weight.expand(maps[stage].shape[0], -1, -1), maps[stage].flatten(2)).unflatten(
                -1, maps[stage].shape[2:]
            )
            for stage, weight in weights.items()
        }


class KeySides(Step):
    """K̃ and X (B, H, r, d) of every link from A F and a of its source; those of one source take one launch together.

    Where landmarks are sampled, every link draws its own.
    """

    def forward(
        self, sources: Mapping[int, Tensor], shifts: Mapping[int, Tensor], links: Mapping[Pair, Link]
    ) -> tuple[list[Tensor], list[Tensor]]:
        c = self.config
        groups = [[pair for pair in links if pair[0] == source] for source in sources]
        if c.landmarks == "leverage_sample":
            groups = [[pair] for pair in links]
        sides: dict[Pair, tuple[Tensor, Tensor]] = {}
        for pairs in filter(None, groups):
            group, source = [links[pair] for pair in pairs], pairs[0][0]
            k, v = project_sources(
                sources[source].flatten(2).mT,
                [link.key.weight for link in group],
                [link.value.weight for link in group],
                shift=shifts[source],
                dyt=[link.dyt_key.tensors for link in group] if c.dyt else None,
                backend=c.backend,
            )
            k, v = (t.unflatten(-1, (c.heads, c.head_dim)).transpose(-2, -3).flatten(0, 1) for t in (k, v))
            both = landmark_side(k, v, c.rank, **group[0].key_options())
            parts = (t.unflatten(0, (len(group), -1)).unbind() for t in both)
            sides |= dict(zip(pairs, zip(*parts, strict=True), strict=True))
        return [sides[pair][0] for pair in links], [sides[pair][1] for pair in links]


class QuerySides(Step):
    """P̄ of every link and pool(F), and where X is given the statistic of every link's Y."""

    def forward(
        self,
        maps: Sequence[Tensor],
        align: Sequence[Affine],
        links: Sequence[Link],
        targets: Sequence[int],
        keys: Sequence[Tensor],
        xs: Sequence[Tensor] | None,
    ) -> PooledLinks:
        c = self.config
        return pooled_links(
            maps,
            [align[target] for target in targets],
            [link.query.weight for link in links],
            keys,
            targets,
            size=c.pool_size,
            dyt=[link.dyt_query.tensors for link in links] if c.dyt else None,
            xs=xs,
            qk_norm=c.qk_norm,
            backend=c.backend,
        )


class Merge(Step):
    """pool(F_t + β_t Σ U) of every fused stage (B, S, C, P, P)."""

    def forward(
        self,
        pooled: PooledLinks,
        xs: Sequence[Tensor],
        align: Sequence[Affine],
        links: Sequence[Link],
        targets: Sequence[int],
        betas: Sequence[Tensor],
    ) -> Tensor:
        thetas = [link.theta for link in links] if self.config.tau else None
        weights = [link.output.weight for link in links]
        return merge_links(
            pooled, xs, align, weights, targets, betas, thetas=thetas, backend=self.config.backend
        )


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
        self.sources, self.key_sides = Sources(config), KeySides(config)
        self.query_sides, self.merge = QuerySides(config), Merge(config)

    @property
    def acting(self) -> list[Pair]:
        """Links into a stage that is fused; the others reach nothing but the pyramid."""
        return [pair for pair in self.config.links if pair[1] in self.config.fused_stages]

    def link(self, source: int, target: int) -> Link:
        """The link between two stages."""
        return cast(Link, self.links[link_name(source, target)])

    def aligned(self, pyramid: Sequence[Tensor]) -> dict[int, Tensor]:
        """Maps (B, C_s, h, w) → those that links or the gate read, by stage, (B, C, h, w)."""
        used = {*self.config.fused_stages, *(stage for pair in self.config.links for stage in pair)}
        return {stage: self.align[stage - 1](pyramid[stage - 1]) for stage in sorted(used)}

    def pooled(self, m: Tensor) -> Tensor:
        """(B, C, h, w) → (B, C, P, P)."""
        P = self.config.pool_size
        # What is traced must not ask: a program of any size would be one of all sizes but P.
        there = not torch.compiler.is_compiling() and m.shape[-2:] == (P, P)
        return m if there else F.adaptive_avg_pool2d(m, P)

    def pools(self, pyramid: Sequence[Tensor]) -> bool:
        """Whether links take the pooled form for maps like these."""
        c = self.config
        if self.attention != "nystrom" or c.solve_dtype != "fp32" or not self.acting:
            return False
        read = [self.align, *(self.link(*pair) for pair in self.acting)]
        if not all(is_plain(part) for one in read for part in one.modules()):
            return False  # weights are read there, and adapters and parametrised modules have to be called
        return serves_pooled_links(
            pyramid[0].new_empty(0, dtype=autocast_dtype(pyramid[0])),  # as they will be read
            c.head_dim,
            c.rank,
            [pyramid[source - 1][0, 0].numel() for source, _ in self.acting],
            c.pool_size,
            c.channels if c.dyt or c.qk_norm == "both" else 0,
            backend=c.backend,
        )

    def maps(
        self,
        pyramid: Sequence[Tensor],
        statistics: BatchStatistics | None = None,
        *,
        pool_sources: bool = True,
    ) -> Tensor:
        """Updated maps of the fused stages, pooled, (B, S, C, P, P); σ of every link goes to `statistics`.

        pool_sources: whether sources are 2×2 mean-pooled at random where the config has it.
        """
        if self.pools(pyramid):
            return self._pooled_form(pyramid, statistics, pool_sources)
        aligned = self.aligned(pyramid)
        pooled = {stage: self.pooled(aligned[stage]) for stage in self.config.fused_stages}
        updated = self._called(aligned, pooled, self.acting, statistics, pool_sources)
        return torch.stack([updated[stage] for stage in self.config.fused_stages], 1)

    def whole(
        self, pyramid: Sequence[Tensor], statistics: BatchStatistics | None = None
    ) -> dict[int, Tensor]:
        """All four updated maps (B, C, h, w) by stage at full resolution."""
        aligned = {stage: self.align[stage - 1](pyramid[stage - 1]) for stage in STAGES}
        return self._called(aligned, aligned, self.config.links, statistics, pool_sources=True)

    def _pooled_form(
        self, pyramid: Sequence[Tensor], statistics: BatchStatistics | None, pool_sources: bool
    ) -> Tensor:
        """Sources are aligned whole, targets read where they are."""
        c = self.config
        dtype = autocast_dtype(pyramid[0])
        sources = sorted({source for source, _ in c.links})
        links = {pair: self.link(*pair) for pair in self.acting}
        with no_autocast(pyramid[:1]):  # operators choose their own precision
            read = sorted({*sources, *c.fused_stages})
            affine = {stage: self._affine(stage) for stage in read}
            taken = rounded(
                [*(pyramid[stage - 1] for stage in read), *(affine[s][0] for s in sources)], dtype
            )
            maps = dict(zip(read, taken, strict=False))
            found = self.sources(maps, dict(zip(sources, taken[len(read) :], strict=True)))
            if pool_sources:
                found = self._pool_sources(found)
            keys, xs = self.key_sides(found, {stage: affine[stage][1] for stage in sources}, links)
            align, acting = [affine[stage] for stage in c.fused_stages], list(links.values())
            targets = [c.fused_stages.index(target) for _, target in links]
            track = statistics is not None and not statistics.finished
            pooled = self.query_sides(
                [maps[stage] for stage in c.fused_stages], align, acting, targets, keys, xs if track else None
            )
            if statistics is not None and pooled.scales is not None:
                for pair, scale in zip(links, pooled.scales, strict=True):
                    positions = len(pyramid[0]) * pyramid[pair[1] - 1].shape[2:].numel()
                    statistics.add_scale(link_name(*pair), scale, positions)
            betas = [self._beta(target) for _, target in links]
            merged: Tensor = self.merge(pooled, xs, align, acting, targets, betas)
            return merged

    def _called(
        self,
        aligned: dict[int, Tensor],
        bases: dict[int, Tensor],
        pairs: Sequence[Pair],
        statistics: BatchStatistics | None,
        pool_sources: bool,
    ) -> dict[int, Tensor]:
        """F_t + β_t fold(Σ U) for the maps of `bases`, either the aligned ones or those pooled."""
        sources = {source: aligned[source] for source, _ in self.config.links}
        if pool_sources:
            sources = self._pool_sources(sources)
        updates: dict[int, Tensor] = {}
        for source, target in pairs:
            link, grid = self.link(source, target), aligned[target].shape[-2:]
            y = link(aligned[target], sources[source])  # (B, H, N_q, d)
            if statistics is not None and not statistics.finished:
                statistics.add_link(link_name(source, target), y.detach(), backend=self.config.backend)
            if bases is not aligned:  # pooled before τ and W_O
                H, d, P = y.shape[1], y.shape[3], self.config.pool_size
                folded = y.transpose(1, 2).flatten(2).mT.unflatten(-1, grid)  # (B, C, h, w), channels last
                y = self.pooled(folded).flatten(2).mT.unflatten(-1, (H, d)).transpose(1, 2)
                grid = torch.Size((P, P))
            update = link.merge(y).mT.unflatten(-1, grid)
            updates[target] = updates[target] + update if target in updates else update
        return bases | {t: bases[t] + self._beta(t) * update for t, update in updates.items()}

    def _pool_sources(self, sources: dict[int, Tensor]) -> dict[int, Tensor]:
        """Each 2×2 mean-pooled with probability p where that is on."""
        c = self.config
        if c.kv_pool_prob == 0 or not (self.training or c.kv_pool_eval):
            return sources
        return {
            stage: F.avg_pool2d(m, 2, ceil_mode=True, count_include_pad=False)
            if float(torch.rand(())) < c.kv_pool_prob
            else m
            for stage, m in sorted(sources.items())
        }

    def _affine(self, stage: int) -> Affine:
        conv = cast(nn.Conv2d, self.align[stage - 1])
        assert conv.bias is not None
        return conv.weight.flatten(1), conv.bias

    def _beta(self, target: int) -> Tensor:
        """β of a stage as a scalar, which leaves the dtype of a map as it is; stored with an axis, which FSDP needs."""
        return cast(Tensor, self.beta[str(target)]).reshape(())
