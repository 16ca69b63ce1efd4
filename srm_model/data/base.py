"""Base class and helpers of the image quality datasets."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from srm_model.data.cache import ImageCache
from srm_model.data.images import Pixels, find_faults, shorter_side
from srm_model.data.lists import number
from srm_model.data.transforms import centre_crop, load_resized, random_crop_and_flip, to_tensor

SPLITS = ("train", "val", "test")


def published_name(name: str, images: int, published: int) -> str:
    """Return the dataset's name. If `images` differs from `published`, append both numbers in parentheses."""
    return name if images == published else f"{name} ({images} of its {published} images)"


class Row(NamedTuple):
    """One valid row of a dataset's list."""

    number: int
    name: str
    mos: float  # on the dataset's own scale
    group: str  # images of one group are in the same split


class Entry(NamedTuple):
    """One image of a dataset."""

    name: str
    path: Path
    mos: float
    group: str


class Faults:
    """Collect all faults of a list and its images, and report them in one error."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.rows = 0
        self._faults: list[tuple[int, str, str]] = []  # row, kind, sentence

    def add(self, row: int, kind: str, sentence: str) -> None:
        """Add a fault: its row, its kind, and a sentence that begins with the image's name."""
        self._faults.append((row, kind, sentence))

    def raise_if_any(self) -> None:
        """Raise ValueError with the first faulty row and the number of faults of each kind."""
        if not self._faults:
            return
        row, _, sentence = min(self._faults)
        kinds = Counter(kind for _, kind, _ in self._faults)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        faulty = len({row for row, _, _ in self._faults})
        raise ValueError(
            f"{self.source}, row {row}: {sentence} (of {self.rows} rows, {faulty} {'is' if faulty == 1 else 'are'} "
            f"faulty: {counts})"
        )


