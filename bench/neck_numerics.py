"""Compare a training step of the fused neck with the reference neck, result by result.

The results are the outputs, losses and buffers of the neck, and all gradients. Errors are measured against the
reference neck in fp64. The error of a result is the largest error of its entries. The error may be at most the
sum of two terms:

- twice the error of the reference neck when it runs in the precision of the fused neck;
- the largest entry of the result, times 64 eps in fp32 or 2 eps in a reduced precision.

Some gradients are small differences of larger numbers. Their rounding errors are proportional to the larger
numbers. For these gradients, the second term of the bound therefore uses another number in place of the
largest entry of the result:

- for the gradient of a bias, the largest entry of all gradients;
- for the gradient of any other parameter of the gate, the largest entry of all gradients of the gate. The
  gradients of the gate are small differences because the gradients of its logits sum to 0 over the stages.

Some gradients have one element: those of β, of α, of the bias of a readout, and, if there is only one head,
of θ. Such a gradient is a sum Σ tᵢ over channels and positions. Each term tᵢ has a relative rounding error
δᵢ, which may be positive or negative. The error of the sum is Σ tᵢ δᵢ, which is about eps·√(Σ tᵢ²), even if
the sum itself is small. In a single step, the rounding errors of the reference neck can cancel by chance, and
the bound would then be too small. The reference neck therefore runs `DRAWS` steps with different losses. For
a gradient with one element, the two terms of the bound use all these steps:

- the first term is twice the largest error of the reference neck in the `DRAWS` steps;
- in fp32, the second term is at least 64 eps times the root mean square of the gradient over the `DRAWS` steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from srm_model import SRMConfig, SRMNeck

DRAWS = 16
Step = dict[str, Tensor]


def make_pyramid(
    batch: int, grids: Sequence[tuple[int, int]], channels: Sequence[int], seed: int = 0, device: str = "cpu"
) -> list[Tensor]:
    """Return standard normal maps (B, C_i, h, w), with (h, w) from `grids` and C_i from `channels`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, *grid, generator=generator).to(device)
        for c, grid in zip(channels, grids, strict=True)
    ]


def make_neck(
    config: SRMConfig,
    grids: Sequence[tuple[int, int]],
    channels: Sequence[int],
    seed: int = 0,
    device: str = "cpu",
) -> SRMNeck:
    """Return a calibrated reference neck in training mode. Its stage weights are not uniform, and β and τ are not 1."""
    torch.manual_seed(seed)
    neck = SRMNeck(channels, config.replace(backend="reference")).to(device)
    neck.calibrate(make_pyramid(3, grids, channels, seed=9, device=device))
    with torch.no_grad():
        for name, parameter in neck.named_parameters():
            if name.startswith(("beta", "gate.readouts")) or name.endswith(("theta", "bias", "alpha")):
                parameter += 0.3 * torch.rand_like(parameter)
    return neck.train()


def with_backend(neck: SRMNeck, backend: str) -> SRMNeck:
    """Return a neck with the same weights and buffers and another backend."""
    other = SRMNeck([conv.in_channels for conv in neck.align], neck.config.replace(backend=backend))
    other = other.to(next(neck.parameters()).device)
    other.load_state_dict(neck.state_dict())
    return other.train(neck.training)


def step(neck: SRMNeck, pyramid: Sequence[Tensor], draw: int = 0) -> Step:
    """Run forward and backward once.

    Args:
        neck: Neck in training or evaluation mode.
        pyramid: Maps (B, C_i, h, w).
        draw: Number that selects the loss. Each loss is a weighted sum of the elements of the fused map, plus
            the neck's own losses. With draw 0, the weights rise evenly from -1 to 1. With any other draw, each of
            these weights is also multiplied by a random sign; `draw` is the seed of the random signs.

    Returns:
        Outputs, buffers and gradients by name, on the CPU.
    """
    torch.manual_seed(1)
    maps = [m.detach().clone().requires_grad_() for m in pyramid]
    out = neck(maps)
    weight = torch.linspace(-1, 1, out.fused.numel(), dtype=torch.float64).view_as(out.fused)
    if draw:
        signs = torch.randint(2, weight.shape, generator=torch.Generator().manual_seed(draw)) * 2 - 1
        weight = weight * signs
    loss = (out.fused * weight.to(out.fused.device)).sum() + sum(out.losses.values())
    neck.zero_grad()
    loss.backward()
    seen = {"fused": out.fused, "weights": out.weights, "gain": out.gain, "norm": out.norm, **out.losses}
    seen |= {f"buffer {name}": b for name, b in neck.named_buffers() if b.is_floating_point()}
    seen |= {f"gradient {name}": p.grad for name, p in neck.named_parameters() if p.grad is not None}
    seen |= {f"gradient map {i}": m.grad for i, m in enumerate(maps) if m.grad is not None}
    return {name: value.detach().cpu() for name, value in seen.items()}


def ratios(
    neck: SRMNeck,
    pyramid: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    run: Callable[[SRMNeck, Sequence[Tensor]], Step] = step,
) -> dict[str, float]:
    """Run a training step with the backend "triton"; return error / bound for every result.

    The docstring of the module defines the error and its bound.

    Args:
        neck: Reference neck.
        pyramid: Maps (B, C_i, h, w) in fp32.
        dtype: Dtype of autocast, or None for fp32.
        run: Function that runs the training step. It is called with a copy of the neck that has the backend
            "triton", and with `pyramid`.

    Raises:
        AssertionError: The kernels and the reference neck return results with different names.
    """
    device = pyramid[0].device.type
    draws: list[tuple[Step, Step]] = []  # (fp64, this precision)
    for draw in range(DRAWS):
        exact = step(copy.deepcopy(neck).double(), [m.double() for m in pyramid], draw)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            draws.append((exact, step(copy.deepcopy(neck), pyramid, draw)))
    with torch.autocast(device, dtype, enabled=dtype is not None):
        found = run(with_backend(neck, "triton"), pyramid)
    return _judge(found, draws, dtype)


def _judge(found: Step, draws: list[tuple[Step, Step]], dtype: torch.dtype | None) -> dict[str, float]:
    exact, plain = draws[0]
    if not found.keys() == plain.keys() == exact.keys():
        raise AssertionError(f"results of one neck only: {sorted(found.keys() ^ exact.keys())}")
    unit = 64 * torch.finfo(torch.float32).eps if dtype is None else 2 * torch.finfo(dtype).eps

    def largest(start: str) -> float:
        return max(float(value.abs().max()) for name, value in exact.items() if name.startswith(start))

    def distance(one: Step, other: Step, name: str) -> float:
        return float((one[name].double() - other[name]).abs().max())

    judged = {}
    for name, value in exact.items():
        kind = "gradient gate" if name.startswith("gradient gate") else name
        single = name.startswith("gradient") and value.numel() == 1
        size = largest("gradient" if name.endswith("bias") else kind)
        if single and dtype is None:
            size = max(size, float(torch.stack([e[name] for e, _ in draws]).square().mean().sqrt()))
        reference = max(distance(p, e, name) for e, p in (draws if single else draws[:1]))
        bound = 2 * reference + unit * size
        error = distance(found, exact, name)
        judged[name] = 0.0 if error == 0 else error / bound if bound else float("inf")
    return judged
