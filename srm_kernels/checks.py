"""What the doors of several operators ask of their arguments, one sentence each."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics, scores and solves are held: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nowhere(mask: Tensor) -> bool:
    """Whether no element holds, so that its case needs no work; off the CPU asking would wait: False there."""
    return mask.device.type == "cpu" and not bool(mask.any())


def check_tensors(**tensors: Tensor) -> None:
    """Floating-point tensors of one dtype on one device, none of them empty; TypeError or ValueError."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected float64, float32, bfloat16 or float16"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and {first_name} {first.dtype}; expected one dtype")
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first_name} on {first.device}; expected one device"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected no empty axis")


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

    Returns it as a Python float.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number")
    value = float(value)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name}={value}: expected a finite number")
    if above is not None and not value > above:
        raise ValueError(f"{name}={value}: expected more than {above}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name}={value}: expected at least {at_least}")
    return value


def check_count(name: str, value: int, *, at_least: int = 1) -> int:
    """An integer, NumPy's included, of at least `at_least`; TypeError or ValueError. Returns it as a Python int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an integer")
    if value < at_least:
        raise ValueError(f"{name}={value}: expected at least {at_least}")
    return int(value)


def check_flag(name: str, value: bool) -> None:
    """True or False; TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; expected True or False")
