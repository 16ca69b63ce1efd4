"""Check the arguments of operators, and detect whether torch.func, make_fx or torch.export is active."""

from __future__ import annotations

import numbers
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NO_NARROWER = {dtype: DTYPES[: number + 1] for number, dtype in enumerate(DTYPES)}
RENAMED = {"sdpa": "torch"}  # backend names of the last release, which this release still accepts


def current_name(backend: Any) -> Any:
    """Return the current name of a backend.

    The keys of `RENAMED` are names from the previous release. Such a name is still accepted, but it causes a
    FutureWarning when it is first used in a process.
    """
    if not isinstance(backend, str) or backend not in RENAMED:
        return backend
    if not torch.compiler.is_compiling():
        _warn_renamed(backend)
    return RENAMED[backend]


@cache
def _warn_renamed(backend: str) -> None:
    message = f"backend {backend!r} is now called {RENAMED[backend]!r}; the next release will not accept the old name"
    warnings.warn(message, FutureWarning, stacklevel=4)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of intermediate results, such as statistics and scores: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transforming() -> bool:
    """Return whether a function transform (torch.func) or forward-mode differentiation is active."""
    return _in_functorch() or forward_ad._current_level >= 0


# Without the decorator, torch 2.11 traces this call into the graph. The result can be a constant of the graph, because
# torch.compile adds a guard for the stack of transforms.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


def exporting() -> bool:
    """Return whether torch.export is active.

    The function reads the flag behind `torch.compiler.is_exporting()`, because `is_exporting` itself always
    returns True under torch.compile in torch 2.11.
    """
    return torch.compiler._is_exporting_flag


def may_ask(tensor: Tensor) -> bool:
    """Return whether Python may read values of the tensor.

    The result is False for a tensor on a GPU, because reading it would wait for the device. The result is also False
    under torch.func and make_fx, because torch.func.vmap, torch.func.linearize and make_fx do not allow reading.
    """
    return tensor.device.type == "cpu" and not _is_symbolic()


def _is_symbolic() -> bool:
    return _in_functorch() or _in_make_fx()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_make_fx() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def nowhere(mask: Tensor, *, wait: bool = False) -> bool:
    """Return True if Python may read the mask and every element of the mask is False. Otherwise return False.

    The mask selects the elements that need some additional work. If the result is True, no element needs this
    work, and the caller can skip it.

    Args:
        mask: A bool tensor, True for each element that needs additional work.
        wait: If True, a mask on a GPU is read too, except during the capture of a CUDA graph. Reading waits for the
            device. Use True only where the additional work takes longer than the wait.
    """
    asked = may_ask(mask) or (
        wait and _on_cuda(mask) and not _is_symbolic() and not torch.cuda.is_current_stream_capturing()
    )
    return asked and not bool(mask.any())


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def check_tensors(**tensors: Tensor) -> None:
    """Check that all arguments are non-empty floating-point tensors of one dtype and one device.

    Raises:
        TypeError: An argument is not a tensor, its dtype is not in `DTYPES`, or the dtypes differ.
        ValueError: A tensor is empty, or the devices differ.
    """
    first_name, first = "", None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected float64, float32, bfloat16 or float16"
            )
        if first is None:
            first_name, first = name, tensor
        elif tensor.dtype != first.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and {first_name} {first.dtype}; expected one dtype")
        elif tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first_name} on {first.device}; expected one device"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected no empty axis")


def check_tokens(name: str, tensor: Tensor) -> None:
    """Raise TypeError or ValueError unless the tensor has the shape of tokens, (B, H, N, d)."""
    check_tensors(**{name: tensor})
    if tensor.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (B, H, N, d)")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def check_number(
    name: str, value: float, *, above: float | None = None, at_least: float | None = None
) -> float:
    """Return a finite real number as a Python float.

    A symbolic number (torch.SymInt or torch.SymFloat) is returned unchanged.

    Raises:
        TypeError: `value` is not a real number. Numbers of NumPy are accepted.
        ValueError: `value` is not finite, or it is not greater than `above`, or it is less than `at_least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number")
    value = float(value) if isinstance(value, numbers.Real) else value
    if value != value or abs(value) == float("inf"):
        raise ValueError(f"{name}={value}: expected a finite number")
    if above is not None and not value > above:
        raise ValueError(f"{name}={value}: expected more than {above}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name}={value}: expected at least {at_least}")
    return value


def check_count(name: str, value: int, *, at_least: int = 1) -> int:
    """Return an integer as a Python int.

    A symbolic integer (torch.SymInt) is returned unchanged.

    Raises:
        TypeError: `value` is not an integer. Integers of NumPy are accepted.
        ValueError: `value` is less than `at_least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an integer")
    if value < at_least:
        raise ValueError(f"{name}={value}: expected at least {at_least}")
    return int(value) if isinstance(value, numbers.Integral) else value


def check_flag(name: str, value: bool) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; expected True or False")
