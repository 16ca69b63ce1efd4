"""What several parts ask of modules, of torch's kind and of Python's."""

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
_schemas: list[torch.library.Library] = []  # a schema lives as long as its library


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the length of a block; afterwards every submodule has the mode it was found in."""
    modes = [(part, part.training) for part in module.modules() if hasattr(part, "training")]
    try:
        _evaluate(module)
        yield
    finally:
        for part, training in modes:
            part.training = training


def _evaluate(module: nn.Module) -> None:
    """`module.eval()`; a part that refuses it, as an exported program does, has its attribute set alone."""
    try:
        module.eval()
    except Exception:  # whatever a part chooses to refuse with
        module.training = False
        for child in module.children():
            _evaluate(child)


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters are, or else its buffers; the CPU for a module without any."""
    tensor = next(module.parameters(), next(module.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile, `DataParallel`, `DistributedDataParallel` and `AveragedModel`."""
    while (name := _wrapped(module)) is not None:
        module = module.get_submodule(name)
    return module


def _wrapped(module: nn.Module) -> str | None:
    """The attribute that holds the module inside a wrapper; None for other modules."""
    if isinstance(module, WRAPPERS):
        return "module"
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" else None  # its class is slow to import


def plain_names(module: nn.Module) -> dict[str, str]:
    """The keys of `module.state_dict()`, and for each its name in a model whose parts are not wrapped."""
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
    """Whether the weights of a module are all that it does: no adapter, no parametrisation, no shards, no pruning."""
    own = type(module).__module__.startswith(("torch.nn.modules.", "srm_model."))
    made = any(
        type(hook).__module__.startswith("torch.nn.utils") for hook in module._forward_pre_hooks.values()
    )
    return own and not made and "forward" not in module.__dict__


def is_stochastic(model: nn.Module) -> bool:
    """Whether the model says, wrapped or not, that two evaluations of one image may differ."""
    return bool(getattr(unwrapped(model), "stochastic", False))


def in_backward() -> bool:
    """Whether autograd is at work on this thread: gradient checkpointing then takes a forward pass again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check_like(name: str, given: Tensor, own: Tensor, *, promoted: bool = False) -> None:
    """`given` is on the device of a module's `own` tensor and of its dtype, unless autocast is on.

    `promoted`: it may be of a narrower dtype, since arithmetic with `own` comes first.
    """
    if given.device != own.device:
        raise ValueError(f"{name} is on {given.device} and the model on {own.device}; expected one device")
    met = torch.promote_types(given.dtype, own.dtype) if promoted else given.dtype
    if met != own.dtype and not torch.is_autocast_enabled(given.device.type):
        raise TypeError(f"{name} is {given.dtype} and the model {own.dtype}; expected one dtype, or autocast")


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a product takes this tensor in: its own without autocast, which leaves fp64 and shapes alone."""
    device = tensor.device.type
    own = device == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device)
    return tensor.dtype if own else torch.get_autocast_dtype(device)


def rounded(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Every tensor as `tensor.to(dtype)` gives it, all that are not of it already by one launch.

    Differentiable, any number of times; the gradients take one launch too. Under torch.func and in forward mode it is
    a launch for each.
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
    """Call before importing a library that imports torchvision (timm, piq).

    A torchvision built for CUDA cannot register its operators on CPU torch and does not import. Two schemas are all
    that it asks for; no operator of it is used here.
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
