"""Scores of a model over a data set, and their correlation with the labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from srm_model.metrics import LogisticMap, plcc, srocc
from srm_model.modules import evaluating
from srm_model.training.seeding import seeded


def predict(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 8,
    workers: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Scores of every image in the data set's order, float64 (n,).

    In eval mode and fp32, whatever the precision of training; the mode of every submodule is put back.
    The scores do not depend on `batch_size`, except where the model is stochastic: it draws once a batch,
    seeded.
    `device` defaults to where the model is.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, pin_memory=device.type == "cuda")
    scores = []
    with (
        evaluating(model),
        torch.inference_mode(),
        seeded(0),
        tqdm(
            total=len(dataset), unit="img", desc="scoring", leave=False, disable=None if progress else True
        ) as bar,
    ):
        for images, _ in loader:
            batch = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            scores.append(model(batch).double().cpu().numpy())
            bar.update(len(images))
    return np.concatenate(scores)


def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 8,
    logistic: LogisticMap | None = None,
    workers: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """SROCC on raw scores and PLCC after `logistic`, the map frozen on validation (None: plain Pearson).

    Returns the contents of `evaluation.json`: split, srocc, plcc, n, scores, mos, names, logistic, labels.
    """
    scores = predict(model, dataset, batch_size=batch_size, workers=workers, device=device, progress=progress)
    mapped = scores if logistic is None else logistic(scores)
    return {
        "split": getattr(dataset, "split", None),
        "srocc": srocc(scores, dataset.mos),
        "plcc": plcc(mapped, dataset.mos),
        "n": len(scores),
        "scores": scores.tolist(),
        "mos": np.asarray(dataset.mos, dtype=float).tolist(),
        "names": list(dataset.names),
        "logistic": None if logistic is None else logistic.to_dict(),
        "labels": dataset.labels,
    }
