"""Choose the backend of an operator call, and give the reason if a backend cannot run."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch

from . import choice, devices, native
from .checks import current_name

ENVIRONMENT_VARIABLE = "SRM_KERNELS_BACKEND"
BACKENDS = {
    "reference": "the definitions in plain PyTorch",
    "torch": "attention by scaled_dot_product_attention; on the CPU also the default landmark solve in C++"
    + ("" if native.BUILT else " (not built)")
    + " and the neck's query side in tiles; other operators run as in the reference",
    "triton": "fused Triton kernels for landmarks, their solve, attention, scale, gate, pooling and the neck",
}
WORTH_THREADS = 2**26  # multiply-adds; one thread takes a few milliseconds


class BackendStatus(NamedTuple):
    """Whether a backend can run here; `reason` describes the backend, or says why it cannot run."""

    available: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Return the backends that `backend=` accepts, and whether each can run here.

    A backend that can run here does not necessarily support every operator and every argument. If the requested backend
    does not support a call, the operator raises NotImplementedError.

    Returns:
        Backend name → its `BackendStatus`: True and a description, or False and the reason why the backend cannot run.
    """
    found = {name: BackendStatus(True, description) for name, description in BACKENDS.items()}
    missing = devices.triton_missing()
    return found if missing is None else found | {"triton": BackendStatus(False, missing)}


def few_threads(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function(key, ...)` run on one thread if its CPU tensor `key` (…, N, d) is small.

    The first argument of `function` is either the tensor `key`, or an object whose attribute `key` is this tensor.

    One thread is faster, because `function` runs many small steps: several threads would wait for each other
    after each step, and on a busy machine this waiting takes far longer than the steps. The number of threads
    is set for the calling thread only, and is restored afterwards. torch.compile traces `function` without
    this wrapper.
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
    """Return the backend to run; a requested backend is never replaced by another one.

    Args:
        requested: The value of `backend=`. If it is None, the environment variable SRM_KERNELS_BACKEND names
            the backend. If this variable is not set, the verdict about the device of `tensor` selects the
            backend (see `choice`). If there is no verdict, or it selects no backend, the result is the first
            of `implementations` that can run the call.
        implementations: Backends that have an implementation of the operator, the default first.
        operator: Name of the operator.
        refusal: Function that takes the name of a backend, and returns why this backend cannot run the call,
            or None if it can.
        tensor: The tensor whose device and dtype select the verdict. With None, no verdict is used.
        sizes: As in `choice.measured`.
        variant: As in `choice.measured`.
        call: Key of the cached choice. The key contains everything that `refusal`, `sizes` and `variant` depend on.

    Raises:
        ValueError: The name of the requested backend is not in `backends()`.
        NotImplementedError: The requested backend cannot run the call.
        choice.Answer: `requested` is a `choice.Question`. The exception contains the explanation of the choice.
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
        missing = devices.triton_missing() if name == "triton" else None
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

    For a variable that is not set, `os.environ` raises and catches an exception. This takes longer than the whole
    choice of a backend. The function therefore first looks in the dictionary that `os.environ` wraps.
    """
    if not torch.compiler.is_compiling() and _variables is not None and _variable not in _variables:
        return None
    return current_name(os.environ.get(ENVIRONMENT_VARIABLE)) or None


def kept(
    requested: str | None, tensor: torch.Tensor, operator: str, variant: str, call: tuple[Any, ...]
) -> str | None:
    """Return the choice cached for `call`, or None if nothing is cached or if a backend was requested."""
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

    `plain` contains the names of all backends of the operator except "triton", the default first. `refusal`
    returns why the kernels cannot run the call, or None if they can. The remaining arguments are those of
    `choose_backend`.

    Under torch.export, every shape that `refusal` reads adds a guard to the exported program. To avoid unnecessary
    guards, `refusal` is called only if `devices.triton_refusal` returns None, that is, if Triton kernels can run on
    `tensor` in general.
    """
    return kept(requested, tensor, operator, variant, call) or choose_backend(
        requested,
        (*plain, "triton"),
        operator,
        lambda name: (devices.triton_refusal(tensor) or refusal()) if name == "triton" else None,
        tensor=tensor,
        sizes=sizes,
        variant=variant,
        call=call,
    )
