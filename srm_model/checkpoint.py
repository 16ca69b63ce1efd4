"""Save and load checkpoints: folders with `model.safetensors` (weights) and `config.json`, without pickle.

The keys of `config.json` are `format` ("srm-iqa/1"), `backbone`, `neck`, `config` (`SRMConfig.to_dict()`), `sha256`
(digest of the weights file) and `card` (facts about the training, such as dataset, epoch and logistic map).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srm_model.config import SRMConfig
from srm_model.files import atomic_path, read_json, sha256_of, utf8_path, write_json
from srm_model.necks import NECKS

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = "srm-iqa/1"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SHIPPED = Path(__file__).resolve().parent / "shipped"  # the checkpoint that comes with the package
# New weights are first written to this file. It is renamed to model.safetensors after config.json was written.
_PENDING = "model.next.safetensors"
_KEYS = {"format": str, "backbone": str, "neck": str, "config": dict, "sha256": str, "card": dict}


def save_model(model: nn.Module, folder: str | Path, *, card: dict[str, Any]) -> None:
    """Save a model as a checkpoint. An interrupted save leaves either the old checkpoint or the new one.

    Tensors keep their dtype. A tensor with several names is stored under each of its names. For a model sharded by
    FSDP, every rank must call this function; only rank 0 writes.

    Args:
        model: An `IQAModel`. The model or its parts may be wrapped by torch.compile, `DataParallel`,
            `DistributedDataParallel` or `AveragedModel`.
        folder: Folder of the checkpoint.
        card: Dictionary that describes the training, for example the dataset and the best epoch. It is saved in
            `config.json`, so its values must be JSON values.

    Raises:
        TypeError: The model is not an `IQAModel`.
        ValueError: The model lacks a tensor that it was built with, or has an additional tensor, such as a tensor of an
            adapter.
    """
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
    document = {
        "backbone": model.backbone_name,
        "neck": model.neck_name,
        "config": model.config.to_dict(),  # type: ignore[operator, union-attr]
        "card": card,
    }
    _write(tensors, folder, document)


def _write(tensors: dict[str, Tensor], folder: Path, document: dict[str, Any]) -> None:
    """Write a checkpoint. `document` has the contents of `config.json` without the format and the digest."""
    from safetensors.torch import save_file

    with atomic_path(folder / _PENDING) as temporary:
        save_file(tensors, temporary)
        digest = sha256_of(temporary)
    about = {key: document[key] for key in ("backbone", "neck", "config")}
    write_json(folder / CONFIG, {"format": FORMAT, **about, "sha256": digest, "card": document["card"]})
    (folder / _PENDING).replace(folder / WEIGHTS)


def pack(folder: str | Path, out: str | Path) -> None:
    """Write a copy of a checkpoint with weight matrices in fp16.

    The copy has about half the size of the original.

    Tensors with fewer than two dimensions keep their dtype: biases, BatchNorm statistics, θ, σ̄ and M₀. A
    matrix with a value beyond the range of fp16 keeps its dtype too. `load_weights` can load the copy into a
    model in fp32, because it converts the weights to the dtypes of the model. The card is copied without the
    path of the dataset's folder.

    Args:
        folder: Folder of the checkpoint.
        out: Folder of the copy.

    Raises:
        ValueError: `out` is `folder`, or the checkpoint is incomplete or damaged.
    """
    folder, out = Path(folder), Path(out)
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out}: is the checkpoint itself; expected another folder")
    document = read_card(folder)
    card = dict(document["card"])
    if isinstance(card.get("dataset"), dict):
        card["dataset"] = {key: value for key, value in card["dataset"].items() if key != "root"}
    tensors = _read_tensors(_weights_path(folder, document["sha256"]))
    _write({name: _halved(tensor) for name, tensor in tensors.items()}, out, {**document, "card": card})


def _halved(tensor: Tensor) -> Tensor:
    """Convert an fp32 or fp64 matrix to fp16 if its values fit; return every other tensor unchanged."""
    import torch

    if tensor.dim() < 2 or tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    half = tensor.to(torch.float16)
    return half if half.isfinite().all() else tensor


def shipped() -> Path:
    """Return the folder of the checkpoint that comes with the package.

    Raises:
        ValueError: This installation does not contain the checkpoint.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (SHIPPED / name).is_file()]
    if missing:
        raise ValueError(
            f"{SHIPPED} has no {missing[0]}, so this installation of srm-iqa has no checkpoint of its own; name a "
            "checkpoint, install a release, or make one with python -m bench.checkpoint in a source checkout"
        )
    return SHIPPED


