"""Checkpoints: a folder of `model.safetensors` (weights) and `config.json` (everything else), no pickle.

`config.json` is `{"format": "srm-iqa/1", "backbone", "neck", "config", "sha256", "card"}`: `config` is
`SRMConfig.to_dict()`, `sha256` the digest of the weights file that belongs to it, `card` what is known about
the training (data set, epoch, validation figures, logistic map).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srm_model.config import SRMConfig
from srm_model.files import atomic_path, read_json, utf8_path, write_json
from srm_model.necks import NECKS

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = "srm-iqa/1"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# The weights are complete under this name before config.json turns to them, and renamed afterwards.
_PENDING = "model.next.safetensors"
_KEYS = {"format": str, "backbone": str, "neck": str, "config": dict, "sha256": str, "card": dict}


def save_model(model: nn.Module, folder: str | Path, *, card: dict[str, Any]) -> None:
    """Write `model` to `folder`, so that a kill at any moment leaves the old checkpoint or the new one.

    `model` has `backbone_name`, `neck_name` and `config`, as `IQAModel` does, or is one wrapped by torch.compile,
    `DataParallel`, `DistributedDataParallel` or `AveragedModel`; its parts may be wrapped too. Tensors are stored
    contiguous and in their own dtype; tied ones are stored once per name. Of a model sharded by FSDP every rank calls
    this, and the first one writes. `card` holds plain JSON values.
    Raises TypeError for another module, ValueError where the model has other tensors than `load_model` would expect.
    """
    from safetensors.torch import save_file

    from srm_model import ranks
    from srm_model.modules import unwrapped

    model, folder = unwrapped(model), Path(folder)
    missing = [name for name in ("backbone_name", "neck_name", "config") if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"model is a {type(model).__name__} without {', '.join(missing)}; expected an IQAModel, or one wrapped by "
            "torch.compile, DataParallel, DistributedDataParallel or AveragedModel"
        )
    tensors, sharded = _own_tensors(model)
    if sharded and ranks.place()[0] != 0:
        return
    with atomic_path(folder / _PENDING) as temporary:
        save_file(tensors, temporary)
        digest = _sha256(temporary)
    document = {
        "format": FORMAT,
        "backbone": model.backbone_name,
        "neck": model.neck_name,
        "config": model.config.to_dict(),  # type: ignore[operator, union-attr]
        "sha256": digest,
        "card": card,
    }
    write_json(folder / CONFIG, document)
    (folder / _PENDING).replace(folder / WEIGHTS)


def _own_tensors(model: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """Copies of the model's tensors by the names of a plain model, and whether they were sharded."""
    from srm_model.modules import plain_names

    state, names = model.state_dict(), plain_names(model)
    expected = getattr(model, "tensor_names", None)
    if expected is not None:
        found = set(names.values())
        others = sorted(found - expected) or sorted(expected - found)
        if others:
            raise ValueError(
                f"the model's tensors are not those it was built with ({others[0]} and {len(others) - 1} more differ): "
                "merge adapters and remove parametrizations before saving"
            )
    sharded = {name for name, tensor in state.items() if hasattr(tensor, "full_tensor")}
    whole = {
        names[key]: tensor.full_tensor() if key in sharded else tensor  # type: ignore[operator]
        for key, tensor in state.items()
    }
    return plain_tensors(whole), bool(sharded)


def read_card(folder: str | Path) -> dict[str, Any]:
    """The checked contents of `folder/config.json`, all of it; the training's own card is its key `card`.

    A file in place of the folder; a missing, broken or foreign file in it; another format version, an unknown key or
    an invalid config is a ValueError.
    """
    path = Path(folder) / CONFIG
    if Path(folder).is_file():
        raise ValueError(
            f"{folder}: a file; expected the folder of a checkpoint, with {WEIGHTS} and {CONFIG}"
        )
    document = read_json(path)
    if not isinstance(document, dict) or not str(document.get("format", "")).startswith("srm-iqa/"):
        raise ValueError(
            f'{path}: not a checkpoint of this program, whose config.json has "format": "{FORMAT}"'
        )
    if document["format"] != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {document['format']!r} is not {FORMAT!r}, the one accepted"
        )
    unknown, missing = sorted(document.keys() - _KEYS.keys()), sorted(_KEYS.keys() - document.keys())
    if unknown or missing:
        what = f"unknown key {', '.join(unknown)}" if unknown else f"no key {', '.join(missing)}"
        raise ValueError(f"{path}: {what}; a checkpoint has {', '.join(_KEYS)}")
    for key, kind in _KEYS.items():
        if not isinstance(document[key], kind):
            raise ValueError(f"{path}: {key} is {document[key]!r}, expected {kind.__name__}")
    if not re.fullmatch(r"[\w.]+", document["backbone"]):
        # timm resolves names such as "hf-hub:…" over the network: reading a file must not.
        raise ValueError(f"{path}: backbone {document['backbone']!r} is not the name of a timm model")
    if document["neck"] not in NECKS:
        raise ValueError(f"{path}: neck {document['neck']!r} is not one of {', '.join(NECKS)}")
    try:
        SRMConfig.from_dict(document["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return document


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy the weights in `folder` into `model`, wrapped or not, which must have exactly the tensors stored there.

    Of a model sharded by FSDP every rank calls this.

    Damaged files, and tensors that are missing, unexpected or of another shape, are a ValueError; `model` is
    then unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _weights_path(Path(folder), read_card(folder)["sha256"])
    try:
        with utf8_path(path) as readable:
            tensors = load_file(readable)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable as safetensors ({error})") from None
    copy_tensors(model, tensors, path)


def plain_tensors(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Copies that safetensors accepts: on the CPU, contiguous, no two sharing memory."""
    import torch

    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        for name, tensor in tensors.items()
    }


def with_axis(tensor: Tensor, own: Tensor) -> Tensor:
    """A stored scalar as the one-element vector that the model has in its place since: β."""
    return tensor.reshape(1) if tensor.dim() == 0 and own.shape == (1,) else tensor


def copy_tensors(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Strict `load_state_dict` whose complaint is one sentence."""
    from srm_model.modules import plain_names, unwrapped

    model = unwrapped(model)
    names = plain_names(model)
    own = {names[key]: value for key, value in model.state_dict().items()}
    tensors = {
        name: with_axis(tensor, own[name]) if name in own else tensor for name, tensor in tensors.items()
    }
    problems = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & tensors.keys())
            if own[name].shape != tensors[name].shape
        ],
    }
    found = [f"{len(names)} {kind} ({names[0]})" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{source}: its tensors do not fit the model: {', '.join(found)}")
    state = model.state_dict()
    model.load_state_dict({key: _as_sharded(tensors[name], state[key]) for key, name in names.items()})


def _as_sharded(tensor: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, in the pieces of `own` where FSDP has cut that one; every rank has it, and sends nothing."""
    if not hasattr(own, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _weights_path(folder: Path, digest: str) -> Path:
    # A save that was cut off after config.json leaves the weights that belong to it under the pending name.
    path = folder / WEIGHTS
    candidates = [path, folder / _PENDING]
    for candidate in candidates:
        if candidate.is_file() and _sha256(candidate) == digest:
            return candidate
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a checkpoint holds {WEIGHTS} and {CONFIG}")
    raise ValueError(
        f"{path}: damaged, or not the file that {CONFIG} beside it was written with (sha256 differs)"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
