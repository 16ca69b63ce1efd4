"""Published defences, for comparison: gradient-norm regularisation, PGD adversarial training and TRADES."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from srm_model.attacks import MSE, Drift, pgd
from srm_model.attacks.guard import derived_seed
from srm_model.config import SRMConfig
from srm_model.norms import norm_of, unit

_SCALE = 2.0**10  # prevents underflow of a score's gradient in fp16


class Randomness:
    """A copy of PyTorch's random state before a forward pass; `replay` draws the same random numbers as this pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def replay(self, model: nn.Module, images: Tensor) -> Tensor:
        """Score images with the stored random state. The buffers and the current random state do not change."""
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
    """Return the mean over images of |f(x + h·d) − f(x)| / h, which approximates ‖∇f(x)‖.

    The step h is `config.gradient_step`. The direction d depends on `config.gradient_norm`:

    - "l1": d = sign(∇f(x)). With h = 0.01 and `config.weight_gradient` = 1e-3, this is the norm-regularised training
      (NT) of Liu et al., CVPR 2024.
    - "l2": d = ∇f(x)/‖∇f(x)‖₂.

    The backward pass treats d as a constant. The forward pass at x + h·d draws the same random numbers as the pass at
    x, and updates no running statistics.

    Args:
        images: Images (B, 3, H, W) that require a gradient.
        scores: Scores (B,) of these images.
        randomness: Random state before the pass that computed `scores`.
    """
    with torch.autocast(images.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(_SCALE * scores.float().sum(), images, retain_graph=True)
        gradient = gradient.nan_to_num(nan=0, posinf=0, neginf=0)
        direction = gradient.sign() if config.gradient_norm == "l1" else unit(gradient)
        shifted = images.detach() + config.gradient_step * direction
    moved = randomness.replay(model, shifted)
    return (moved.float() - scores.float()).abs().mean() / config.gradient_step


def adversarial(
    model: nn.Module, images: Tensor, mos: Tensor, config: SRMConfig, *seed: int, share: float = 1.0
) -> Tensor:
    """Attack images by PGD from one random start, for adversarial training; return the attacked images.

    PGD maximises the squared error (Madry et al., 2018). With `config.weight_consistency` > 0, PGD maximises the
    squared change of the score instead (Zhang et al., 2019). During the attack, the model is in evaluation mode and
    fp32. The budget is `share` · `config.adversarial_eps`. `Norm.radius` scales this budget to the image size, as in
    `Suite`.
    """
    objective = Drift() if config.weight_consistency > 0 else MSE()
    settings: dict[str, Any] = {
        "norm": config.adversarial_norm,
        "eps": norm_of(config.adversarial_norm).radius(share * config.adversarial_eps, images[0]),
        "steps": config.adversarial_steps,
        "restarts": 1,
        "generator": torch.Generator().manual_seed(derived_seed(*seed)),
    }
    return pgd(model, images, mos, objective, **settings).contiguous(memory_format=torch.channels_last)


def consistency(model: nn.Module, attacked: Tensor, scores: Tensor, randomness: Randomness) -> Tensor:
    """Return the mean over images of (f(x') − f(x))², the consistency term of TRADES (Zhang et al., ICML 2019).

    TRADES is defined for classifiers and compares their class probabilities; this function compares scores. The
    gradient flows through f(x') and f(x). The forward pass at x' draws the same random numbers as the pass at x, and
    updates no running statistics.

    Args:
        attacked: The attacked images x' (B, 3, H, W).
        scores: Scores f(x) (B,) of the clean images.
        randomness: Random state before the pass that computed `scores`.
    """
    return (randomness.replay(model, attacked).float() - scores.float()).square().mean()
