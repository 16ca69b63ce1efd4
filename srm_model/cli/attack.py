"""`srm-iqa attack`."""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from srm_model import ranks
from srm_model.attacks import Suite, save_examples
from srm_model.checkpoint import read_card
from srm_model.cli import runs
from srm_model.cli.options import attack_config_from
from srm_model.cli.train import logistic_of
from srm_model.config import SRMConfig
from srm_model.files import read_json, write_json
from srm_model.metrics import doubts

SUITES = {"paper": Suite.paper, "extended": Suite.extended}
HEADER = (
    "neck",
    "norm",
    "eps",
    "clean SROCC",
    "worst SROCC",
    "clean PLCC",
    "worst PLCC",
    "worst attack",
    "images",
)


def run(args: argparse.Namespace) -> None:
    """Attack each checkpoint at each budget, print clean and worst correlations."""
    if args.eps is not None and len(args.norm) > 1:
        raise ValueError("--eps needs one --norm: a budget means nothing without its norm")
    folders = runs.checkpoints(args.folder)
    with runs.process_group() as writes, runs.writing(args.folder):
        results = _attack_all(args, folders, writes)
    if writes:
        print_table(results)


def print_table(results: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Print a line for each checkpoint's result, and below them which figures may overstate robustness."""
    print(runs.table(HEADER, [row(folder, result) for folder, result in results]))
    for folder, result in results:
        for doubt in doubts(result.get("attacks", {})):
            print(f"{folder.name}, {result['norm']} {budget_text(result['norm'], result['eps'])}, {doubt}")


def _attack_all(
    args: argparse.Namespace, folders: list[Path], writes: bool
) -> list[tuple[Path, dict[str, Any]]]:
    device = runs.device_from(args.device)
    results = []
    for folder in folders:
        document = read_card(folder)
        trained = SRMConfig.from_dict(document["config"])
        config = attack_config_from(args, trained)
        progress = writes and not args.no_progress
        dataset = runs.dataset_for(
            document["card"], trained, root=args.data, split=args.split, progress=progress
        )
        surrogate = Path(args.surrogate) if args.surrogate else runs.surrogate_of(folder)
        if surrogate is None and writes:
            runs.say(f"{folder}: no surrogate beside it, so the suite runs without the transfer attack")
        for norm in args.norm:
            for eps in args.eps or (config.eps_linf_tables if norm == "linf" else config.eps_l2_tables):
                result = attack_checkpoint(
                    folder,
                    dataset,
                    norm=norm,
                    eps=eps,
                    config=config,
                    device=device,
                    surrogate=surrogate,
                    limit=args.images,
                    keep=args.keep,
                    suite=args.suite,
                    progress=progress,
                    writes=writes,
                )
                results.append((folder, result))
    return results


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
    with warnings.catch_warnings():
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
    found = {**result.to_dict(), "kernels": runs.kernels_of(model.config, device), "settings": settings}
    if progress:
        runs.say_kernels(model.config, device)
    if writes:
        save_examples(result, pictures)
        write_json(path, found)
        shutil.rmtree(unfinished)
    return found


def row(folder: Path, result: dict[str, Any]) -> list[Any]:
    """A line under `HEADER`."""
    clean, worst = result["clean"], result["worst"]
    return [
        folder.name,
        result["norm"],
        budget_text(result["norm"], result["eps"]),
        clean["srocc"],
        worst["srocc"],
        clean["plcc"],
        worst["plcc"],
        worst["srocc_attack"],
        len(result["mos"]),
    ]


def budget_text(norm: str, eps: float) -> str:
    """A budget as people write it."""
    return f"{eps * 255:.4g}/255" if norm == "linf" else f"{eps:.4g}"
