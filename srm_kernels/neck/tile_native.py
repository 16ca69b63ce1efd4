"""The elementwise steps of a tile in the C++ of csrc, on CPU tensors of the wide dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .tile_steps import Grid, Tile, Workspace


class NativeGrid(Grid):
    """The grid whose softmax, pooling and tanh are compiled: a pass each over a tile, forward and backward."""

    def pool(self, logits: Tensor, tile: Tile, into: Tensor, space: Workspace) -> None:
        """Turn logits (H, M, r) into probabilities in place, and add their share of all means to `into` (H, P, P·r)."""
        torch.ops.srm_cpu.softmax_pool_(
            logits, into, self.height, self.width, self.size, tile.start, tile.stop
        )

    def pool_backward(self, logits: Tensor, tile: Tile, grad: Tensor, space: Workspace) -> Tensor:
        """Turn logits (H, M, r) into their gradient, from that of all means (H, P, P·r), and return them."""
        torch.ops.srm_cpu.softmax_pool_backward_(
            logits, grad, self.height, self.width, self.size, tile.start, tile.stop
        )
        return logits

    def pool_map(self, image: Tensor) -> Tensor:
        """Return the means (C, P, P) of a map (C, h, w) in its dtype."""
        if image.dtype not in (torch.float32, torch.float64) or not image.is_contiguous():
            return super().pool_map(image)
        means = image.new_empty((len(image), self.size, self.size))
        torch.ops.srm_cpu.cell_means_(means, image)
        return means

    def squash_(self, tokens: Tensor) -> Tensor:
        """Apply tanh in place."""
        torch.ops.srm_cpu.tanh_(tokens)
        return tokens


def grid_of(height: int, width: int, size: int, positions: int, like: Tensor) -> Grid:
    """Return the compiled grid where the library is there and has its steps, else that of plain PyTorch."""
    kind = NativeGrid if like.device.type == "cpu" and _is_built() else Grid
    return kind(height, width, size, positions, like)


def _is_built() -> bool:
    """A library that was built before these steps existed does not have them."""
    if not native.BUILT:
        return False
    native.load()
    return hasattr(torch.ops.srm_cpu, "cell_means_")
