"""The command line `srm-iqa`. The module of a subcommand is imported when the subcommand runs, to keep --help fast."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from importlib import import_module

from srm_model.cli.parser import make_parser
from srm_model.cli.streams import Output, prepared, sentence
from srm_model.messages import say

# Errors that the user can fix, printed as one sentence. Any other exception is a bug and keeps its traceback.
_EXPECTED = (ValueError, TypeError, NotImplementedError, OSError, ModuleNotFoundError)
# Commands that use several processes under torchrun. The processes of `ablate` divide the missing results among them.
_PARALLEL = ("train", "evaluate", "attack", "ablate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `srm-iqa` and return its exit code.

    Under torchrun, only the first process prints. Commands that do not support several processes run on the first
    process only.

    Args:
        arguments: Command line without the program's name. Default: the command line of this process.

    Returns:
        The exit code:

        - 0: success;
        - 1: `audit` ran, and at least one of its checks failed;
        - 2: the input is not accepted, or standard output cannot be written. stderr has one sentence about the error;
        - 130: Ctrl-C;
        - 143: SIGTERM stopped a training run, and the training state was saved.
    """
    if arguments is None:
        _set_environment()
        arguments = sys.argv[1:]
    with prepared() as output, nullcontext() if _rank() == 0 else redirect_stdout(io.StringIO()):
        code = _run(list(arguments), output)
        lost = output.lost()
        if lost is None:
            return code
        say(f"srm-iqa: standard output cannot be written ({lost})")
        return 2


def _run(arguments: list[str], output: Output) -> int:
    first = _rank() == 0
    try:
        with nullcontext() if first else redirect_stderr(io.StringIO()):
            parsed = make_parser().parse_args(arguments)
    except SystemExit as stop:  # help, version, or a wrong argument
        return int(stop.code or 0)
    except OSError:  # the version could not be printed; `main` reports it
        return 2
    parsed.arguments = arguments
    if _number("WORLD_SIZE", 1) > 1 and parsed.command not in _PARALLEL:
        if not first:
            return 0
        say(f"srm-iqa {parsed.command}: runs only in the process of rank 0; the other processes do nothing")
    try:
        return _call(parsed)
    except KeyboardInterrupt:
        say("srm-iqa: interrupted; finished results are kept")
        return 130
    except Exception as error:
        if isinstance(error, OSError) and output.lost() is not None:
            return 2  # `main` reports it
        if parsed.traceback or not _expected(error):
            raise
        say(f"srm-iqa {parsed.command}: {sentence(str(error))}")
        return 2
    except BaseException as error:
        from srm_model.training import Preempted

        if not isinstance(error, Preempted):
            raise
        say(f"srm-iqa {parsed.command}: stopped by SIGTERM, saved at {error}")
        return 143  # 128 plus the signal's number, as shells report it


def _call(parsed: argparse.Namespace) -> int:
    module, _, function = parsed.run.partition(":")
    command = getattr(import_module(f"srm_model.cli.{module}"), function)
    if not hasattr(parsed, "max_pixels"):
        return int(command(parsed) or 0)
    from srm_model.data.images import pixel_limit

    with pixel_limit(parsed.max_pixels):
        return int(command(parsed) or 0)


def _rank() -> int:
    """Return the rank of this process under torchrun, 0 for a single process."""
    return _number("RANK", 0) if _number("WORLD_SIZE", 1) > 1 else 0


def _number(variable: str, default: int) -> int:
    try:
        return int(os.environ[variable])
    except (KeyError, ValueError):
        return default


def _set_environment() -> None:
    """Set defaults of environment variables that libraries read at import."""
    # By default, OpenMP threads that wait keep their core busy. With another busy process on the machine, training was
    # 4 to 10 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs every start and stop
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it


def _expected(error: Exception) -> bool:
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        from srm_model.training import DivergenceError, WorkerError

        return isinstance(error, DivergenceError | WorkerError)
    return isinstance(error, _EXPECTED)
