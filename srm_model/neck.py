"""The Spectral Robustness Mixer: a neck between a backbone's pyramid and a regression head (SPEC 1, article 3.2)."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srm_kernels import (
    PooledLinks,
    biased_gelu,
    dyt,
    full_attention,
    fuses,
    gate_logits,
    gated_fusion,
    landmark_side,
    merge_links,
    nystrom_attention,
    pooled_links,
    project_sources,
    rms_scale,
    select_landmarks,
    tau_loss,
)
from srm_kernels.attention.reference import normalised_key, normalised_query
from srm_kernels.checks import may_ask, wide_dtype

from .config import STAGES, SRMConfig
from .modules import autocast_dtype, check_like, evaluating, in_backward, is_plain, rounded
from .statistics import BatchStatistics

ATTENTIONS = ("nystrom", "full")
TAU_FLOOR = 1e-6
# M₀ before it is started: a cap that no map reaches. It is finite, so that an average of weights can begin with it:
# above half of it, M₀ counts as not started.
UNSTARTED = 1024.0
CALIBRATION_LOGITS = 2**28  # at once: 1 GiB in fp32, a batch of 8 at 512×512 by exact attention


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # necks whose missing calibration was reported


class NeckOutput(NamedTuple):
    """What a neck hands to the head, and what it knows about itself."""

    fused: Tensor  # (B, C, P, P)
    weights: Tensor | None  # (B, S) gate weights; None without a gate
    gain: Tensor | None  # (B,) γ
    norm: Tensor | None  # (B,) ‖M‖_F before the cap
    losses: dict[str, Tensor]  # unweighted scalars "tau", "entropy", "balance"
    pyramid: list[Tensor] | None  # four updated maps (B, C, h_s, w_s), on request


class DyT(nn.Module):
    """Dynamic tanh w ⊙ tanh(αx) + b over channels (SPEC 3.4)."""

    def __init__(self, channels: int, alpha: float, backend: str | None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.backend = backend

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """α, w and b."""
        return self.alpha, self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return dyt(x, self.alpha, self.weight, self.bias, backend=self.backend)


class Link(nn.Module):
    """Cross-attention from a source stage's keys to a target stage's queries (SPEC 1.2, 1.3 and 3)."""

    sigma: Tensor
    sigma_started: Tensor

    def __init__(self, config: SRMConfig, attention: str) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        C = config.channels
        if config.dyt:
            self.dyt_query = DyT(C, config.dyt_alpha, config.backend)
            self.dyt_key = DyT(C, config.dyt_alpha, config.backend)
        self.query, self.key, self.value, self.output = (nn.Linear(C, C, bias=False) for _ in range(4))
        if config.tau:
            self.theta = nn.Parameter(torch.zeros(config.heads))
        self.register_buffer("sigma", torch.zeros(config.heads))  # σ̄, the EMA of σ
        # 0 or 1; between them in an average of weights that began before σ̄ did. Not a bool, which has no average.
        self.register_buffer("sigma_started", torch.zeros(()))

    @property
    def reference_scale(self) -> float:
        """σ_ref = √d."""
        return math.sqrt(self.config.head_dim)

    def project(self, target: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, C, h, w) → Q (B, H, N_q, d) and K, V (B, H, N_k, d)."""
        tokens_t, tokens_s = target.flatten(2).mT, source.flatten(2).mT  # (B, N, C)
        if self.config.dyt:
            tokens_t, tokens_s = self.dyt_query(tokens_t), self.dyt_key(tokens_s)
        return (
            self._heads(self.query(tokens_t)),
            self._heads(self.key(tokens_s)),
            self._heads(self.value(tokens_s)),
        )

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.config.heads, self.config.head_dim)).transpose(1, 2)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Y (B, H, N_q, d)."""
        y: Tensor = self.attend(*self.project(target, source))
        return y

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, diagnostics: bool = False) -> Any:
        """Y, or (Y, solution) with `diagnostics` on the Nyström form."""
        c = self.config
        if self.attention == "full":
            return full_attention(q, k, v, qk_norm=c.qk_norm)
        return nystrom_attention(
            q,
            k,
            v,
            c.rank,
            solve_dtype=c.solve_dtype,
            diagnostics=diagnostics,
            **self.key_options(),
        )

    def key_options(self) -> dict[str, Any]:
        """How landmarks are chosen and their system solved, as the operators take it."""
        c = self.config
        return {
            "method": self.landmark_method,
            "gamma": c.gamma,
            "ridge": c.ridge,
            "solver": c.solver,
            "equilibrate": c.equilibrate,
            "kappa_max": c.kappa_max,
            "neumann_order": c.neumann_order,
            "neumann_gate": c.neumann_gate,
            "qk_norm": c.qk_norm,
            "generator": self.generator(),
            "backend": c.backend,
        }

    @property
    def landmark_method(self) -> str:
        """Sampling is for training; evaluation takes the largest scores."""
        sampled = self.config.landmarks == "leverage_sample"
        return "leverage" if sampled and not self.training else self.config.landmarks

    def generator(self) -> torch.Generator | None:
        """Where landmarks are sampled, one of a fresh seed."""
        if self.landmark_method != "leverage_sample":
            return None
        return torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def merge(self, y: Tensor) -> Tensor:
        """Y, pooled or not, (B, H, N, d) → U (B, N, C): Ŷ = τY, heads merged, times W_O."""
        if self.config.tau:
            y = (y * self.tau()[:, None, None]).to(y.dtype)
        return self.output(y.transpose(1, 2).flatten(2))

    def tau(self) -> Tensor:
        """τ_h = exp(θ_h), (H,); ones where the rescaler is off."""
        return self.theta.exp() if self.config.tau else torch.ones_like(self.sigma)

    @torch.no_grad()
    def tracked(self, sigma: Tensor) -> Tensor:
        """σ̄ after a batch of statistic `sigma` (H,): the first starts it, and what is not finite is left out."""
        sigma = sigma.to(self.sigma.dtype)
        averaged = self.sigma.lerp(sigma, 1 - self.config.ema * self.sigma_started)
        return torch.where(sigma.isfinite(), averaged, self.sigma)

    @torch.no_grad()
    def track(self, sigma: Tensor) -> None:
        """Take a batch's statistic into σ̄."""
        self.sigma.copy_(self.tracked(sigma))
        self.sigma_started.logical_or_(sigma.isfinite().all())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if isinstance(started := state_dict.get(f"{prefix}sigma_started"), Tensor):
            state_dict[f"{prefix}sigma_started"] = started.to(self.sigma_started.dtype)  # a bool in old ones
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def calibrate(self, target: Tensor, source: Tensor) -> None:
        """Scale W_Q until logits over the landmarks have standard deviation 1, W_V until σ = σ_ref, per head."""
        c = self.config
        q, k, v = self.project(target, source)
        if c.qk_norm != "both":  # else the scale of W_Q does not reach the logits
            Q, K = normalised_query(q, c.qk_norm), self._attended(k)
            # In pieces: all logits at once would be quadratic in the resolution, as neither attention is.
            some = max(1, CALIBRATION_LOGITS // (Q.shape[0] * Q.shape[1] * K.shape[2]))
            spreads = [_logits(piece, K).std(-1, correction=0) for piece in Q.split(some, 2)]
            spread = torch.cat(spreads, 2).mean((0, 2))
            self._scale_heads(self.query.weight, spread.reciprocal())
            q = self.project(target, source)[0]
        sigma = rms_scale(self.attend(q, k, v)).rms
        self._scale_heads(self.value.weight, self.reference_scale / sigma)

    def _attended(self, k: Tensor) -> Tensor:
        """K̃, normalised keys: the landmarks, or all of them in exact attention."""
        K = normalised_key(k, self.config.qk_norm)
        if self.attention == "nystrom":
            index = select_landmarks(
                K,
                self.config.rank,
                method=self.landmark_method,
                gamma=self.config.gamma,
                generator=self.generator(),
            )
            K = K.gather(-2, index[..., None].expand(*index.shape, K.shape[-1]))
        return K

    def _scale_heads(self, weight: Tensor, factor: Tensor) -> None:
        limit = self.config.calibration_range
        factor = factor.nan_to_num(nan=1.0).clamp(1 / limit, limit).to(weight.dtype)
        weight.mul_(factor.repeat_interleave(self.config.head_dim)[:, None])

    @torch.no_grad()
    def diagnose(self, target: Tensor, source: Tensor) -> dict[str, Any]:
        """Median and 90th percentile over batch and heads of what Tables 1 and 2 report, plus per-head scales."""
        q, k, v = self.project(target, source)
        logits = _logits(normalised_query(q, self.config.qk_norm), self._attended(k))
        count = logits.shape[-1]
        probability = logits.softmax(-1)
        entropy = torch.special.entr(probability).sum(-1).mean(-1) / max(math.log(count), 1e-12)
        # An average of weights that began before σ̄ holds the share `sigma_started` of it.
        started = self.sigma_started.clamp(min=torch.finfo(self.sigma.dtype).tiny)
        sigma = self.sigma / started / self.reference_scale
        result = {
            "logit_std": _quantiles(logits.std(-1, correction=0).mean(-1)),
            "attention_entropy": _quantiles(entropy),
            "tau": self.tau().tolist(),
            "sigma_before_tau": sigma.tolist(),
            "sigma_after_tau": (sigma * self.tau()).tolist(),
        }
        if self.attention == "nystrom":
            _, solution = cast(Any, self.attend(q, k, v, diagnostics=True))
            for name in ("kappa", "residual", "gain"):
                result[name] = _quantiles(getattr(solution, name))
        return result


class Gate(nn.Module):
    """One logit per stage and image: linear(GAP(φ_s(P_s))) (SPEC 4)."""

    def __init__(self, config: SRMConfig) -> None:
        super().__init__()
        self.config = config
        C, hidden = config.channels, max(config.channels // 4, 1)
        self.stages = nn.ModuleList()
        for _ in config.fused_stages:
            layers: list[nn.Module] = []
            for width in (C, hidden):
                if config.gate_dyt:
                    layers += [_ChannelDyT(width, config.dyt_alpha, config.backend)]
                layers += [nn.Conv2d(width, hidden, 3, padding=1), nn.GELU()]
            self.stages.append(nn.Sequential(*layers))
        self.readouts = nn.ModuleList(nn.Linear(hidden, 1) for _ in config.fused_stages)
        for readout in self.readouts:  # the gate starts uniform
            for parameter in readout.parameters():
                nn.init.zeros_(parameter)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Pooled maps, each (B, C, P, P) → logits (B, S).

        Weights are read from plain modules only; adapters and parametrised modules are called.
        """
        if not all(map(is_plain, self.modules())):
            return self._called(maps)
        backend, weights = self.config.backend, self._weights()
        hidden = biased_gelu(*self.convolved(maps, 0, weights), backend=backend)
        readouts = [(readout.weight, readout.bias) for readout in cast(Iterable[nn.Linear], self.readouts)]
        return gate_logits(*self.convolved(hidden.unbind(), 1, weights), readouts, backend=backend)

    def _called(self, maps: Sequence[Tensor]) -> Tensor:
        """The logits by calling every module, the readouts in the wide dtype as far as their weights allow."""
        logits = []
        for m, stage, readout in zip(maps, self.stages, self.readouts, strict=True):
            hidden = stage(m)
            mean = hidden.mean((2, 3), dtype=wide_dtype(hidden.dtype))
            parameter = next(readout.parameters(), mean)
            with torch.autocast(mean.device.type, enabled=False):
                logits.append(readout(mean.to(parameter.dtype)).to(mean.dtype))
        return torch.cat(logits, -1)

    def convolved(
        self, maps: Sequence[Tensor], number: int, weights: dict[nn.Conv2d, Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the first or second convolution of every stage gives without its bias, and the biases."""
        results, biases = [], []
        for m, stage in zip(maps, cast(Iterable[nn.Sequential], self.stages), strict=True):
            half = len(stage) // 2
            *before, conv, _ = list(stage)[half * number : half * (number + 1)]
            for layer in before:
                m = layer(m)
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            results.append(F.conv2d(m, weights[conv] if weights else conv.weight, padding=1))
            biases.append(conv.bias)
        return results, biases

    def _weights(self) -> dict[nn.Conv2d, Tensor]:
        """Of the convolutions, rounded by one launch; autocast would take one for each."""
        convs = [layer for layer in self.stages.modules() if isinstance(layer, nn.Conv2d)]
        weights = [conv.weight for conv in convs]
        return dict(zip(convs, rounded(weights, autocast_dtype(weights[0])), strict=True))


class _ChannelDyT(DyT):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SRMNeck(nn.Module):
    """Deep-to-shallow Nyström mixing, scale control and the gain-capped gate (SPEC 1 to 4, article 3.2 to 3.6).

    in_channels: channels of the four maps, shallowest first. config: every switch and constant.
    attention: "nystrom", or "full" for the quadratic baseline with the same schedule.
    Raises ValueError for anything else, or a config whose links name a stage that is not there.
    """

    median_rms: Tensor

    def __init__(self, in_channels: Sequence[int], config: SRMConfig, *, attention: str = "nystrom") -> None:
        super().__init__()
        if len(in_channels) != len(STAGES):
            raise ValueError(
                f"in_channels has {len(in_channels)} entries; expected one for each of stages {STAGES}"
            )
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r}: expected one of {', '.join(map(repr, ATTENTIONS))}")
        self.config, self.attention = config, attention
        C = config.channels
        self.align = nn.ModuleList(nn.Conv2d(width, C, 1) for width in in_channels)
        for conv in self.align:
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.links = nn.ModuleDict({_link_name(*pair): Link(config, attention) for pair in config.links})
        targets = sorted({target for _, target in config.links})
        self.beta = nn.ParameterDict(
            {str(t): nn.Parameter(torch.full((1,), config.beta_init)) for t in targets}
        )
        self.gate = Gate(config)
        # M₀, the EMA of the batch median of M's root mean square.
        self.register_buffer("median_rms", torch.full((), UNSTARTED))
        self._last: BatchStatistics | None = None  # of the last training pass, which autograd may take again

    @property
    def stochastic(self) -> bool:
        """Whether two evaluations of one image may differ."""
        return self.config.kv_pool_eval and self.config.kv_pool_prob > 0

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate`, or a training batch without it, has started M₀; waits for the device."""
        return bool(self.median_rms < UNSTARTED / 2)

    def warn_uncalibrated(self) -> None:
        """Warn where `calibrated` is false, once for each neck; not while a CUDA graph is captured, or on meta."""
        m0 = self.median_rms
        if self in _warned or m0.is_meta or (m0.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if self.calibrated:
            return
        _warned.add(self)
        warnings.warn(
            "the neck was never calibrated: its attention is close to uniform, and its gain cap is off; call "
            "`calibrate` on the first training batch, or load trained weights",
            stacklevel=3,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if isinstance(median := state_dict.get(f"{prefix}median_rms"), Tensor):
            # Earlier versions saved infinity for "not started", of which averages made NaN.
            state_dict[f"{prefix}median_rms"] = median.nan_to_num(nan=UNSTARTED, posinf=UNSTARTED)
        for target in self.beta:
            name = f"{prefix}beta.{target}"
            if (
                name in state_dict and state_dict[name].dim() == 0
            ):  # earlier versions stored it without an axis
                state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        pyramid: Sequence[Tensor],
        *,
        return_pyramid: bool = False,
        statistics: BatchStatistics | None = None,
    ) -> NeckOutput:
        """Four maps (B, C_s, h_s, w_s), shallowest first → `NeckOutput`.

        Unless the full-resolution pyramid is asked for, updates are pooled before τ and W_O: pooling is linear; and
        where kernels serve, already the landmark probabilities are, so that nothing is written at full resolution.

        In training σ̄ and M₀ take in the batch, over all ranks of a process group, and the losses are those of the
        whole batch: their gradients, averaged over ranks as `DistributedDataParallel` does, are its gradients. Every
        rank must then call this. `statistics` is for a batch cut into micro-batches: an unfinished one is added to
        and its losses mean nothing, with a finished one the losses are the whole batch's, averaged over micro-batches
        too; σ̄ and M₀ change by `track` alone.

        Inside gradient checkpointing the pass that autograd takes again changes no buffer, and finds M₀ and σ̄ as the
        last training pass found them. A finished `statistics` is therefore needed where several training passes come
        before one backward pass (on a CPU a RuntimeError says so), and with `torch.compile` around the neck or
        around both: what is compiled cannot tell its passes apart. A checkpointed backbone before it needs nothing.
        """
        self._check(pyramid)
        given, earlier = statistics is not None, None
        if statistics is None and self.training:
            if not torch.compiler.is_compiling() and self._last is None:
                self.warn_uncalibrated()
            statistics = BatchStatistics()
            earlier = self._last if in_backward() else None
        whole = None
        if not return_pyramid and self._fuses(pyramid):
            maps = self._mix_fused(pyramid, statistics)
        else:
            aligned = self._align(pyramid, every=return_pyramid)
            updated = self._mix(
                aligned, self._pool_sources(aligned), pooled=not return_pyramid, statistics=statistics
            )
            maps = self._fused_stages(updated)
            whole = [updated[stage] for stage in STAGES] if return_pyramid else None
        output = self._fuse(maps, whole, statistics, finish=not given, earlier=earlier)
        if statistics is not None and not given and earlier is None:
            self.track(statistics)
            self._last = None if torch.compiler.is_compiling() else statistics
        return output

    @torch.no_grad()
    def track(self, statistics: BatchStatistics) -> None:
        """Take the finished statistics of a whole batch into σ̄ and M₀."""
        for name, sigma in statistics.sigma.items():
            cast(Link, self.links[name]).track(sigma)
        assert statistics.norms is not None
        self._track_norms(statistics.norms)

    @property
    def _acting(self) -> list[tuple[int, int]]:
        """Links into a stage that is fused; the others reach nothing but the pyramid."""
        return [
            (source, target) for source, target in self.config.links if target in self.config.fused_stages
        ]

    def _link(self, source: int, target: int) -> Link:
        return cast(Link, self.links[_link_name(source, target)])

    def _beta(self, target: int) -> Tensor:
        """β of a stage as a scalar, which leaves the dtype of a map as it is; stored with an axis, which FSDP needs."""
        return cast(Tensor, self.beta[str(target)]).reshape(())

    def _check(self, pyramid: Sequence[Tensor]) -> None:
        if len(pyramid) != len(STAGES):
            raise ValueError(f"pyramid has {len(pyramid)} maps; expected {len(STAGES)}")
        for stage, (m, conv) in enumerate(zip(pyramid, self.align, strict=True), 1):
            if m.dim() != 4 or m.shape[1] != conv.in_channels or m.numel() == 0:
                raise ValueError(
                    f"stage {stage} has shape {tuple(m.shape)}; expected (B, {conv.in_channels}, h, w)"
                )
            if m.shape[0] != pyramid[0].shape[0]:
                raise ValueError(f"stage {stage} has {m.shape[0]} images and stage 1 {pyramid[0].shape[0]}")
            check_like(f"stage {stage}", m, cast(nn.Conv2d, conv).weight)
            # Where Python may not ask, a NaN reaches its own image's score and no other.
            if not torch.compiler.is_compiling() and may_ask(m) and not m.isfinite().all():
                raise ValueError(f"stage {stage} holds NaN or infinite values; expected finite maps")

    def _align(self, pyramid: Sequence[Tensor], *, every: bool) -> dict[int, Tensor]:
        used = (
            set(STAGES)
            if every
            else {*self.config.fused_stages, *(s for link in self.config.links for s in link)}
        )
        return {stage: self.align[stage - 1](pyramid[stage - 1]) for stage in sorted(used)}

    def _pool_sources(self, aligned: dict[int, Tensor]) -> dict[int, Tensor]:
        """Sources of the links, each 2×2 mean-pooled with probability p where that is on."""
        sources = {source: aligned[source] for source, _ in self.config.links if source in aligned}
        if self.config.kv_pool_prob > 0 and (self.training or self.config.kv_pool_eval):
            for stage in sorted(sources):
                if float(torch.rand(())) < self.config.kv_pool_prob:
                    sources[stage] = F.avg_pool2d(sources[stage], 2, ceil_mode=True, count_include_pad=False)
        return sources

    def _mix(
        self,
        aligned: dict[int, Tensor],
        sources: dict[int, Tensor],
        *,
        pooled: bool,
        statistics: BatchStatistics | None = None,
    ) -> dict[int, Tensor]:
        """F_t + β_t fold(Σ U), at full resolution or pooled to P×P before τ and W_O; other stages unchanged."""
        updates: dict[int, Tensor] = {}
        for source, target in self._acting if pooled else self.config.links:
            link = self._link(source, target)
            y = link(aligned[target], sources[source])  # (B, H, N_q, d)
            if statistics is not None and not statistics.finished:
                statistics.add_link(_link_name(source, target), y.detach(), backend=self.config.backend)
            height, width = aligned[target].shape[-2:]
            if pooled:
                y = self._pool_tokens(y, height, width)
                height = width = self.config.pool_size
            update = link.merge(y).mT.unflatten(-1, (height, width))
            updates[target] = updates[target] + update if target in updates else update
        updated = dict(aligned)
        for target, update in updates.items():
            base = self._pooled(aligned[target]) if pooled else aligned[target]
            updated[target] = base + self._beta(target) * update
        return updated

    def _fuses(self, pyramid: Sequence[Tensor]) -> bool:
        """Whether links run as `pooled_links`: exact attention and blocks in the model's dtype have no such form."""
        c = self.config
        if self.attention != "nystrom" or c.solve_dtype != "fp32" or not self._acting:
            return False
        held = c.channels if c.dyt or c.qk_norm == "both" else 0
        like = pyramid[0].new_empty(0, dtype=autocast_dtype(pyramid[0]))  # as they will be read
        if not fuses(like, c.head_dim, 1, c.pool_size, held, backend=c.backend):
            return False  # before anything is asked of shapes, which torch.export would guard
        grids = [pyramid[source - 1].shape[-2:] for source, _ in self._acting]
        rank = max(min(c.rank, grid.numel()) for grid in grids)  # never more landmarks than keys
        read = [self.align, *(self._link(*pair) for pair in self._acting)]
        if not all(is_plain(part) for one in read for part in one.modules()):
            return False  # weights are read there, and adapters and parametrised modules have to be called
        return fuses(like, c.head_dim, rank, c.pool_size, held, backend=c.backend)

    def _mix_fused(self, pyramid: Sequence[Tensor], statistics: BatchStatistics | None) -> Tensor:
        """The fused stages' maps (B, S, C, P, P): sources are aligned whole, targets read where they are."""
        c = self.config
        dtype = autocast_dtype(pyramid[0])
        sources = sorted({source for source, _ in c.links})
        links = [self._link(*pair) for pair in self._acting]
        with torch.autocast(pyramid[0].device.type, enabled=False):  # operators choose their own precision
            read = sorted({*sources, *c.fused_stages})
            weights = [self._align_of(stage)[0] for stage in sources]
            taken = rounded([*(pyramid[stage - 1] for stage in read), *weights], dtype)
            maps = dict(zip(read, taken, strict=False))
            keys, xs = self._key_sides(
                self._shiftless_sources(maps, dict(zip(sources, taken[len(read) :], strict=True)))
            )
            align = {stage: self._align_of(stage) for stage in c.fused_stages}
            targets = [c.fused_stages.index(target) for _, target in self._acting]
            track = statistics is not None and not statistics.finished
            pooled = self._query_sides(
                [maps[stage] for stage in c.fused_stages],
                [align[target] for _, target in self._acting],
                [link.query.weight for link in links],
                keys,
                targets,
                size=c.pool_size,
                dyt=[link.dyt_query.tensors for link in links] if c.dyt else None,
                xs=xs if track else None,
                qk_norm=c.qk_norm,
                backend=c.backend,
            )
            if statistics is not None and pooled.scales is not None:
                for (source, target), scale in zip(self._acting, pooled.scales, strict=True):
                    positions = pyramid[0].shape[0] * pyramid[target - 1].shape[2:].numel()
                    statistics.add_scale(_link_name(source, target), scale, positions)
            return self._merged(
                pooled,
                xs,
                [align[stage] for stage in c.fused_stages],
                [link.output.weight for link in links],
                targets,
                [self._beta(target) for _, target in self._acting],
                thetas=[link.theta for link in links] if c.tau else None,
                backend=c.backend,
            )

    def _query_sides(self, *args: Any, **options: Any) -> PooledLinks:
        return pooled_links(*args, **options)

    def _merged(self, *args: Any, **options: Any) -> Tensor:
        return merge_links(*args, **options)

    def _key_sides(self, sources: dict[int, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """K̃ and X (B, H, r, d) of every acting link from A F; those of one source take one launch together.

        Where landmarks are sampled, every link draws its own.
        """
        c = self.config
        sides: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        groups = [[pair for pair in self._acting if pair[0] == source] for source in sources]
        if c.landmarks == "leverage_sample":
            groups = [[pair] for pair in self._acting]
        for pairs in filter(None, groups):
            links = [self._link(*pair) for pair in pairs]
            m = sources[pairs[0][0]]
            k, v = project_sources(
                m.flatten(2).mT,
                [link.key.weight for link in links],
                [link.value.weight for link in links],
                shift=self._align_of(pairs[0][0])[1],
                dyt=[link.dyt_key.tensors for link in links] if c.dyt else None,
                backend=c.backend,
            )
            k, v = (t.unflatten(-1, (c.heads, c.head_dim)).transpose(-2, -3).flatten(0, 1) for t in (k, v))
            keys, x = landmark_side(k, v, c.rank, **links[0].key_options())
            parts = (t.unflatten(0, (len(links), -1)).unbind() for t in (keys, x))
            sides |= dict(zip(pairs, zip(*parts, strict=True), strict=True))
        return [sides[pair][0] for pair in self._acting], [sides[pair][1] for pair in self._acting]

    def _shiftless_sources(self, maps: dict[int, Tensor], weights: dict[int, Tensor]) -> dict[int, Tensor]:
        """A F of every source (B, C, h, w), its bias left to `project_sources`: one product, however F is laid out."""
        aligned = {}
        for stage, weight in weights.items():
            m = maps[stage]
            aligned[stage] = torch.bmm(weight.expand(len(m), -1, -1), m.flatten(2)).unflatten(-1, m.shape[2:])
        return self._pool_sources(aligned)

    def _align_of(self, stage: int) -> tuple[Tensor, Tensor]:
        conv = cast(nn.Conv2d, self.align[stage - 1])
        assert conv.bias is not None
        return conv.weight.flatten(1), conv.bias

    def _pool_tokens(self, y: Tensor, height: int, width: int) -> Tensor:
        """(B, H, h·w, d) → (B, H, P·P, d)."""
        H, d = y.shape[1], y.shape[3]
        folded = y.transpose(1, 2).flatten(2).mT.unflatten(-1, (height, width))  # (B, C, h, w), channels last
        return self._pooled(folded).flatten(2).mT.unflatten(-1, (H, d)).transpose(1, 2)

    def _pooled(self, m: Tensor) -> Tensor:
        P = self.config.pool_size
        # What is traced must not ask: a program of any size would be one of all sizes but P.
        there = not torch.compiler.is_compiling() and m.shape[-2:] == (P, P)
        return m if there else F.adaptive_avg_pool2d(m, P)

    def _fused_stages(self, maps: dict[int, Tensor]) -> Tensor:
        return torch.stack([self._pooled(maps[stage]) for stage in self.config.fused_stages], 1)

    def _fuse(
        self,
        maps: Tensor,
        pyramid: list[Tensor] | None,
        statistics: BatchStatistics | None = None,
        *,
        finish: bool = True,
        earlier: BatchStatistics | None = None,
    ) -> NeckOutput:
        """`earlier`: what this pass found the first time, where it is taken again."""
        c = self.config
        fusion = gated_fusion(
            maps,
            self.gate(maps.unbind(1)),
            cap=self._cap(earlier or statistics),
            cap_factor=(c.gain_cap or 1.0) * self._root(maps),
            temperature=c.gate_temperature,
            backend=c.backend,
        )
        if statistics is None:
            statistics = BatchStatistics()
        elif not statistics.finished:
            statistics.add_gate(fusion.weights.detach(), fusion.norm.detach() / self._root(maps))
            if earlier is not None:
                earlier.check_again(statistics)
            elif finish:
                statistics.finish()
        whole = earlier or statistics
        entropy, balance = whole.gate_losses(
            fusion.weights, entropy_floor=c.entropy_floor * math.log(len(c.fused_stages)), backend=c.backend
        )
        tau = self._tau_loss(whole) if self._acting and c.tau else entropy.new_zeros(())
        losses = {"tau": tau, "entropy": entropy, "balance": balance}
        return NeckOutput(fusion.fused, fusion.weights, fusion.gain, fusion.norm, losses, pyramid)

    def _tau_loss(self, statistics: BatchStatistics) -> Tensor:
        """L_τ at σ̄ as it is, or as it will be after a finished batch; only θ receives its gradient."""
        thetas, sigmas = [], []
        for pair in self._acting:
            link, name = self._link(*pair), _link_name(*pair)
            if name in statistics.sigma and name not in statistics.averages:
                statistics.averages[name] = link.tracked(statistics.sigma[name])
            thetas.append(link.theta)
            sigmas.append(statistics.averages.get(name, link.sigma))
        c = self.config
        return tau_loss(thetas, sigmas, reference=math.sqrt(c.head_dim), floor=TAU_FLOOR, backend=c.backend)

    def _cap(self, statistics: BatchStatistics | None) -> Tensor | None:
        """M₀: as the batch of `statistics` finds it, for `track` may change it before the backward pass."""
        if self.config.gain_cap is None:
            return None
        if statistics is None:
            return self.median_rms
        if statistics.median_rms is None:
            statistics.median_rms = self.median_rms.clone()
        return statistics.median_rms

    def _root(self, maps: Tensor) -> float:
        """√(C·P·P), by which a root mean square is a norm: c = gain_cap · M₀ · √(C·P·P)."""
        return math.sqrt(maps[0, 0].numel())

    @torch.no_grad()
    def _track_norms(self, rms: Tensor) -> None:
        median = rms.median().to(self.median_rms.dtype)
        decayed = self.config.ema * self.median_rms + (1 - self.config.ema) * median
        taken = torch.where(self.median_rms < UNSTARTED / 2, decayed, median)
        self.median_rms.copy_(torch.where(median.isfinite(), taken, self.median_rms))

    @torch.no_grad()
    def calibrate(self, pyramid: Sequence[Tensor]) -> None:
        """Once, on the first training batch, LSUV-style (SPEC 1.6): the constants then mean the same everywhere.

        Scales each align weight until its map has RMS 1, W_Q until logits over the landmarks have standard
        deviation 1, W_V until σ = σ_ref, each factor within the configured range; starts M₀. The mode is kept.
        """
        self._check(pyramid)
        with evaluating(self):
            limit = self.config.calibration_range
            for conv, m in zip(self.align, pyramid, strict=True):
                _scale_to_unit(cast(nn.Conv2d, conv), m, limit)
            aligned = self._align(pyramid, every=True)
            for source, target in self.config.links:
                self._link(source, target).calibrate(aligned[target], aligned[source])
            updated = self._mix(aligned, aligned, pooled=True)
            maps = self._fused_stages(updated)
            self.median_rms.fill_(UNSTARTED)
            norm = gated_fusion(maps, self.gate(maps.unbind(1)), cap=None).norm
            self._track_norms(norm / self._root(maps))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep τ within [1/range, range]; call after every optimiser step."""
        limit = math.log(self.config.tau_range)
        for pair in self.config.links if self.config.tau else ():
            self._link(*pair).theta.clamp_(-limit, limit)

    @torch.no_grad()
    def diagnose(self, pyramid: Sequence[Tensor]) -> dict[str, Any]:
        """Figures of Tables 1 and 2 and Figures 3 and 4 on one batch, as plain JSON values."""
        with evaluating(self):
            aligned = self._align(pyramid, every=False)
            links = {
                _link_name(source, target): self._link(source, target).diagnose(
                    aligned[target], aligned[source]
                )
                for source, target in self._acting
            }
            before = {target: self._pooled(aligned[target]) for _, target in self._acting}
            after = self._mix(aligned, aligned, pooled=True)
            out = self._fuse(self._fused_stages(after), None)
        ratios = {t: float((after[t] - before[t]).norm() / before[t].norm()) for t in before}
        assert out.weights is not None
        assert out.gain is not None
        assert out.norm is not None
        entropy = torch.special.entr(out.weights.float()).sum(-1) / math.log(
            max(len(self.config.fused_stages), 2)
        )
        return {
            "gate_weights": out.weights.mean(0).tolist(),
            "gate_entropy": float(entropy.mean()),
            "gain": _quantiles(out.gain),
            "gain_active": float((out.gain < 1).float().mean()),
            "norm": _quantiles(out.norm),
            "update_ratio": {str(t): ratio for t, ratio in ratios.items()},
            "links": links,
        }


class PlainNeck(nn.Module):
    """No neck: the deepest stage, aligned and pooled, goes to the head. The baseline `none`."""

    stochastic = False

    def __init__(self, in_channels: Sequence[int], config: SRMConfig) -> None:
        super().__init__()
        self.config = config
        self.align = nn.Conv2d(in_channels[-1], config.channels, 1)
        nn.init.zeros_(self.align.bias)  # type: ignore[arg-type]

    def forward(self, pyramid: Sequence[Tensor], *, statistics: BatchStatistics | None = None) -> NeckOutput:
        """Four maps → the last one as `fused` (B, C, P, P); there are no statistics to keep."""
        fused = F.adaptive_avg_pool2d(self.align(pyramid[-1]), self.config.pool_size)
        losses = {name: fused.new_zeros(()) for name in ("tau", "entropy", "balance")}
        return NeckOutput(fused, None, None, None, losses, None)

    @torch.no_grad()
    def calibrate(self, pyramid: Sequence[Tensor]) -> None:
        """Scale the align weight until its map has RMS 1, as in `SRMNeck`."""
        _scale_to_unit(self.align, pyramid[-1], self.config.calibration_range)

    def clamp_(self) -> None:
        """Nothing to keep in range."""

    def diagnose(self, pyramid: Sequence[Tensor]) -> dict[str, Any]:
        """Nothing to report."""
        return {}


def _logits(Q: Tensor, K: Tensor) -> Tensor:
    """Q K̃ᵀ s of normalised queries and keys: (B, H, N_q, r or N_k)."""
    return Q @ K.mT / math.sqrt(Q.shape[-1])


def _scale_to_unit(conv: nn.Conv2d, m: Tensor, limit: float) -> None:
    """Scale the weight until the convolution of this map has RMS 1, within [1/limit, limit]."""
    rms = conv(m).square().mean().sqrt()
    conv.weight.mul_((1 / rms).clamp(1 / limit, limit))


def _link_name(source: int, target: int) -> str:
    return f"{source}to{target}"


def _quantiles(values: Tensor) -> dict[str, float]:
    quantiles = values.float().flatten().quantile(torch.tensor([0.5, 0.9], device=values.device))
    return {"median": float(quantiles[0]), "p90": float(quantiles[1])}
