"""Run folders, checkpoints and data sets as commands and studies share them."""

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
    """The ranks that torchrun started, joined for the block; yields whether this process is the one that writes.

    One process alone is rank 0 of 1 and joins nothing. Gloo serves CPU tensors and what is pickled, NCCL the GPUs'.
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
    """Have glibc keep freed memory: handing each large activation back costs most of a small model's time.

    Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # <malloc.h>
    for parameter, value in ((mmap_threshold, 1 << 30), (trim_threshold, 2**31 - 1), (top_pad, 1 << 28)):
        mallopt(parameter, value)


@contextmanager
def writing(folder: str | Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other commands from writing into `folder` for the block, `shared` ones excepted.

    A checkpoint of a run is held beside the run's other checkpoints, one of a study with the whole study: every process
    of `srm-iqa ablate` may write into each of its folders. The first rank holds it for all.

    Raises:
        ValueError: another process writes there; on every rank.
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
    """Keep `folder/run.json`: what was said first stays, commands are listed, seconds add up.

    Yields what the file will hold, to be added to. A block that raises before it has written anything else into the
    folder leaves the folder as it was.
    """
    path = folder / RUN
    before, content = _inside(folder), path.read_bytes() if path.is_file() else None
    known = read_json(path) if path.is_file() else {}
    if not isinstance(known, dict):
        raise ValueError(f"{path}: expected an object")
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
    begun = _inside(folder)
    start = time.perf_counter()
    refused = False
    try:
        yield record
    except Exception:
        now = _inside(folder)
        refused = _files(now) == _files(begun)
        if refused:
            _restore(path, content, now.keys() - before.keys())
        raise
    finally:
        if not refused:
            record["seconds"] = round(float(known.get("seconds", 0)) + time.perf_counter() - start, 1)
            write_json(path, record)


def _inside(folder: Path) -> dict[Path, tuple[int, int] | None]:
    """Everything below a folder: of files their time and size, of folders None."""
    found: dict[Path, tuple[int, int] | None] = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process has removed it
            state = path.lstat()
            found[path] = None if path.is_dir() else (state.st_mtime_ns, state.st_size)
    return found


def _files(inside: dict[Path, tuple[int, int] | None]) -> dict[Path, tuple[int, int] | None]:
    return {path: state for path, state in inside.items() if state is not None}


def _restore(path: Path, content: bytes | None, made: Set[Path]) -> None:
    """Give a file its earlier content, or remove it, and the folders that were made since."""
    if content is None:
        path.unlink()
    else:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    for folder in sorted(made - {path}, reverse=True):
        with suppress(OSError):
            folder.rmdir()


def kernels_of(config: SRMConfig, device: torch.device, found: dict[str, set[str]]) -> str:
    """Which backends ran on a device, and on whose verdict: one sentence about what `running` collected."""
    return choice.ran(device, config.backend, found)


def say_kernels(config: SRMConfig, device: torch.device, found: dict[str, set[str]]) -> None:
    """Say `kernels_of` on stderr where there is something to say: on a GPU, or where a backend is named."""
    if device.type == "cuda" or config.backend is not None:
        say(f"kernels: {kernels_of(config, device, found)}")


def versions() -> dict[str, str]:
    """Of what results depend on."""
    found = {"python": platform.python_version()}
    for package in ("srm-iqa", "torch", "timm", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def checkpoints(folder: str) -> list[Path]:
    """The checkpoint that `folder` is, or those of a run's necks; ValueError where there is none."""
    path = Path(folder)
    if (path / CONFIG).is_file():
        return [path]
    found = [path / neck for neck in NECKS if (path / neck / CONFIG).is_file()]
    if not found:
        reason = "no such folder" if not path.is_dir() else "no checkpoint here"
        raise ValueError(
            f"{folder}: {reason}; expected {CONFIG} with model.safetensors, in it or in {', '.join(NECKS)}"
        )
    return found


def checkpoints_of_study(folder: str) -> dict[str, Path]:
    """By the name a table shows: every checkpoint of a study's folder, else those of a run."""
    root = Path(folder)
    if (root / STUDY).is_file():
        found = sorted(path.parent for path in (root / "runs").rglob(CONFIG))
        if not found:
            raise ValueError(f"{folder}: a study of which nothing has been trained yet")
        return {str(path.relative_to(root / "runs")): path for path in found}
    return {path.name: path for path in checkpoints(folder)}


def one_checkpoint(folder: str) -> Path:
    """The checkpoint at `folder`, or the only one in it."""
    found = checkpoints(folder)
    if len(found) > 1:
        raise ValueError(f"{folder}: holds several checkpoints; name one of {', '.join(map(str, found))}")
    return found[0]


def open_checkpoint(
    folder: Path, device: torch.device, backend: str | None = STORED
) -> tuple[Any, dict[str, Any]]:
    """Model on `device` in channels-last, its operators by `backend`, and card."""
    model, card = load_model(folder, backend=backend)
    check_size(model.backbone_name, model.config.image_size)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, card


def open_splits(
    root: str | Path, config: SRMConfig, cache: ImageCache | None = None, *, progress: bool
) -> dict[str, Any]:
    """Every split; the first one opened has checked the files of all, on the first rank."""
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


def dataset_card(dataset: Any) -> dict[str, Any]:
    """What cards and run.json say about a data set, by any of its splits."""
    ceiling = getattr(dataset, "type_level_srocc", None)
    return {
        "name": dataset.name,
        "root": str(dataset.root),
        "labels": dataset.labels,
        "splits": dict(dataset.counts),
        "seed": dataset.seed,
        "fingerprint": dataset.fingerprint,
        **({} if ceiling is None else {"type_level_srocc": ceiling}),
    }


def dataset_for(
    card: dict[str, Any], config: SRMConfig, *, root: str | None, split: str, progress: bool
) -> Any:
    """A split of `root`, by default of the set the checkpoint was trained on, which must not have changed."""
    trained = card.get("dataset") or {}
    if root is None and not trained.get("root"):
        raise ValueError("the checkpoint does not say which data set it was trained on; name one with --data")
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
            f"{trained['root']}: not the data set of training any more (images, labels or split differ); "
            "give --data to use it all the same"
        )
    return dataset


def surrogate_of(folder: Path) -> Path | None:
    """Where the transfer attack on a checkpoint is crafted: the neck `none`, for `none` itself `srm`.

    It lies beside the checkpoint; that of a study's variant beside the full model, a folder above.
    """
    other = NECKS[read_card(folder)["neck"]].surrogate
    studied = any((above / STUDY).is_file() for above in folder.resolve().parents)
    for place in (folder.parent, folder.parent.parent)[: 1 + studied]:
        if (place / other / CONFIG).is_file() and (place / other).resolve() != folder.resolve():
            return place / other
    return None
