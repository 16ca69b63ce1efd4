"""Adaptive average pooling in plain PyTorch (docs/METHOD.md §1.5)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..checks import wide_dtype


def adaptive_pool(x: Tensor, size: int) -> Tensor:
    """Return the mean of `x` over each cell of a P×P grid, in the dtype of `x`; P is `size`.

    The cells in row i of the grid contain the map rows from ⌊i h/P⌋ to ⌈(i + 1) h/P⌉ − 1, where h is the height
    of the map. Columns are divided in the same way.
    """
    return F.adaptive_avg_pool2d(x.to(wide_dtype(x.dtype)), size).to(x.dtype)
