"""What a cut-off training goes on from, in one file: `state.safetensors`.

Tensors are the model's and the optimiser's; everything else is JSON in the file's own metadata, so that one
rename replaces all of it. No random state is kept: what an epoch draws is a function of (seed, epoch).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from srm_model.checkpoint import copy_tensors, plain_tensors
from srm_model.files import atomic_path

STATE = "state.safetensors"
_FORMAT = "srm-iqa-state/1"


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer, values: dict[str, Any]) -> None:
    """Write model, optimiser and the JSON `values`; a kill leaves the old file or the new one."""
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    metadata = {"format": _FORMAT, "values": json.dumps(values)}
    with atomic_path(folder / STATE) as temporary:
        save_file(plain_tensors(tensors), temporary, metadata)


def read_values(folder: Path) -> dict[str, Any] | None:
    """The JSON values of the state in `folder`, None where there is none; ValueError where it is damaged."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable as safetensors ({error})") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a training state of this program (format {_FORMAT!r})")
    values: dict[str, Any] = json.loads(metadata["values"])
    return values


def load_tensors(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put the stored model and optimiser back; ValueError where they do not fit."""
    path = folder / STATE
    model_tensors: dict[str, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 — not a mapping
            part, _, name = key.partition(".")
            if part == "model":
                model_tensors[name] = file.get_tensor(key)
                continue
            index, _, name = name.partition(".")
            tensor, parameter = file.get_tensor(key), parameters[int(index)]
            if tensor.shape == parameter.shape:
                # The fused optimiser walks raw memory: its state has to lie as its parameter does.
                tensor = torch.empty_like(parameter).copy_(tensor)
            states.setdefault(int(index), {})[name] = tensor
    copy_tensors(model, model_tensors, path)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
