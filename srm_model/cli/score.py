"""`srm-iqa score`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srm_model import runs
from srm_model.attacks.guard import scores_of
from srm_model.checkpoint import CONFIG, WEIGHTS, read_card, shipped
from srm_model.cli.external import check_model_options, interface_of
from srm_model.cli.maps import Maps
from srm_model.cli.options import device_from
from srm_model.cli.streams import as_named, sentence
from srm_model.cli.tables import print_json
from srm_model.config import SRMConfig
from srm_model.crops import CropMean, at_full_resolution
from srm_model.data import load_image, load_whole
from srm_model.data.lists import decode
from srm_model.data.photographs import SUFFIXES
from srm_model.external import open_model
from srm_model.reports.text import count


class _Scorer(NamedTuple):
    """A model, the function that reads an image file for it, and the function's second argument, the image size."""

    model: Any
    load: Callable[[str, int], Tensor]
    size: int
    name: str
    about: str  # for stderr
    lower_is_better: bool = False
    config: SRMConfig | None = None  # of a checkpoint


class _Source(NamedTuple):
    """A file to score. If `fault` is not None, `path` cannot be scored, and `fault` is the reason."""

    path: str
    fault: str | None = None


class _Result(NamedTuple):
    """The score of a file. If the file has no score, `score` is None and `fault` is the reason.

    If the model failed on the image, `error` is the model's error: `fault` without the path.
    """

    path: str
    score: float | None
    fault: str | None
    image: Tensor | None = None
    error: str | None = None


class _Faults:
    """Report faults on stderr, and an error that the model raises for every image only once.

    Until the first image is scored, faults that repeat the first error of the model are held back. They are reported as
    soon as an image is scored. If no image is scored, only their number is reported.
    """

    def __init__(self) -> None:
        self._error: str | None = None
        self._held: list[str] = []
        self._scored = False

    def add(self, result: _Result) -> None:
        if result.score is not None:
            self._scored = True
            for fault in self._held:
                self._say(fault)
            self._held.clear()
        elif result.error is not None and result.error == self._error and not self._scored:
            self._held.append(str(result.fault))
        else:
            self._error = self._error or result.error
            self._say(str(result.fault))

    def close(self) -> None:
        if self._held:
            self._say(f"the model fails with the same error on {count(len(self._held), 'more image')}")

    def _say(self, text: str) -> None:
        runs.say(f"srm-iqa score: {sentence(text)}")


def run(args: argparse.Namespace) -> int:
    """Print one line per scored file; return 2 if a file could not be scored or a map could not be written, else 0."""
    check_model_options(args)
    names = list(args.images)
    faults = _Faults()
    chosen: Path | None = None
    first = args.checkpoint
    if first is not None and runs.has_checkpoint(first):
        if args.model is not None:
            raise ValueError(f"{first} and --model {args.model} were given; expected one of them")
        chosen = runs.one_checkpoint(first)
    elif first is not None:
        if args.model is None:
            _check_first(first, recursive=args.recursive)
        names.insert(0, first)
    if not names and args.files_from is None:
        raise ValueError("no image was given; expected IMAGE or --files-from FILE")
    maps = None if args.map is None else Maps(args.map, names, more=args.files_from is not None)
    names += [] if args.files_from is None else _listed(args.files_from, null=args.null)
    device = device_from(args.device)
    scorer = _checkpoint(chosen, device, args.backend) if args.model is None else _other_model(args, device)
    failed = False
    with runs.running() as ran:
        for number, batch in enumerate(_batches(_sources(names, recursive=args.recursive), args.batch_size)):
            results = _scored(scorer, device, batch)
            if number == 0:
                runs.say(scorer.about)  # after the first batch, which shows that the model can run
            for result in results:
                failed |= result.fault is not None
                drawn = None if maps is None else _draw(maps, scorer, result, args)
                failed |= maps is not None and result.fault is None and drawn is None
                faults.add(result)
                _print(result, scorer.name, drawn, args)
                if maps is not None:
                    sys.stdout.flush()  # a map takes seconds
            sys.stdout.flush()
    faults.close()
    if scorer.config is not None:
        runs.say_kernels(scorer.config, device, ran)
    return 2 if failed else 0


def _checkpoint(chosen: Path | None, device: torch.device, backend: str | None) -> _Scorer:
    """Open a checkpoint, or the checkpoint of the package if `chosen` is None."""
    folder = shipped() if chosen is None else chosen
    model, card = runs.open_checkpoint(folder, device, backend)
    name, config = _model_name(folder), model.config
    origin = "that comes with the package" if chosen is None else f"in {folder}"
    trained = "" if "epoch" in card else ", which is not trained"
    about = f"scoring with the checkpoint {name} {origin}{trained}"
    size = config.image_size
    if at_full_resolution(card):
        return _Scorer(CropMean(model, size), load_whole, size, name, about, config=config)
    return _Scorer(model, load_image, size, name, about, config=config)


