"""The options of `attack`, `audit` and `score` for the user's own models and images."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srm_model.cli.options import attack_config_from, budgets_of, device_from, positive
from srm_model.config import SRMConfig
from srm_model.files import read_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from srm_model.data import ImageQualityDataset
    from srm_model.external import ExternalModel, Interface

SIZE = 512
NEARLY_EQUAL = 1e-3  # range of scores, as a share of the largest score
# Options that need --model, as attributes of the parsed arguments. Their default is None.
_WITH_MODEL = (
    "size imagenet mean std peak lower_is_better labels image_column score_column label_range out".split()
)


def add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that name a model and describe its input."""
    group = parser.add_argument_group(
        "another model",
        "Use any model instead of a checkpoint. --model MODULE:NAME imports MODULE, which runs its code. --model "
        "FILE.pt2 runs code from the file, too: use only programs that you trust. No other option imports a module.",
    )
    add = group.add_argument
    add(
        "--model",
        metavar="NAME",
        help="MODULE:NAME of an nn.Module or of a callable that returns one; or FILE.pt2, an exported program",
    )
    add(
        "--size",
        type=positive,
        metavar="PX",
        help=f"side of the model's square input in pixels (default: {SIZE})",
    )
    add("--imagenet", action="store_true", default=None, help="normalise images as for ImageNet")
    for option, default in (("mean", 0), ("std", 1)):
        add(
            f"--{option}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"normalise images in [0, 1] by this {option} per channel (default: {default})",
        )
    add(
        "--peak",
        type=float,
        metavar="V",
        help="value of white, such as 255 for a model with inputs from 0 to 255 (default: 1)",
    )
    add(
        "--lower-is-better",
        action="store_true",
        default=None,
        help="low scores mean high quality (default: the model's attribute lower_better); `score` prints the model's "
        "own scores in any case, and uses this option for --map only",
    )
    return group


def add_labels(group: argparse._ArgumentGroup) -> None:
    """Add the options for labels and results."""
    add = group.add_argument
    add("--labels", metavar="FILE", help="table of scores for the images, with a header")
    add(
        "--image-column",
        metavar="NAME",
        help="column of file names (default: the only column where every row names an image of --images)",
    )
    add(
        "--score-column",
        metavar="NAME",
        help="column of scores, higher is better (default: the only other column of numbers)",
    )
    add(
        "--label-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="worst and best possible score (default: lowest and highest score in the table)",
    )
    add("--out", metavar="DIR", help="folder for results")


def images_of(text: str) -> int | str:
    """Parse the value of `--images` for argparse: how many images to use, or a folder of images."""
    return positive(text) if text.isdecimal() and not Path(text).is_dir() else text


def interface_of(args: argparse.Namespace, *, lower_is_better: bool | None) -> Interface:
    """Return the format of the model's input and the direction of its scores, as an `Interface`.

    The format is taken from the options that `add_model` adds; `lower_is_better` gives the direction.
    """
    from srm_model.external import IMAGENET, Interface

    given: dict[str, Any] = {name: getattr(args, name) for name in ("mean", "std", "peak")}
    if args.imagenet:
        if args.mean or args.std:
            raise ValueError("--imagenet and --mean or --std were given; expected one of them")
        given["mean"], given["std"] = IMAGENET
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    return Interface(**given, lower_is_better=lower_is_better)


def check_model_options(args: argparse.Namespace) -> None:
    """Raise ValueError if an option that needs `--model` is given without `--model`.

    With `--model`, set `args.size` to its default if `--size` was not given.
    """
    if args.model is not None:
        args.size = args.size or SIZE
        return
    for name in _WITH_MODEL:
        if getattr(args, name, None) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --model, which was not given")


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError if options of `attack` or `audit` contradict each other, or if a required option is missing."""
    check_model_options(args)
    for name in ("limit", "images"):
        if getattr(args, name) == 1:
            raise ValueError(f"--{name} 1: expected at least 2, because a correlation needs two images")
    if args.model is None:
        if args.folder is None:
            raise ValueError("no model was given; expected RUN, or --model")
        if isinstance(args.images, str):
            raise ValueError(f"--images {args.images}: expected a number; a folder goes with --model")
        return
    if args.folder is not None:
        raise ValueError(f"{args.folder} and --model {args.model} were given; expected one of them")
    if args.data is not None:
        raise ValueError("--data goes with a checkpoint; --model takes --images FOLDER and --labels FILE")
    for name, what in (("labels", "FILE"), ("out", "DIR")):
        if getattr(args, name) is None:
            raise ValueError(f"--model needs --{name} {what}")
    if not isinstance(args.images, str):
        raise ValueError("--model needs --images FOLDER; --limit N uses only N of its images")


class Subject:
    """The model and the dataset that the arguments name. The model's scores are mapped to the scale of the labels."""

    def __init__(self, args: argparse.Namespace) -> None:
        import numpy as np

        from srm_model import runs
        from srm_model.attacks.guard import differentiable, predict
        from srm_model.attacks.suite import spread
        from srm_model.data.labelled import labelled_images
        from srm_model.external import open_model
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
        # One image at a time, because the whole dataset may not fit in memory.
        scores = np.array([float(predict(self.model, self.dataset[index][0][None])) for index in used])
        labels = self.dataset.mos[used]
        _check_spread(args, scores * float(self.model.line[0]))
        reversed_ = float(self.model.line[0]) < 0
        self.model.match(scores, labels)
        self.has_gradient = differentiable(self.model, self.dataset[used[0]][0])
        if (found := srocc(scores, labels)) < 0:
            if not reversed_:
                remedy = "--lower-is-better reverses them"
            elif args.lower_is_better:
                remedy = "they are reversed by --lower-is-better"
            else:
                remedy = "they are reversed, because the model's attribute lower_better is true"
            runs.say(f"{args.model}: the scores fall as the labels rise (SROCC {found:.3f}); {remedy}")
        self.surrogate = (
            runs.open_checkpoint(Path(args.surrogate), self.device, self.config.backend)[0]
            if args.surrogate
            else None
        )


