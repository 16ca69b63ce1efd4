"""The context that all jobs of a study share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from srm_model import runs
from srm_model.study.file import Model, Study


@dataclass(frozen=True)
class Context:
    """A study, its folder, and the settings with which its jobs run."""

    study: Study
    out: Path
    device: torch.device
    workers: int = 0
    progress: bool = True
    _splits: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def splits(self, model: Model) -> dict[str, Any]:
        """Return a model's datasets by split.

        The datasets are opened once for each combination of dataset name, seed and image size.
        """
        key = model.data, model.config.seed, model.config.image_size
        if key not in self._splits:
            root = self.study.data[model.data]
            self._splits[key] = runs.open_splits(root, model.config, progress=self.progress)
        return self._splits[key]

    def test(self, model: Model) -> Any:
        """Return a model's test split."""
        return self.splits(model)["test"]

    def opened(self, model: Model) -> tuple[Any, dict[str, Any]]:
        """Load a trained model onto the device; return the model and its card."""
        return runs.open_checkpoint(self.out / model.folder, self.device)
