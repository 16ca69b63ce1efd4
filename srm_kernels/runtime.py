"""Which implementations of an operator can run here, and why the others cannot.

Only this module queries the hardware and the environment.
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
    "reference": "the definitions in plain PyTorch",
    "torch": "attention by scaled_dot_product_attention; on the CPU also the default landmark solve in C++"
    + ("" if native.BUILT else " (not built)")
    + " and the neck's query side in tiles; other operators run as in the reference",
    "triton": "fused Triton kernels for landmarks, their solve, attention, scale, gate, pooling and the neck",
}
LEAST_CAPABILITY = (8, 0)
WORTH_THREADS = 2**26  # multiply-adds; one thread takes a few milliseconds


class BackendStatus(NamedTuple):
    """Whether a backend can run here; `reason` describes the backend, or says why it cannot run."""

    available: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Return the backends that `backend=` accepts, and whether each can run here.

    An operator can still raise NotImplementedError for an available backend, if it has no implementation for it.

    Returns:
        Backend name → whether it can run here, and its description or the reason why it cannot.
    """
    found = {name: BackendStatus(True, description) for name, description in BACKENDS.items()}
    missing = triton_missing()
    return found if missing is None else found | {"triton": BackendStatus(False, missing)}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_missing() -> str | None:
    """Return why no Triton kernel can run here, or None."""
    if not _has_triton():
        return "Triton is not installed: pip install triton"
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA GPUs, and this torch is built for AMD GPUs"
    if not torch.cuda.is_available() and cpu_launch_device() is None:
        return "there is no CUDA device; only TRITON_INTERPRET=1 runs kernels on the CPU, and it is not set"
    return None


@cache
def _has_triton() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:  # sys.modules has the module without a specification
        return False


