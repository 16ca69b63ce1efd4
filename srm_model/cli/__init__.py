"""The command line `srm-iqa`. Each subcommand imports what it needs when it runs, so that help is immediate."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

from srm_model.cli.external import add_labels, add_model, images_of
from srm_model.cli.options import (
    add_backend,
    add_config,
    add_device,
    add_max_pixels,
    backend_name,
    budget,
    byte_count,
    not_negative,
    positive,
    seconds,
    width_and_height,
)
from srm_model.cli.streams import Output, prepared, sentence
from srm_model.messages import say
from srm_model.necks import NECKS
from srm_model.norms import NORMS
from srm_model.suites import SUITES

# What a caller can mend, told in one sentence; anything else is a fault of the program and keeps its traceback.
_EXPECTED = (ValueError, TypeError, NotImplementedError, OSError, ModuleNotFoundError)
# Whose processes share their work under torchrun. Those of `ablate` do so by the results that are missing.
_PARALLEL = ("train", "evaluate", "attack", "ablate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `srm-iqa` with `arguments` (default: the process's own); returns the exit code.

    0 where all went well, 1 where an audit's check failed, 2 with one sentence on stderr for bad input and where
    standard output cannot be written, 130 after Ctrl-C, 143 where SIGTERM stopped a training, which is then saved.
    Under torchrun the first process alone prints, and only the commands whose processes share their work use others.
    """
    if arguments is None:
        _set_environment()
        arguments = sys.argv[1:]
    with prepared() as output, nullcontext() if _rank() == 0 else redirect_stdout(io.StringIO()):
        code = _run(list(arguments), output)
        lost = output.lost()
        return code if lost is None else _fail(f"srm-iqa: standard output cannot be written ({lost})")


def _run(arguments: list[str], output: Output) -> int:
    first = _rank() == 0
    try:
        with nullcontext() if first else redirect_stderr(io.StringIO()):
            parsed = _parser().parse_args(arguments)
    except SystemExit as stop:  # help, version, or a wrong argument
        return int(stop.code or 0)
    except OSError:  # the version could not be printed; `main` says why
        return 2
    parsed.arguments = arguments
    if _number("WORLD_SIZE", 1) > 1 and parsed.command not in _PARALLEL:
        if not first:
            return 0
        say(f"srm-iqa {parsed.command}: runs on one process, of several that were started")
    try:
        return _call(parsed)
    except KeyboardInterrupt:
        say("srm-iqa: interrupted; what was finished is kept")
        return 130
    except Exception as error:
        if isinstance(error, OSError) and output.lost() is not None:
            return 2  # `main` says why
        if parsed.traceback or not _expected(error):
            raise
        return _fail(f"srm-iqa {parsed.command}: {sentence(str(error))}")
    except BaseException as error:
        if not _preempted(error):
            raise
        say(f"srm-iqa {parsed.command}: stopped by SIGTERM, saved at {error}")
        return 143  # 128 and the signal's number, as shells say it


def _call(parsed: argparse.Namespace) -> int:
    module, _, function = parsed.run.partition(":")
    command = getattr(import_module(f"srm_model.cli.{module}"), function)
    if not hasattr(parsed, "max_pixels"):
        return int(command(parsed) or 0)
    from srm_model.data.images import pixel_limit

    with pixel_limit(parsed.max_pixels):
        return int(command(parsed) or 0)


def _rank() -> int:
    """Of this process among those that torchrun started; 0 for one alone."""
    return _number("RANK", 0) if _number("WORLD_SIZE", 1) > 1 else 0


def _number(variable: str, default: int) -> int:
    try:
        return int(os.environ[variable])
    except (KeyError, ValueError):
        return default


def _set_environment() -> None:
    """What libraries read once, when they are loaded; a process of its own may choose it, an importer may not."""
    # Threads that wait spinning take the cores from the others: beside one busy process training was 4 to 10
    # times slower for it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of every start and stop
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS is deterministic only with a fixed workspace


