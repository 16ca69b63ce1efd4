"""TID2013, and sets in its layout whose labels are a metric's (docs/METHOD.md §5)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

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
MOS_RANGE = (0.0, 9.0)  # nominal; the published scores lie in 0.24 to 7.21

LINE = re.compile(
    r"""\s*"?(?P<score>[^\s;"]+?)"?(?:\s*[;,]\s*|\s+)"?(?P<name>i(?P<reference>\d+)_\d+_\d+\.bmp)"?[\s;,]*""",
    re.IGNORECASE,
)


class Labels(NamedTuple):
    """What the numbers of a list are, and the range they are normalised from.

    kind: "mos", people's of these very images; "opinions:<set>", people's of that set's images of the same photograph,
        type and level; "metric:<name>", a full-reference metric's.
    """

    kind: str
    range: tuple[float, float]


class TID2013(ImageQualityDataset):
    """TID2013: 25 references × 24 types × 5 levels of distortion, split by reference.

    root: holds `mos_with_names.txt` and `distorted_images/`; names are looked up whatever their case. A line of the
    list is a score and a name, separated by spaces, tabs, semicolons or commas (see `lists`). The references
    themselves carry no label and are not needed. Splits are 60/20/20 % of the references, by
    `numpy.random.default_rng(seed).permutation` of their sorted ids, so that no content is in two of them.
    Sets made by `srm_model.data.synthesize` have the same layout and a `labels.json`, by which `labels` is
    "metric:<name>" or "opinions:<set>" and the labels are normalised; without one the labels are people's, on 0 to 9.

    Of opinions, `type_level_srocc` is the SROCC that type and level alone reach on the test split, by the mean label of
    the training split's images of the same type and level: what a model gets for recognising distortions only.

    seed: of the split and of the train transform. image_size: S of the (3, S, S) items.
    train: whether items are randomly cropped; None: in the train split only.
    cache: keep resized images, uint8: True in memory, per process, for sets that fit; an `ImageCache` in its folder.
    verify: "full" decodes every image of the whole set first, "fast" reads the headers only (see `find_faults`).
    progress: a bar where stderr is a terminal and checking takes seconds.

    A missing, ambiguous or undecodable image anywhere in the set, a malformed row, a score out of range or a name
    listed twice is a ValueError with the first such row and the count of all.
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
        self.type_level_srocc = (
            _type_level_srocc(entries, parts) if labels.kind.startswith("opinions:") else None
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


def split_by_reference(references: Iterable[str], seed: int) -> dict[str, str]:
    """Reference id → "train", "val" or "test": 60/20/20 % of the ids, rounded, at least one each.

    The sorted distinct ids are permuted by `numpy.random.default_rng(seed)`; the first go to train, then val, and
    the rest to test: 15/5/5 of TID2013's 25. Fewer than three references are a ValueError.
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


def _type_level_srocc(entries: Sequence[Entry], parts: dict[str, str]) -> float | None:
    """SROCC on the test split of the training split's means by type and level; None where it is undefined."""
    scores: dict[str, list[float]] = {}
    for entry in entries:
        if parts[entry.group] == "train":
            scores.setdefault(type_and_level(entry.name), []).append(entry.mos)
    test = [
        entry for entry in entries if parts[entry.group] == "test" and type_and_level(entry.name) in scores
    ]
    if len(test) < 2:
        return None
    found = srocc([float(np.mean(scores[type_and_level(e.name)])) for e in test], [e.mos for e in test])
    return None if math.isnan(found) else round(found, 4)


def type_and_level(name: str) -> str:
    """What follows the reference in an image's name: 02_3 of i01_02_3.bmp."""
    return Path(name).stem.partition("_")[2]


def read_labels(root: Path) -> Labels:
    """What `labels.json` says of a set's labels; people's, on 0 to 9, where there is none."""
    path = root / LABELS
    if not path.exists():
        if (root / REFERENCES).exists():
            raise ValueError(
                f"{root}: a synthesised set without its {LABELS}, so whose labels it has is not known"
            )
        return Labels("mos", MOS_RANGE)
    value = read_json(path)
    known = isinstance(value, dict) and value.get("format") == LABELS_FORMAT
    sources = [key for key in ("metric", "opinions") if known and isinstance(value.get(key), str)]
    if len(sources) != 1 or value.get("direction") != HIGHER_IS_BETTER:
        raise ValueError(
            f"{path}: expected format {LABELS_FORMAT!r}, the name of a metric or of a set that the opinions are from, "
            f"and direction {HIGHER_IS_BETTER!r}"
        )
    limits = value.get("range")
    if (
        not isinstance(limits, list)
        or len(limits) != 2
        or not all(isinstance(limit, int | float) for limit in limits)
        or not limits[0] < limits[1]
    ):
        raise ValueError(f"{path}: range {limits!r}: expected two numbers, the lower first")
    return Labels(f"{sources[0]}:{value[sources[0]]}", (float(limits[0]), float(limits[1])))


def _read_list(root: Path, label_range: tuple[float, float], faults: Faults) -> list[Row]:
    path = root / LIST
    if not path.exists():
        if (root / LABELS).exists():
            raise ValueError(
                f"{root}: the set is not finished; the command that began it goes on where it stopped"
            )
        raise ValueError(f"{path}: no such file; a set in TID2013's layout has one")
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
