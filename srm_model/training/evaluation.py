"""Scores of a model over a data set, and their correlation with the labels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from srm_model import ranks
from srm_model.metrics import LogisticMap, plcc, srocc
from srm_model.modules import device_of, evaluating, is_stochastic
from srm_model.training.faults import reading, reading_fault, worker_start
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
    seeded. `device` defaults to where the model is.
    In a process group every rank calls this; the batches are dealt to the ranks, and each gets all scores, those of
    one process. An image that cannot be read is a ValueError, a worker that was killed a WorkerError.
    """
    device = torch.device(device) if device is not None else device_of(model)
    rank, world = ranks.place()
    starts = range(0, len(dataset), batch_size)[rank::world]
    loader = DataLoader(
        dataset,
        batch_sampler=[list(range(i, min(i + batch_size, len(dataset)))) for i in starts],
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_start(),
    )
    stochastic = is_stochastic(model)
    found: dict[int, np.ndarray] = {}
    try:
        with (
            evaluating(model),
            torch.inference_mode(),
            seeded(0),
            reading(loader) as items,
            tqdm(
                total=len(dataset),
                unit="img",
                desc="scoring",
                leave=False,
                disable=None if progress and rank == 0 else True,
            ) as bar,
        ):
            for start, (images, _) in zip(starts, items, strict=True):
                batch = images.to(device, non_blocking=True, memory_format=torch.channels_last)
                # What a batch draws must not depend on which rank scores it.
                with seeded(0, start) if stochastic else nullcontext():
                    found[start] = model(batch).double().cpu().numpy()
                bar.update(world * len(images))
    except Exception as error:
        raise reading_fault(error) from None
    whole = {start: part for share in ranks.gather(found) for start, part in share.items()}
    return np.concatenate([whole[start] for start in sorted(whole)])


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
