"""`srm-iqa audit`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from srm_model import runs
from srm_model.attacks import audit
from srm_model.attacks.certify import certificate, smoothed_scores
from srm_model.attacks.problem import radius_of
from srm_model.attacks.suite import spread
from srm_model.checkpoint import read_card
from srm_model.cli.options import attack_config_from, device_from
from srm_model.cli.streams import as_named, table
from srm_model.config import SRMConfig
from srm_model.files import write_json
from srm_model.reports import write_audit

VERDICTS = {True: "passed", False: "failed", None: "left open"}


def run(args: argparse.Namespace) -> int:
    """Audit each checkpoint, write its page, print its checks; 1 where a check failed."""
    folders = runs.checkpoints(args.folder)
    with runs.writing(args.folder):
        return int(_audit_all(args, folders))


def _audit_all(args: argparse.Namespace, folders: list[Path]) -> bool:
    """Whether a check failed."""
    device = device_from(args.device)
    failed = False
    for folder in folders:
        document = read_card(folder)
        trained = SRMConfig.from_dict(document["config"])
        config = attack_config_from(args, trained)
        progress = not args.no_progress
        dataset = runs.dataset_for(
            document["card"], trained, root=args.data, split=args.split, progress=progress
        )
        surrogate = Path(args.surrogate) if args.surrogate else runs.surrogate_of(folder)
        if device.type == "cpu":
            runs.keep_memory()
        model, _ = runs.open_checkpoint(folder, device, config.backend)
        eps = args.eps
        if eps is None:
            eps = (config.eps_linf_tables if args.norm == "linf" else config.eps_l2_tables)[-1]
        found = audit(
            model,
            dataset,
            norm=args.norm,
            eps=eps,
            surrogate=None
            if surrogate is None
            else runs.open_checkpoint(surrogate, device, config.backend)[0],
            config=config,
            images=args.images,
            seed=config.seed,
            progress=None if args.no_progress else lambda title: runs.say(f"auditing: {title}"),
        )
        result = {
            **found.to_dict(),
            "title": f"Audit of {document['neck']} on {document['backbone']}",
            "dataset": f"{dataset.name}, {dataset.split} split",
            "sha256": document["sha256"],
            "config": config.to_dict(),
        }
        if args.certify:
            if not args.no_progress:
                runs.say("auditing: median smoothing")
            result["certificates"] = certificates(model, dataset, config, args.images)
        write_json(folder / "audit.json", result)
        page = write_audit(result, folder / "audit.html")
        rows = [[check.title, VERDICTS[check.passed], check.figure] for check in found.checks]
        print(table(["check", "verdict", "measured"], rows))
        print(f"{as_named(page)}: {len(found.failed)} of {len(found.checks)} checks failed")
        failed |= not found.passed
    return failed


def certificates(model: nn.Module, dataset: Any, config: SRMConfig, limit: int) -> list[dict[str, Any]]:
    """Median smoothing of `limit` images, for each budget of `config.eps_smoothing`."""
    indices = spread(len(dataset), limit)
    images = torch.stack([torch.as_tensor(dataset[index][0]) for index in indices])
    scores = smoothed_scores(
        model,
        images,
        sigma=config.smoothing_sigma,
        samples=config.smoothing_samples,
        batch_size=config.attack_batch_size,
        generator=torch.Generator().manual_seed(config.seed),
    )
    found = []
    for stated in config.eps_smoothing:
        entry = certificate(
            scores,
            eps=radius_of("l2", stated, images[0]),
            sigma=config.smoothing_sigma,
            confidence=config.smoothing_confidence,
        )
        lower, upper = np.array(entry.lower), np.array(entry.upper)
        apart = (lower[:, None] > upper[None, :]) | (lower[None, :] > upper[:, None])
        pairs = len(lower) * (len(lower) - 1)
        found.append(
            {"stated": stated, **entry.to_dict(), "ordered": float(apart.sum() / pairs) if pairs else 0.0}
        )
    return found
