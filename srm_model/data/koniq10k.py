"""KonIQ-10k with its official split (docs/METHOD.md §5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srm_model.config import SRMConfig
from srm_model.data.base import (
    SPLITS,
    Entry,
    Faults,
    ImageQualityDataset,
    Row,
    check_arguments,
    find_images,
    parse_mos,
    published_name,
)
from srm_model.data.cache import ImageCache
from srm_model.data.lists import header, number, records

SETS_FILE = "koniq10k_distributions_sets.csv"
SCORES_FILE = "koniq10k_scores_and_distributions.csv"
IMAGE_FOLDERS = ("1024x768", "512x384")  # the larger one if both exist
MOS_RANGE = (0.0, 100.0)

_SET_WORDS = {"training": "train", "validation": "val", "test": "test"}
PUBLISHED_SPLIT = {"train": 7058, "val": 1000, "test": 2015}
_SETS_COLUMNS = {"image_name", "MOS", "set"}
_SCORES_COLUMNS = {"image_name", "MOS", "MOS_zscore"}
_SUFFIXES = (".csv", ".tsv")
_REASONS = 3  # upper limit of rejected tables that an error lists
_AGREEMENT = 0.1  # tolerance on the scale 0 to 100; rounding errors are much smaller


class KonIQ10k(ImageQualityDataset):
    """KonIQ-10k: 10,073 photographs with their MOS, split 7058/1000/2015 into train, val and test.

    The first list, `koniq10k_distributions_sets.csv`, gives the split of each image, and its MOS on a scale from 0 to
    100. The second list, `koniq10k_scores_and_distributions.csv`, is optional and has no split. It gives two scores of
    each image: the MOS on a scale from 1 to 5, and MOS_zscore on a scale from 0 to 100. If an image is in both lists,
    its MOS_zscore must agree with its MOS in the first list.

    Both lists are recognised by their columns, not by their names. Their suffix must be `.csv` or `.tsv`. The separator
    is a comma, a semicolon, a tab or a vertical bar (|). The encodings are those of `srm_model.data.lists.read_list`.

    A list with the name `koniq10k_distributions_sets.csv` must have the published split: 7058 images for train, 1000
    for val and 2015 for test. Otherwise the list is rejected, because it may be truncated. To use a subset of the
    images, give the list another name.

    Args:
        root: Folder that contains the lists and the folder of images, `1024x768/` or `512x384/`.
        split: "train", "val" or "test".
        seed: Seed of the train transform.
        images: Name of the folder of images inside `root`. Default: `1024x768` if it exists, otherwise `512x384`.
        image_size, train, cache, verify, progress: As in `TID2013`.

    Raises:
        ValueError: An image of the dataset is missing or cannot be decoded, a row is malformed, a score is out of
            range, or a name is listed twice. The message names the first faulty row and the number of faults.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        seed: int = SRMConfig.seed,
        image_size: int = SRMConfig.image_size,
        train: bool | None = None,
        images: str | None = None,
        cache: bool | ImageCache = False,
        verify: str = "full",
        progress: bool = True,
    ) -> None:
        check_arguments(split, seed, image_size)
        root = Path(root)
        sets, scores = find_lists(root)
        folder = _image_folder(root, images)
        faults = Faults(sets)
        rows = _read_sets(sets, faults)
        if scores is not None:
            _compare(rows, faults, scores)
        entries = find_images(rows, folder, faults, verify=verify, progress=progress)
        if sets.name == SETS_FILE:
            _check_whole(entries, sets)
        super().__init__(
            published_name("KonIQ-10k", len(entries), sum(PUBLISHED_SPLIT.values())),
            root,
            split,
            entries,
            {name: name for name in SPLITS},
            labels="mos",
            label_range=MOS_RANGE,
            seed=seed,
            image_size=image_size,
            train=train,
            cache=cache,
        )
        self.image_folder = folder.name

    @staticmethod
    def missing(root: Path) -> str | None:
        """Return the reason why `find_lists` rejects the folder, or None if it finds the list with the split."""
        try:
            find_lists(root)
        except ValueError as error:
            return str(error)
        return None

    def details(self, sets: Mapping[str, ImageQualityDataset]) -> dict[str, Any]:
        """Return the name of the folder of images."""
        return {"image_folder": self.image_folder}


