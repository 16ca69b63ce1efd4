"""Any model and any labelled images for `attack`, `audit` and `score`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srm_model.cli.options import attack_config_from, device_from, positive
from srm_model.config import SRMConfig

if TYPE_CHECKING:
    from srm_model.data import ImageQualityDataset
    from srm_model.external import ExternalModel, Interface


def add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that name a model and say how it takes images."""
    group = parser.add_argument_group(
        "another model",
        "Any model in place of a checkpoint. Importing MODULE runs its code; nothing else is imported by name.",
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help="MODULE:NAME, an nn.Module or a callable that returns one, or an exported program, FILE.pt2",
    )
    group.add_argument(
        "--size", type=positive, default=512, metavar="PX", help="side of the square it gets (default: 512)"
    )
    group.add_argument(
        "--imagenet", action="store_true", help="normalise images by ImageNet's mean and standard deviation"
    )
    for option, default in (("mean", 0.0), ("std", 1.0)):
        group.add_argument(
            f"--{option}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"normalise images in [0, 1] by this {option} per channel (default: {default:g})",
        )
    group.add_argument(
        "--peak",
        type=float,
        default=1.0,
        metavar="V",
        help="value of white, such as 255 for a model that takes 0 to 255 (default: 1)",
    )
    return group


def add_labels(group: argparse._ArgumentGroup) -> None:
    """Add the options that name images, their labels and where results go."""
    group.add_argument(
        "--lower-is-better",
        action="store_true",
        default=None,
        help="low scores of the model mean high quality",
    )
    group.add_argument("--labels", metavar="FILE", help="table of scores for the images, with a header")
    group.add_argument(
        "--image-column", metavar="NAME", help="column of file names (default: the only one that fits)"
    )
    group.add_argument(
        "--score-column", metavar="NAME", help="column of scores, higher is better (default: the only one)"
    )
    group.add_argument(
        "--label-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="worst and best score that the labels can have (default: those in the table)",
    )
    group.add_argument("--out", metavar="DIR", help="folder for results")


def images_of(text: str) -> int | str:
    """A number of images, or a folder of them, for argparse."""
    return positive(text) if text.isdecimal() and not Path(text).is_dir() else text


def interface_of(args: argparse.Namespace, *, lower_is_better: bool | None) -> Interface:
    """How the model of the arguments takes its images."""
    from srm_model.external import IMAGENET, Interface

    mean, std = args.mean or (0.0,) * 3, args.std or (1.0,) * 3
    if args.imagenet:
        if args.mean or args.std:
            raise ValueError("--imagenet and --mean or --std: expected one of them")
        mean, std = IMAGENET
    return Interface(tuple(mean), tuple(std), args.peak, lower_is_better)


def check_options(args: argparse.Namespace) -> None:
    """ValueError for options that do not go together."""
    if args.model is None:
        needing = ("labels", "image_column", "score_column", "label_range", "out", "lower_is_better")
        given = [name for name in needing if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')}: only for a model that --model names")
        if args.folder is None:
            raise ValueError("nothing to attack: expected RUN, or --model")
        if isinstance(args.images, str):
            raise ValueError(f"--images {args.images}: expected a number; a folder only with --model")
        return
    if args.folder is not None:
        raise ValueError(f"{args.folder} and --model {args.model}: expected one of them")
    if args.data is not None:
        raise ValueError("--data: only for a checkpoint; --model takes --images FOLDER and --labels FILE")
    for name, what in (("labels", "FILE"), ("out", "DIR")):
        if getattr(args, name) is None:
            raise ValueError(f"--model needs --{name} {what}")
    if not isinstance(args.images, str):
        raise ValueError("--model needs --images FOLDER; --limit N takes only N of them")


class Subject:
    """A model, its images and what describes both; the model's scores are matched to the labels."""

    def __init__(self, args: argparse.Namespace) -> None:
        import numpy as np

        from srm_model import runs
        from srm_model.attacks.guard import predict
        from srm_model.attacks.suite import spread
        from srm_model.data.labelled import labelled_images
        from srm_model.external import differentiable, open_model
        from srm_model.metrics import srocc

        self.config: SRMConfig = attack_config_from(args, SRMConfig(image_size=args.size))
        self.device = device_from(args.device)
        self.dataset: ImageQualityDataset = labelled_images(
            args.images,
            args.labels,
            image_column=args.image_column,
            score_column=args.score_column,
            label_range=None if args.label_range is None else tuple(args.label_range),
            image_size=args.size,
            progress=not args.no_progress,
        )
        self.model: ExternalModel = open_model(
            args.model, interface_of(args, lower_is_better=args.lower_is_better)
        )
        self.model.to(self.device)
        if self.device.type == "cpu":
            runs.keep_memory()
        used = spread(len(self.dataset), len(self.dataset) if args.limit is None else args.limit)
        # One image at a time: a whole set would not fit in memory.
        scores = np.array([float(predict(self.model, self.dataset[index][0][None])) for index in used])
        labels = self.dataset.mos[used]
        self.model.match(scores, labels)
        self.has_gradient = differentiable(self.model, self.dataset[used[0]][0])
        if not self.has_gradient:
            runs.say(f"{args.model}: its scores have no gradient, so it is attacked by queries alone")
        if srocc(scores, labels) < 0:
            runs.say(
                f"{args.model}: its scores fall where the labels rise (SROCC {srocc(scores, labels):.3f}); "
                "--lower-is-better turns them round"
            )
        self.surrogate = (
            runs.open_checkpoint(Path(args.surrogate), self.device, self.config.backend)[0]
            if args.surrogate
            else None
        )


def attack(args: argparse.Namespace, writes: bool) -> list[tuple[Path, dict[str, Any]]]:
    """Attack the model at each budget; results are under the name of the model."""
    from srm_model import runs
    from srm_model.attacks.suite import fingerprint
    from srm_model.norms import norm_of
    from srm_model.runs.attacking import attack_model, known_result, result_name

    subject = Subject(args)
    config = subject.config
    suite = args.suite if subject.has_gradient else "queries"
    results = []
    for norm in args.norm:
        for eps in args.eps or norm_of(norm).tables_of(config):
            settings = {
                "model": args.model,
                "weights": fingerprint(subject.model),
                "surrogate": None if subject.surrogate is None else fingerprint(subject.surrogate),
                "dataset": subject.dataset.fingerprint,
                "size": args.size,
                "limit": args.limit,
                "keep": args.keep,
                "suite": suite,
                "seed": config.seed,
                "attack": config.attack_settings(),
            }
            path = Path(args.out, "attacks", result_name(norm, eps))
            found = known_result(path, settings)
            if found is None:
                if writes and not args.no_progress:
                    runs.say(f"attacking {args.model} with {norm} {norm_of(norm).brief(eps)}")
                found = attack_model(
                    subject.model,
                    subject.dataset,
                    path,
                    settings,
                    norm=norm,
                    eps=eps,
                    config=config,
                    surrogate=subject.surrogate,
                    limit=args.limit,
                    keep=args.keep,
                    suite=suite,
                    progress=writes and not args.no_progress,
                    writes=writes,
                )
            results.append((Path(args.model), found))
    return results
