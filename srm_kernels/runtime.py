"""Which implementation of an operator can run here, and why not the others.

The one place that asks the hardware and the environment.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from functools import cache, wraps
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from . import choice, native
from .checks import current_name

ENVIRONMENT_VARIABLE = "SRM_KERNELS_BACKEND"
BACKENDS = {
    "reference": "the mathematics in plain PyTorch",
    "torch": "attention through scaled_dot_product_attention, and on the CPU the default landmark solve in C++ of csrc"
    + ("" if native.BUILT else " (not built)")
    + " and the neck's query side in tiles; the other operators have one plain-PyTorch form",
    "triton": "fused Triton kernels for landmarks, their solve, attention, scale, gate, pooling and the neck",
}
LEAST_CAPABILITY = (8, 0)
WORTH_THREADS = 2**26  # multiply-adds, a few milliseconds of one thread


class BackendStatus(NamedTuple):
    """Whether an implementation can run here; `reason` says what it is, or why it cannot."""

    available: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """The implementations `backend=` accepts: name → (available here, what it is or why it cannot run).

    An operator without kernels of its own for an available backend says so when that backend is asked for.
    """
    missing = _missing()
    return {
        name: BackendStatus(name not in missing, missing.get(name, description))
        for name, description in BACKENDS.items()
    }


def _missing() -> dict[str, str]:
    reason = triton_missing()
    return {} if reason is None else {"triton": reason}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_missing() -> str | None:
    """Why no Triton kernel can run here, or None."""
    if not _has_triton():
        return "Triton is not installed: pip install triton"
    if not torch.cuda.is_available() and cpu_launch_device() is None:
        return "there is no CUDA device, and TRITON_INTERPRET=1, which runs kernels on the CPU, is not set"
    return None


@cache
def _has_triton() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:  # a module that was blocked has no specification
        return False


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: slow, and only for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class LaunchDevice(NamedTuple):
    """What launches of Triton kernels depend on: compute capability, and bytes of shared memory a block may use."""

    capability: tuple[int, int]
    shared_memory: int


def cpu_launch_device() -> LaunchDevice | None:
    """Return the device that Triton kernels on CPU tensors are compiled for, or None where none accepts them.

    The interpreter takes the configurations of a common card and has no limit of shared memory. An emulator replaces
    this function.
    """
    return LaunchDevice((8, 9), sys.maxsize) if interpreting() else None


def launch_device(tensor: torch.Tensor) -> LaunchDevice:
    """Return the device that launches on this tensor are compiled for; for a meta tensor as for a CPU tensor."""
    if tensor.is_cuda:
        properties = torch.cuda.get_device_properties(tensor.device)
        shared = int(getattr(properties, "shared_memory_per_block_optin", 0))
        return LaunchDevice(torch.cuda.get_device_capability(tensor.device), shared)
    return cpu_launch_device() or LaunchDevice((8, 9), sys.maxsize)


def pipeline_stages(capability: tuple[int, int]) -> int:
    """Return the stages of a kernel's software pipeline: 2, or 1 where more would be a race.

    Before 3.7.1 Triton puts no fence between a copy by cp.async and the wgmma of compute capability 9.x that reads it
    (triton-lang/triton, pull request 10537).
    """
    return 1 if capability[0] == 9 and not _copies_are_fenced() else 2


@cache
def _copies_are_fenced() -> bool:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version("triton"))
    return found is None or tuple(map(int, found.groups())) >= (3, 7, 1)


def triton_refusal(tensor: torch.Tensor) -> str | None:
    """Why no Triton kernel can run on a tensor, or None: what is common to all of them."""
    reason: str | None = triton_missing()
    if reason is not None:
        return reason
    if tensor.dtype == torch.float64:
        return "its kernels compute in float32, and the tensors are float64"
    if tensor.device.type not in ("cuda", "cpu", "meta"):
        return f"its kernels run on CUDA devices, and the tensors are on {tensor.device}"
    if tensor.device.type == "cpu" and cpu_launch_device() is None:
        return "the tensors are on the CPU, where only TRITON_INTERPRET=1 runs its kernels"
    if launch_device(tensor).capability < LEAST_CAPABILITY:
        return f"its kernels need compute capability {'.'.join(map(str, LEAST_CAPABILITY))}"
    return None


def roomy(tensor: torch.Tensor, kibibytes: int = 160) -> bool:
    """Whether blocks may ask for so much shared memory; 160 KiB they may on data-centre cards and not on others."""
    return launch_device(tensor).shared_memory >= kibibytes * 1024


def few_threads(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function(key, ...)` such that small work on a CPU tensor `key` (…, N, d) stays on one thread.

    In place of the tensor may stand what holds it under this name.

    Between many small steps threads wait for one another by spinning, which on a busy machine takes far longer than
    the steps. The number of threads is the calling thread's own, and is set back. torch.compile traces
    `function` alone.
    """

    @wraps(function)
    def call(first: Any, *args: Any) -> Any:
        key = first if isinstance(first, torch.Tensor) else first.key
        here = key.device.type == "cpu" and not torch.compiler.is_compiling()
        threads = torch.get_num_threads() if here else 1
        if threads == 1 or key.numel() * key.shape[-1] > WORTH_THREADS:
            return function(first, *args)
        torch.set_num_threads(1)
        try:
            return function(first, *args)
        finally:
            torch.set_num_threads(threads)

    return call


