"""A suite run on a checkpoint, and its file."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srm_model import ranks, runs
from srm_model.attacks import Suite, save_examples
from srm_model.checkpoint import read_card
from srm_model.config import SRMConfig
from srm_model.files import read_json, write_json
from srm_model.metrics import LogisticMap
from srm_model.norms import norm_of
from srm_model.runs.training import logistic_of


def attack_checkpoint(
    folder: Path,
    dataset: Any,
    *,
    norm: str,
    eps: float,
    config: SRMConfig,
    device: torch.device,
    surrogate: Path | None,
    limit: int | None = None,
    keep: int = 0,
    suite: str = "paper",
    progress: bool = True,
    writes: bool = True,
    within: str = "",
) -> dict[str, Any]:
    """Run a suite into `folder/attacks/`, or the folder `within` that; returns what the JSON file there holds.

    A result there that these very arguments gave is taken as it is; one that was cut off is continued. In a process
    group every rank calls this, and the one that `writes` writes.
    """
    settings = {
        "checkpoint": read_card(folder)["sha256"],
        "surrogate": None if surrogate is None else read_card(surrogate)["sha256"],
        "dataset": dataset.fingerprint,
        "split": dataset.split,
        "limit": limit,
        "keep": keep,
        "suite": suite,
        "seed": config.seed,
        "attack": config.attack_settings(),
    }
    path = folder / "attacks" / within / result_name(norm, eps)
    if (known := known_result(path, settings)) is not None:
        return known
    if progress:
        runs.say(f"attacking {folder} with {norm} {norm_of(norm).brief(eps)}")
    if device.type == "cpu":
        runs.keep_memory()
    model, card = runs.open_checkpoint(folder, device, config.backend)
    with runs.running() as ran:
        found = attack_model(
            model,
            dataset,
            path,
            settings,
            norm=norm,
            eps=eps,
            config=config,
            surrogate=None
            if surrogate is None
            else runs.open_checkpoint(surrogate, device, config.backend)[0],
            logistic=logistic_of(card),
            limit=limit,
            keep=keep,
            suite=suite,
            progress=progress,
            writes=writes,
            about=lambda: {"kernels": runs.kernels_of(model.config, device, ran)},
        )
    if progress:
        runs.say_kernels(model.config, device, ran)
    return found


def result_name(norm: str, eps: float) -> str:
    """The file of a result among those of one model."""
    return f"{norm}-{eps:.6g}.json"


def known_result(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a file holds, if these settings gave it; the same on every rank."""
    found = ranks.from_first(lambda: read_json(path) if path.is_file() else None)
    return found if isinstance(found, dict) and found.get("settings") == settings else None


def attack_model(
    model: nn.Module,
    dataset: Any,
    path: Path,
    settings: dict[str, Any],
    *,
    norm: str,
    eps: float,
    config: SRMConfig,
    surrogate: nn.Module | None,
    logistic: LogisticMap | None = None,
    limit: int | None = None,
    keep: int = 0,
    suite: str = "paper",
    progress: bool = True,
    writes: bool = True,
    about: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Run a suite on any model into the file `path`, pictures beside it; returns what the file holds.

    `settings`, and what `about` returns afterwards, are kept in it. A run that was cut off is continued.
    """
    pictures = path.with_suffix("")
    unfinished = pictures / "unfinished"
    with warnings.catch_warnings():
        # The command prints these below its table instead.
        warnings.filterwarnings("ignore", message=".*may overstate robustness")
        result = Suite.named(suite, config).run(
            model,
            dataset,
            norm=norm,
            eps=eps,
            surrogate=surrogate,
            logistic=logistic,
            batch_size=config.attack_batch_size,
            seed=config.seed,
            progress=runs.bars(progress),
            keep=keep,
            limit=limit,
            resume=unfinished,
        )
    found = {**result.to_dict(), **about(), "settings": settings}
    if writes:
        save_examples(result, pictures)
        write_json(path, found)
        shutil.rmtree(unfinished)
    return found
