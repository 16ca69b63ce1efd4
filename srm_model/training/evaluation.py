"""Score a dataset and compute the correlations of the scores with its labels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from srm_model import ranks
from srm_model.data.base import type_level_result
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
    """Score every image of a dataset, in evaluation mode and fp32.

    For a stochastic model, the random generators are seeded before each batch, so the scores depend on `batch_size`. In
    a process group, every rank calls this function. The batches are distributed over the ranks, and every rank returns
    all scores.

    Args:
        model: Model that maps images (B, 3, H, W) to scores (B,). Afterwards, each of its modules has its
            original mode (training or evaluation).
        dataset: Dataset of pairs (image, label), which are read by index.
        batch_size: Images per forward pass.
        workers: Number of processes that load images.
        device: Device of the model. Default: the device of its parameters.
        progress: Whether to show a progress bar.

    Returns:
        Scores in the order of the dataset, float64, (n,).

    Raises:
        ValueError: An image cannot be read.
        WorkerError: A process that loads images was killed.
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
                # The random numbers of a batch do not depend on the rank.
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
    """Compute SROCC on raw scores and PLCC on scores after a logistic map (docs/METHOD.md §5).

    Arguments that are not listed, and the errors, are as in `predict`.

    Args:
        dataset: Dataset as in `predict`, with the attributes `mos`, `names` and `labels`.
        logistic: Logistic map, fitted on clean validation scores. Default: no map; PLCC uses the raw scores.

    Returns:
        The contents of `evaluation.json`, with the keys split, srocc, plcc, n, scores, mos, names, logistic and labels.
        With labels "opinions:<dataset>", the key type_level_srocc is added: the SROCC of a predictor that knows only
        distortion type and level, on the same images (see `TID2013`).
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
        **type_level_result(dataset, dataset.names),
    }
