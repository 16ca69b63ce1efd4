"""The Spectral Robustness Mixer: links, gate and their statistics (docs/METHOD.md §1 to §4)."""

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
# Value of M₀ before the first batch. With this M₀, the cap is so large that it has no effect. The value is finite,
# because moving averages of the weights also average M₀. A neck is calibrated if its M₀ is below half of this value.
UNSTARTED = 1024.0

_asked = WeakTensorKeyDictionary()  # M₀ of the necks that `_warn_once` has checked


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_once(m0: Tensor) -> None:
    # While tracing, torch.compile calls this function with the buffer, but adds no call to the compiled program.
    if m0 in _asked or m0.is_meta or (m0.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    _asked[m0] = True
    if not _started(m0):
        warnings.warn(
            "the neck was never calibrated, or its weights are an average that includes weights from before "
            "calibration. Its attention may be almost uniform, and its gain cap is off. Call `calibrate` on the first "
            "training batch, or load trained weights",
            stacklevel=4,
        )


def _started(m0: Tensor) -> bool:
    return bool(m0 < UNSTARTED / 2)


class SRMNeck(Mixer):
    """Spectral Robustness Mixer: shallow maps attend to deep maps, and a gate with a gain cap fuses the updated maps.

    Source: docs/METHOD.md §1 to §4.

    Args:
        in_channels: Channels of the four maps, shallowest first.
        config: Constants of the neck.
        attention: "nystrom", or "full" for exact attention, the quadratic baseline.

    Raises:
        ValueError: `in_channels` does not have four entries, or `attention` is unknown.
    """

    median_rms: Tensor  # M₀
    _prepared = False  # whether the neck was calibrated or has loaded calibrated weights

    def __init__(self, in_channels: Sequence[int], config: SRMConfig, *, attention: str = "nystrom") -> None:
        if len(in_channels) != len(STAGES):
            raise ValueError(
                f"in_channels has {len(in_channels)} entries; expected one for each of stages {STAGES}"
            )
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r}: expected one of {', '.join(map(repr, ATTENTIONS))}")
        super().__init__(in_channels, config, attention)
        self.gate = Gate(config)
        self.register_buffer("median_rms", torch.full((), UNSTARTED))
        self._last: BatchStatistics | None = None  # of the last training pass, which checkpointing may repeat

    @property
    def stochastic(self) -> bool:
        """Whether the outputs for one image may differ between two calls in evaluation mode."""
        return self.config.kv_pool_eval and self.config.kv_pool_prob > 0

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` or a training batch has initialised M₀. This property synchronises with the device."""
        return _started(self.median_rms)

    def warn_uncalibrated(self) -> None:
        """Warn if the neck is not calibrated. Each neck is checked once.

        This method does nothing during export, during the capture of a CUDA graph, and on the meta device.
        """
        tracing = torch.compiler.is_compiling()
        if tracing and (exporting() or not torch.compiler.is_dynamo_compiling()):
            return
        # torch.compile uses one compiled program for all necks that differ only in their buffers. `_prepared` is read
        # here so that it becomes a guard of this program. For a neck that is not prepared, torch.compile then traces
        # again, and the warning appears.
        if not (tracing and self._prepared):
            _warn_once(self.median_rms)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if isinstance(median := state_dict.get(f"{prefix}median_rms"), Tensor):
            # Earlier versions stored infinity for "not started", which becomes NaN in an average.
            median = median.nan_to_num(nan=UNSTARTED, posinf=UNSTARTED)
            state_dict[f"{prefix}median_rms"] = median
            self._prepared = not median.is_meta and _started(median)
        for target in self.beta:
            name = f"{prefix}beta.{target}"
            if name in state_dict and state_dict[name].dim() == 0:
                state_dict[name] = state_dict[name].reshape(1)  # earlier versions stored a scalar
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        pyramid: Sequence[Tensor],
        *,
        return_pyramid: bool = False,
        statistics: BatchStatistics | None = None,
    ) -> NeckOutput:
        """Mix and fuse a pyramid.

        In training mode, this method updates σ̄ and M₀. In a process group, the update and the returned losses use the
        images of all ranks, so every rank must call this method. `DistributedDataParallel` averages the gradients over
        the ranks. This average is the gradient of the returned losses.

        Gradient checkpointing of the neck repeats the forward pass during the backward pass. The repeated forward pass
        changes no buffer. It uses the same values of M₀ and σ̄ as the last forward pass in training mode. Normally,
        this last pass is the pass that is repeated. If several forward passes precede one backward pass, or if the neck
        is compiled, a checkpointed neck needs the argument `statistics`. In these two cases, `statistics.finish()` must
        be called before the checkpointed pass. Checkpointing of the backbone alone needs no extra argument.

        Args:
            pyramid: Four maps (B, C_s, h_s, w_s), shallowest first.
            return_pyramid: Whether to return the updated maps at full resolution too. This takes more memory.
            statistics: Statistics of a batch that is split into micro-batches. Before `statistics.finish()`, each call
                adds the statistics of its micro-batch, and the returned losses have no meaning. After
                `statistics.finish()`, the loss of the whole batch is the mean of the returned losses over all
                micro-batches and ranks. With this argument, a call updates neither σ̄ nor M₀; call `track` to update
                them.

        Raises:
            TypeError: Autocast is off, and a map has another dtype than the neck.
            ValueError: The maps have wrong shapes, are not on the neck's device, or contain values that are not finite.
                The values are checked only on a CPU.
            RuntimeError: Gradient checkpointing repeats a forward pass that is not the last forward pass in training
                mode. This is checked only on a CPU.
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
        """Update σ̄ and M₀ with the statistics of a batch. Call `statistics.finish()` first."""
        for name, sigma in statistics.sigma.items():
            cast(Link, self.links[name]).track(sigma)
        assert statistics.norms is not None
        self.track_norms(statistics.norms)

    def check(self, pyramid: Sequence[Tensor]) -> None:
        """Check shapes, device and dtype of a pyramid. On a CPU, also check that its values are finite.

        Raises:
            TypeError: Autocast is off, and a map has another dtype than the neck.
            ValueError: The maps have wrong shapes, are not on the neck's device, or contain values that are not finite.
                The values are checked only on a CPU.
        """
        if len(pyramid) != len(STAGES):
            raise ValueError(f"pyramid has {len(pyramid)} maps; expected {len(STAGES)}")
        for stage, (m, conv) in enumerate(zip(pyramid, self.align, strict=True), 1):
            if m.dim() != 4 or m.shape[1] != conv.in_channels or m.numel() == 0:
                raise ValueError(
                    f"stage {stage} has shape {tuple(m.shape)}; expected (B, {conv.in_channels}, h, w)"
                )
            if m.shape[0] != pyramid[0].shape[0]:
                raise ValueError(
                    f"stage {stage} has {m.shape[0]} images and stage 1 has {pyramid[0].shape[0]}; expected the same "
                    "number"
                )
            check_like(f"stage {stage}", m, cast(nn.Conv2d, conv).weight)
            # Where this check is skipped, a NaN changes the score of its own image only.
            readable = not torch.compiler.is_compiling() and may_ask(m)
            if readable and not all(map(math.isfinite, m.detach().aminmax())):
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
        """Fuse maps with the gate and compute the losses.

        Args:
            maps: Updated, pooled maps, (B, S, C, P, P).
            pyramid: Updated maps at full resolution. The output contains them unchanged.
            statistics: Statistics of the batch. Before `statistics.finish()`, each call adds the statistics of its
                micro-batch.
            finish: Whether to call `statistics.finish()` before the losses are computed. Ignored if `earlier` is given.
            earlier: Statistics of the original forward pass if gradient checkpointing repeats that pass with this call,
                otherwise None.
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
        """Return L_τ (docs/METHOD.md §3.3), computed with an updated copy of σ̄.

        This method copies the buffer σ̄ and updates the copy with the σ in `statistics`. The buffer does not change.
        """
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
        """Return M₀ as it was before the batch of `statistics`, or None if there is no gain cap.

        The first call for a batch stores M₀ in `statistics`. Later calls for this batch return the stored M₀, because
        `track` may have updated the buffer `median_rms` since the first call.
        """
        if self.config.gain_cap is None:
            return None
        if statistics is None:
            return self.median_rms
        if statistics.median_rms is None:
            statistics.median_rms = self.median_rms.clone()
        return statistics.median_rms

    def root(self, maps: Tensor) -> float:
        """Return √(C·P·P), the ratio of ‖M‖_F to the root mean square of M."""
        return math.sqrt(maps[0, 0].numel())

    @torch.no_grad()
    def track_norms(self, rms: Tensor, *, reset: bool = False) -> None:
        """Update M₀ with the median of `rms` (B,), which contains the root mean square of M for each image of a batch.

        With `reset`, the median replaces M₀.
        """
        median, old = rms.median().to(self.median_rms.dtype), self.median_rms
        old = torch.full_like(old, UNSTARTED) if reset else old
        decayed = self.config.ema * old + (1 - self.config.ema) * median
        taken = torch.where(old < UNSTARTED / 2, decayed, median)
        self.median_rms.copy_(torch.where(median.isfinite(), taken, old))

    @torch.no_grad()
    def calibrate(self, pyramid: Sequence[Tensor]) -> None:
        """Calibrate the weights and M₀ on the first training batch (docs/METHOD.md §1.6).

        The mode of the neck, training or evaluation, does not change.

        Args:
            pyramid: Four maps (B, C_s, h_s, w_s), shallowest first.

        Raises:
            TypeError: Autocast is off, and a map has another dtype than the neck.
            ValueError: The maps have wrong shapes, are not on the neck's device, or contain values that are not finite.
                The values are checked only on a CPU.
        """
        self.check(pyramid)
        calibration.calibrate(self, pyramid)
        self._prepared = True

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp τ to its range. Call this method after every optimiser step (docs/METHOD.md §3.3)."""
        limit = math.log(self.config.tau_range)
        for pair in self.config.links if self.config.tau else ():
            self.link(*pair).theta.clamp_(-limit, limit)

    def diagnose(self, pyramid: Sequence[Tensor]) -> dict[str, Any]:
        """Return statistics of links, updates and gate for one batch, as JSON values.

        Source: article, tables 1 and 2, figures 3 and 4.

        Args:
            pyramid: Four maps (B, C_s, h_s, w_s), shallowest first.
        """
        return diagnosis.summary(diagnosis.measure(self, pyramid), len(self.config.fused_stages))