def interpreting() -> bool:
    """Return whether Triton kernels run in Triton's interpreter, on CPU tensors: slow, and only for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class LaunchDevice(NamedTuple):
    """The target of Triton kernels: compute capability, and bytes of shared memory that a block can use."""

    capability: tuple[int, int]
    shared_memory: int


def cpu_launch_device() -> LaunchDevice | None:
    """Return the device that Triton kernels on CPU tensors are compiled for, or None if they cannot run.

    The interpreter uses the configurations of compute capability 8.9 and has no limit of shared memory. An emulator
    replaces this function.
    """
    return LaunchDevice((8, 9), sys.maxsize) if interpreting() else None


def launch_device(tensor: torch.Tensor) -> LaunchDevice:
    """Return the device that launches on this tensor are compiled for; a meta tensor counts as a CPU tensor."""
    if tensor.is_cuda:
        properties = torch.cuda.get_device_properties(tensor.device)
        shared = int(getattr(properties, "shared_memory_per_block_optin", 0))
        return LaunchDevice(torch.cuda.get_device_capability(tensor.device), shared)
    return cpu_launch_device() or LaunchDevice((8, 9), sys.maxsize)


def pipeline_stages(capability: tuple[int, int]) -> int:
    """Return the number of stages of a kernel's software pipeline: 2, or 1 where 2 would be a data race.

    On compute capability 9.x, Triton before 3.7.1 inserts no fence between a copy by cp.async and the wgmma that reads
    it (triton-lang/triton, pull request 10537).
    """
    return 1 if capability[0] == 9 and not _copies_are_fenced() else 2


@cache
def _copies_are_fenced() -> bool:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version("triton"))
    return found is None or tuple(map(int, found.groups())) >= (3, 7, 1)


def triton_refusal(tensor: torch.Tensor) -> str | None:
    """Return why no Triton kernel can run on a tensor, or None. Only conditions that all kernels share are checked."""
    reason: str | None = triton_missing()
    if reason is not None:
        return reason
    if tensor.dtype == torch.float64:
        return "its kernels accept float32, bfloat16 and float16, and the tensors are float64"
    if tensor.device.type not in ("cuda", "cpu", "meta"):
        return f"its kernels run on CUDA devices, and the tensors are on {tensor.device}"
    if tensor.device.type == "cpu" and cpu_launch_device() is None:
        return "the tensors are on the CPU; only TRITON_INTERPRET=1 runs its kernels there"
    if launch_device(tensor).capability < LEAST_CAPABILITY:
        return f"its kernels need compute capability {'.'.join(map(str, LEAST_CAPABILITY))} or higher"
    return None


def roomy(tensor: torch.Tensor, kibibytes: int = 160) -> bool:
    """Return whether a block can use this many KiB of shared memory; only data-centre GPUs have 160 KiB."""
    return launch_device(tensor).shared_memory >= kibibytes * 1024


def few_threads(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function(key, ...)` run on one thread if its CPU tensor `key` (…, N, d) is small.

    Between many small steps threads wait for one another by spinning. On a busy machine this takes far longer than the
    steps. The number of threads is set for the calling thread only, and is restored. torch.compile traces `function`
    without this wrapper. The first argument can also be an object with an attribute `key`.
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
    requested: str | choice.Question | None,
    implementations: tuple[str, ...],
    operator: str,
    refusal: Callable[[str], str | None] = lambda name: None,
    *,
    tensor: torch.Tensor | None = None,
    sizes: choice.Sizes = tuple,
    variant: str = "",
    call: tuple[Any, ...] = (),
) -> str:
    """Return the backend to run. A request for a backend never falls back to another one.

    Args:
        requested: The value of `backend=`. None means SRM_KERNELS_BACKEND, if it is set. Without either, the verdict
            about the device of `tensor` decides (see `choice`). Without a verdict, the backend is the first of
            `implementations` that is not refused.
        implementations: Backends that the operator has, the default first.
        operator: Name of the operator.
        refusal: Function that returns why a backend cannot run with these arguments, or None.
        tensor: The tensor whose device and dtype select the verdict, or None.
        sizes: As in `choice.measured`.
        variant: As in `choice.measured`.
        call: Key of the cached choice. It contains everything that `refusal`, `sizes` and `variant` depend on.

    Raises:
        ValueError: The name is not in `backends()`.
        NotImplementedError: The operator cannot run the named backend.
        choice.Answer: `requested` is a `choice.Question`.
    """
    given = requested.requested if isinstance(requested, choice.Question) else requested
    asked = given is not requested
    name = current_name(given) or named_by_environment()
    if name is None and asked:
        default = next(name for name in implementations if refusal(name) is None)
        raise choice.Answer(choice.explained(default, tensor, operator, variant, sizes, refusal))
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
        origin = "backend" if given else ENVIRONMENT_VARIABLE
        raise ValueError(f"{origin}={name!r}: expected None or one of {', '.join(BACKENDS)}")
    reason = refusal(name)
    if name not in implementations or reason is not None:
        missing = triton_missing() if name == "triton" else None
        only = f"for these arguments expected one of {', '.join(implementations)}"
        raise NotImplementedError(f"backend {name!r} cannot run {operator}: {missing or reason or only}")
    if asked:
        origin = "the argument `backend`" if given else ENVIRONMENT_VARIABLE
        reason = f"{origin} names it"
        raise choice.Answer(choice.Explanation(choice.named(operator, variant), name, reason, sizes=sizes()))
    return name


_variables = getattr(os.environ, "_data", None)
_variable = os.environ.encodekey(ENVIRONMENT_VARIABLE)  # type: ignore[attr-defined]


def named_by_environment() -> str | None:
    """Return the value of SRM_KERNELS_BACKEND, or None.

    `os.environ` raises and catches an error for a variable that is not set. This costs more than the whole choice, so
    the function looks up the dictionary behind `os.environ` first.
    """
    if not torch.compiler.is_compiling() and _variables is not None and _variable not in _variables:
        return None
    return current_name(os.environ.get(ENVIRONMENT_VARIABLE)) or None


def kept(
    requested: str | None, tensor: torch.Tensor, operator: str, variant: str, call: tuple[Any, ...]
) -> str | None:
    """Return the cached choice for the key `call`, or None. This is cheaper than preparing a new choice."""
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
    """Return the backend to run for an operator that has Triton kernels.

    `plain` names its other backends, the default first. `refusal` returns why its kernels cannot run with these
    arguments, or None. It is called only if `triton_refusal` has no objection, so that torch.export guards no shape
    without need. The other arguments are those of `choose_backend`.
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
