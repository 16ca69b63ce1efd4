"""Run a forward pass at fixed shapes as a CUDA graph, so that one launch starts all of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srm_model.modules import is_stochastic

WARMUP = 3  # calls before the capture, which compile kernels and fill caches


class Graphed:
    """Capture `module(maps)` once and replay it for maps of the same shapes, dtypes and device.

    Gradients are not computed. After the capture, weights may change in place, and the graph uses the new values. If a
    weight gets new memory, for example by `Module.to`, the graph still reads the old memory, so the module must be
    captured again. Every replay uses the autocast state of the capture.

    Args:
        module: A deterministic module in evaluation mode, such as an `SRMNeck`.
        maps: CUDA tensors. The graph is captured for their shapes, dtypes and strides. Maps of later calls may have
            other strides, because each call copies its maps into the captured tensors.

    Raises:
        ValueError: The module is stochastic or is in training mode, or a map is not a CUDA tensor.
    """

    def __init__(self, module: nn.Module, maps: Sequence[Tensor]) -> None:
        if module.training:
            raise ValueError("module is in training mode; expected evaluation mode (call module.eval())")
        if is_stochastic(module):
            raise ValueError(
                "module is stochastic; expected a deterministic module, because a graph would repeat one random draw"
            )
        if not all(m.is_cuda for m in maps):
            raise ValueError(
                f"maps are on {', '.join(sorted({str(m.device) for m in maps}))}; expected CUDA tensors"
            )
        self._maps = [m.detach().clone() for m in maps]
        self._graph = torch.cuda.CUDAGraph()
        # The autocast cache is off, because a cast from before the capture could be freed while the graph needs it.
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
        """Return the module's output for `maps`. The next call overwrites the memory of the output.

        Args:
            maps: Tensors of the captured shapes, dtypes and device.

        Raises:
            ValueError: The number of maps, or the shape, dtype or device of a map, is not the same as at the capture.
        """
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
