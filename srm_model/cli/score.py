"""`srm-iqa score`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srm_model import runs
from srm_model.attacks.guard import scores_of
from srm_model.cli.external import check_model_options, interface_of
from srm_model.cli.options import device_from
from srm_model.cli.streams import as_named, sentence
from srm_model.data import load_image
from srm_model.data.lists import decode
from srm_model.data.photographs import SUFFIXES
from srm_model.external import open_model


class _Source(NamedTuple):
    """A name to score: its file, or the reason why there is no such file."""

    path: str
    fault: str | None = None


def run(args: argparse.Namespace) -> int:
    """Print one line per scored file and return 2 if a file could not be read or scored."""
    check_model_options(args)
    names = list(args.images)
    if args.model is not None and args.checkpoint is not None:
        names.insert(0, args.checkpoint)  # without a checkpoint, the first positional argument is an image
    elif args.model is None:
        if args.checkpoint is None:
            raise ValueError("no model was given; expected CHECKPOINT, or --model")
        folder = runs.one_checkpoint(args.checkpoint)
    if not names and args.files_from is None:
        raise ValueError("no image was given; expected IMAGE or --files-from FILE")
    names += [] if args.files_from is None else _listed(args.files_from, null=args.null)
    device = device_from(args.device)
    if args.model is None:
        model, _ = runs.open_checkpoint(folder, device, args.backend)
        size = model.config.image_size
    else:
        model, size = open_model(args.model, interface_of(args, lower_is_better=False)).to(device), args.size
    failed = False
    with runs.running() as ran:
        for batch in _batches(_sources(names, recursive=args.recursive), args.batch_size):
            for path, score, fault in _scored(model, size, device, batch):
                failed |= fault is not None
                _print(path, score, fault, args)
            sys.stdout.flush()
    if args.model is None:
        runs.say_kernels(model.config, device, ran)
    return 2 if failed else 0


def _listed(file: str, *, null: bool) -> list[str]:
    """Return the names in a list file ("-": stdin). Line breaks or NUL bytes separate the names."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"--files-from {file}: not readable ({error.strerror})") from None
    if null:
        return [os.fsdecode(name) for name in data.split(b"\0") if name]
    try:
        text = decode(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"--files-from {file}: not readable as {error.encoding} ({error.reason})") from None
    if "\0" in text:
        raise ValueError(f"--files-from {file}: has NUL bytes; --null reads names that they separate")
    names = (line.removesuffix("\r") for line in text.split("\n"))
    return [os.fsdecode(name.encode(errors="surrogateescape")) for name in names if name]


def _sources(names: Iterable[str], *, recursive: bool) -> Iterator[_Source]:
    for name in names:
        if not os.path.isdir(name):  # noqa: PTH112, names may contain NUL bytes
            yield _Source(name)
        elif recursive:
            yield from _inside(name)
        else:
            yield _Source(name, f"{name}: is a folder; expected an image, or --recursive to score its images")


def _inside(folder: str) -> Iterator[_Source]:
    """Yield the images of a folder and its subfolders, sorted by name. Hidden files and folders are skipped."""
    faults: list[OSError] = []
    empty = True
    for place, folders, files in os.walk(folder, onerror=faults.append):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(files):
            if name[0] != "." and name.lower().endswith(SUFFIXES):
                yield _Source(os.path.join(place, name))  # noqa: PTH118, Path removes a leading ./
                empty = False
    for fault in faults:
        yield _Source(str(fault.filename), f"{fault.filename}: cannot be listed ({fault.strerror})")
    if empty and not faults:
        yield _Source(folder, f"{folder}: no image in this folder ({', '.join(SUFFIXES)})")


def _batches(sources: Iterator[_Source], size: int) -> Iterator[list[_Source]]:
    while batch := list(islice(sources, size)):
        yield batch


def _scored(
    model: Any, size: int, device: torch.device, batch: list[_Source]
) -> list[tuple[str, float | None, str | None]]:
    """Return, for each source, its path, its score or None, and the reason if there is no score."""
    loaded = [source.fault or _load(source.path, size) for source in batch]
    images = [image for image in loaded if isinstance(image, Tensor)]
    scores = _scores(model, device, images)
    found: list[tuple[str, float | None, str | None]] = []
    for source, image in zip(batch, loaded, strict=True):
        score = scores.pop(0) if isinstance(image, Tensor) else image
        if isinstance(image, str):
            found.append((source.path, None, image))
        elif isinstance(score, str):
            found.append((source.path, None, f"{source.path}: {score}"))
        elif math.isfinite(score):
            found.append((source.path, score, None))
        else:
            found.append((source.path, None, f"{source.path}: the model's score is {score}"))
    return found


def _scores(model: Any, device: torch.device, images: list[Tensor]) -> list[Any]:
    """Return the score of each image, or the reason if the model fails on this image."""
    if not images:
        return []
    try:
        with torch.inference_mode():
            return list(scores_of(model, torch.stack(images).to(device)).tolist())
    except ValueError as error:
        if len(images) == 1:
            return [str(error)]
        return [score for image in images for score in _scores(model, device, [image])]


def _load(path: str, image_size: int) -> Tensor | str:
    try:
        return load_image(path, image_size)
    except ValueError as error:
        return sentence(str(error))


def _print(path: str, score: float | None, fault: str | None, args: argparse.Namespace) -> None:
    if fault is not None:
        runs.say(f"srm-iqa score: {sentence(fault)}")
    if args.json:
        name = os.fsencode(path).decode(errors="surrogateescape")
        row = {"path": name, "score": score} | ({} if fault is None else {"error": sentence(fault)})
        print(json.dumps(row, allow_nan=False))
    elif score is not None:
        name = as_named(path)
        if not args.null:
            name = name.replace("\n", "\\n").replace("\r", "\\r")
        print(f"{score:.4f}\t{name}", end="\0" if args.null else "\n")