def _expected(error: Exception) -> bool:
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        from srm_model.training import DivergenceError, WorkerError

        return isinstance(error, DivergenceError | WorkerError)
    return isinstance(error, _EXPECTED)


def _preempted(error: BaseException) -> bool:
    from srm_model.training import Preempted

    return isinstance(error, Preempted)


def _fail(sentence: str) -> int:
    say(sentence)
    return 2


class _Help(argparse.HelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        # argparse's own "{a,b,c} [{a,b,c} ...]" cannot be wrapped, and is wider than a narrow terminal.
        if action.nargs == argparse.ONE_OR_MORE:
            several = f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
            return several if action.option_strings or action.required else f"[{several}]"
        return super()._format_args(action, default_metavar)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help} | options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="srm-iqa",
        description="No-reference image quality that is hard to fool: train, attack and report.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="on an error, show where it arose")
    common.add_argument("--no-progress", action="store_true", help="no progress on stderr")

    def command(name: str, run: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        description = f"{_sentence(summary)} {details}".strip()
        made = commands.add_parser(name, help=summary, description=description, parents=[common])
        made.set_defaults(run=run)
        return made

    _add_demo(command("demo", "demo:run", "the whole road on photographs that installed packages carry"))
    _add_data(commands, common)
    verify = commands.add_parser(
        "verify", help="check and time the kernels on the GPU at hand", add_help=False
    )
    verify.set_defaults(run="verify:run", traceback=False)
    _add_verify(verify)
    _add_train(
        command("train", "train:run", "train necks on a data set, then evaluate them on its test split")
    )
    _add_evaluate(command("evaluate", "train:evaluate", "clean SROCC and PLCC of a checkpoint"))
    _add_attack(
        command("attack", "attack:run", "attack checkpoints and correlate what is left with the labels")
    )
    _add_audit(
        command(
            "audit",
            "audit:run",
            "ten checks that tell a hard model from a masked one",
            "Writes audit.json and audit.html into the checkpoint's folder. The exit code is 1 where a check failed.",
        )
    )
    _add_ablate(
        command(
            "ablate",
            "ablate:run",
            "train, attack and measure what a study file declares",
            "Results are lines of OUT/results.jsonl; what is there is not repeated. The same command started in a "
            "second shell on this machine takes its share of the work. On several machines a scheduler runs the jobs: "
            "--list prints their names, --job does one. docs/RECIPES.md describes the file.",
        )
    )
    _add_diagnose(
        command(
            "diagnose",
            "diagnose:run",
            "condition numbers, solvers and landmarks of a checkpoint",
            "Writes diagnosis.json, diagnosis.md and diagnosis.html, one self-contained page, beside the checkpoint.",
        )
    )
    _add_profile(
        command(
            "profile",
            "profile:run",
            "what necks cost in parameters, multiply-accumulates, time and memory",
            "The product of all options is measured, one after the other, and written line by line to "
            "DIR/<device>/neck.jsonl: what cannot run is a line that says why, and Ctrl-C keeps what there is.",
        )
    )
    _add_score(
        command(
            "score",
            "score:run",
            "quality of image files",
            "Each image is turned as its EXIF orientation says, composited on white where it is transparent, and "
            "resized so that its shorter side is the checkpoint's image size; its centre square is scored. Prints one "
            "line per file: the score (normalised quality, about 0 to 1, higher is better), a tab, and the path, with "
            "line breaks in it as \\n and \\r. Files that cannot be read or scored are reported on stderr, and the "
            "exit code is then 2.",
        )
    )
    exported = command(
        "export", "export:run", "a checkpoint to publish: weights, an exported program, a card"
    )
    exported.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint folder, or a run that holds one"
    )
    exported.add_argument("out", metavar="OUT", help="folder to write")
    _add_report(command("report", "report:run", "write a run's report, one self-contained HTML page"))
    return parser


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(version("srm-iqa"))
        parser.exit()


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="run folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a minute's worth, only to see that it runs")
    parser.add_argument("--seed", type=int, default=0, help="of splits, training and attacks (default: 0)")
    add_device(parser)