def _other_model(args: argparse.Namespace, device: torch.device) -> _Scorer:
    """Open the model of `--model`."""
    model = open_model(args.model, interface_of(args, lower_is_better=False)).to(device)
    lower = model.lower_better if args.lower_is_better is None else args.lower_is_better
    about = f"scoring with the model {args.model}"
    return _Scorer(model, load_image, args.size, args.model, about, lower_is_better=lower)


def _check_first(name: str, *, recursive: bool) -> None:
    """Raise ValueError if the first argument may be a mistyped checkpoint.

    Without this check, a mistyped path of a checkpoint would count as an image that cannot be read, and the images
    after this path would be scored with the default checkpoint.
    """
    if not os.path.exists(name):  # noqa: PTH110, the name may contain NUL bytes
        raise ValueError(f"{name}: no such folder or file; expected a checkpoint or an image")
    if not recursive and os.path.isdir(name):  # noqa: PTH112
        raise ValueError(
            f"{name}: is a folder and has no checkpoint; expected a checkpoint, an image, or --recursive to score the "
            "images of a folder"
        )


def _model_name(folder: Path) -> str:
    """Return a name that identifies a checkpoint: backbone, neck, and the first digits of the digest of the weights."""
    document = read_card(folder)
    return f"{document['backbone']}/{document['neck']}@{document['sha256'][:12]}"


def _listed(file: str, *, null: bool) -> list[str]:
    """Read a list of names from a file, or from stdin if `file` is "-".

    In the list, the names are separated by NUL bytes if `null` is true, otherwise by line breaks.
    """
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
        raise ValueError(
            f"--files-from {file}: has NUL bytes; expected one name per line, or --null for names separated by NUL "
            "bytes"
        )
    names = (line.removesuffix("\r") for line in text.split("\n"))
    return [os.fsdecode(name.encode(errors="surrogateescape")) for name in names if name]


def _sources(names: Iterable[str], *, recursive: bool) -> Iterator[_Source]:
    for name in names:
        if os.path.basename(name) in (CONFIG, WEIGHTS):  # noqa: PTH119, names may contain NUL bytes
            yield _Source(
                name, f"{name}: is a file of a checkpoint; expected its folder, as the first argument"
            )
        elif not os.path.isdir(name):  # noqa: PTH112
            yield _Source(name)
        elif runs.has_checkpoint(name):
            yield _Source(name, f"{name}: is a checkpoint or a run; expected it as the first argument only")
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


def _scored(scorer: _Scorer, device: torch.device, batch: list[_Source]) -> list[_Result]:
    """Score the images of a batch."""
    loaded = [source.fault or _load(scorer, source.path) for source in batch]
    images = [image for image in loaded if isinstance(image, Tensor)]
    scores = _scores(scorer.model, device, images)
    found = []
    for (path, _), image in zip(batch, loaded, strict=True):
        score = scores.pop(0) if isinstance(image, Tensor) else image
        if not isinstance(image, Tensor):
            found.append(_Result(path, None, image))
        elif isinstance(score, str):
            found.append(_Result(path, None, f"{path}: {score}", error=score))
        elif math.isfinite(score):
            found.append(_Result(path, score, None, image))
        else:
            found.append(_Result(path, None, f"{path}: the model's score is {score}"))
    return found


def _scores(model: Any, device: torch.device, images: list[Tensor]) -> list[Any]:
    """Return a score for each image. If the model fails on an image, return the error message instead of its score."""
    if not images:
        return []
    if len({image.shape for image in images}) > 1:
        return [score for image in images for score in _scores(model, device, [image])]
    try:
        with torch.inference_mode():
            return list(scores_of(model, torch.stack(images).to(device)).tolist())
    except ValueError as error:
        if len(images) == 1:
            return [str(error)]
        return [score for image in images for score in _scores(model, device, [image])]


def _load(scorer: _Scorer, path: str) -> Tensor | str:
    try:
        return scorer.load(path, scorer.size)
    except ValueError as error:
        return sentence(str(error))


def _draw(maps: Maps, scorer: _Scorer, result: _Result, args: argparse.Namespace) -> str | None:
    """Write the map of a scored image and return the path of the map.

    If the file has no score, return None. If the map cannot be written, report the reason and return None.
    """
    if result.image is None:
        return None
    try:
        return str(
            maps.write(
                scorer.model,
                result.image,
                result.path,
                name=scorer.name,
                batch_size=args.batch_size,
                progress=not args.no_progress,
                lower_is_better=scorer.lower_is_better,
            )
        )
    except (OSError, ValueError) as error:
        runs.say(f"srm-iqa score: {sentence(str(error))}")
        return None


def _print(result: _Result, model: str, drawn: str | None, args: argparse.Namespace) -> None:
    path, score, fault, *_ = result
    if args.json:
        row = {"path": _as_json(path), "score": score, "model": model}
        row |= {} if drawn is None else {"map": _as_json(drawn)}
        row |= {} if fault is None else {"error": sentence(fault)}
        print_json([row])
    elif score is not None:
        name = as_named(path)
        if not args.null:
            name = name.replace("\n", "\\n").replace("\r", "\\r")
        print(f"{score:.4f}\t{name}", end="\0" if args.null else "\n")


def _as_json(path: str) -> str:
    return os.fsencode(path).decode(errors="surrogateescape")
