"""Parameter groups, learning-rate schedule and precision of training (docs/METHOD.md §5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from srm_model.config import SRMConfig


def parameter_groups(model: nn.Module, config: SRMConfig) -> list[dict[str, Any]]:
    """Return parameter groups for AdamW: backbone and other parameters, each with and without weight decay.

    Parameters with at most one dimension (norms, biases, scalars) and tables of position biases have no weight decay.
    Frozen parameters are in no group. The schedule sets the `lr` of each group to its `base_lr` times a factor.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "backbone" if name.startswith("backbone.") else "neck"
        decays = parameter.ndim > 1 and "bias" not in name.rpartition(".")[2]
        key = part if decays else f"{part}_no_decay"
        lr = config.lr_backbone if part == "backbone" else config.lr_neck
        group = groups.setdefault(
            key,
            {
                "name": key,
                "params": [],
                "lr": lr,
                "base_lr": lr,
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def lr_factor(step: int, *, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate at `step`, which counts from 0.

    The factor rises linearly from 1/warmup to 1 in `warmup` steps. Then it decays by a cosine and reaches 0 after
    `steps` steps.
    """
    if step < warmup:
        return warmup_share(step, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def warmup_share(step: int, warmup: int) -> float:
    """Return a factor that rises linearly from 1/warmup to 1 in `warmup` steps. `step` counts from 0."""
    return 1.0 if step >= warmup else (step + 1) / warmup


def warmup_steps(config: SRMConfig, steps_per_epoch: int) -> int:
    """Return the number of steps in the config's warm-up epochs, at most a quarter of all steps."""
    return min(config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch // 4)


@torch.no_grad()
def average_weights(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Update the average of the weights with decay min(`decay`, (1 + t) / (10 + t)) at `step` t; copy all buffers."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([*average.parameters()], [*model.parameters()], weight)
    for own, other in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(other)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype for autocast, or None for fp32.

    "auto" is fp32 on a CPU, bf16 on a GPU that supports bf16, and fp16 on other GPUs.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
