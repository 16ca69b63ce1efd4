"""`srm-iqa audit`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from srm_model import runs
from srm_model.attacks import audit
from srm_model.attacks.certify import certify_dataset
from srm_model.checkpoint import read_card
from srm_model.cli import external
from srm_model.cli.options import attack_config_from, budgets_of, device_from
from srm_model.cli.streams import as_named
from srm_model.cli.tables import Columns, print_rows, print_text
from srm_model.config import SRMConfig
from srm_model.files import write_json
from srm_model.reports import write_audit

IMAGES = 16
VERDICTS = {True: "passed", False: "failed", None: "not run"}
COLUMNS: Columns = {
    "check": "title",
    "verdict": lambda row: VERDICTS[row["passed"]],
    "measured": "figure",
}


def run(args: argparse.Namespace) -> int:
    """Audit each checkpoint, or the model of `--model`; return 1 if a check failed and 0 otherwise."""
    external.check_options(args)
    args.limit = args.limit or (args.images if isinstance(args.images, int) else IMAGES)
    if args.model is not None:
        with runs.writing(args.out):
            external.check_owner(args)
            subject = external.Subject(args)
            if not subject.has_gradient:
                runs.say(
                    f"{args.model}: the scores have no gradient, which is not evidence of robustness; checks that need "
                    "gradients are not run"
                )
            about = {"title": f"Audit of {args.model}", "model_name": args.model, "size": args.size}
            found = _audit(
                args, subject.model, subject.dataset, subject.config, subject.surrogate, Path(args.out), about
            )
        return int(not found)
    folders = runs.checkpoints(args.folder)
    with runs.writing(args.folder):
        passed = [_audit_checkpoint(args, folder) for folder in folders]
    return int(not all(passed))


def _audit_checkpoint(args: argparse.Namespace, folder: Path) -> bool:
    device = device_from(args.device)
    document = read_card(folder)
    trained = SRMConfig.from_dict(document["config"])
    config = attack_config_from(args, trained)
    dataset = runs.dataset_for(
        document["card"], trained, root=args.data, split=args.split, progress=not args.no_progress
    )
    surrogate = Path(args.surrogate) if args.surrogate else runs.surrogate_of(folder)
    if device.type == "cpu":
        runs.keep_memory()
    model, _ = runs.open_checkpoint(folder, device, config.backend)
    other = None if surrogate is None else runs.open_checkpoint(surrogate, device, config.backend)[0]
    about = {
        "title": f"Audit of {document['neck']} on {document['backbone']}",
        "sha256": document["sha256"],
        "config": config.to_dict(),
    }
    return _audit(args, model, dataset, config, other, folder, about)


def _audit(
    args: argparse.Namespace,
    model: nn.Module,
    dataset: Any,
    config: SRMConfig,
    surrogate: nn.Module | None,
    folder: Path,
    about: dict[str, Any],
) -> bool:
    eps = budgets_of(args.norm, None if args.eps is None else [args.eps], config)[-1]
    found = audit(
        model,
        dataset,
        norm=args.norm,
        eps=eps,
        surrogate=surrogate,
        config=config,
        images=args.limit,
        seed=config.seed,
        # A model of --model may be a metric without gradients; a checkpoint of this package always has gradients.
        expect_gradient=args.model is None,
        progress=None if args.no_progress else lambda title: runs.say(f"auditing: {title}"),
    )
    result = {**found.to_dict(), **about, "dataset": f"{dataset.name}, {dataset.split} split"}
    if args.certify:
        if not args.no_progress:
            runs.say("auditing: median smoothing")
        result["certificates"] = certify_dataset(model, dataset, config, args.limit)
    write_json(folder / "audit.json", result)
    page = write_audit(result, folder / "audit.html")
    subject = {"model": about.get("model_name", folder.name), "norm": found.norm, "eps": found.eps}
    keys = ("title", "passed", "figure", "data")
    rows = [
        {**subject, "check": check.name, **{key: getattr(check, key) for key in keys}}
        for check in found.checks
    ]
    print_rows(rows, COLUMNS, as_json=args.json)
    failed = f"{len(found.failed)} of {len(found.checks)} checks failed"
    if not found.has_gradient:
        failed += "; the scores have no gradient, which is not evidence of robustness"
    print_text(f"{as_named(page)}: {failed}", as_json=args.json)
    return found.passed
