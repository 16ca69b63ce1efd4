"""Load models of other projects, by name or from an exported program."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
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

from srm_model.attacks.guard import as_scores, check_model
from srm_model.files import sha256_of
from srm_model.modules import make_torchvision_importable

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PROGRAM = ".pt2"
_PICKLED = ("custom_obj_", "opaque_obj_")  # names of constants in an exported program that need pickle


@dataclass(frozen=True)
class Interface:
    """The format of a model's input and the direction of its scores.

    Args:
        mean, std: Mean and standard deviation of each channel of images in [0, 1]. The model's input is peak·(image −
            mean)/std.
        peak: Scale of the pixel values that the model expects: 1 for values from 0 to 1, 255 for values from 0 to 255.
            `mean` and `std` refer to images in [0, 1] in both cases.
        lower_is_better: Whether low scores mean high quality. None uses the model's attribute `lower_better`, which
            pyiqa's metrics have. If the model has no such attribute, None means False.
    """

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    peak: float = 1.0
    lower_is_better: bool | None = None

    def __post_init__(self) -> None:
        if not all(deviation > 0 for deviation in self.std):
            raise ValueError(f"std is {self.std}; expected three numbers above 0")
        if not self.peak > 0:
            raise ValueError(f"peak is {self.peak}; expected a number above 0")


class ExternalModel(nn.Module):
    """A wrapper that gives a model this package's interface.

    The wrapper maps images (B, 3, H, W) in [0, 1] to scores (B,), higher is better.

    Args:
        model: Model to wrap.
        interface: Format of the model's input and direction of its scores. Default: `Interface()`.

    Attributes:
        model: The wrapped model.
        lower_better: The attribute `lower_better` of the wrapped model, as in pyiqa; False without such an attribute.
        line: Slope and offset that are applied to the scores (see `match`).
    """

    mean: Tensor
    gain: Tensor
    line: Tensor

    def __init__(self, model: nn.Module, interface: Interface | None = None) -> None:
        super().__init__()
        interface = interface or Interface()
        self.model = model
        self.lower_better = bool(getattr(model, "lower_better", False))
        lower = self.lower_better if interface.lower_is_better is None else interface.lower_is_better
        # Store the interface in buffers, because the fingerprint of a model includes its buffers. With another
        # interface, the fingerprint is different, so old results are not reused.
        self.register_buffer("mean", torch.tensor(interface.mean).view(3, 1, 1))
        self.register_buffer("gain", interface.peak / torch.tensor(interface.std).view(3, 1, 1))
        self.register_buffer("line", torch.tensor([-1.0 if lower else 1.0, 0.0], dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores, (B,) floating point.

        Raises:
            TypeError: The model returns neither a tensor nor an object whose attribute `logits` is a tensor.
            ValueError: The model raises an error, the tensor is not floating point, or its shape is not (B,) or (B, 1).
        """
        output = self._called((images - self.mean.to(images)) * self.gain.to(images))
        scores = as_scores(
            getattr(output, "logits", output), len(images)
        )  # Hugging Face models return "logits"
        slope, offset = self.line.to(scores)
        return scores * slope + offset

    def _called(self, inputs: Tensor) -> Any:
        try:
            return self.model(inputs)
        except (ValueError, OSError) as error:
            wants_255 = "255" in str(error) and float(self.gain.max()) < 255
            advice = "; --peak 255 gives it values from 0 to 255" if wants_255 else ""
            raise ValueError(f"the model raised {_reason(error)}{advice}") from error
        except (AssertionError, RuntimeError) as error:
            if "Guard failed" not in str(error):
                raise
            raise ValueError(
                f"the program does not take inputs of shape {tuple(inputs.shape)}; export it with a dynamic batch "
                "size, and use --size for its image size"
            ) from error

    def match(self, scores: npt.ArrayLike, labels: npt.ArrayLike) -> None:
        """Set `line` so that the scores have the same mean and standard deviation as the labels.

        `line` is the slope and the offset that are applied to the scores. The ranking of the images does not change.

        Args:
            scores: Scores of this model, (n,).
            labels: Labels of the same images, (n,).

        Raises:
            ValueError: All scores are equal, or some are not finite.
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
    """Load a model in evaluation mode.

    Args:
        name: "MODULE:NAME", or the path of an exported program (.pt2). MODULE is an importable module, which may be in
            the current folder. Importing MODULE runs its code. NAME is an `nn.Module` in MODULE, or a callable in
            MODULE that takes no arguments and returns an `nn.Module`. An exported program with pickled objects is
            refused. Loading a program still runs code from the file, because PyTorch evaluates expressions of the
            file (sizes and guards) as Python code.
        interface: Format of the model's input and direction of its scores. Default: `Interface()`.

    Raises:
        ValueError: MODULE, NAME or the file does not exist, the import of MODULE or the call of NAME fails, the
            exported program cannot be loaded or has pickled objects, or the model needs a reference image.
        TypeError: The object is not an `nn.Module`, its `forward` requires further arguments besides the images, or it
            has fp16 or bf16 parameters.
    """
    found = _program(Path(name)) if _is_program(name) else _named(name)
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


def _is_program(name: str) -> bool:
    return name.lower().endswith(PROGRAM)


def _named(name: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ValueError(
            f"--model {name}: expected MODULE:NAME, or an exported program that ends in {PROGRAM}"
        )
    if module_name.startswith(".") or module_name.endswith(".py") or set(module_name) & set("/\\"):
        raise ValueError(
            f"--model {name}: {module_name} is a path; expected a module of the current folder or an installed module, "
            f"such as {Path(module_name).stem}:{attribute}"
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
                f"--model {name}: {attribute} needs arguments ({error}); expected a function without arguments that "
                "returns the model"
            ) from None
        except ValueError:  # the callable has no signature
            pass
        try:
            return found()
        except Exception as error:
            raise ValueError(f"--model {name}: {attribute}() failed ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Put the current folder first in `sys.path` within the `with` block.

    Modules of the current folder can then be imported, as in a program that is started with `python -m`.
    """
    folder = os.getcwd()  # noqa: PTH109, sys.path holds strings
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
        raise ValueError(f"--model {path}: no such file; expected an exported program") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--model {path}: not an exported program ({error}); expected a file that torch.export.save wrote"
        ) from None
    if "data.pkl" in names and "archive_format" not in names:
        raise ValueError(
            f"--model {path}: has pickled objects, as torch.save and torch.jit.save write them; expected a file that "
            "torch.export.save wrote"
        )
    pickled = sorted(name for name in names if name.startswith(_PICKLED))
    if pickled:
        raise ValueError(
            f"--model {path}: has objects that need pickle ({pickled[0]}), which could run any code; expected a "
            "program with tensors only"
        )
    with (
        _weights_only(),
        _without_warnings(),
        path.open("rb") as file,
    ):  # a path would have to end in lower case
        try:
            return torch.export.load(file).module()
        except Exception as error:
            raise ValueError(
                f"--model {path}: not loadable as an exported program ({_reason(error)})"
            ) from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Log no warnings in the `with` block.

    If an exported program cannot be loaded, PyTorch logs a traceback as a warning before it raises an error.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every `torch.load` within the `with` block load with `weights_only=True`.

    Without this context, `torch.export.load` could call `torch.load` with `weights_only=False`, which can run code from
    the file.
    """
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


def code_digest(name: str, model: nn.Module) -> str:
    """Return a hash of the files that define a model.

    The files are the exported program, or MODULE and the source files of the classes of all submodules. Other modules
    that the model imports are not included.

    Args:
        name: As in `open_model`.
        model: The model that `open_model` returned for `name`.
    """
    files = {Path(name)} if _is_program(name) else _sources(name, model)
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def _sources(name: str, model: nn.Module) -> set[Path]:
    modules = {type(part).__module__ for part in model.modules()} | {name.partition(":")[0]}
    files = (getattr(sys.modules.get(module), "__file__", None) for module in modules)
    return {Path(file) for file in files if file and Path(file).is_file()}