def _add_data(commands: argparse._SubParsersAction[_Parser], common: _Parser) -> None:
    summary = "make or check a data set"
    parser = commands.add_parser("data", help=summary, description=_sentence(summary))
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    summary = "distort photographs into a set in TID2013's layout, labelled by a full-reference metric"
    made = actions.add_parser("synthesize", help=summary, description=_sentence(summary), parents=[common])
    made.set_defaults(run="data:synthesize")
    made.add_argument("out", metavar="OUT", help="folder to write; an unfinished set there is completed")
    made.add_argument(
        "--photographs",
        metavar="DIR",
        help="folder of 3 to 99 photographs, one scene each (default: those installed packages carry)",
    )
    made.add_argument(
        "--packaged", action="store_true", help="those installed packages carry too, after the folder's"
    )
    made.add_argument("--image-size", type=positive, help="shorter side in pixels (default: as they are)")
    made.add_argument(
        "--crop",
        type=width_and_height,
        metavar="WxH",
        help="keep the centre of each photograph at this size (default: 512x384 with --opinions)",
    )
    made.add_argument(
        "--types", type=positive, nargs="+", metavar="T", help="distortion types, 1 to 24 (default: all)"
    )
    made.add_argument("--levels", type=positive, nargs="+", metavar="L", help="levels, 1 to 5 (default: all)")
    made.add_argument("--metric", help="label images by this metric of piq (default: vsi)")
    made.add_argument(
        "--opinions",
        metavar="FILE",
        help="label images by TID2013's mos_with_names.txt instead: photographs are matched by the number in their "
        "names, such as 1.png or kodim01.png",
    )
    made.add_argument(
        "--labels",
        metavar="FILE",
        help="mos_with_names.txt of the same set made on another processor, whose last digits may differ",
    )
    made.add_argument("--seed", type=int, default=0, help="of the distortions (default: 0)")
    add_max_pixels(made)

    summary = "open every split of a data set, which checks all of its files, and say what is there"
    made = actions.add_parser("check", help=summary, description=_sentence(summary), parents=[common])
    made.set_defaults(run="data:check")
    made.add_argument("root", metavar="ROOT")
    made.add_argument("--seed", type=int, default=0, help="of the split by reference (default: 0)")
    add_max_pixels(made)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="ROOT", help="a TID2013, KonIQ-10k or synthesised set"
    )
    parser.add_argument(
        "--out", required=True, metavar="RUN", help="run folder; an unfinished run is continued"
    )
    parser.add_argument("--backbone", default="pvt_v2_b2", help="a timm model (default: %(default)s)")
    parser.add_argument(
        "--neck",
        nargs="+",
        default=["srm"],
        choices=tuple(NECKS),
        help="each is trained into RUN/<neck> (default: srm)",
    )
    parser.add_argument("--pretrained", action="store_true", help="start the backbone from ImageNet weights")
    parser.add_argument("--freeze-backbone", action="store_true", help="train neck and head only")
    parser.add_argument("--restart", action="store_true", help="begin anew over an earlier training in RUN")
    parser.add_argument("--title", help="heading of the report")
    parser.add_argument(
        "--save-every", type=positive, metavar="N", help="save after every N steps too, not only after epochs"
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="backbone and head through torch.compile (default backend: %(const)s, which needs a compiler)",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="keep decoded and resized images here, such as under /dev/shm; deleted by you (default: decode anew)",
    )
    parser.add_argument(
        "--cache-size",
        type=byte_count,
        default=byte_count("20GB"),
        metavar="SIZE",
        help="most of what --cache keeps, such as 500MB (default: 20GB)",
    )
    add_max_pixels(parser)
    add_config(
        parser,
        "epochs",
        "batch_size",
        "accumulate",
        "image_size",
        "seed",
        "precision",
        "lr_backbone",
        "lr_neck",
    )
    add_device(parser, workers=True)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="RUN", help="a run folder, one checkpoint of it, or a study's folder"
    )
    _add_data_choice(parser)
    _add_batch_size(parser)
    add_backend(parser)
    add_device(parser, workers=True)