def _own_tensors(model: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """Return copies of the model's tensors by name, and whether the model is sharded.

    The names are those of the model without wrappers such as `DataParallel`.
    """
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
    """Read and check `config.json` of a checkpoint.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        The contents of `config.json`. The entry `card` has the facts about the training.

    Raises:
        ValueError: `folder` is a file or does not exist, or its `config.json` is missing or invalid. `config.json` is
            invalid if it is not readable as JSON, its format is not "srm-iqa/1", a key is missing or unknown, or a
            value is invalid.
    """
    path = Path(folder) / CONFIG
    if Path(folder).is_file():
        raise ValueError(
            f"{folder} is a file; expected the folder of a checkpoint, with {WEIGHTS} and {CONFIG}"
        )
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder}: no such folder; expected the folder of a checkpoint, with {WEIGHTS} and {CONFIG}"
        )
    document = read_json(path)
    if not isinstance(document, dict) or not str(document.get("format", "")).startswith("srm-iqa/"):
        raise ValueError(
            f'{path}: not a checkpoint of this program; expected a config.json with "format": "{FORMAT}"'
        )
    if document["format"] != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {document['format']!r} is not supported; expected {FORMAT!r}"
        )
    unknown, missing = sorted(document.keys() - _KEYS.keys()), sorted(_KEYS.keys() - document.keys())
    if unknown or missing:
        what = f"unknown key {', '.join(unknown)}" if unknown else f"no key {', '.join(missing)}"
        raise ValueError(f"{path}: {what}; a checkpoint has {', '.join(_KEYS)}")
    for key, kind in _KEYS.items():
        if not isinstance(document[key], kind):
            raise ValueError(f"{path}: {key} is {document[key]!r}, expected {kind.__name__}")
    if not re.fullmatch(r"[\w.]+", document["backbone"]):
        # timm resolves names such as "hf-hub:…" over the network; reading a file must not do that.
        raise ValueError(f"{path}: backbone {document['backbone']!r} is not the name of a timm model")
    if document["neck"] not in NECKS:
        raise ValueError(f"{path}: neck {document['neck']!r} is not one of {', '.join(NECKS)}")
    try:
        SRMConfig.from_dict(document["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return document


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of a checkpoint into a model, strictly. The model keeps its dtypes.

    For a model sharded by FSDP, every rank must call this function.

    Args:
        model: A model with exactly the tensors of the checkpoint. The model may be wrapped as in `save_model`.
        folder: Folder of the checkpoint.

    Raises:
        ValueError: A file is missing or damaged, or the checkpoint and the model differ in the names or the shapes of
            their tensors. The model then stays unchanged.
    """
    path = _weights_path(Path(folder), read_card(folder)["sha256"])
    copy_tensors(model, _read_tensors(path), path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with utf8_path(path) as readable:
            return load_file(readable)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable as safetensors ({error})") from None


def plain_tensors(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Copy tensors as safetensors requires: on the CPU, contiguous, without shared memory."""
    import torch

    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        for name, tensor in tensors.items()
    }


def with_axis(tensor: Tensor, own: Tensor) -> Tensor:
    """Convert a scalar β, as in checkpoints of earlier versions, to a vector with one element."""
    return tensor.reshape(1) if tensor.dim() == 0 and own.shape == (1,) else tensor


def copy_tensors(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy tensors into a model, and raise ValueError unless their names and shapes match those of the model.

    The error message names `source`, the file of the tensors, and gives examples of tensors that do not match.
    """
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
    """Shard `tensor` like `own`. No communication is needed, because every rank has the whole tensor."""
    if not hasattr(own, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _weights_path(folder: Path, digest: str) -> Path:
    path = folder / WEIGHTS
    # If a save was interrupted after config.json was written, the weights still have the pending name.
    for candidate in (path, folder / _PENDING):
        if candidate.is_file() and sha256_of(candidate) == digest:
            return candidate
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a checkpoint with {WEIGHTS} and {CONFIG}")
    raise ValueError(f"{path}: damaged, or it does not belong to {CONFIG} beside it (sha256 differs)")
