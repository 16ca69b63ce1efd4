"""The parser of `srm-iqa`. Each command names a module and a function; the module is imported when the command runs."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, NoReturn

from srm_model.attack_suites import SUITES
from srm_model.cli.external import add_labels, add_model, images_of
from srm_model.cli.options import (
    add_backend,
    add_config,
    add_device,
    add_max_pixels,
    add_seed,
    backend_name,
    budget,
    budget_help,
    byte_count,
    default_norms,
    not_negative,
    positive,
    seconds,
    width_and_height,
)
from srm_model.cli.tables import add_json
from srm_model.necks import NECKS
from srm_model.norms import NORMS

_AUDIT = (
    "Writes audit.json and audit.html into the checkpoint's folder. The exit code is 1 if a check failed."
)
_ABLATE = """\
Appends results to OUT/results.jsonl and does not repeat results that are there. To share the work, start the same
command in a second shell on this machine. To use several machines, let a scheduler run the jobs: --list prints their
names and --job runs one. docs/RECIPES.md describes the study file."""
_DIAGNOSE = (
    "Writes diagnosis.json, diagnosis.md and diagnosis.html, a self-contained page, beside the checkpoint."
)
_PROFILE = """\
Measures every combination of the options and appends each result to DIR/<device>/neck.jsonl. A combination that cannot
run gets a line with the reason. Ctrl-C keeps the results so far."""
_DESCRIPTION = "print the description of the dataset as one JSON object"
_SCORE = """\
Rotates each image according to its EXIF orientation and composites transparency on white. If no image was resized in
the training of the checkpoint, the score is the mean over crops that cover the image; otherwise, the shorter side is
resized to the checkpoint's image size and the centre square is scored. Prints one line per file: the score (normalised
quality, about 0 to 1, higher is better), a tab and the path, with line breaks in the path as \\n and \\r. Reports files
that cannot be read or scored on stderr; the exit code is then 2."""


class _Help(argparse.HelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        # argparse's own "{a,b,c} [{a,b,c} ...]" does not wrap and is wider than a narrow terminal.
        if action.nargs == argparse.ONE_OR_MORE:
            several = f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
            return several if action.option_strings or action.required else f"[{several}]"
        return super()._format_args(action, default_metavar)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help} | options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands.

    In the parsed arguments, `run` is a string "module:function". It names the function that runs the command, and the
    module of `srm_model.cli` that contains the function.
    """
    parser = _Parser(prog="srm-iqa", description="Train, attack and audit no-reference image quality models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = partial(_command, commands)

    _add_demo(command("demo", "run the full pipeline on bundled photographs", table=True))
    data = commands.add_parser("data", help="make or check a dataset", description="Make or check a dataset.")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_synthesize(
        _command(
            actions,
            "synthesize",
            "distort photographs into a dataset in TID2013's layout, labelled by a full-reference metric",
            run="data:synthesize",
        )
    )
    _add_check(_command(actions, "check", "check all files of a dataset and describe it", run="data:check"))
    verify = commands.add_parser("verify", help="check and time the kernels on the GPU", add_help=False)
    verify.set_defaults(run="verify:run", traceback=False)
    _add_verify(verify)
    _add_train(command("train", "train necks on a dataset, then evaluate them on its test split", table=True))
    _add_evaluate(
        command("evaluate", "compute clean SROCC and PLCC of checkpoints", run="train:evaluate", table=True)
    )
    _add_attack(
        command("attack", "attack checkpoints and report the correlation with the labels", table=True)
    )
    _add_audit(command("audit", "run ten checks for masked gradients", _AUDIT, table=True))
    _add_ablate(
        command("ablate", "train, attack and measure what a study file declares", _ABLATE, table=True)
    )
    _add_diagnose(
        command(
            "diagnose",
            "report condition numbers, solvers and landmarks of a checkpoint",
            _DIAGNOSE,
            table=True,
        )
    )
    _add_profile(
        command("profile", "measure parameters, MACs, time and memory of necks", _PROFILE, table=True)
    )
    _add_score(command("score", "score image files, folders or lists", _SCORE))
    exported = command("export", "write weights, an exported program and a model card")
    exported.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or run folder with one checkpoint"
    )
    exported.add_argument("out", metavar="OUT", help="folder to write")
    _add_report(command("report", "write the report of a run as one self-contained HTML page"))
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    summary: str,
    details: str = "",
    run: str = "",
    *,
    table: bool = False,
) -> _Parser:
    """Add a command with the options `--traceback` and `--no-progress`, and with `--json` if `table` is true."""
    description = f"{summary[0].upper()}{summary[1:]}. {details}".strip()
    made = commands.add_parser(name, help=summary, description=description)
    made.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    made.add_argument("--no-progress", action="store_true", help="show no progress on stderr")
    if table:
        add_json(made)
    made.set_defaults(run=run or f"{name}:run")
    return made


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(version("srm-iqa"))
        parser.exit()


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", default="runs/demo", metavar="DIR", help="run folder (default: %(default)s)")
    add("--quick", action="store_true", help="finish in about a minute, only to test the installation")
    add_seed(parser, "the splits, training and attacks")
    add_device(parser)


