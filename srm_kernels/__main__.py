"""Command line: `python -m srm_kernels` lists the backends and the verdict about each GPU.

The command `verify` checks the results of the kernels on a GPU and measures their times. The command `env`
prints data for a bug report.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

import torch

from . import backends, choice, devices, dispatch, native, verdicts
from .verify.table import tolerate

USAGE = """usage: python -m srm_kernels           print which backends can run, and the verdict about each GPU
       python -m srm_kernels verify    measure the kernels on a GPU (--help for its options)
       python -m srm_kernels env       print versions, devices and settings for a bug report"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    tolerate()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        print("\n".join([*_backends(), "", *_verdicts()]))
        return 0
    command, *rest = given
    if command == "verify":
        from .verify.command import main as verify

        return verify(rest)
    if command == "env" and not rest:
        print("\n".join(_environment()))
        return 0
    asked = command in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _backends() -> list[str]:
    lines = [f"{'backend':11}{'can run':9}description, or why it cannot run"]
    lines += [
        f"{name:11}{'yes' if known.available else 'no':9}{known.reason}" for name, known in backends().items()
    ]
    return lines


def _verdicts() -> list[str]:
    """Return a line for each CUDA device: its verdicts, and how many pairs (operator, dtype) use Triton kernels.

    A verdict is the result of `verify` on a GPU. If there is no CUDA device, the only line says that
    `backend=None` uses plain PyTorch.
    """
    if not torch.cuda.is_available():
        return ["no CUDA device: `backend=None` uses plain PyTorch"]
    return [f"cuda:{i}: {choice.sentence(choice.table(i))}" for i in range(torch.cuda.device_count())]


def _environment() -> list[str]:
    named = dispatch.named_by_environment()
    lines = [
        f"python     {platform.python_version()} on {platform.platform()}",
        f"torch      {torch.__version__}, CUDA {torch.version.cuda or 'absent'}",
        f"triton     {verdicts.triton_version()}",
        f"numpy      {_version('numpy')}",
        f"csrc       {'built' if native.BUILT else 'not built'}",
        f"kernels    {verdicts.sources_digest()}",
        f"driver     {verdicts.driver_version()}",
        f"cache      {verdicts.cache_folder()}",
        f"{dispatch.ENVIRONMENT_VARIABLE}={named or ''} TRITON_INTERPRET={int(devices.interpreting())}",
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index}     {about.name}, compute capability {about.major}.{about.minor}, "
            f"{about.total_memory >> 20} MiB, {about.multi_processor_count} multiprocessors"
        )
    return [*lines, "", *_backends(), "", *_verdicts()]


def _version(package: str) -> str:
    return str(getattr(sys.modules.get(package), "__version__", None) or __import__(package).__version__)


if __name__ == "__main__":
    sys.exit(main())