def _check_spread(args: argparse.Namespace, scores: npt.NDArray[np.float64]) -> None:
    """Raise ValueError if the model has only one score or equal scores; warn if its scores are nearly equal."""
    from srm_model import runs

    if len(scores) < 2:
        raise ValueError(f"{args.labels}: lists one image; expected at least two, which a correlation needs")
    low, high = scores.min(), scores.max()
    if not high - low <= NEARLY_EQUAL * max(abs(low), abs(high)):  # NaN is reported later
        return
    same = "equal" if low == high else "nearly equal"
    said = f"{args.model}: the scores of all {len(scores)} images are {same} ({low:g} to {high:g})"
    if args.peak is None:
        said += "; if the model takes pixels from 0 to 255, add --peak 255"
    if low == high:
        raise ValueError(said)
    runs.say(said)


def check_owner(args: argparse.Namespace) -> None:
    """Raise ValueError if the folder `--out` has results of another model, of a checkpoint or of a run."""
    out = Path(args.out)
    for path in (out / "run.json", out / "audit.json", *sorted(out.glob("attacks/*.json"))):
        known = read_json(path) if path.is_file() else None
        if not isinstance(known, dict):
            continue
        # run.json, audit.json and the results of attacks name the model at different places.
        named = (
            known.get("model_name")
            if path.name == "audit.json"
            else known.get("settings", known).get("model")
        )
        if named != args.model:
            other = named or "a checkpoint or a run"
            raise ValueError(f"{path}: has results of {other}; expected another folder as --out")


def attack(args: argparse.Namespace, writes: bool) -> list[tuple[Path, dict[str, Any]]]:
    """Attack the model that the arguments name, with each norm and budget.

    Args:
        args: Parsed arguments of `srm-iqa attack`.
        writes: Whether this rank writes results and progress.

    Returns:
        A list with one pair for each norm and budget: the value of `--model` as a path, and the results of the attack.
        The results are also stored in a JSON file in the folder `attacks` of `--out`. `run.json` in `--out` records
        the command.
    """
    from srm_model import runs
    from srm_model.attacks.suite import fingerprint
    from srm_model.external import code_digest
    from srm_model.norms import norm_of
    from srm_model.runs.attacking import attack_model, known_result, result_name

    check_owner(args)
    subject = Subject(args)
    if not subject.has_gradient:
        runs.say(f"{args.model}: the scores have no gradient, so only query attacks are run")
    config = subject.config
    budgets = [(norm, eps) for norm in args.norm for eps in budgets_of(norm, args.eps, config)]
    suite = args.suite if subject.has_gradient else "queries"
    chosen: dict[str, Any] = {"limit": args.limit, "keep": args.keep, "suite": suite}
    settings = {
        "model": args.model,
        "code": code_digest(args.model, subject.model),
        "weights": fingerprint(subject.model),
        "surrogate": None if subject.surrogate is None else fingerprint(subject.surrogate),
        "dataset": subject.dataset.fingerprint,
        "size": args.size,
        **chosen,
        "seed": config.seed,
        "attack": config.attack_settings(),
    }
    progress = writes and not args.no_progress
    results = []
    with _recorded(args, subject) if writes else nullcontext():
        for norm, eps in budgets:
            path = Path(args.out, "attacks", result_name(norm, eps))
            found = known_result(path, settings)
            if found is None:
                if progress:
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
                    progress=progress,
                    writes=writes,
                    **chosen,
                )
            results.append((Path(args.model), found))
    return results


@contextmanager
def _recorded(args: argparse.Namespace, subject: Subject) -> Iterator[None]:
    """Record the command and the dataset in `run.json`, for `srm-iqa report`."""
    from srm_model import runs

    title = f"Attacks on {args.model}"
    with runs.recorded(Path(args.out), args.arguments, title=title, model=args.model) as record:
        record["dataset"] = runs.dataset_card(subject.dataset)
        yield