def _add_synthesize(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write; an unfinished dataset in it is completed")
    add(
        "--photographs",
        metavar="DIR",
        help="folder of 3 to 99 photographs of different scenes (default: the photographs in scikit-image "
        "and scikit-learn)",
    )
    add(
        "--packaged",
        action="store_true",
        help="also use the photographs in scikit-image and scikit-learn, after those in DIR",
    )
    add(
        "--image-size",
        type=positive,
        metavar="S",
        help="resize the central square of each photograph to S×S pixels (default: keep the photograph)",
    )
    add(
        "--crop",
        type=width_and_height,
        metavar="WxH",
        help="crop the centre of each photograph to this size (default: 512x384 with --opinions)",
    )
    add(
        "--types",
        type=positive,
        nargs="+",
        metavar="T",
        help="distortion types, 1 to 24 (default: all; with --opinions, all but 16, 17 and 18)",
    )
    add("--levels", type=positive, nargs="+", metavar="L", help="levels, 1 to 5 (default: all)")
    add("--metric", help="label images by this metric of piq (default: vsi)")
    add(
        "--opinions",
        metavar="FILE",
        help="label images by TID2013's mos_with_names.txt instead; photographs are matched by the number in their "
        "names, such as 1.png or kodim01.png",
    )
    add(
        "--labels",
        metavar="FILE",
        help="take the labels from the mos_with_names.txt that the same command wrote on another machine; the last "
        "digits of computed labels depend on the processor",
    )
    add_seed(parser, "the distortions")
    add_max_pixels(parser)
    add_json(parser, _DESCRIPTION)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", help="TID2013, KonIQ-10k or a synthesised dataset")
    add_seed(parser, "the split by reference")
    add_max_pixels(parser)
    add_json(parser, _DESCRIPTION)


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="ROOT", help="TID2013, KonIQ-10k or a synthesised dataset")
    add("--out", required=True, metavar="RUN", help="run folder; an unfinished run is resumed")
    add("--backbone", default="pvt_v2_b2", help="timm model (default: %(default)s)")
    add(
        "--neck",
        nargs="+",
        default=["srm"],
        choices=tuple(NECKS),
        help="necks to train into RUN/<neck> (default: srm)",
    )
    add("--pretrained", action="store_true", help="start the backbone from ImageNet weights")
    add("--freeze-backbone", action="store_true", help="train neck and head only")
    add("--restart", action="store_true", help="overwrite an earlier training in RUN")
    add("--title", help="heading of the report")
    add("--save-every", type=positive, metavar="N", help="also save every N steps, not only after epochs")
    add(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile backbone and head with torch.compile (default backend: %(const)s, which needs a compiler)",
    )
    add(
        "--cache",
        metavar="DIR",
        help="keep decoded and resized images in DIR, such as one under /dev/shm; it is not deleted afterwards "
        "(default: decode again every epoch)",
    )
    add(
        "--cache-size",
        type=byte_count,
        default=byte_count("20GB"),
        metavar="SIZE",
        help="upper limit of the cache's size, such as 500MB (default: 20GB)",
    )
    add_max_pixels(parser)
    fields = "epochs batch_size accumulate image_size seed precision lr_backbone lr_neck"
    add_config(parser, *fields.split())
    add_device(parser, workers=True)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder, checkpoint or study folder")
    _add_data_choice(parser)
    _add_batch_size(parser)
    add_backend(parser)
    add_device(parser, workers=True)


