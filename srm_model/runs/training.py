"""Train a model, save it in its folder and evaluate it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from srm_model import ranks, runs
from srm_model.checkpoint import read_card
from srm_model.config import SRMConfig
from srm_model.files import read_json, write_json
from srm_model.metrics import LogisticMap
from srm_model.model import IQAModel, build_model
from srm_model.training import evaluate as evaluate_model
from srm_model.training import train as train_model
from srm_model.training.seeding import seeded

EVALUATION = "evaluation.json"


def new_model(backbone: str, neck: str, config: SRMConfig, *, pretrained: bool) -> IQAModel:
    """Build a model. Initial weights that are not pretrained depend only on the config's seed."""
    with seeded(config.seed):
        return build_model(backbone, neck=neck, pretrained=pretrained, config=config)


def train_neck(
    model: IQAModel,
    folder: Path,
    splits: dict[str, Any],
    *,
    device: torch.device,
    freeze_backbone: bool = False,
    resume: bool = True,
    workers: int = 0,
    progress: bool = True,
    **options: Any,
) -> None:
    """Train a model, evaluate its best epoch on the test split, and save the result in `evaluation.json`.

    With `resume`, finished epochs are not trained again. The evaluation is skipped if `evaluation.json` already has the
    result for the weights of the best epoch. In a process group, every rank calls this function, and the first rank
    writes the files.

    Args:
        model: Model to train.
        folder: Folder of the checkpoint.
        splits: Datasets by split: "train", "val" and "test".
        device: Device of the training.
        freeze_backbone: Whether to train only the neck and the head.
        resume: Whether to continue an unfinished training in the folder.
        workers: Number of processes that load images.
        progress: Whether to report progress on stderr.
        options: Further arguments of `srm_model.training.train`.
    """
    if device.type == "cpu":
        runs.keep_memory()
    if progress:
        runs.say(f"training {model.neck_name} on {len(splits['train'])} images, {device}")
    with runs.running() as trained:
        train_model(
            model,
            splits["train"],
            splits["val"],
            folder,
            workers=workers,
            resume=resume,
            progress=progress,
            device=device,
            freeze_backbone=freeze_backbone,
            card={"dataset": runs.dataset_card(splits["train"])},
            **options,
        )
    if progress:
        runs.say_kernels(model.config, device, trained)
    path = folder / EVALUATION
    digest = ranks.from_first(lambda: read_card(folder)["sha256"])
    if ranks.from_first(lambda: path.is_file() and read_json(path).get("sha256") == digest):
        return
    model, card = runs.open_checkpoint(folder, device)
    with runs.running() as evaluated:
        found = evaluate_model(
            model,
            splits["test"],
            batch_size=model.config.batch_size,
            logistic=logistic_of(card),
            workers=workers,
            progress=progress,
        )
    if ranks.place()[0] == 0:
        kernels = runs.kernels_of(model.config, device, evaluated)
        write_json(path, {**found, "kernels": kernels, "sha256": digest})


def logistic_of(card: dict[str, Any]) -> LogisticMap | None:
    """Return the logistic map that is stored in a checkpoint's card, or None if the card has no logistic map.

    Training fits the map to the scores of the validation set.
    """
    values = card.get("logistic")
    return None if values is None else LogisticMap.from_dict(values)
