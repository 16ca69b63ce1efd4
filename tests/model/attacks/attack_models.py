"""Small models whose attacks are known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """f(x) = ⟨w, x⟩ + b."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.weight).flatten(1).sum(1) + self.bias


class OfFirstPixel(nn.Module):
    """f(x) = g(x[0, 0, 0]) for any function g of one number."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images[:, 0, 0, 0])


class Convolutional(nn.Module):
    """A small network with convolution, BatchNorm and dropout.

    Every forward pass updates the buffers `calls` and `ema`, even in evaluation mode.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.convolution = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.dropout = nn.Dropout(0.5)
            self.linear = nn.Linear(8, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("ema", torch.zeros(8))

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.convolution(images)).tanh().mean((2, 3))
        self.calls += 1
        self.ema = 0.9 * self.ema + 0.1 * features.detach().mean(0)
        return self.linear(self.dropout(features)).squeeze(1)


class Noisy(Linear):
    """A linear model that adds new Gaussian noise to its weight in every forward pass.

    The noise is drawn from PyTorch's global generator.
    """

    stochastic = True

    def __init__(self, weight: Tensor, spread: float) -> None:
        super().__init__(weight)
        self.spread = spread
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        weight = self.weight + self.spread * torch.randn(self.weight.shape)
        return (images * weight).flatten(1).sum(1)


def weight(seed: int = 0, side: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, side, side, generator=generator, dtype=dtype)


def batch(size: int = 4, seed: int = 0, side: int = 8, low: float = 0.25, high: float = 0.75) -> Tensor:
    """Return random images. By default, pixels are far from 0 and 1, so that small perturbations are never clipped."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(size, 3, side, side, generator=generator)
