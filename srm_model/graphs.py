"""A forward pass at fixed shapes as one CUDA graph: its launches cost the host one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srm_model.modules import is_stochastic

WARMUP = 3  # calls that compile kernels and fill caches; none of it may happen while a graph is captured


class Graphed:
    """`module(maps)` for maps of the shapes, dtypes, strides and device of `maps`, captured once and then replayed.

    module: in evaluation mode and not stochastic, such as an `SRMNeck`. maps: CUDA tensors. Gradients are not kept.
    Weights may change in place afterwards; new tensors, as `Module.to` makes them, are not seen. Autocast is as it was
    when the graph was made. Raises ValueError for a module in training, a stochastic one, or maps elsewhere.
    """

    def __init__(self, module: nn.Module, maps: Sequence[Tensor]) -> None:
        if module.training:
            raise ValueError(
                "module is in training mode; expected module.eval(), whose buffers stay as they are"
            )
        if is_stochastic(module):
            raise ValueError("module is stochastic; a graph would repeat one draw for ever")
        if not all(m.is_cuda for m in maps):
            raise ValueError(
                f"maps are on {', '.join(sorted({str(m.device) for m in maps}))}; expected CUDA tensors"
            )
        self._maps = [m.detach().clone() for m in maps]
        self._graph = torch.cuda.CUDAGraph()
        # A cast that autocast keeps from before the capture would be freed under the graph.
        autocast = torch.autocast(
            "cuda",
            torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        with torch.cuda.device(maps[0].device), torch.no_grad(), autocast:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    module(self._maps)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._output = module(self._maps)

    def __call__(self, maps: Sequence[Tensor]) -> Any:
        """What the module gives for these maps, in memory that the next call overwrites. ValueError: other shapes."""
        if len(maps) != len(self._maps):
            raise ValueError(f"maps has {len(maps)} entries; the graph was made for {len(self._maps)}")
        for number, (own, given) in enumerate(zip(self._maps, maps, strict=True)):
            if (own.shape, own.dtype, own.device) != (given.shape, given.dtype, given.device):
                raise ValueError(
                    f"map {number} is {tuple(given.shape)}, {given.dtype}, {given.device}; "
                    f"the graph was made for {tuple(own.shape)}, {own.dtype}, {own.device}"
                )
        with torch.no_grad():
            for own, given in zip(self._maps, maps, strict=True):
                own.copy_(given)
        self._graph.replay()
        return self._output
