"""Read TID2013 and synthesised datasets in the same layout (docs/METHOD.md §5)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
from srm_model.data.lists import read_list
from srm_model.files import read_json
from srm_model.metrics import srocc

LIST = "mos_with_names.txt"
PUBLISHED_IMAGES = 3_000
LABELS = "labels.json"
REFERENCES = "references.json"
IMAGES = "distorted_images"
LABELS_FORMAT = "srm-iqa-labels/1"
HIGHER_IS_BETTER = "higher is better"
MOS_RANGE = (0.0, 9.0)  # nominal; the published scores are from 0.24 to 7.21

LINE = re.compile(
    r"""\s*"?(?P<score>[^\s;"]+?)"?(?:\s*[;,]\s*|\s+)"?(?P<name>i(?P<reference>\d+)_\d+_\d+\.bmp)"?[\s;,]*""",
    re.IGNORECASE,
)


class Labels(NamedTuple):
    """Kind and range of the labels in a list."""

    kind: str  # "mos": opinions of these images; "opinions:<dataset>": of that dataset's images; "metric:<name>"
    range: tuple[float, float]


class TID2013(ImageQualityDataset):
    """TID2013: 25 references × 24 types × 5 levels of distortion, split by reference.

    Each line of `mos_with_names.txt` has a score and a file name, separated by spaces, tabs, semicolons or commas. The
    case of file names is ignored. The reference images are not needed. The train, val and test splits have 60 %, 20 %
    and 20 % of the references (see `split_by_reference`). No two splits have images of the same reference.

    `srm_model.data.synthesize` makes datasets in TID2013's layout, with an additional file, `labels.json`, which states
    the kind and the range of the labels. TID2013 itself has no `labels.json`; its labels are mean opinion scores from 0
    to 9.

    Args:
        root: Folder with `mos_with_names.txt` and `distorted_images/`.
        split: "train", "val" or "test".
        seed: Seed of the split and of the train transform.
        image_size: S, side in pixels of the images (3, S, S).
        train: Whether images are cropped at random. Default: True for the train split, False for the other splits.
        cache: Where to cache resized images. False: nowhere. True: in memory, separately in each process. An
            `ImageCache`: in its folder.
        verify: "full" decodes every image of the dataset at the start; "fast" reads the headers only (see
            `find_faults`).
        progress: Whether to show a progress bar while the images are checked. The bar appears only if stderr is a
            terminal and the check takes more than two seconds.

    Attributes:
        type_level_srocc: SROCC, on the test split, of a simple predictor that knows only the distortion type and level
            of an image. The score that it predicts is the mean label of all training images with the same type and
            level. A model can reach this SROCC by recognising distortions, without judging quality. None if the labels
            are not "opinions:<dataset>", or if the SROCC is undefined.

    Raises:
        ValueError: A row of the list is malformed, has an invalid score, or has a name that is already listed; or the
            image of a row is missing, cannot be decoded, or could be one of several files whose names differ only in
            case. The message states the first faulty row and the number of faulty rows.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        seed: int = SRMConfig.seed,
        image_size: int = SRMConfig.image_size,
        train: bool | None = None,
        cache: bool | ImageCache = False,
        verify: str = "full",
        progress: bool = True,
    ) -> None:
        check_arguments(split, seed, image_size)
        root = Path(root)
        labels = read_labels(root)
        faults = Faults(root / LIST)
        rows = _read_list(root, labels.range, faults)
        entries = find_images(rows, root / IMAGES, faults, verify=verify, progress=progress)
        parts = split_by_reference((entry.group for entry in entries), seed)
        self._type_level_means = (
            _type_level_means(entries, parts) if labels.kind.startswith("opinions:") else {}
        )
        self.type_level_srocc = self._type_level_srocc(
            (entry.name, entry.mos) for entry in entries if parts[entry.group] == "test"
        )
        super().__init__(
            published_name("TID2013", len(entries), PUBLISHED_IMAGES)
            if labels.kind == "mos"
            else "synthesised in TID2013's layout",
            root,
            split,
            entries,
            parts,
            labels=labels.kind,
            label_range=labels.range,
            seed=seed,
            image_size=image_size,
            train=train,
            cache=cache,
        )

    @staticmethod
    def missing(root: Path) -> str | None:
        """Return why the folder is not a dataset in TID2013's layout, or None if it is one.

        A folder with `mos_with_names.txt`, `labels.json` or both counts as a dataset in this layout. If it has only
        `labels.json`, it is an unfinished synthesised dataset: this function returns None, but `TID2013(root, …)`
        raises ValueError.
        """
        return None if (root / LIST).exists() or (root / LABELS).exists() else f"no {LIST}"

    def type_level_srocc_of(self, names: Iterable[str]) -> float | None:
        """Return the SROCC of the predictor of `type_level_srocc` on some images of this split.

        Args:
            names: File names of the images, from the attribute `names`.

        Returns:
            The SROCC, or None in the cases in which `type_level_srocc` is None. Images whose type and level no training
            image has are left out.
        """
        mos = dict(zip(self.names, self.mos.tolist(), strict=True))
        return self._type_level_srocc((name, mos[name]) for name in names)

    def _type_level_srocc(self, labelled: Iterable[tuple[str, float]]) -> float | None:
        means = self._type_level_means
        known = [(means[key], mos) for name, mos in labelled if (key := type_and_level(name)) in means]
        if len(known) < 2:
            return None
        found = srocc([mean for mean, _ in known], [mos for _, mos in known])
        return None if math.isnan(found) else round(found, 4)

    def details(self, sets: Mapping[str, ImageQualityDataset]) -> dict[str, Any]:
        """Return the ids of the references in each split, and `type_level_srocc` if it is known."""
        found: dict[str, Any] = {
            "references": {split: sorted(Counter(part.groups)) for split, part in sets.items()}
        }
        if self.type_level_srocc is not None:
            found["type_level_srocc"] = self.type_level_srocc
        return found


def split_by_reference(references: Iterable[str], seed: int) -> dict[str, str]:
    """Assign 60 % of the references to train, 20 % to val and 20 % to test, and at least one to each split.

    TID2013's 25 references are split 15/5/5. Repeated ids are removed, and the remaining ids are sorted. The sorted ids
    are permuted by `numpy.random.default_rng(seed)`. In the permuted order, the first ids are assigned to "train", the
    next ids to "val" and the remaining ids to "test".

    Args:
        references: Reference ids, with repetitions.
        seed: Seed of the permutation.

    Returns:
        A dict from reference id to "train", "val" or "test".

    Raises:
        ValueError: There are fewer than three references.
    """
    ids = sorted(set(references), key=int)
    if len(ids) < len(SPLITS):
        raise ValueError(f"{len(ids)} references: expected at least 3, one each for train, val and test")
    val = max(1, round(0.2 * len(ids)))
    train = min(max(1, round(0.6 * len(ids))), len(ids) - val - 1)
    order = np.random.default_rng(seed).permutation(len(ids))
    return {
        ids[index]: SPLITS[0] if place < train else SPLITS[1] if place < train + val else SPLITS[2]
        for place, index in enumerate(order)
    }


def _type_level_means(entries: Sequence[Entry], parts: dict[str, str]) -> dict[str, float]:
    """Return the mean label of the training images for each type and level, on the dataset's own scale."""
    scores: dict[str, list[float]] = {}
    for entry in entries:
        if parts[entry.group] == "train":
            scores.setdefault(type_and_level(entry.name), []).append(entry.mos)
    return {key: float(np.mean(found)) for key, found in scores.items()}


