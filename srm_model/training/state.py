"""Save and load training states, from which an interrupted training resumes.

`state.safetensors` is the last state, and `state.previous.safetensors` is the previous state. A state has the tensors
of the model and of the optimiser. With `config.weights_ema`, it also has the average of the weights. All other values
are JSON in the metadata of the same file, so that a single rename replaces the whole state.
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
    """A readable state: its file and its JSON values."""

    path: Path
    values: dict[str, Any]


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    values: dict[str, Any],
    average: nn.Module | None = None,
) -> None:
    """Write a state with JSON `values` atomically. The old state becomes the previous state.

    Raises:
        OSError: The file cannot be written, for example because the disk is full. The old state is unchanged.
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
        except SafetensorError as error:  # a write failed
            raise OSError(str(error)) from None
        _flush(temporary)
        _rotate(folder)


def read_state(folder: Path) -> Stored | None:
    """Return the newest readable state in a folder, or None if there is no state.

    If the last state is damaged and the previous state is readable, return the previous state, warn, and rename the
    damaged file. Without the new name, the next `save_state` would replace the readable previous state by the damaged
    file.

    Raises:
        ValueError: All states in the folder are damaged.
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
                warnings.warn(f"{damaged[0]}; resuming from {path.name}", stacklevel=2)
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
    # Without this, a power failure after the rename may leave an empty file.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _rotate(folder: Path) -> None:
    """Replace the previous state by a hard link to the current state, or by a copy if links are not supported."""
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
    """Load a state into model, optimiser and average; raise ValueError if the tensors do not fit."""
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
                # The fused optimiser needs a state with the memory layout of its parameter.
                tensor = torch.empty_like(parameter).copy_(tensor)
            states.setdefault(int(index), {})[name] = tensor
    copy_tensors(model, modules["model"], path)
    if average is not None:
        copy_tensors(average, modules["average"], path)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
