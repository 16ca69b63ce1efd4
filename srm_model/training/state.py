"""What a cut-off training goes on from, in one file: `state.safetensors`; beside it the one saved before.

Tensors are the model's, the optimiser's and, where there is one, the average's; everything else is JSON in the file's
own metadata, so that one rename replaces all of it.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from srm_model.checkpoint import copy_tensors, plain_tensors, with_axis
from srm_model.files import atomic_path, utf8_path

STATE = "state.safetensors"
PREVIOUS = "state.previous.safetensors"
DAMAGED = "state.damaged.safetensors"
_FORMAT = "srm-iqa-state/1"


class Stored(NamedTuple):
    """A state that was found whole."""

    path: Path
    values: dict[str, Any]


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    values: dict[str, Any],
    average: nn.Module | None = None,
) -> None:
    """Write model, optimiser, average and the JSON `values`; a kill at any moment leaves the old file or the new one.

    The file that was there becomes the previous one. A disk that is full is an OSError, and changes nothing.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    metadata = {"format": _FORMAT, "values": json.dumps(values)}
    with atomic_path(folder / STATE) as temporary:
        try:
            save_file(plain_tensors(tensors), temporary, metadata)
        except SafetensorError as error:  # how it tells of a failed write
            raise OSError(str(error)) from None
        _flush(temporary)
        _rotate(folder)


def read_state(folder: Path) -> Stored | None:
    """The newest whole state in `folder`, None where there is none; ValueError where all that is there is damaged.

    A damaged one beside a whole one is told in a warning and renamed, lest it become the previous one.
    """
    damaged = []
    for path in (folder / STATE, folder / PREVIOUS):
        if path.exists():
            try:
                stored = Stored(path, _read_values(path))
            except ValueError as error:
                damaged.append(error)
                continue
            if damaged:
                warnings.warn(f"{damaged[0]}; going on from {path.name}", stacklevel=2)
                (folder / STATE).replace(folder / DAMAGED)
            return stored
    if damaged:
        raise damaged[0]
    return None


def _read_values(path: Path) -> dict[str, Any]:
    try:
        with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable as safetensors ({error})") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a training state of this program (format {_FORMAT!r})")
    values: dict[str, Any] = json.loads(metadata["values"])
    return values


def _flush(path: Path) -> None:
    # A machine that loses its power after the rename would else find an empty file under the name.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _rotate(folder: Path) -> None:
    """Give the present state its second name first, so that there is one under its own at every moment."""
    if not (folder / STATE).exists():
        return
    with atomic_path(folder / PREVIOUS) as temporary:
        temporary.unlink()
        try:
            temporary.hardlink_to(folder / STATE)
        except OSError:  # a file system without links
            temporary.write_bytes((folder / STATE).read_bytes())


def load_tensors(
    path: Path, model: nn.Module, optimizer: Optimizer, average: nn.Module | None = None
) -> None:
    """Put the stored model, optimiser and average back; ValueError where they do not fit."""
    modules: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
    states: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with utf8_path(path) as readable, safe_open(readable, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 — not a mapping
            part, _, name = key.partition(".")
            if part in modules:
                modules[part][name] = file.get_tensor(key)
                continue
            index, _, name = name.partition(".")
            tensor, parameter = file.get_tensor(key), parameters[int(index)]
            tensor = tensor if name == "step" else with_axis(tensor, parameter)
            if tensor.shape == parameter.shape:
                # The fused optimiser walks raw memory: its state has to lie as its parameter does.
                tensor = torch.empty_like(parameter).copy_(tensor)
            states.setdefault(int(index), {})[name] = tensor
    copy_tensors(model, modules["model"], path)
    if average is not None:
        copy_tensors(average, modules["average"], path)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
