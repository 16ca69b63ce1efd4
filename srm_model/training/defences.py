"""Defences that a robust figure is compared with: gradient-norm regularisation and PGD adversarial training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from srm_model.attacks import MSE, pgd
from srm_model.config import SRMConfig
from srm_model.norms import norm_of, unit

_SCALE = 2.0**10  # keeps the gradient of a score from underflowing where the model runs in fp16


class Randomness:
    """PyTorch's random state at the moment of creation, to run another pass with the same draws."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def replay(self, model: nn.Module, images: Tensor) -> Tensor:
        """The model's scores with those draws; its buffers and the random state stay as they are."""
        with torch.random.fork_rng([self.device] if self._cuda is not None else []):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self.device)
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            scores: Tensor = functional_call(model, buffers, (images,))
        return scores


def gradient_norm(
    model: nn.Module, images: Tensor, scores: Tensor, config: SRMConfig, randomness: Randomness
) -> Tensor:
    """mean over images of |f(x + h·d) − f(x)| / h, which is about ‖∇f(x)‖; 0-d, differentiable in the weights.

    "l1": d = sign(∇f(x)), whose product with the gradient is its L1 norm: the norm-regularised training (NT) of Liu et
    al., CVPR 2024, whose h is 0.01 and whose weight is 1e-3. "l2": d = ∇f(x)/‖∇f(x)‖₂. d is held constant. The second
    pass makes the draws of the first and moves no running statistic.

    images: those `scores` (B,) were computed from, requiring a gradient. randomness: taken before that pass.
    """
    with torch.autocast(images.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(_SCALE * scores.float().sum(), images, retain_graph=True)
        gradient = gradient.nan_to_num(nan=0, posinf=0, neginf=0)
        direction = gradient.sign() if config.gradient_norm == "l1" else unit(gradient)
        shifted = images.detach() + config.gradient_step * direction
    moved = randomness.replay(model, shifted)
    return (moved.float() - scores.float()).abs().mean() / config.gradient_step


def adversarial(model: nn.Module, images: Tensor, mos: Tensor, config: SRMConfig, *seed: int) -> Tensor:
    """The batch to train on in place of `images`: PGD on the squared error, from one random start, by the seed.

    As Madry et al., 2018; crafted on the model in evaluation mode and fp32. Budgets mean what they mean in `Suite`.
    """
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    settings: dict[str, Any] = {
        "norm": config.adversarial_norm,
        "eps": norm_of(config.adversarial_norm).radius(config.adversarial_eps, images[0]),
        "steps": config.adversarial_steps,
        "restarts": 1,
        "generator": torch.Generator().manual_seed(int(state >> np.uint64(1))),
    }
    return pgd(model, images, mos, MSE(), **settings).contiguous(memory_format=torch.channels_last)
