"""A small model with IQAModel's interface and a dataset in memory. A training takes a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srm_model.config import SRMConfig

CONFIG = SRMConfig(epochs=3, batch_size=4, warmup_epochs=1, lr_backbone=1e-2, lr_neck=1e-2, image_size=8)


class ToyModel(nn.Module):
    """Score images with a small network. Dropout makes a training depend on the random state."""

    backbone_name, neck_name, stochastic = "toy", "srm", False

    def __init__(self, config: SRMConfig = CONFIG) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(1)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Dropout(0.2))
        self.neck = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)
        self.tau = nn.Parameter(torch.zeros(()))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.calls: list[str] = []

    def forward(self, images: Tensor, return_losses: bool = False) -> Any:
        features = self.backbone(images).mean((2, 3))
        scores = self.head(torch.tanh(self.neck(features)))[:, 0]
        return (scores, {"tau": self.tau.square()}) if return_losses else scores

    def calibrate(self, images: Tensor) -> None:
        self.calls.append(f"calibrate {len(images)}")

    def clamp_(self) -> None:
        self.calls.append("clamp")

    def diagnose(self, images: Tensor) -> dict[str, Any]:
        return {"tau": float(self.tau), "gate_weights": [0.5, 0.5], "nothing": float("nan")}


class ToySet(torch.utils.data.Dataset[Any]):
    """Noise images whose brightness increases with their label."""

    labels, split, root = "mos", "train", Path("toy")

    def __init__(self, count: int = 18, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.mos = generator.uniform(size=count)
        noise = generator.uniform(size=(count, 3, 8, 8))
        self.images = torch.tensor(0.5 * noise + 0.5 * self.mos[:, None, None, None], dtype=torch.float32)
        self.names = [f"image{i}.png" for i in range(count)]
        self.fingerprint = f"{count}-{seed}"
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.mos)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        return self.images[index], float(self.mos[index])
