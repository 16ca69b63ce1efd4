"""Compute softmax, pooling and tanh of a tile of the fused neck in C++, on CPU tensors in fp32 or fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .tile_steps import Grid, Tile, Workspace


class NativeGrid(Grid):
    """A `Grid` with C++ code: one pass over a tile computes softmax and pooling, another pass computes tanh."""

    def pool(self, logits: Tensor, tile: Tile, into: Tensor, space: Workspace) -> None:
        sizes = self.height, self.width, self.size, tile.start, tile.stop
        torch.ops.srm_cpu.softmax_pool_(logits, into, *sizes)

    def pool_backward(self, logits: Tensor, tile: Tile, grad: Tensor, space: Workspace) -> Tensor:
        sizes = self.height, self.width, self.size, tile.start, tile.stop
        torch.ops.srm_cpu.softmax_pool_backward_(logits, grad, *sizes)
        return logits

    def pool_map(self, image: Tensor) -> Tensor:
        if image.dtype not in (torch.float32, torch.float64) or not image.is_contiguous():
            return super().pool_map(image)
        means = image.new_empty((len(image), self.size, self.size))
        torch.ops.srm_cpu.cell_means_(means, image)
        return means

    def squash_(self, tokens: Tensor) -> Tensor:
        torch.ops.srm_cpu.tanh_(tokens)
        return tokens


def grid_of(height: int, width: int, size: int, positions: int, like: Tensor) -> Grid:
    """Return a `NativeGrid` if `like` is a CPU tensor and the C++ library is built, else a `Grid` in plain PyTorch."""
    kind = NativeGrid if like.device.type == "cpu" and _is_built() else Grid
    return kind(height, width, size, positions, like)


def _is_built() -> bool:
    """Return whether the C++ library is built and has the operators that `NativeGrid` calls.

    A library that was built from an older version of `csrc/` can lack some of the operators.
    """
    if not native.BUILT:
        return False
    native.load()
    return hasattr(torch.ops.srm_cpu, "cell_means_")