def find_images(
    rows: Sequence[Row], folder: Path, faults: Faults, *, verify: str, progress: bool
) -> list[Entry]:
    """Find the image file of each row of a list, ignoring case in file names.

    Args:
        rows: Valid rows of the list.
        folder: Folder of the images.
        faults: Collects the faults. This function adds a fault for each name that is listed twice, for each name with
            no file or several files in the folder, and for each image that cannot be read.
        verify, progress: As in `find_faults`.

    Raises:
        ValueError: The folder is missing, `rows` is empty, or `faults` is not empty at the end. It then contains faults
            that this function found, or faults that the caller added before.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected the images that {faults.source} lists")
    on_disk: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        on_disk.setdefault(path.name.casefold(), []).append(path)
    first: dict[str, int] = {}
    found: list[tuple[Row, Path]] = []
    for row in rows:
        key = row.name.casefold()
        files = on_disk.get(key, [])
        if key in first:
            faults.add(row.number, "listed twice", f"{row.name} is already listed in row {first[key]}")
        elif not files:
            faults.add(row.number, "missing", f"{row.name} is not in {folder}")
        elif len(files) > 1:
            names = " or ".join(sorted(path.name for path in files))
            faults.add(row.number, "ambiguous", f"{row.name} could be {names} in {folder}")
        else:
            found.append((row, files[0]))
        first.setdefault(key, row.number)
    unreadable = find_faults([path for _, path in found], verify=verify, progress=progress)
    for i, reason in unreadable.items():
        row, path = found[i]
        faults.add(row.number, "unreadable", f"{row.name} cannot be read as an image ({path}: {reason})")
    faults.raise_if_any()
    if not found:
        raise ValueError(f"{faults.source}: lists no images")
    return [Entry(row.name, path, row.mos, row.group) for row, path in found]


def parse_mos(text: str, low: float, high: float) -> float:
    """Parse a score; raise ValueError if the text is not a number from `low` to `high`."""
    try:
        value = number(text)
    except ValueError:
        raise ValueError(f"the score {text!r} is not a number") from None
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"the score {text} is outside {low:g} to {high:g}")
    return value


class ImageQualityDataset(Dataset[tuple[Tensor, float]]):
    """Images of one split of a dataset, with normalised labels. `TID2013` and `KonIQ10k` open datasets from files.

    An item is a pair `(image, mos)`. `image` is (3, S, S), float32, in [0, 1]. `mos` is a float in [0, 1]; higher is
    better. `DataLoader` collates `mos` to float64.

    By default, the train split uses the train transform, and the other splits use the test transform. Both transforms
    first resize the shorter side of the image to S. The train transform then takes a random crop of side `crop_size`
    and mirrors the crop with probability 0.5. The crop and the mirroring depend only on seed, epoch and index. The test
    transform takes the centre crop of side S.

    Attributes:
        name: Name of the dataset.
        root: Folder of the dataset.
        split: "train", "val" or "test".
        labels: Source of the labels. "mos": people's scores of these images. "opinions:<dataset>": people's scores of
            similar images in another dataset, which serve as labels of these images. "metric:<name>": values of a
            metric. "scores of <table>, column <column>": scores from the table that was passed to `labelled_images`.
        label_range: Lowest and highest label. Normalisation maps them to 0 and 1.
        crop_size: Side in pixels of the train transform's crops, at most S. Default: S. The function `train` assigns
            `SRMConfig.crop_size` to this attribute.
        mos: Normalised labels, (n,) float64.
        names: File name of each item. The items have the order of the dataset's list file, or of the indices that were
            passed to `subset`.
        fingerprint: SHA-256, in hexadecimal, of the name, label and split of every image of the whole dataset. The
            three splits of a dataset have the same fingerprint.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        split: str,
        entries: Sequence[Entry],
        split_of: Mapping[str, str],
        *,
        labels: str,
        label_range: tuple[float, float],
        seed: int,
        image_size: int,
        train: bool | None,
        cache: bool | ImageCache,
    ) -> None:
        low, high = label_range
        chosen = [entry for entry in entries if split_of[entry.group] == split]
        if not chosen:
            raise ValueError(f"{root}: the {split} split of {name} has no images")
        self.name = name
        self.root = root
        self.split = split
        self.labels = labels
        self.label_range = label_range
        self.seed = seed
        self.image_size = self.crop_size = image_size
        self.train = split == "train" if train is None else train
        self.names = [entry.name for entry in chosen]
        self.groups = [entry.group for entry in chosen]
        self.mos: npt.NDArray[np.float64] = (np.array([entry.mos for entry in chosen]) - low) / (high - low)
        self.fingerprint = _fingerprint(entries, split_of)
        self.counts = dict(Counter(split_of[entry.group] for entry in entries))
        self._paths = [entry.path for entry in chosen]
        self._shared = cache if isinstance(cache, ImageCache) else None
        self._cache: dict[int, Pixels] | None = {} if cache is True else None
        self._epoch = _shared_counter()

    @staticmethod
    def missing(root: Path) -> str | None:
        """Return why a folder does not hold a dataset of this class, or None if it does."""
        raise NotImplementedError

    def details(self, sets: Mapping[str, ImageQualityDataset]) -> dict[str, Any]:
        """Return the entries of `describe` that only datasets of this class have.

        Args:
            sets: The three splits by their names.
        """
        return {}

    def type_level_srocc_of(self, names: Iterable[str]) -> float | None:
        """Return the SROCC of a predictor that knows only distortion type and level, on the images with these names.

        None if the class defines no such predictor. See `TID2013.type_level_srocc_of`.
        """
        return None

    @property
    def epoch(self) -> int:
        """The epoch, which determines the random crops. A new value also reaches persistent workers of `DataLoader`."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        if value < 0:
            raise ValueError(f"epoch {value}: expected zero or more")
        self._epoch.fill_(value)

    def path(self, index: int) -> Path:
        """Return the file of an item."""
        return self._paths[index]

    def subset(self, indices: Sequence[int]) -> Self:
        """Return a dataset with only these items, in this order. The fingerprint of the whole dataset is kept."""
        part = copy.copy(self)
        part.names = [self.names[i] for i in indices]
        part.groups = [self.groups[i] for i in indices]
        part.mos = self.mos[list(indices)]
        part._paths = [self._paths[i] for i in indices]
        part._cache = None if self._cache is None else {}
        part._epoch = _shared_counter(self.epoch)
        return part

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        index = range(len(self))[index]
        pixels = self._resized(index)
        if self.train:
            rng = np.random.default_rng([self.seed, self.epoch, index])
            pixels = random_crop_and_flip(pixels, self.crop_size, rng)
        else:
            pixels = centre_crop(pixels, self.image_size)
        return to_tensor(pixels), float(self.mos[index])

    def __getstate__(self) -> dict[str, Any]:
        # Give a spawned worker an empty cache; otherwise all cached pixels would be pickled.
        return {**self.__dict__, "_cache": None if self._cache is None else {}}

    @property
    def resized(self) -> bool:
        """Whether the transforms change the resolution of at least one image of this split."""
        return any(shorter_side(path) != self.image_size for path in self._paths)

    def _resized(self, index: int) -> Pixels:
        if self._shared is not None:
            return self._shared.get(self._paths[index], self.image_size)
        if self._cache is None:
            return load_resized(self._paths[index], self.image_size)
        if index not in self._cache:
            self._cache[index] = load_resized(self._paths[index], self.image_size)
        return self._cache[index]


def type_level_result(dataset: Any, names: Iterable[str]) -> dict[str, float]:
    """Return the entry `type_level_srocc` of a result on the images with these names.

    Args:
        dataset: Any dataset. Only an `ImageQualityDataset` can have the entry.
        names: File names of the images.

    Returns:
        A dict with the value of `dataset.type_level_srocc_of`, or an empty dict if the value is None.
    """
    found = dataset.type_level_srocc_of(names) if isinstance(dataset, ImageQualityDataset) else None
    return {} if found is None else {"type_level_srocc": found}


def check_arguments(split: str, seed: int, image_size: int) -> None:
    """Check the arguments that all datasets share; raise ValueError for a value that is not accepted."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(map(repr, SPLITS))}")
    if seed < 0:
        raise ValueError(f"seed {seed}: expected zero or more")
    if image_size < 1:
        raise ValueError(f"image_size {image_size}: expected at least 1")


def _fingerprint(entries: Sequence[Entry], split_of: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(
            f"{entry.name}\t{entry.mos!r}\t{split_of[entry.group]}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def _shared_counter(value: int = 0) -> Tensor:
    return torch.tensor(value, dtype=torch.int64).share_memory_()
