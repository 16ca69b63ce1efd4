"""Test `autocast_dtype`, and test that `rounded` casts several tensors exactly as `Tensor.to` casts each of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srm_model.modules import autocast_dtype, rounded


def tensors() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (2, 3, 4, 4), (7,)]
    made = [torch.randn(shape, generator=g) * 10.0 ** (6 * i - 6) for i, shape in enumerate(shapes)]
    made[1] = made[1].contiguous(memory_format=torch.channels_last)
    return [t.requires_grad_() for t in made]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_a_cast_of_each_to_the_bit(dtype):
    """Compare values, overflow, strides, gradients and a second derivative with those of `Tensor.to`.

    The loss does not use the third result, so the backward pass gets no gradient for this result.
    """
    found, expected = tensors(), tensors()
    results = rounded(found, dtype), [t.to(dtype) for t in expected]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    slopes = []
    for given, (first, second, _) in zip((found, expected), results, strict=True):
        loss = first.float().pow(3).sum() + second.float().square().sum()
        slopes.append(torch.autograd.grad(loss, given[:2], create_graph=True))
        slopes.append(torch.autograd.grad(slopes[-1][0].sum(), given[:1]))
    for one, other in zip(slopes[0] + slopes[1], slopes[2] + slopes[3], strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_what_is_of_the_dtype_is_left_alone():
    half = torch.ones(2, dtype=torch.float16)
    wide = torch.ones(2)
    one, other = rounded([half, wide], torch.float16)
    assert one is half
    assert other.dtype == torch.float16
    assert rounded([wide], torch.float32)[0] is wide


def test_autocast_leaves_fp64_and_what_it_is_off_for():
    for device in ("cpu", "meta"):
        assert autocast_dtype(torch.ones(1, device=device)) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(torch.ones(1)) == torch.bfloat16
        assert autocast_dtype(torch.ones(1, dtype=torch.float64)) == torch.float64