def _check_whole(entries: list[Entry], sets: Path) -> None:
    """Raise ValueError unless each split has the published number of images; the message names the list `sets`."""
    counts = Counter(entry.group for entry in entries)
    if counts == PUBLISHED_SPLIT:
        return
    here, published = (
        ", ".join(f"{split} {numbers.get(split, 0)}" for split in SPLITS)
        for numbers in (counts, PUBLISHED_SPLIT)
    )
    raise ValueError(
        f"{sets}: has the split {here}; expected the published split, {published}; give the list of a subset "
        "another file name"
    )


def find_lists(root: Path) -> tuple[Path, Path | None]:
    """Find KonIQ-10k's lists by their columns. Other files are ignored.

    Args:
        root: Folder of the dataset.

    Returns:
        The path of the list that has the split, and the path of the list that has MOS_zscore. The second path is None
        if the folder has no list with MOS_zscore.

    Raises:
        ValueError: The list with the split is missing, two or more files are lists of the same kind, or one file has
            the columns of both lists.
    """
    sets, scores, others = [], [], []
    for path in sorted(path for path in root.iterdir() if path.suffix.lower() in _SUFFIXES):
        try:
            columns = set(header(path)[0]) if path.is_file() else set()
        except OSError as error:
            others.append(f"{path.name} is not readable ({error.strerror})")
            continue
        if columns >= _SETS_COLUMNS and columns >= _SCORES_COLUMNS:
            raise ValueError(
                f"{path}: has the columns set and MOS_zscore, so the scale of MOS is ambiguous; expected only one of "
                "these columns"
            )
        if columns >= _SETS_COLUMNS:
            sets.append(path)
        elif columns >= _SCORES_COLUMNS:
            scores.append(path)
        else:
            others.append(f"{path.name} {'has other columns' if path.is_file() else 'is not a file'}")
    for found, what in ((sets, SETS_FILE), (scores, SCORES_FILE)):
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise ValueError(f"{root}: {names} both have the columns of {what}; expected one")
    if not sets:
        instead = [f"{scores[0].name} has the columns of {SCORES_FILE}, which has no split"] if scores else []
        reasons = "".join(f"; {reason}" for reason in [*instead, *others][:_REASONS])
        raise ValueError(
            f"{root}: no {SETS_FILE}, with the columns image_name, MOS and set, separated by commas, "
            f"semicolons, tabs or bars (|){reasons}"
        )
    return sets[0], scores[0] if scores else None


def _image_folder(root: Path, images: str | None) -> Path:
    if images is not None:
        return root / images
    for name in IMAGE_FOLDERS:
        if (root / name).is_dir():
            return root / name
    raise ValueError(f"{root}: no folder {' or '.join(IMAGE_FOLDERS)} with the images")


def _read_sets(path: Path, faults: Faults) -> list[Row]:
    rows = []
    for line, fields in records(path):
        faults.rows += 1
        name, mos, word = fields.get("image_name"), fields.get("MOS"), fields.get("set", "").strip()
        if not name or mos is None or word not in _SET_WORDS:
            words = ", ".join(_SET_WORDS)
            faults.add(
                line, "malformed", f"{name or 'no name'}: expected an image_name, a MOS and a set of {words}"
            )
            continue
        try:
            rows.append(Row(line, name, parse_mos(mos, *MOS_RANGE), _SET_WORDS[word]))
        except ValueError as error:
            faults.add(line, "with no valid score", f"{name}: {error}")
    return rows


def _compare(rows: list[Row], faults: Faults, scores: Path) -> None:
    """Add a fault for each row whose MOS differs from the MOS_zscore of the same image in the file `scores`."""
    on_both_scales = {fields.get("image_name"): fields.get("MOS_zscore") for _, fields in records(scores)}
    for row in rows:
        text = on_both_scales.get(row.name)
        if text is None:
            continue
        try:
            agrees = abs(number(text) - row.mos) <= _AGREEMENT
        except ValueError:
            agrees = False
        if not agrees:
            sentence = f"{row.name} has MOS {row.mos:g} here and MOS_zscore {text} in {scores.name}"
            faults.add(row.number, "contradicted", sentence)
