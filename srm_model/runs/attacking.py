"""Run a suite of attacks on a model and save the result in a file."""

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
from srm_model.data.base import type_level_result
from srm_model.files import read_json, write_json
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
    """Attack a checkpoint and save the result in `folder/attacks/`.

    An existing result for the same arguments is not computed again. An interrupted attack is resumed. In a process
    group, every rank must call this function.

    Args:
        folder: Folder of the checkpoint.
        dataset: Split to attack.
        norm, eps: Norm and budget ε of the attacks.
        config: Config with the settings of the attacks.
        device: Device of the model.
        surrogate: Checkpoint of the surrogate for transfer attacks, or None to skip transfer attacks.
        limit: Number of images to attack, evenly spaced over the dataset. Default: all.
        keep: Number of attacked images to save as pictures.
        suite: Name of the suite.
        progress: Whether to report progress on stderr.
        writes: Whether this rank writes the result.
        within: Subfolder of `folder/attacks/` for the result. Default: the result is saved in `folder/attacks/` itself.

    Returns:
        The contents of the JSON file. With labels "opinions:<dataset>", `type_level_srocc` is the SROCC of a predictor
        that knows only distortion type and level, on the attacked images (see `TID2013`).
    """
    chosen: dict[str, Any] = {"limit": limit, "keep": keep, "suite": suite}
    settings = {
        "checkpoint": read_card(folder)["sha256"],
        "surrogate": None if surrogate is None else read_card(surrogate)["sha256"],
        "dataset": dataset.fingerprint,
        "split": dataset.split,
        **chosen,
        "seed": config.seed,
        "attack": config.attack_settings(),
    }
    path = folder / "attacks" / within / result_name(norm, eps)
    if (known := known_result(path, settings)) is not None:
        return {**type_level_result(dataset, known["names"]), **known}
    if progress:
        runs.say(f"attacking {folder} with {norm} {norm_of(norm).brief(eps)}")
    if device.type == "cpu":
        runs.keep_memory()
    model, card = runs.open_checkpoint(folder, device, config.backend)
    other = None if surrogate is None else runs.open_checkpoint(surrogate, device, config.backend)[0]
    with runs.running() as ran:
        found = attack_model(
            model,
            dataset,
            path,
            settings,
            norm=norm,
            eps=eps,
            config=config,
            surrogate=other,
            logistic=logistic_of(card),
            progress=progress,
            writes=writes,
            about=lambda: {"kernels": runs.kernels_of(model.config, device, ran)},
            **chosen,
        )
    if progress:
        runs.say_kernels(model.config, device, ran)
    return found


def result_name(norm: str, eps: float) -> str:
    """Return the file name of a result."""
    return f"{norm}-{eps:.6g}.json"


def known_result(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return a result file's contents on all ranks, or None if the file is missing or has other settings."""
    found = ranks.from_first(lambda: read_json(path) if path.is_file() else None)
    return found if isinstance(found, dict) and found.get("settings") == settings else None


def attack_model(
    model: nn.Module,
    dataset: Any,
    path: Path,
    settings: dict[str, Any],
    *,
    config: SRMConfig,
    suite: str,
    progress: bool,
    writes: bool,
    about: Callable[[], dict[str, Any]] = dict,
    **options: Any,
) -> dict[str, Any]:
    """Attack any model and save the result in a file, with pictures in a folder next to the file.

    An interrupted attack is resumed.

    Args:
        model: Model to attack.
        dataset, config, suite, progress, writes: As in `attack_checkpoint`.
        path: File of the result.
        settings: Settings to save in the file. `known_result` later compares them with the settings of a new attack.
        about: Function that is called after the attack and returns a dict of further facts about the run. The entries
            of this dict are also saved in the file. Default: no entries.
        options: Further arguments of `Suite.run`: norm, eps, surrogate, logistic, limit and keep.

    Returns:
        The contents of the file.
    """
    pictures = path.with_suffix("")
    unfinished = pictures / "unfinished"
    with warnings.catch_warnings():
        # `srm-iqa attack` prints these warnings below its table.
        warnings.filterwarnings("ignore", message=".*may overstate robustness")
        result = Suite.named(suite, config).run(
            model,
            dataset,
            batch_size=config.attack_batch_size,
            seed=config.seed,
            progress=runs.bars(progress),
            resume=unfinished,
            **options,
        )
    ceiling = type_level_result(dataset, result.names)
    found = {**result.to_dict(), **ceiling, **about(), "settings": settings}
    if writes:
        save_examples(result, pictures)
        write_json(path, found)
        shutil.rmtree(unfinished)
    return found