def _add_attack(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser, or_model=True)
    _add_data_choice(parser)
    add = parser.add_argument
    norms = default_norms()
    add(
        "--norm",
        nargs="+",
        default=norms,
        choices=tuple(NORMS),
        help=f"norms (default: {'all' if norms == list(NORMS) else ' '.join(norms)})",
    )
    add(
        "--eps",
        nargs="+",
        type=budget,
        metavar="E",
        help=f"budgets, such as 4/255, in the norm of --norm; {budget_help()}",
    )
    _add_images(parser, "all")
    add(
        "--keep",
        type=not_negative,
        default=4,
        metavar="N",
        help="attacked images to save as pictures (default: 4)",
    )
    _add_surrogate(parser, "attack")
    add(
        "--suite",
        default="paper",
        choices=tuple(SUITES),
        help="paper: the article's attacks (default); extended: more attacks (signed, list-wise, adaptive, "
        "query-only); queries: attacks that only use scores",
    )
    add_labels(add_model(parser))
    add_config(parser, "attack_steps", "attack_restarts", "attack_batch_size", "seed")
    add_device(parser)


def _add_audit(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser, or_model=True)
    _add_data_choice(parser)
    add = parser.add_argument
    add("--norm", default="linf", choices=tuple(NORMS), help="norm (default: linf)")
    add(
        "--eps",
        type=budget,
        metavar="E",
        help=f"budget, such as 4/255; {budget_help(last=True)}",
    )
    _add_images(parser, "16")
    _add_surrogate(parser, "check")
    add("--certify", action="store_true", help="also bound each score within L2 budgets by median smoothing")
    add_labels(add_model(parser))
    add_config(parser, "attack_steps", "attack_restarts", "attack_batch_size", "attack_queries", "seed")
    add_device(parser)


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", metavar="STUDY", help="a .toml or .json file")
    add("--out", required=True, metavar="OUT", help="folder of runs and results")
    add(
        "--data",
        action="append",
        metavar="NAME=FOLDER",
        help="use this dataset instead of the datasets in STUDY (repeatable); if STUDY has a protocol for NAME, the "
        "keys of the protocol apply",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="only list the missing results")
    only.add_argument(
        "--list",
        action="store_true",
        help="only print the name of every job, one per line; a training comes before the jobs that need it",
    )
    only.add_argument(
        "--job",
        metavar="NAME",
        help="run only this job, for Slurm arrays, GNU parallel or Ray; a finished job is not repeated",
    )
    add_max_pixels(parser)
    add_device(parser, workers=True)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    several = partial(add, nargs="+")
    several(
        "--part",
        choices=("neck", "model"),
        help="neck: only the neck, on random maps in the shapes of the backbone's maps (default); model: the whole "
        "model",
    )
    several("--backbone", metavar="NAME", help="timm models (default: pvt_v2_b2)")
    several("--neck", choices=tuple(NECKS), help="necks (default: all)")
    several(
        "--backend",
        type=backend_name,
        metavar="NAME",
        help="backends of srm's operators, such as triton; none selects them from the results of srm-iqa verify "
        "(default: all that can run)",
    )
    several("--resolution", type=positive, metavar="PX", help="sides of the square image (default: 512)")
    several("--batch", type=positive, metavar="B", help="batch sizes (default: 1)")
    several(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="fp32 (default), or bf16 or fp16 under autocast"
    )
    several(
        "--direction",
        choices=("forward", "backward", "step"),
        metavar="PASS",
        help="forward (default), backward (after forward), or step (a training step with optimiser)",
    )
    add(
        "--article",
        action="store_true",
        help="measure the article's Table 3 (necks, 512 px, bf16, B=1) and its training throughput (model, B=4, "
        "step); other options replace these values",
    )
    add(
        "--trace",
        action="store_true",
        help="write a torch.profiler trace and the ten slowest kernels of every case",
    )
    add("--memory", action="store_true", help="write memory over time of every case")
    add(
        "--warmup", type=not_negative, metavar="N", help="unmeasured calls (default: 50 on a GPU, 2 on a CPU)"
    )
    add(
        "--repeats",
        type=positive,
        metavar="N",
        help="maximum number of measured calls (default: 100 on a GPU, 10 on a CPU)",
    )
    add(
        "--seconds",
        type=seconds,
        default=10.0,
        metavar="S",
        help="approximate time of the measured calls of a case (default: 10)",
    )
    add(
        "--small-ceilings",
        action="store_true",
        help="measure the machine's peak bandwidth and matrix rate with small buffers, only to test the installation",
    )
    add("--out", default="runs/profile", metavar="DIR", help="folder to write (default: %(default)s)")
    add_config(parser)
    add_device(parser)


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    _add_data_choice(parser)
    add = parser.add_argument
    add(
        "--images",
        type=positive,
        default=64,
        metavar="N",
        help="number of images, evenly spaced (default: 64)",
    )
    _add_batch_size(parser)
    add("--out", metavar="DIR", help="folder to write (default: the checkpoint's)")
    add_backend(parser)
    add_device(parser)