def type_and_level(name: str) -> str:
    """Return the distortion type and level in an image's name, such as "02_3" for i01_02_3.bmp."""
    return Path(name).stem.partition("_")[2]


def read_labels(root: Path) -> Labels:
    """Read the kind and range of a dataset's labels.

    Raises:
        ValueError: A synthesised dataset has no `labels.json`, or `labels.json` is malformed.
    """
    path = root / LABELS
    if not path.exists():
        if (root / REFERENCES).exists():
            raise ValueError(
                f"{root}: a synthesised dataset without {LABELS}; expected this file, which describes the labels"
            )
        return Labels("mos", MOS_RANGE)
    value = read_json(path)
    known = isinstance(value, dict) and value.get("format") == LABELS_FORMAT
    sources = [key for key in ("metric", "opinions") if known and isinstance(value.get(key), str)]
    if len(sources) != 1 or value.get("direction") != HIGHER_IS_BETTER:
        raise ValueError(
            f"{path}: expected format {LABELS_FORMAT!r}, direction {HIGHER_IS_BETTER!r}, and the name of a metric or "
            "of the dataset that the opinions are from"
        )
    limits = value.get("range")
    if (
        not isinstance(limits, list)
        or len(limits) != 2
        or not all(isinstance(limit, int | float) for limit in limits)
        or not limits[0] < limits[1]
    ):
        raise ValueError(f"{path}: range is {limits!r}; expected two numbers, the lower first")
    return Labels(f"{sources[0]}:{value[sources[0]]}", (float(limits[0]), float(limits[1])))


def _read_list(root: Path, label_range: tuple[float, float], faults: Faults) -> list[Row]:
    path = root / LIST
    if not path.exists():
        if (root / LABELS).exists():
            raise ValueError(f"{root}: an unfinished dataset; repeat the command that made it to complete it")
        raise ValueError(f"{path}: no such file; a dataset in TID2013's layout has one")
    rows = []
    for number, line in enumerate(read_list(path).splitlines(), 1):
        if not line.strip():
            continue
        faults.rows += 1
        match = LINE.fullmatch(line)
        if match is None:
            faults.add(
                number, "malformed", f"{line.strip()[:80]!r} is not a score and a name like i01_02_3.bmp"
            )
            continue
        try:
            mos = parse_mos(match["score"], *label_range)
        except ValueError as error:
            faults.add(number, "with no valid score", f"{match['name']}: {error}")
            continue
        rows.append(Row(number, match["name"], mos, match["reference"].zfill(2)))
    return rows
