"""Run any model on images in [0, 1] without changing the state of the model or of the process."""

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


class NoGradientError(ValueError):
    """The scores have no gradient with respect to the images."""

    def __init__(self) -> None:
        super().__init__(
            "the model's scores have no gradient with respect to the images; expected a differentiable model for a "
            "gradient attack"
        )


@contextmanager
def as_found(model: nn.Module, images: Tensor, *, seed: int) -> Iterator[None]:
    """Run the `with` block with the model in evaluation mode and seeded random generators; then restore the state.

    In the `with` block, autocast is off and gradients are enabled, even under an outer `no_grad` or `inference_mode`.

    The following state is the same after the `with` block as before it:

    - the mode of every submodule;
    - all buffers: the tensor objects and their values;
    - `requires_grad` of the parameters;
    - random generators that are attributes of modules;
    - the global random generators of Python and NumPy;
    - PyTorch's global random generators, on the CPU and on the device of `images`.
    """
    with (
        seeded(images.device, seed),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
    ):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        buffers = [
            (module, name, buffer, None if buffer is None else buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        generators = [(generator, generator.get_state()) for generator in generators_of(model)]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)  # saves memory: autograd keeps no activations for weights
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


def generators_of(model: nn.Module) -> list[torch.Generator]:
    """Return the random generators that are attributes of a model's modules."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return [value for value in values if isinstance(value, torch.Generator)]


def derived_seed(*entropy: int) -> int:
    """Derive a seed, in [0, 2⁶³), from non-negative integers."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def scores_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's scores (B,), in fp32 or wider.

    The model gets a copy of the images, because some models normalise in place.

    Raises:
        TypeError: The model does not return a tensor.
        NoGradientError: The images require a gradient, and the model converts them to NumPy without `detach`.
        ValueError: The model fails on these images, or does not return one floating-point score per image.
    """
    try:
        scores = model(images.clone())
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except (RuntimeError, AssertionError, AttributeError, LookupError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        if reason.startswith("Can't call numpy() on Tensor that requires grad"):
            raise NoGradientError from None
        raise ValueError(
            f"the model fails on {images.dtype} images of shape {tuple(images.shape)}: {reason}"
        ) from error
    scores = as_scores(scores, len(images))
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def as_scores(output: object, batch: int) -> Tensor:
    """Check a model's output for `batch` images and return it as (B,).

    Raises:
        TypeError: The output is not a tensor.
        ValueError: The output does not have a floating-point dtype, or its shape is neither (B,) nor (B, 1).
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__}; expected a tensor with one score per image"
        )
    if output.shape not in ((batch,), (batch, 1)) or not output.is_floating_point():
        raise ValueError(
            f"the model returned {output.dtype} of shape {tuple(output.shape)} for {batch} images; "
            f"expected floating-point scores of shape ({batch},) or ({batch}, 1)"
        )
    return output.reshape(batch)


def gradient_of(scores: Tensor, images: Tensor, pull: Tensor | None = None) -> Tensor | None:
    """Return the gradient of Σ pull · scores with respect to the images; None if no score depends on the images.

    `scores` and `pull` have the shape (B,). The default of `pull` is a tensor of ones.

    Raises:
        ValueError: The backward pass of the model fails.
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
                "it writes in place into a tensor that an earlier operation saved for the backward pass; expected a "
                "forward without such writes, for example by clone()"
            )
        raise ValueError(f"the model's scores cannot be differentiated: {reason}") from error


def predict(model: nn.Module, images: Tensor, *, samples: int = 1, seed: int = 0) -> Tensor:
    """Return scores (B,) without gradient, averaged over `samples` seeded passes. The model's state does not change."""
    images = to_model(model, images)
    with as_found(model, images, seed=seed), torch.no_grad():
        return torch.stack([scores_of(model, images) for _ in range(samples)]).mean(0)


def differentiable(model: nn.Module, image: Tensor) -> bool:
    """Return whether autograd can differentiate the score of an image.

    Args:
        model: Model to test.
        image: (3, H, W) in [0, 1].

    Raises:
        ValueError: The model fails on the image.
    """
    images = to_model(model, image[None])
    with as_found(model, images, seed=0):
        try:
            return scores_of(model, images.clone().requires_grad_()).requires_grad
        except NoGradientError:
            return False


def to_model(model: nn.Module, images: Tensor) -> Tensor:
    """Move images to the model's device, in channels_last layout if the first convolution uses this layout."""
    tensors = [*model.parameters(), *model.buffers()]
    if tensors:
        images = images.to(tensors[0].device)
    weight = next((tensor for tensor in tensors if tensor.ndim == 4), None)
    layout = torch.channels_last
    if weight is not None and not weight.is_contiguous() and weight.is_contiguous(memory_format=layout):
        images = images.contiguous(memory_format=layout)
    return images


def check_model(model: nn.Module) -> None:
    """Check that a model can be attacked. Warn if it contains a neck that was never calibrated.

    Raises:
        TypeError: The model is not a module, its `forward` requires further arguments besides the images, or it has
            fp16 or bf16 parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    needed = _needed(model)
    if len(needed) > 1:
        raise TypeError(
            f"the model's forward needs {', '.join(needed)}; expected a module that takes only images; wrap the model "
            "in one"
        )
    half = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        raise TypeError(
            f"the model has {', '.join(sorted(map(str, half)))} parameters; expected fp32 (pass model.float())"
        )
    for part in model.modules():
        if isinstance(part, SRMNeck):
            part.warn_uncalibrated()


def _needed(model: nn.Module) -> list[str]:
    """Return the names of the arguments of `forward` that have no default."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # compiled and scripted modules may have no signature
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def check_finite(scores: Tensor) -> None:
    """Raise ValueError unless all scores of clean images are finite."""
    broken = int((~scores.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(scores)} scores of clean images are not finite; expected a model with finite scores"
        )


def check_images(images: Tensor) -> None:
    """Raise TypeError or ValueError unless images are (B, 3, H, W), float32 or float64, in [0, 1]."""
    if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.float64):
        given = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images is {given}; expected a float32 or float64 tensor")
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, 3, H, W) with B at least 1")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        if low != low or high != high:
            raise ValueError("images contains NaN; expected values in [0, 1]")
        raise ValueError(f"images has values from {low:g} to {high:g}; expected values in [0, 1]")


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and PyTorch for the `with` block, then restore their states."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002, models may use it
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.random.default_generator.manual_seed(seed)
            if device.type == "cuda":  # torch.manual_seed would also seed devices that are not restored
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
