"""What the doors of several operators ask of their arguments, one sentence each."""

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


RENAMED = {"sdpa": "torch"}  # backends by their names of the last release, which this one still accepts


def current_name(backend: Any) -> Any:
    """Return a backend's present name; one of the last release is a FutureWarning, once a process."""
    if not isinstance(backend, str) or backend not in RENAMED:
        return backend
    if not torch.compiler.is_compiling():
        _warn_renamed(backend)
    return RENAMED[backend]


@cache
def _warn_renamed(backend: str) -> None:
    message = (
        f"backend {backend!r} is now called {RENAMED[backend]!r}; the next release will refuse the old name"
    )
    warnings.warn(message, FutureWarning, stacklevel=4)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics, scores and solves are held: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transforming() -> bool:
    """Whether a function transform (torch.func) or forward-mode differentiation is at work."""
    return _in_functorch() or forward_ad._current_level >= 0


# torch.compile guards the stack of transforms; torch 2.11 would otherwise trace the question into the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


def exporting() -> bool:
    """Whether torch.export is at work.

    torch.compile of torch 2.11 takes `torch.compiler.is_exporting()` for true; this flag is what it answers elsewhere.
    """
    return torch.compiler._is_exporting_flag


def may_ask(tensor: Tensor) -> bool:
    """Whether Python may look at values.

    Off the CPU it would wait for the device; torch.func.vmap, make_fx and torch.func.linearize forbid it.
    """
    return tensor.device.type == "cpu" and not _in_functorch() and not _in_make_fx()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_make_fx() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def nowhere(mask: Tensor, *, wait: bool = False) -> bool:
    """Whether no element holds, so that its case needs no work; False where Python may not ask.

    wait: also ask a GPU, and wait for it, unless a CUDA graph is being captured. For work that costs more than the
    wait.
    """
    asked = may_ask(mask) or (wait and _may_wait(mask))
    return asked and not bool(mask.any())


def _may_wait(tensor: Tensor) -> bool:
    return (
        _on_cuda(tensor)
        and not _in_functorch()
        and not _in_make_fx()
        and not torch.cuda.is_current_stream_capturing()
    )


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def check_tensors(**tensors: Tensor) -> None:
    """Floating-point tensors of one dtype on one device, none of them empty; TypeError or ValueError."""
    first_name, first, dtype, device = None, None, None, None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if first is None:
            first_name, first, dtype, device = name, tensor, tensor.dtype, tensor.device
            if dtype not in DTYPES:
                raise TypeError(f"{name} has dtype {dtype}; expected float64, float32, bfloat16 or float16")
        elif tensor.dtype != dtype:
            if tensor.dtype not in DTYPES:
                raise TypeError(
                    f"{name} has dtype {tensor.dtype}; expected float64, float32, bfloat16 or float16"
                )
            raise TypeError(f"{name} is {tensor.dtype} and {first_name} {dtype}; expected one dtype")
        elif tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first_name} on {device}; expected one device"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected no empty axis")


def is_parameter(value: object, shape: tuple[int, ...], like: Tensor) -> bool:
    """Whether `value` is a tensor of this shape on the device of `like`, in its dtype or a wider one.

    For checks of many parameters: who gets False finds out which of it does not hold, and says so.
    """
    return (
        isinstance(value, Tensor)
        and value.shape == shape
        and value.dtype in NO_NARROWER[like.dtype]
        and value.device == like.device
    )


def check_tokens(name: str, tensor: Tensor) -> None:
    """Tokens are (B, H, N, d)."""
    check_tensors(**{name: tensor})
    if tensor.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (B, H, N, d)")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """`value` is one of `choices`; ValueError."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def check_number(
    name: str, value: float, *, above: float | None = None, at_least: float | None = None
) -> float:
    """A real number, NumPy's included, greater than `above` or at least `at_least`; TypeError or ValueError.

    Returns it as a Python float, or as torch.export's symbol for a number that comes from a shape.
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
    """An integer, NumPy's included, of at least `at_least`; TypeError or ValueError.

    Returns it as a Python int, or as torch.export's symbol for one.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an integer")
    if value < at_least:
        raise ValueError(f"{name}={value}: expected at least {at_least}")
    return int(value) if isinstance(value, numbers.Integral) else value


def check_flag(name: str, value: bool) -> None:
    """True or False; TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; expected True or False")
