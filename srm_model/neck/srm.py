"""The Spectral Robustness Mixer: mixing, gate and their statistics (docs/METHOD.md §1, article 3.2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from srm_kernels import gated_fusion, tau_loss
from srm_kernels.checks import exporting, may_ask
from srm_model.config import STAGES, SRMConfig
from srm_model.modules import check_like, in_backward
from srm_model.statistics import BatchStatistics

from . import calibration, diagnosis
from .gate import Gate
from .links import Link, link_name
from .mixing import Mixer
from .plain import NeckOutput

ATTENTIONS = ("nystrom", "full")
TAU_FLOOR = 1e-6
# M₀ before it is started: a cap that no map reaches. It is finite, so that an average of weights can begin with it:
# above half of it, M₀ counts as not started.
UNSTARTED = 1024.0

_asked = WeakTensorKeyDictionary()  # the M₀ of necks that were asked whether they are calibrated


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_once(m0: Tensor) -> None:
    """`torch.compile` calls this with the buffer itself, and puts no trace of it into the program."""
    if m0 in _asked or m0.is_meta or (m0.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    _asked[m0] = True
    if not _started(m0):
        warnings.warn(
            "the neck was never calibrated, or is an average of weights that was begun before: its attention may be "
            "close to uniform, and its gain cap is off; call `calibrate` on the first training batch, or load trained "
            "weights",
            stacklevel=4,
        )


def _started(m0: Tensor) -> bool:
    return bool(m0 < UNSTARTED / 2)


class SRMNeck(Mixer):
    """Deep-to-shallow Nyström mixing, scale control and the gain-capped gate (docs/METHOD.md §1 to 4).

    in_channels: channels of the four maps, shallowest first. config: every switch and constant.
    attention: "nystrom", or "full" for the quadratic baseline with the same schedule.
    Raises ValueError for anything else, or a config whose links name a stage that is not there.
    """

    median_rms: Tensor
    _prepared = False  # calibrated, or filled with weights that were

    def __init__(self, in_channels: Sequence[int], config: SRMConfig, *, attention: str = "nystrom") -> None:
        if len(in_channels) != len(STAGES):
            raise ValueError(
                f"in_channels has {len(in_channels)} entries; expected one for each of stages {STAGES}"
            )
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r}: expected one of {', '.join(map(repr, ATTENTIONS))}")
        super().__init__(in_channels, config, attention)
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
        return _started(self.median_rms)

    def warn_uncalibrated(self) -> None:
        """Warn where `calibrated` is false, asked once of each neck, by torch.compile when it traces one.

        Not while a program is exported or a CUDA graph is captured, nor on meta.
        """
        tracing = torch.compiler.is_compiling()
        if tracing and (exporting() or not torch.compiler.is_dynamo_compiling()):
            return
        # A program is shared by necks that only their buffers tell apart: this attribute it is guarded by.
        if not (tracing and self._prepared):
            _warn_once(self.median_rms)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if isinstance(median := state_dict.get(f"{prefix}median_rms"), Tensor):
            # Earlier versions saved infinity for "not started", of which averages made NaN.
            median = median.nan_to_num(nan=UNSTARTED, posinf=UNSTARTED)
            state_dict[f"{prefix}median_rms"] = median
            self._prepared = not median.is_meta and _started(median)
        for target in self.beta:
            name = f"{prefix}beta.{target}"
            if name in state_dict and state_dict[name].dim() == 0:
                state_dict[name] = state_dict[name].reshape(1)  # earlier versions stored it without an axis
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        pyramid: Sequence[Tensor],
        *,
        return_pyramid: bool = False,
        statistics: BatchStatistics | None = None,
    ) -> NeckOutput:
        """Four maps (B, C_s, h_s, w_s), shallowest first → `NeckOutput`.

        Unless the full-resolution pyramid is asked for, landmark probabilities are pooled before X, τ and W_O
        (exact attention's updates before τ and W_O), as pooling is linear.

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
        self.check(pyramid)
        given, earlier = statistics is not None, None
        if self.training:
            self.warn_uncalibrated()
        if statistics is None and self.training:
            statistics = BatchStatistics()
            earlier = self._last if in_backward() else None
        whole = None
        if return_pyramid:
            updated = self.whole(pyramid, statistics)
            whole = [updated[stage] for stage in STAGES]
            maps = torch.stack([self.pooled(updated[stage]) for stage in self.config.fused_stages], 1)
        else:
            maps = self.maps(pyramid, statistics)
        output = self.fuse(maps, whole, statistics, finish=not given, earlier=earlier)
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
        self.track_norms(statistics.norms)

    def check(self, pyramid: Sequence[Tensor]) -> None:
        """Raise ValueError or TypeError for a pyramid that the neck does not take; on the CPU for a NaN too."""
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
            # One pass over the map: NaN and infinities show in its extremes.
            asked = not torch.compiler.is_compiling() and may_ask(m)
            if asked and not all(map(math.isfinite, m.detach().aminmax())):
                raise ValueError(f"stage {stage} holds NaN or infinite values; expected finite maps")

    def fuse(
        self,
        maps: Tensor,
        pyramid: list[Tensor] | None = None,
        statistics: BatchStatistics | None = None,
        *,
        finish: bool = True,
        earlier: BatchStatistics | None = None,
    ) -> NeckOutput:
        """Updated maps (B, S, C, P, P) → what the gate makes of them, and the losses.

        statistics: of the batch, finished here where `finish`. earlier: what this pass found the first time, where it
        is taken again.
        """
        c = self.config
        fusion = gated_fusion(
            maps,
            self.gate(maps.unbind(1)),
            cap=self._cap(earlier or statistics),
            cap_factor=(c.gain_cap or 1.0) * self.root(maps),
            temperature=c.gate_temperature,
            backend=c.backend,
        )
        if statistics is None:
            statistics = BatchStatistics()
        elif not statistics.finished:
            statistics.add_gate(fusion.weights.detach(), fusion.norm.detach() / self.root(maps))
            if earlier is not None:
                earlier.check_again(statistics)
            elif finish:
                statistics.finish()
        whole = earlier or statistics
        entropy, balance = whole.gate_losses(
            fusion.weights, entropy_floor=c.entropy_floor * math.log(len(c.fused_stages)), backend=c.backend
        )
        tau = self.tau_loss(whole) if self.acting and c.tau else entropy.new_zeros(())
        losses = {"tau": tau, "entropy": entropy, "balance": balance}
        return NeckOutput(fusion.fused, fusion.weights, fusion.gain, fusion.norm, losses, pyramid)

    def tau_loss(self, statistics: BatchStatistics) -> Tensor:
        """L_τ at σ̄ as it is, or as it will be after a finished batch; only θ receives its gradient."""
        thetas, sigmas = [], []
        for pair in self.acting:
            link, name = self.link(*pair), link_name(*pair)
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

    def root(self, maps: Tensor) -> float:
        """√(C·P·P), by which a root mean square is a norm: c = gain_cap · M₀ · √(C·P·P)."""
        return math.sqrt(maps[0, 0].numel())

    @torch.no_grad()
    def track_norms(self, rms: Tensor, *, anew: bool = False) -> None:
        """Take a batch's root mean squares of M (B,) into M₀, or start it `anew` with them."""
        median, old = rms.median().to(self.median_rms.dtype), self.median_rms
        old = torch.full_like(old, UNSTARTED) if anew else old
        decayed = self.config.ema * old + (1 - self.config.ema) * median
        taken = torch.where(old < UNSTARTED / 2, decayed, median)
        self.median_rms.copy_(torch.where(median.isfinite(), taken, old))

    @torch.no_grad()
    def calibrate(self, pyramid: Sequence[Tensor]) -> None:
        """Start the constants from the first training batch, once (docs/METHOD.md §1.6).

        Scales each align weight until its map has RMS 1, W_Q until logits over the landmarks have standard
        deviation 1, W_V until σ = σ_ref, each factor within the configured range; starts M₀. The mode is kept.
        """
        self.check(pyramid)
        calibration.calibrate(self, pyramid)
        self._prepared = True

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep τ within [1/range, range]; call after every optimiser step."""
        limit = math.log(self.config.tau_range)
        for pair in self.config.links if self.config.tau else ():
            self.link(*pair).theta.clamp_(-limit, limit)

    def diagnose(self, pyramid: Sequence[Tensor]) -> dict[str, Any]:
        """Figures of Tables 1 and 2 and Figures 3 and 4 on one batch, as plain JSON values."""
        return diagnosis.summary(diagnosis.measure(self, pyramid), len(self.config.fused_stages))
