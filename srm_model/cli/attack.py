"""`srm-iqa attack`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srm_model import runs
from srm_model.checkpoint import read_card
from srm_model.cli import external
from srm_model.cli.options import attack_config_from, budgets_of, device_from
from srm_model.cli.tables import Columns, print_rows, print_type_level
from srm_model.config import SRMConfig
from srm_model.metrics import doubts
from srm_model.norms import norm_of
from srm_model.runs.attacking import attack_checkpoint

COLUMNS: Columns = {
    "model": "model",
    "norm": "norm",
    "eps": lambda row: norm_of(row["norm"]).brief(row["eps"]),
    "clean SROCC": "clean_srocc",
    "worst SROCC": "worst_srocc",
    "clean PLCC": "clean_plcc",
    "worst PLCC": "worst_plcc",
    "worst attack": "worst_attack",
    "images": "images",
}


def run(args: argparse.Namespace) -> None:
    """Attack each checkpoint at each budget; print the correlations on clean images and under the strongest attack."""
    if args.eps is not None and len(args.norm) > 1:
        raise ValueError(
            f"--eps was given with --norm {' '.join(args.norm)}; expected only the norm of these budgets"
        )
    external.check_options(args)
    if args.model is not None:
        with runs.process_group() as writes, runs.writing(args.out):
            results = external.attack(args, writes)
    else:
        folders = runs.checkpoints(args.folder)
        with runs.process_group() as writes, runs.writing(args.folder):
            results = _attack_all(args, folders, writes)
    if writes:
        print_results(results, as_json=args.json)


def print_results(
    results: Sequence[tuple[Path, dict[str, Any]]], *, as_json: bool = False, table: str | None = None
) -> None:
    """Print one row per result, as in `print_rows`.

    Without `as_json`, also print the SROCC of a predictor that knows only distortion type and level, and a line for
    each attack that may overstate robustness.
    """
    rows = [row(folder, result) for folder, result in results]
    print_rows(rows, COLUMNS, as_json=as_json, table=table)
    if not as_json:
        print_type_level(rows, "model")
    for found in [] if as_json else rows:
        for doubt in found["doubts"]:
            print(f"{found['model']}, {found['norm']} {norm_of(found['norm']).brief(found['eps'])}, {doubt}")


def _attack_all(
    args: argparse.Namespace, folders: list[Path], writes: bool
) -> list[tuple[Path, dict[str, Any]]]:
    device = device_from(args.device)
    results = []
    for folder in folders:
        document = read_card(folder)
        trained = SRMConfig.from_dict(document["config"])
        config = attack_config_from(args, trained)
        progress = writes and not args.no_progress
        budgets = [(norm, eps) for norm in args.norm for eps in budgets_of(norm, args.eps, config)]
        dataset = runs.dataset_for(
            document["card"], trained, root=args.data, split=args.split, progress=progress
        )
        surrogate = Path(args.surrogate) if args.surrogate else runs.surrogate_of(folder)
        if surrogate is None and writes:
            runs.say(
                f"{folder}: has no sibling checkpoint to use as surrogate; the transfer attack is skipped"
            )
        for norm, eps in budgets:
            result = attack_checkpoint(
                folder,
                dataset,
                norm=norm,
                eps=eps,
                config=config,
                device=device,
                surrogate=surrogate,
                limit=args.limit or args.images,
                keep=args.keep,
                suite=args.suite,
                progress=progress,
                writes=writes,
            )
            results.append((folder, result))
    return results


def row(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return the row that `print_rows` prints for a result.

    The entry "doubts" contains a warning for each attack that may overstate robustness.
    """
    clean, worst = result["clean"], result["worst"]
    return {
        "model": folder.name,
        "norm": result["norm"],
        "eps": result["eps"],
        "clean_srocc": clean["srocc"],
        "worst_srocc": worst["srocc"],
        "clean_plcc": clean["plcc"],
        "worst_plcc": worst["plcc"],
        "worst_attack": worst["srocc_attack"],
        "images": len(result["mos"]),
        "type_level_srocc": result.get("type_level_srocc"),
        "doubts": doubts(result.get("attacks", {})),
    }