def choose_backend(
    requested: str | None,
    implementations: tuple[str, ...],
    operator: str,
    refusal: Callable[[str], str | None] = lambda name: None,
    *,
    tensor: torch.Tensor | None = None,
    sizes: choice.Sizes = tuple,
    variant: str = "",
    call: tuple[Any, ...] = (),
) -> str:
    """The implementation to run: the one asked for, or the fastest that is right by the verdict about the device.

    `requested` None reads SRM_KERNELS_BACKEND. Without either, the device of `tensor` may have a verdict (see
    `choice`); without that it is the first of `implementations` that is not refused. `refusal` says why an
    implementation cannot serve these arguments, or None; only those in question are asked about. `sizes` and `variant`
    are as in `choice.measured`; the choice is kept for `call`, which holds everything that these and `refusal` depend
    on. A name outside `backends()` is a ValueError, a known one that this operator cannot run is a NotImplementedError
    with the reason: a request never falls back.
    """
    if isinstance(requested, choice.Question):
        raise choice.Answer(
            _explained(requested.requested, implementations, operator, refusal, tensor, sizes, variant)
        )
    name = current_name(requested) or named_by_environment()
    if name is None:
        chosen = None if tensor is None else choice.cached(tensor, operator, variant, call)
        if chosen is not None:
            return chosen
        if tensor is not None:
            chosen = choice.measured(tensor, operator, variant, sizes, refusal)
        if chosen is None:
            chosen = next(name for name in implementations if refusal(name) is None)
        if tensor is not None:
            choice.keep(tensor, operator, variant, call, chosen)
        return chosen
    if name not in BACKENDS:
        origin = "backend" if requested else ENVIRONMENT_VARIABLE
        raise ValueError(f"{origin}={name!r}: expected None or one of {', '.join(BACKENDS)}")
    reason = refusal(name)
    if name not in implementations or reason is not None:
        only = f"it has no form for these arguments, only {', '.join(implementations)}"
        raise NotImplementedError(
            f"backend {name!r} cannot run {operator}: {_missing().get(name) or reason or only}"
        )
    return name


_variables = getattr(os.environ, "_data", None)
_variable = os.environ.encodekey(ENVIRONMENT_VARIABLE)  # type: ignore[attr-defined]


def named_by_environment() -> str | None:
    """SRM_KERNELS_BACKEND, or None.

    Looking for a variable that is not set raises and catches errors in `os`, which costs more than the whole choice;
    so this first looks into the dictionary that `os.environ` keeps.
    """
    if not torch.compiler.is_compiling() and _variables is not None and _variable not in _variables:
        return None
    return current_name(os.environ.get(ENVIRONMENT_VARIABLE)) or None


def _explained(
    requested: str | None,
    implementations: tuple[str, ...],
    operator: str,
    refusal: Callable[[str], str | None],
    tensor: torch.Tensor | None,
    sizes: choice.Sizes,
    variant: str,
) -> choice.Explanation:
    if requested or named_by_environment():
        name = choose_backend(requested, implementations, operator, refusal)
        origin = "the argument `backend`" if requested else ENVIRONMENT_VARIABLE
        return choice.Explanation(choice.named(operator, variant), name, f"{origin} names it", sizes=sizes())
    default = next(name for name in implementations if refusal(name) is None)
    return choice.explained(default, tensor, operator, variant, sizes, refusal)


def kept(
    requested: str | None, tensor: torch.Tensor, operator: str, variant: str, call: tuple[Any, ...]
) -> str | None:
    """What was chosen for such a call before, or None; asked first, before anything is made that a choice needs."""
    if requested is None and named_by_environment() is None:
        return choice.cached(tensor, operator, variant, call)
    return None


def choose_kernels(
    requested: str | None,
    tensor: torch.Tensor,
    operator: str,
    refusal: Callable[[], str | None] = lambda: None,
    *,
    plain: tuple[str, ...] = ("reference", "torch"),
    sizes: choice.Sizes = tuple,
    variant: str = "",
    call: tuple[Any, ...] = (),
) -> str:
    """The choice for an operator that has Triton kernels beside one form in plain PyTorch.

    `plain` names its forms in plain PyTorch, the default first. `refusal` says why its kernels cannot serve these
    arguments, where what is common to all of them can; it is asked only where they are in question, so that under
    torch.export it guards no shape for nothing.
    """
    return kept(requested, tensor, operator, variant, call) or choose_backend(
        requested,
        (*plain, "triton"),
        operator,
        lambda name: (triton_refusal(tensor) or refusal()) if name == "triton" else None,
        tensor=tensor,
        sizes=sizes,
        variant=variant,
        call=call,
    )
