"""Models that this package did not make: loaded by name or from an exported program, and scored as ours are."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from srm_model.attacks.guard import as_found, as_scores, check_model, scores_of, to_model
from srm_model.modules import make_torchvision_importable

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PROGRAM = ".pt2"
_PICKLED = ("custom_obj_", "opaque_obj_")  # constants of an exported program that only pickle can restore


@dataclass(frozen=True)
class Interface:
    """How a model takes its images and what its scores mean.

    Args:
        mean, std: per channel, of images in [0, 1]; the model gets (image − mean)/std.
        peak: the value of white before normalisation: 1, or 255.
        lower_is_better: whether low scores mean high quality; None takes the model's attribute `lower_better`, as
            pyiqa's metrics have it, else False.
    """

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    peak: float = 1.0
    lower_is_better: bool | None = None

    def __post_init__(self) -> None:
        if not all(deviation > 0 for deviation in self.std):
            raise ValueError(f"std {self.std}: expected three numbers above 0")
        if not self.peak > 0:
            raise ValueError(f"peak {self.peak}: expected a number above 0")


class ExternalModel(nn.Module):
    """A model behind the interface of this package: images (B, 3, H, W) in [0, 1] → scores (B,), higher is better.

    Attributes:
        model: the module itself.
        line: buffer of two numbers, slope and offset that its scores get last; see `match`.
    """

    mean: Tensor
    gain: Tensor
    line: Tensor

    def __init__(self, model: nn.Module, interface: Interface | None = None) -> None:
        super().__init__()
        interface = interface or Interface()
        lower = interface.lower_is_better
        lower = bool(getattr(model, "lower_better", False)) if lower is None else lower
        self.model = model
        # Buffers, so that results of another interface are results of another model.
        self.register_buffer("mean", torch.tensor(interface.mean).view(3, 1, 1))
        self.register_buffer("gain", interface.peak / torch.tensor(interface.std).view(3, 1, 1))
        self.register_buffer("line", torch.tensor([-1.0 if lower else 1.0, 0.0], dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores, (B,) floating point.

        Raises:
            TypeError: the model returned no tensor.
            ValueError: it returned a tensor of another shape than (B,) or (B, 1), or of integers.
        """
        output = self.model((images - self.mean.to(images)) * self.gain.to(images))
        scores = as_scores(getattr(output, "logits", output), len(images))  # "logits" of a Hugging Face model
        slope, offset = self.line.to(scores)
        return scores * slope + offset

    def match(self, scores: npt.ArrayLike, labels: npt.ArrayLike) -> None:
        """Bring scores to the mean and the standard deviation of labels, so that both are on one scale.

        The order of scores stays.

        Args:
            scores: (n,) of this model as it is now.
            labels: (n,) of the same images.

        Raises:
            ValueError: the scores are all the same, or not finite.
        """
        found, wanted = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
        broken = int((~np.isfinite(found)).sum())
        if broken:
            raise ValueError(f"the model's scores of {broken} of {len(found)} images are not finite")
        if found.std() == 0:
            raise ValueError(f"the model gives all {len(found)} images the same score")
        scale = float(wanted.std() / found.std())
        slope, offset = self.line.tolist()
        self.line.copy_(
            torch.tensor([scale * slope, scale * (offset - float(found.mean())) + float(wanted.mean())])
        )


def open_model(name: str, interface: Interface | None = None) -> ExternalModel:
    """Return a model in evaluation mode.

    Args:
        name: "MODULE:NAME", a module that Python can import (the current folder included) and in it an `nn.Module`,
            or a function or class that returns one without arguments. Importing MODULE runs its code. Or the path of
            an exported program, which ends in .pt2; it is loaded without pickle and runs no code of its own.

    Raises:
        ValueError: there is no such module, name or file; the function fails; the program holds pickled objects.
        TypeError: what was found is not a model.
    """
    found = _program(Path(name)) if name.endswith(PROGRAM) else _named(name)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"--model {name}: a {type(found).__name__}; expected an nn.Module or a callable that returns one"
        )
    check_model(found)
    reference = getattr(found, "metric_mode", "NR")
    if reference != "NR":
        raise ValueError(
            f"--model {name}: a metric of mode {reference}, which compares with a reference image; expected a "
            "no-reference model"
        )
    model = ExternalModel(found, interface)
    try:
        model.eval()
    except NotImplementedError:  # an exported program has no modes
        model.training = False
    return model


def _named(name: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ValueError(
            f"--model {name}: expected MODULE:NAME, or an exported program that ends in {PROGRAM}"
        )
    make_torchvision_importable()
    with _current_folder_first():
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"--model {name}: {error}") from None
        except Exception as error:
            raise ValueError(f"--model {name}: importing {module_name} failed ({_reason(error)})") from error
        for part in attribute.split("."):
            try:
                found = getattr(found, part)
            except AttributeError:
                raise ValueError(f"--model {name}: {module_name} has no {attribute}") from None
        if isinstance(found, nn.Module) or not callable(found):
            return found
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise ValueError(
                f"--model {name}: {attribute} needs arguments ({error}); write a function without any that returns "
                "the model"
            ) from None
        except ValueError:
            pass  # a callable without a signature
        try:
            return found()
        except Exception as error:
            raise ValueError(f"--model {name}: {attribute}() failed ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Let modules of the current folder be imported, as `python -m` does."""
    folder = os.getcwd()  # noqa: PTH109, what sys.path holds
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _program(path: Path) -> nn.Module:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [PurePosixPath(name).name for name in archive.namelist()]
    except FileNotFoundError:
        raise ValueError(f"--model {path}: no such file") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"--model {path}: not an exported program ({error})") from None
    pickled = sorted(name for name in names if name.startswith(_PICKLED))
    if pickled:
        raise ValueError(
            f"--model {path}: holds objects that only pickle can restore ({pickled[0]}), which could run any code; "
            "expected a program of tensors"
        )
    with _weights_only():
        try:
            return torch.export.load(path).module()
        except Exception as error:
            raise ValueError(
                f"--model {path}: not loadable as an exported program ({_reason(error)})"
            ) from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """Have every `torch.load` refuse whatever is not a tensor: torch's own loader of programs does not ask for it."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def differentiable(model: nn.Module, image: Tensor) -> bool:
    """Return whether the score of an image (3, H, W) depends on its pixels through autograd.

    Raises:
        ValueError: the model fails on the image.
    """
    images = to_model(model, image[None])
    with as_found(model, images, seed=0):
        return scores_of(model, images.clone().requires_grad_()).requires_grad