def _add_attack(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser, or_model=True)
    _add_data_choice(parser)
    parser.add_argument("--norm", nargs="+", default=list(NORMS), choices=tuple(NORMS), help="default: all")
    parser.add_argument(
        "--eps",
        nargs="+",
        type=budget,
        metavar="E",
        help='budgets, such as 4/255, of the one norm given (default: the tables\'); "l2" is stated at 512×512',
    )
    _add_images(parser, "all")
    parser.add_argument(
        "--keep", type=not_negative, default=4, metavar="N", help="attacked images to keep (default: 4)"
    )
    parser.add_argument(
        "--surrogate",
        metavar="FOLDER",
        help="checkpoint the transfer attack is crafted on (default: the none neck beside, for none the srm neck)",
    )
    parser.add_argument(
        "--suite",
        default="paper",
        choices=tuple(SUITES),
        help="the article's four attacks, six more (signed, list-wise, self-tuning, query-only), or three that only "
        "ask for scores (default: paper)",
    )
    add_labels(add_model(parser))
    add_config(parser, "attack_steps", "attack_restarts", "attack_batch_size", "seed")
    add_device(parser)


def _add_audit(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser, or_model=True)
    _add_data_choice(parser)
    parser.add_argument("--norm", default="linf", choices=tuple(NORMS), help="default: linf")
    parser.add_argument(
        "--eps",
        type=budget,
        metavar="E",
        help='such as 4/255; "l2" is stated at 512×512 (default: 4/255, or 10)',
    )
    _add_images(parser, "16")
    parser.add_argument(
        "--surrogate",
        metavar="FOLDER",
        help="checkpoint of the transfer check (default: the none neck beside, for none the srm neck)",
    )
    parser.add_argument(
        "--certify",
        action="store_true",
        help="also bound, by median smoothing, where each score can go within an L2 budget",
    )
    add_labels(add_model(parser))
    add_config(parser, "attack_steps", "attack_restarts", "attack_batch_size", "attack_queries", "seed")
    add_device(parser)


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY", help="a .toml or .json file")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder of runs and results")
    parser.add_argument(
        "--data",
        action="append",
        metavar="NAME=FOLDER",
        help="a data set in place of the file's (repeatable); the file may have a protocol for that name",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="only list what is missing")
    only.add_argument(
        "--list",
        action="store_true",
        help="only print the name of every job, a line each, trainings before what needs them",
    )
    only.add_argument(
        "--job",
        metavar="NAME",
        help="do this job alone, as a Slurm array, GNU parallel or Ray runs it; one that is done is not repeated",
    )
    add_max_pixels(parser)
    add_device(parser, workers=True)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    def several(option: str, of: str, **more: Any) -> None:
        parser.add_argument(f"--{option}", nargs="+", help=of, **more)

    several(
        "part",
        "the neck alone, on noise of the backbone's shapes (default), or the whole model",
        choices=("neck", "model"),
    )
    several("backbone", "timm models (default: pvt_v2_b2)", metavar="NAME")
    several("neck", "default: all", choices=tuple(NECKS))
    several(
        "backend",
        "of the operators in srm; none follows the verdict about the device (default: each that can run here)",
        type=backend_name,
        metavar="NAME",
    )
    several("resolution", "sides of the square image (default: 512)", type=positive, metavar="PX")
    several("batch", "images at once (default: 1)", type=positive, metavar="B")
    several("dtype", "fp32 (default), or what autocast computes in", choices=("fp32", "bf16", "fp16"))
    several(
        "direction",
        "forward (default), backward (after forward), or step (a training step with optimiser)",
        choices=("forward", "backward", "step"),
        metavar="PASS",
    )
    parser.add_argument(
        "--article",
        action="store_true",
        help="the article's Table 3 (necks, 512 px, bf16, B=1) and training throughput (model, B=4, step); other "
        "options take their place",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="a torch.profiler trace and the ten dearest kernels of every case",
    )
    parser.add_argument("--memory", action="store_true", help="memory over time of every case")
    parser.add_argument(
        "--warmup",
        type=not_negative,
        metavar="N",
        help="unmeasured calls first (default: 50 on a GPU, 2 on a CPU)",
    )
    parser.add_argument(
        "--repeats",
        type=positive,
        metavar="N",
        help="measured calls at most (default: 100 on a GPU, 10 on a CPU)",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=10.0,
        metavar="S",
        help="of measured calls a case, about (default: 10)",
    )
    parser.add_argument(
        "--small-ceilings",
        action="store_true",
        help="quick ceilings by small buffers, only to see that it runs",
    )
    parser.add_argument(
        "--out", default="runs/profile", metavar="DIR", help="folder to write (default: %(default)s)"
    )
    add_config(parser)
    add_device(parser)


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    _add_data_choice(parser)
    parser.add_argument(
        "--images", type=positive, default=64, metavar="N", help="evenly spaced (default: 64)"
    )
    _add_batch_size(parser)
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: the checkpoint's)")
    add_backend(parser)
    add_device(parser)


