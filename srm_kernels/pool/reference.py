"""Adaptive average pooling in plain PyTorch (docs/METHOD.md §1.5)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..checks import wide_dtype


def adaptive_pool(x: Tensor, size: int) -> Tensor:
    """Cell (i, j) is the mean over rows ⌊i h/P⌋ … ⌈(i + 1) h/P⌉ − 1 and the columns likewise, in the dtype of x."""
    return F.adaptive_avg_pool2d(x.to(wide_dtype(x.dtype)), size).to(x.dtype)