def _add_score(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    checkpoint = add(
        "checkpoint",
        metavar="[CHECKPOINT]",
        help="checkpoint folder, or run folder with one checkpoint (default: the checkpoint that comes with the "
        "package, unless --model is given); any other first argument is an IMAGE",
    )
    checkpoint.required = False  # with nargs="?", an option before the images would leave it empty
    images = add("images", nargs="+", default=[], metavar="IMAGE", help="image file; folder with --recursive")
    images.required = False  # with nargs="*", an option before the first image would leave it empty
    add("--files-from", metavar="FILE", help='also score the files named in FILE, one per line ("-": stdin)')
    add(
        "-r",
        "--recursive",
        action="store_true",
        help="score the PNG, JPEG, BMP, TIFF and WebP files in folders and their subfolders, except hidden ones",
    )
    add(
        "-0",
        "--null",
        action="store_true",
        help="separate names in FILE, and printed lines, by NUL bytes instead of line breaks",
    )
    add_json(
        parser,
        'print a JSON object {"path", "score", "model"} per line, with a null score and an "error" for a file '
        "without a score; bytes of a path that are not UTF-8 become lone surrogates, as in Python",
    )
    add(
        "--map",
        metavar="OUT",
        help="also draw a map of where the model sees a loss of quality; the model can be wrong. The map shows how the "
        "score changes when other parts of the image replace a window (occlusion without gradients; scores 197 copies "
        "of the image). OUT is a PNG file, or a folder for several images",
    )
    _add_batch_size(parser)
    add_max_pixels(parser)
    add_backend(parser)
    add_device(parser)
    add_model(parser)
    for option in ("--images", "--labels"):
        add(option, action=_NotForScore, nargs="?", help=argparse.SUPPRESS)


class _NotForScore(argparse.Action):
    """An option of `attack` and `audit` that users may expect of `score`."""

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        parser.error(
            f"{given[-1]} goes with attack and audit; score takes images as arguments, and folders with --recursive"
        )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m srm_kernels verify`.

    This function repeats the options instead of using the parser of that command, because an import of that parser
    would also import torch.
    """
    add = parser.add_argument
    add("--device", help="cuda or cuda:NUMBER")
    add("--export", help="also write the rows as JSON lines")
    add_json(parser, "print the rows as JSON lines")
    add("--jobs", help="number of processes that check in parallel")
    add("--limit", help="time limit of one case in seconds")
    for name in ("only", "dtypes", "shapes"):
        add(f"--{name}", nargs="+", help="operators" if name == "only" else name)
    add("--quick", action="store_true", help="check fewer shapes")
    add("--compile", action="store_true", help="also time the output of torch.compile")
    add("--again", action="store_true", help="repeat measurements that are stored")
    add("-h", "--help", action="store_true", help="show the command's own help")


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="RUN", help="run folder, a study's folder, or the folder --out of attack --model")
    add("--out", metavar="FILE", help="page to write (default: RUN/report.html)")
    add(
        "--table",
        type=positive,
        nargs="+",
        metavar="N",
        help="write only these tables of a study (1, 2, and 5 to 15), and print them as Markdown",
    )
    add(
        "--figure", type=positive, nargs="+", metavar="N", help="write only these figures of a study (3 to 6)"
    )
    add_json(
        parser,
        "with --table: print one JSON object per row, with the text of its cells, and all other text on stderr",
    )


def _add_checkpoint(parser: argparse.ArgumentParser, *, or_model: bool = False) -> None:
    parser.add_argument(
        "folder",
        nargs="?" if or_model else None,
        metavar="RUN",
        help="run folder, or one of its checkpoints" + ("; omitted with --model" if or_model else ""),
    )


def _add_images(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--images",
        type=images_of,
        metavar="N|FOLDER",
        help="with --model: folder of images; with RUN: the same as --limit",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help=f"use only N images, evenly spaced (default: {default})"
    )


def _add_surrogate(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--surrogate",
        metavar="FOLDER",
        help=f"checkpoint for the transfer {what} (default: the sibling none checkpoint; srm when "
        "attacking none)",
    )


def _add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=positive, default=8, metavar="SIZE", help="default: 8")


def _add_data_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="ROOT", help="dataset (default: the dataset that RUN was trained on)"
    )
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: test")
    add_max_pixels(parser)
