"""Running any model on images in [0, 1] without leaving a trace on it or on the process."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from srm_model.modules import evaluating
from srm_model.neck import SRMNeck


@contextmanager
def as_found(model: nn.Module, images: Tensor, *, seed: int) -> Iterator[None]:
    """Evaluation mode, fp32, every random number generator seeded; all of it put back on leaving.

    Put back are each submodule's training mode, each buffer (object and value), each parameter's
    `requires_grad`, the state of generators kept as attributes of modules, and the global state of Python's,
    NumPy's and PyTorch's generators, on the CPU and on the device of `images`. Autocast is off inside;
    gradients can be taken even under an outer `no_grad` or `inference_mode`.
    """
    with (
        seeded(images.device, seed),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
    ):
        modules = list(model.modules())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        buffers = [
            (module, name, buffer, None if buffer is None else buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
        ]
        generators = [
            (value, value.get_state())
            for module in modules
            for value in vars(module).values()
            if isinstance(value, torch.Generator)
        ]
        try:
            for parameter in trained:
                parameter.requires_grad_(
                    False
                )  # no weight gradient is wanted, so no activation is kept for one
            with evaluating(model):
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
            for generator, state in generators:
                generator.set_state(state)


def scores_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's scores (B,), in fp32 at least; (B, 1) is flattened, anything else is an error.

    The model is given a copy: one that normalises in place changes no tensor of the attack's or the caller's.
    """
    try:
        scores = model(images.clone())
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except (RuntimeError, AssertionError, AttributeError, LookupError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the model fails on {images.dtype} images of shape {tuple(images.shape)}: {reason}"
        ) from error
    scores = as_scores(scores, len(images))
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def as_scores(output: object, batch: int) -> Tensor:
    """Return what a model gave for `batch` images as (B,); TypeError or ValueError where it is not a score each."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__}: expected a tensor of one score per image"
        )
    if output.shape not in ((batch,), (batch, 1)) or not output.is_floating_point():
        raise ValueError(
            f"the model returned {output.dtype} of shape {tuple(output.shape)} for {batch} images: "
            f"expected floating-point scores of shape ({batch},) or ({batch}, 1)"
        )
    return output.reshape(batch)


def gradient_of(scores: Tensor, images: Tensor, pull: Tensor | None = None) -> Tensor | None:
    """The gradient of scores (B,), weighted by `pull`, in the images they are of; None where there is none.

    A model whose backward pass fails is a ValueError.
    """
    try:
        return torch.autograd.grad(
            scores, images, torch.ones_like(scores) if pull is None else pull, allow_unused=True
        )[0]
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "modified by an inplace operation" in reason:
            reason = (
                "it writes into a tensor that an earlier operation has saved for the backward pass, such as into its "
                "input after a convolution; expected a forward that leaves such tensors alone, as by clone()"
            )
        raise ValueError(f"the model's scores cannot be differentiated: {reason}") from error


def predict(model: nn.Module, images: Tensor, *, samples: int = 1, seed: int = 0) -> Tensor:
    """Scores (B,) without gradient, the mean of `samples` seeded passes where the model is stochastic."""
    images = to_model(model, images)
    with as_found(model, images, seed=seed), torch.no_grad():
        return torch.stack([scores_of(model, images) for _ in range(samples)]).mean(0)


def to_model(model: nn.Module, images: Tensor) -> Tensor:
    """The images on the model's device, and channels_last where its first convolution is."""
    tensors = [*model.parameters(), *model.buffers()]
    if tensors:
        images = images.to(tensors[0].device)
    weight = next((tensor for tensor in tensors if tensor.ndim == 4), None)
    if weight is not None and not weight.is_contiguous():
        layout = torch.channels_last
        if weight.is_contiguous(memory_format=layout):
            images = images.contiguous(memory_format=layout)
    return images


def check_model(model: nn.Module) -> None:
    """A module that can be attacked, in fp32; TypeError. Warns of a neck in it that was never calibrated."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model of type {type(model).__name__}: expected a torch.nn.Module")
    needed = _needed(model)
    if len(needed) > 1:
        raise TypeError(
            f"the model's forward needs {', '.join(needed)}: expected a module that takes images alone, so wrap it"
        )
    half = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        raise TypeError(
            f"the model has {', '.join(sorted(map(str, half)))} parameters: attacks run in fp32, "
            "so pass model.float()"
        )
    for part in model.modules():
        if isinstance(part, SRMNeck):
            part.warn_uncalibrated()


def _needed(model: nn.Module) -> list[str]:
    """Names of the arguments without which forward cannot be called."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # compiled and scripted modules need not say
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def check_finite(scores: Tensor) -> None:
    """Of the images as they are, before any attack."""
    broken = int((~scores.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(scores)} scores of clean images are not finite: a model that is broken already cannot "
            "be attacked"
        )


def check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.float64):
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images of type {given}: expected a float32 or float64 tensor")
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W) with B at least 1")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        if low != low or high != high:
            raise ValueError("the images contain NaN: expected values in [0, 1]")
        raise ValueError(f"the images have values from {low:g} to {high:g}: expected values in [0, 1]")


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The global generators of Python, NumPy and PyTorch at a seed, and afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002, a model may draw from it
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.random.default_generator.manual_seed(seed)
            if device.type == "cuda":  # torch.manual_seed would also reseed the devices that are not forked
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
