"""The gate: one logit per fused stage and image (docs/METHOD.md §4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srm_kernels import biased_gelu, gate_logits
from srm_kernels.checks import wide_dtype
from srm_model.config import SRMConfig
from srm_model.modules import autocast_dtype, is_plain, rounded

from .links import DyT


class Gate(nn.Module):
    """Compute one logit per stage and image, linear(GAP(φ_s(P_s))) (docs/METHOD.md §4)."""

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
        """Return logits (B, S). `maps` has the pooled map (B, C, P, P) of each of the S stages.

        If `is_plain` is False for a submodule, for example for an adapter or a parametrised layer, the submodules are
        called to compute the logits. Otherwise the weights are read directly, and no convolution, GELU or linear module
        is called.
        """
        if not all(map(is_plain, self.modules())):
            return self.called(maps)
        backend, weights = self.config.backend, self._weights()
        hidden = biased_gelu(*self.convolved(maps, 0, weights), backend=backend)
        readouts = [(readout.weight, readout.bias) for readout in cast(Iterable[nn.Linear], self.readouts)]
        return gate_logits(*self.convolved(hidden.unbind(), 1, weights), readouts, backend=backend)

    def called(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute the logits by calling every module."""
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
        """Run one convolution of every stage without adding the bias; return the outputs and the biases of all stages.

        `number` selects the first (0) or the second (1) convolution of a stage. `weights` maps each convolution module
        `conv` to the weight that is used instead of `conv.weight`.
        """
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
        """Cast the weights of all convolutions to the dtype of autocast with a single kernel launch.

        Autocast itself would need one launch per weight. If autocast is off, the weights are returned unchanged.
        """
        convs = [layer for layer in self.stages.modules() if isinstance(layer, nn.Conv2d)]
        weights = [conv.weight for conv in convs]
        return dict(zip(convs, rounded(weights, autocast_dtype(weights[0])), strict=True))


class _ChannelDyT(DyT):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
