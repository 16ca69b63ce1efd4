"""Helpers for torch modules: modes, wrappers, dtypes and checks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from srm_kernels.checks import transforming

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
_schemas: list[torch.library.Library] = []  # keeps libraries alive, and with them their schemas


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside the `with` statement, then restore the mode of every submodule."""
    modes = [(part, part.training) for part in module.modules() if hasattr(part, "training")]
    try:
        _evaluate(module)
        yield
    finally:
        for part, training in modes:
            part.training = training


def _evaluate(module: nn.Module) -> None:
    """Set evaluation mode. If `eval()` raises, as it does for exported programs, set `training` to False instead."""
    try:
        module.eval()
    except Exception:  # a part may refuse with any exception
        module.training = False
        for child in module.children():
            _evaluate(child)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the first parameter, or of the first buffer if there are no parameters, or else the CPU."""
    tensor = next(module.parameters(), next(module.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def unwrapped(module: nn.Module) -> nn.Module:
    """Remove all wrappers and return the inner module.

    Wrappers are `DataParallel`, `DistributedDataParallel`, `AveragedModel`, and the modules that torch.compile returns.
    """
    while (name := _wrapped(module)) is not None:
        module = module.get_submodule(name)
    return module


def _wrapped(module: nn.Module) -> str | None:
    """Return the name of the attribute in which a wrapper keeps its module, or None if `module` is not a wrapper."""
    if isinstance(module, WRAPPERS):
        return "module"
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None  # its class is slow to import


def plain_names(module: nn.Module) -> dict[str, str]:
    """Map each key of `module.state_dict()` to its name in the same model without wrappers."""
    names = {key: key for key in module.state_dict()}
    for path, part in reversed(list(module.named_modules())):  # inner wrappers first
        inner, start = _wrapped(part), f"{path}." if path else ""
        if inner is not None:
            longer = f"{start}{inner}."
            names = {
                key: name.replace(longer, start, 1) if name.startswith(longer) else name
                for key, name in names.items()
            }
    return names


def is_plain(module: nn.Module) -> bool:
    """Return whether code may read a module's weights directly instead of calling the module.

    The result is False for a module with an adapter, a parametrisation, sharding or pruning.
    """
    own = type(module).__module__.startswith(("torch.nn.modules.", "srm_model."))
    made = any(
        type(hook).__module__.startswith("torch.nn.utils") for hook in module._forward_pre_hooks.values()
    )
    return own and not made and "forward" not in module.__dict__


def is_stochastic(model: nn.Module) -> bool:
    """Return whether the score of one image may differ between two calls of the model in evaluation mode.

    The result is the attribute `stochastic` of the model without its wrappers, or False if there is no such attribute.
    """
    return bool(getattr(unwrapped(model), "stochastic", False))


def in_backward() -> bool:
    """Return whether this thread is in a backward pass.

    The result is also True in a forward pass that gradient checkpointing repeats during the backward pass.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check_like(name: str, given: Tensor, own: Tensor, *, promoted: bool = False) -> None:
    """Check that a tensor has the device and the dtype of a module. Under autocast, only check the device.

    Args:
        name: Name of the tensor in messages.
        given: The tensor to check.
        own: A tensor of the module.
        promoted: Whether to also accept a tensor whose dtype is promoted to the dtype of `own` when the two tensors are
            added. For example, fp16 is then accepted if `own` is fp32.

    Raises:
        ValueError: The devices differ.
        TypeError: The dtype is not accepted.
    """
    if given.device != own.device:
        raise ValueError(f"{name} is on {given.device} and the model on {own.device}; expected one device")
    met = torch.promote_types(given.dtype, own.dtype) if promoted else given.dtype
    if met != own.dtype and not torch.is_autocast_enabled(given.device.type):
        raise TypeError(f"{name} is {given.dtype} and the model {own.dtype}; expected one dtype, or autocast")


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product or a convolution reads this tensor under the current autocast state.

    Autocast does not cast fp64 tensors or tensors on the meta device, so the result for them is their own dtype.
    """
    device = tensor.device.type
    own = device == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device)
    return tensor.dtype if own else torch.get_autocast_dtype(device)


def rounded(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cast tensors to a dtype with a single kernel launch.

    The result is differentiable to any order, and the backward pass is also a single launch. Under torch.func and in
    forward-mode differentiation, there is one launch per tensor.

    Args:
        tensors: Tensors on one device. A tensor that already has the dtype `dtype` is returned unchanged.
        dtype: The dtype of the results.
    """
    if transforming():
        return [tensor.to(dtype) for tensor in tensors]
    others = [i for i, t in enumerate(tensors) if t.dtype != dtype]
    results = list(tensors)
    if others:
        for i, result in zip(others, _Rounded.apply(dtype, *(tensors[i] for i in others)), strict=True):
            results[i] = result
    return results


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        results = [torch.empty_like(t, dtype=dtype) for t in tensors]
        torch._foreach_copy_(results, tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = iter(rounded([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(given) for grad in grads)


@cache
def make_torchvision_importable() -> None:
    """Make a CUDA build of torchvision importable with a CPU build of torch.

    Call this function before importing timm or piq.

    A torchvision that is built for CUDA cannot be imported with a CPU build of torch, because two operator schemas are
    missing. This function defines the two schemas. It does not define implementations, because this package calls no
    operator of torchvision.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    except ImportError:
        pass
