"""A suite run on a checkpoint, and its file."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from srm_model import ranks, runs
from srm_model.attacks import Suite, save_examples
from srm_model.checkpoint import read_card
from srm_model.config import SRMConfig
from srm_model.files import read_json, write_json
from srm_model.runs.training import logistic_of

SUITES = {"paper": Suite.paper, "extended": Suite.extended}


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
    path = folder / "attacks" / within / f"{norm}-{eps:.6g}.json"
    pictures = path.with_suffix("")
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
    found = ranks.from_first(lambda: read_json(path) if path.is_file() else None)
    if isinstance(found, dict) and found.get("settings") == settings:
        return found
    if progress:
        runs.say(f"attacking {folder} with {norm} {budget_text(norm, eps)}")
    if device.type == "cpu":
        runs.keep_memory()
    model, card = runs.open_checkpoint(folder, device, config.backend)
    unfinished = pictures / "unfinished"
    with warnings.catch_warnings(), runs.running() as ran:
        warnings.filterwarnings(
            "ignore", message=".*may overstate robustness"
        )  # printed below the table instead
        result = SUITES[suite](config).run(
            model,
            dataset,
            norm=norm,
            eps=eps,
            surrogate=None
            if surrogate is None
            else runs.open_checkpoint(surrogate, device, config.backend)[0],
            logistic=logistic_of(card),
            batch_size=config.attack_batch_size,
            seed=config.seed,
            progress=runs.bars(progress),
            keep=keep,
            limit=limit,
            resume=unfinished,
        )
    found = {**result.to_dict(), "kernels": runs.kernels_of(model.config, device, ran), "settings": settings}
    if progress:
        runs.say_kernels(model.config, device, ran)
    if writes:
        save_examples(result, pictures)
        write_json(path, found)
        shutil.rmtree(unfinished)
    return found


def budget_text(norm: str, eps: float) -> str:
    """A budget as people write it."""
    return f"{eps * 255:.4g}/255" if norm == "linf" else f"{eps:.4g}"
