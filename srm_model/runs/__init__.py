"""Open run folders, checkpoints and datasets, for commands and studies."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from srm_kernels import choice
from srm_kernels.registration import running as running
from srm_model import ranks
from srm_model.backbones import check_size
from srm_model.checkpoint import CONFIG, read_card
from srm_model.config import STORED, SRMConfig
from srm_model.data import SPLITS, ImageCache, open_dataset
from srm_model.files import atomic_path, held, read_json, write_json
from srm_model.messages import bars as bars
from srm_model.messages import say as say
from srm_model.model import load_model
from srm_model.necks import NECKS
from srm_model.reports.records import STUDY

RUN = "run.json"


@contextmanager
def process_group() -> Iterator[bool]:
    """Join the process group of torchrun, and yield whether this process writes results.

    A process that runs alone joins no group and writes the results. In a group of several processes, only the first
    rank writes the results. The group uses gloo for CPU tensors and for pickled objects. If CUDA is available, the
    group uses NCCL for GPU tensors.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank() == 0
        dist.barrier()
    finally:
        dist.destroy_process_group()


def keep_memory() -> None:
    """Make glibc keep freed memory. With other C libraries, do nothing.

    By default, glibc returns freed memory to the system and requests it again later. For a small model, returning and
    requesting memory takes more time than the computations.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # <malloc.h>
    for parameter, value in ((mmap_threshold, 1 << 30), (trim_threshold, 2**31 - 1), (top_pad, 1 << 28)):
        mallopt(parameter, value)


@contextmanager
def writing(folder: str | Path, *, shared: bool = False) -> Iterator[None]:
    """Within the block, lock a folder against other commands that write to this folder.

    If the folder is inside the folder of a run or of a study, the outer folder is locked too, unless it is read-only.
    The folder of a run gets a shared lock, so other commands can write to other checkpoints of the run at the same
    time. The folder of a study gets an exclusive lock, because `srm-iqa ablate` may write to any folder of the study
    and must not run at the same time. In a process group, the first rank holds the locks.

    Args:
        folder: Folder to lock.
        shared: Whether other commands that also pass `shared` may write to the folder at the same time.

    Raises:
        ValueError: Another process has locked the folder, or the folder of its run or study. The error is raised on
            every rank.
    """
    path = Path(folder).resolve()
    above = [
        (run, not (run / STUDY).is_file())
        for run in path.parents
        if (run / RUN).is_file() and os.access(run, os.W_OK)
    ]

    def hold() -> None:
        for place, sharing in [*reversed(above), (path, shared)]:
            stack.enter_context(held(place, shared=sharing))

    with ExitStack() as stack:
        ranks.from_first(hold)
        yield


@contextmanager
def recorded(folder: Path, arguments: Sequence[str], **about: Any) -> Iterator[dict[str, Any]]:
    """Record a command and its duration in `folder/run.json`.

    If `run.json` exists, its entries are kept, but the versions of the software are replaced by the current versions.
    The command is added to the list of commands unless it is already there. The duration of the block is added to the
    total duration.

    If the block raises an exception before it has changed any file in the folder, the earlier `run.json` is restored,
    or `run.json` is removed if there was none. New empty folders are removed too.

    Args:
        folder: Run folder.
        arguments: Command line without the program's name.
        about: Further entries of `run.json`. An entry that the file already has is not replaced.

    Yields:
        The contents of `run.json`, which the block may extend.
    """
    path = folder / RUN
    before, content = set(folder.rglob("*")), path.read_bytes() if path.is_file() else None
    known = read_json(path) if path.is_file() else {}
    if not isinstance(known, dict):
        raise ValueError(f"{path}: expected a JSON object")
    command = shlex.join(["srm-iqa", *arguments])
    earlier = known.get("command", [])
    commands = [earlier] if isinstance(earlier, str) else list(earlier)
    record = {
        **about,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **known,
        "command": commands if command in commands else [*commands, command],
        "versions": versions(),
    }
    write_json(path, record)
    begun = _files(folder)
    start = time.perf_counter()
    refused = False
    try:
        yield record
    except Exception:
        refused = _files(folder) == begun
        if refused:
            _restore(path, content, set(folder.rglob("*")) - before)
        raise
    finally:
        if not refused:
            record["seconds"] = round(float(known.get("seconds", 0)) + time.perf_counter() - start, 1)
            write_json(path, record)


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return the modification time and size of every file below a folder."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process may have removed it
            state = path.lstat()
            if not path.is_dir():
                found[path] = state.st_mtime_ns, state.st_size
    return found


def _restore(path: Path, content: bytes | None, made: Set[Path]) -> None:
    """Restore the earlier content of the file `path`, and remove new empty folders.

    If `content` is None, the file did not exist earlier and is removed. `made` is the set of new files and folders; the
    empty folders in this set are removed.
    """
    if content is None:
        path.unlink()
    else:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    for folder in sorted(made - {path}, reverse=True):
        with suppress(OSError):
            folder.rmdir()


def kernels_of(config: SRMConfig, device: torch.device, found: dict[str, set[str]]) -> str:
    """Return a sentence that says which backends ran on a device, and why these backends were chosen.

    `found` maps each operator to the backends that ran, as `srm_kernels.registration.running` collects them.
    """
    return choice.ran(device, config.backend, found)


def say_kernels(config: SRMConfig, device: torch.device, found: dict[str, set[str]]) -> None:
    """Print the sentence of `kernels_of` on stderr if the device is a GPU or the config names a backend."""
    if device.type == "cuda" or config.backend is not None:
        say(f"kernels: {kernels_of(config, device, found)}")


def versions() -> dict[str, str]:
    """Return the versions of the software that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("srm-iqa", "torch", "timm", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def checkpoints(folder: str) -> list[Path]:
    """Return the checkpoint in a folder, or the checkpoints of all necks of a run.

    Raises:
        ValueError: There is no checkpoint.
    """
    path = Path(folder)
    if (path / CONFIG).is_file():
        return [path]
    found = [path / neck for neck in NECKS if (path / neck / CONFIG).is_file()]
    if not found:
        reason = "no such folder" if not path.is_dir() else "has no checkpoint"
        raise ValueError(
            f"{folder}: {reason}; expected {CONFIG} and model.safetensors in this folder or in its "
            f"subfolder {' or '.join(NECKS)}"
        )
    return found


def has_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder is a checkpoint, or a run with a checkpoint."""
    path = Path(folder)
    with suppress(OSError, ValueError):  # a name that is too long or has NUL bytes
        return any((place / CONFIG).is_file() for place in (path, *(path / neck for neck in NECKS)))
    return False


def checkpoints_of_study(folder: str) -> dict[str, Path]:
    """Return the folders of all checkpoints of a study or a run, as a dict.

    The keys are names of the checkpoints, which are printed in tables.
    """
    root = Path(folder)
    if (root / STUDY).is_file():
        found = sorted(path.parent for path in (root / "runs").rglob(CONFIG))
        if not found:
            raise ValueError(f"{folder}: the study has no trained model yet")
        return {str(path.relative_to(root / "runs")): path for path in found}
    return {path.name: path for path in checkpoints(folder)}


def one_checkpoint(folder: str) -> Path:
    """Return the checkpoint in a folder, or the only checkpoint of a run.

    Raises:
        ValueError: There is no checkpoint, or there are several.
    """
    found = checkpoints(folder)
    if len(found) > 1:
        raise ValueError(f"{folder}: has several checkpoints; expected one of {', '.join(map(str, found))}")
    return found[0]


def open_checkpoint(
    folder: Path, device: torch.device, backend: str | None = STORED
) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        device: Device of the model. The model is converted to channels-last format.
        backend: Backend of the operators. Default: `backend` of the checkpoint's config.

    Returns:
        The model and the card.
    """
    model, card = load_model(folder, backend=backend)
    check_size(model.backbone_name, model.config.image_size)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, card


def open_splits(
    root: str | Path, config: SRMConfig, cache: ImageCache | None = None, *, progress: bool
) -> dict[str, Any]:
    """Open all splits of a dataset. The first rank checks all files when it opens the first split."""
    return {
        split: open_dataset(
            root,
            split,
            seed=config.seed,
            image_size=config.image_size,
            cache=cache or False,
            verify="full" if split == SPLITS[0] and ranks.place()[0] == 0 else "fast",
            progress=progress,
        )
        for split in SPLITS
    }


def batches(dataset: Any, indices: Sequence[int], size: int) -> Iterator[torch.Tensor]:
    """Yield batches of `size` images, (B, 3, H, W); the last batch may be smaller."""
    for start in range(0, len(indices), size):
        yield torch.stack([dataset[index][0] for index in indices[start : start + size]])


def dataset_card(dataset: Any) -> dict[str, Any]:
    """Return the description of a dataset for the cards of checkpoints and for run.json.

    The argument `dataset` is one split of the dataset. All splits give the same description, except for the key
    `resized`, which says whether an image of this split is resized.
    """
    ceiling = getattr(dataset, "type_level_srocc", None)
    return {
        "name": dataset.name,
        "root": str(dataset.root),
        "labels": dataset.labels,
        "splits": dict(dataset.counts),
        "seed": dataset.seed,
        "resized": dataset.resized,
        "fingerprint": dataset.fingerprint,
        **({} if ceiling is None else {"type_level_srocc": ceiling}),
    }


def dataset_for(
    card: dict[str, Any], config: SRMConfig, *, root: str | None, split: str, progress: bool
) -> Any:
    """Open a split for a checkpoint.

    Args:
        card: Card of the checkpoint.
        config: Config with the seed of the split and the image size.
        root: Folder of the dataset. None means the dataset that was used for training.
        split: "train", "val" or "test".
        progress: Whether to show a progress bar while files are checked.

    Raises:
        ValueError: Neither `root` nor the card names a dataset; or `root` is None, and the dataset that the card names
            has changed since training; or the dataset is faulty.
    """
    trained = card.get("dataset") or {}
    if root is None and not trained.get("root"):
        raise ValueError("the checkpoint does not name its dataset of training; name a dataset with --data")
    dataset = open_dataset(
        root or trained["root"],
        split,
        seed=config.seed,
        image_size=config.image_size,
        train=False,
        progress=progress,
    )
    if root is None and trained.get("fingerprint") != dataset.fingerprint:
        raise ValueError(
            f"{trained['root']}: differs from the dataset of training (images, labels or split); to use it, name it "
            "with --data"
        )
    return dataset


def surrogate_of(folder: Path) -> Path | None:
    """Return the folder of the surrogate for a transfer attack on the checkpoint in `folder`, or None if none exists.

    The surrogate has the neck `none`, or the neck `srm` if the attacked checkpoint has the neck `none`. The surrogate's
    folder is next to `folder` and has the name of the surrogate's neck.
    """
    found = folder.parent / NECKS[read_card(folder)["neck"]].surrogate
    return found if (found / CONFIG).is_file() and found.resolve() != folder.resolve() else None
