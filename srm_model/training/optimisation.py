"""Parameter groups, learning-rate schedule and precision (docs/METHOD.md §5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from srm_model.config import SRMConfig


def parameter_groups(model: nn.Module, config: SRMConfig) -> list[dict[str, Any]]:
    """Groups for AdamW: backbone and the rest, each with and without weight decay.

    No decay on parameters of at most one dimension (norms, biases, scalars) and on tables of position biases;
    frozen parameters are in no group.
    Every group has `name`, `lr` and `base_lr`; the schedule sets `lr` to a factor times `base_lr`.
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
    """Linear warm-up over `warmup` steps to 1, then half a cosine that reaches 0 after the last of `steps`.

    `step` counts from 0. The first step already moves: its factor is 1/warmup.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def warmup_steps(config: SRMConfig, steps_per_epoch: int) -> int:
    """The config's warm-up epochs, but at most a quarter of the run, so that short runs still train."""
    return min(config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch // 4)


@torch.no_grad()
def average_weights(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Let the average follow after step `step` (from 0), closely at first: min(decay, (1 + t) / (10 + t)).

    Buffers are the model's own: they are averages already, or constant.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([*average.parameters()], [*model.parameters()], weight)
    for own, other in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(other)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to, None for fp32; `auto`: bf16 on a GPU that has it, fp16 on others, fp32 on CPU."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