def _add_score(parser: argparse.ArgumentParser) -> None:
    checkpoint = parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint folder, or a run that holds one; left out with --model",
    )
    checkpoint.required = False  # nargs="?" would leave it out where an option comes before the images
    images = parser.add_argument(
        "images", nargs="+", default=[], metavar="IMAGE", help="an image file, or a folder with --recursive"
    )
    images.required = False  # nargs="*" would take none where an option comes before the first
    parser.add_argument(
        "--files-from", metavar="FILE", help='also score the files named in FILE, one a line ("-": stdin)'
    )
    parser.add_argument(
        "-r",
        "--recursive",
        action="store_true",
        help="score the PNG, JPEG, BMP, TIFF and WebP files in folders and in those below, but no hidden ones",
    )
    parser.add_argument(
        "-0",
        "--null",
        action="store_true",
        help="names in FILE, and the lines printed, end with a NUL byte instead of a line break",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print a JSON object {"path", "score"} per line, and {"path", "score": null, "error"} for a file '
        "without a score; bytes of a path that are not UTF-8 are lone surrogates, as in Python",
    )
    _add_batch_size(parser)
    add_max_pixels(parser)
    add_backend(parser)
    add_device(parser)
    add_model(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m srm_kernels verify`, which reads them itself: its module loads torch."""
    values = {
        "device": "cuda or cuda:NUMBER",
        "export": "also write the rows as JSON lines",
        "jobs": "processes that check at once",
        "limit": "seconds of one case",
    }
    lists = {"only": "operators", "dtypes": "dtypes", "shapes": "shapes"}
    flags = {
        "quick": "fewer shapes",
        "compile": "also time what torch.compile makes",
        "again": "measure again what is kept",
    }
    for name, text in values.items():
        parser.add_argument(f"--{name}", help=text)
    for name, text in lists.items():
        parser.add_argument(f"--{name}", nargs="+", help=text)
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("-h", "--help", action="store_true", help="show the command's own help")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="a run folder, or the folder of a study")
    parser.add_argument("--out", metavar="FILE", help="the page (default: RUN/report.html)")
    parser.add_argument(
        "--table",
        type=positive,
        nargs="+",
        metavar="N",
        help="of a study: only these tables, 1, 2 and 5 to 15, printed as Markdown too",
    )
    parser.add_argument(
        "--figure", type=positive, nargs="+", metavar="N", help="of a study: only these, 3 to 6"
    )


def _add_checkpoint(parser: argparse.ArgumentParser, *, or_model: bool = False) -> None:
    parser.add_argument(
        "folder",
        nargs="?" if or_model else None,
        metavar="RUN",
        help="a run folder, or one checkpoint of it" + ("; or else --model" if or_model else ""),
    )


def _add_images(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--images",
        type=images_of,
        metavar="N|FOLDER",
        help="with --model the folder of its images; else the same as --limit",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help=f"only N images, evenly spaced (default: {default})"
    )


def _add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="SIZE", help="images at once (default: 8)"
    )


def _add_data_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="ROOT", help="data set (default: the one of training)")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: test")
    add_max_pixels(parser)
