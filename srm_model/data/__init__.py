"""Data sets of images with their quality: TID2013, KonIQ-10k, and synthesised ones in TID2013's layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from srm_model.config import SRMConfig
from srm_model.data.base import SPLITS, ImageQualityDataset
from srm_model.data.cache import ImageCache
from srm_model.data.koniq10k import KonIQ10k, find_lists
from srm_model.data.tid2013 import LABELS, LIST, TID2013
from srm_model.data.transforms import load_image

__all__ = [
    "SPLITS",
    "TID2013",
    "ImageCache",
    "ImageQualityDataset",
    "KonIQ10k",
    "describe",
    "load_image",
    "open_dataset",
]


def open_dataset(
    root: str | Path,
    split: str,
    *,
    seed: int = SRMConfig.seed,
    image_size: int = SRMConfig.image_size,
    train: bool | None = None,
    cache: bool | ImageCache = False,
    verify: str = "full",
    progress: bool = True,
) -> TID2013 | KonIQ10k:
    """The data set that lies at `root`, found out by its files; arguments as in `TID2013` and `KonIQ10k`.

    A folder with `mos_with_names.txt` (or a set in that layout that is still being synthesised) is TID2013's, one
    with tables of KonIQ-10k's columns is KonIQ-10k; none or both is a ValueError.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    layout = (root / LIST).exists() or (root / LABELS).exists()
    tables_fault: ValueError | None = None
    try:
        find_lists(root)
        tables = True
    except ValueError as error:
        tables, tables_fault = False, error
    if layout and tables:
        raise ValueError(f"{root}: holds both {LIST} and KonIQ-10k's table; expected one data set per folder")
    options: dict[str, Any] = {
        "seed": seed,
        "image_size": image_size,
        "train": train,
        "cache": cache,
        "verify": verify,
        "progress": progress,
    }
    if layout:
        return TID2013(root, split, **options)
    if tables:
        return KonIQ10k(root, split, **options)
    raise ValueError(f"{root}: neither TID2013 (no {LIST}) nor KonIQ-10k ({tables_fault})")


def describe(
    root: str | Path, *, seed: int = SRMConfig.seed, verify: str = "full", progress: bool = True
) -> dict[str, Any]:
    """What data set lies at `root`, all its files checked: plain values for a person or a JSON file.

    name, root, labels ("mos", "metric:<name>" or "opinions:<set>"), label_range (low, high), images, splits (images in
    each), fingerprint; for TID2013's layout references (ids in each split) under this seed, and type_level_srocc where
    the labels are opinions; for KonIQ-10k the folder of images. A faulty set is a ValueError as in `TID2013` and
    `KonIQ10k`.
    """
    sets = {
        split: open_dataset(
            root, split, seed=seed, verify=verify if split == SPLITS[0] else "fast", progress=progress
        )
        for split in SPLITS
    }
    first = sets["train"]
    description: dict[str, Any] = {
        "name": first.name,
        "root": str(root),
        "labels": first.labels,
        "label_range": list(first.label_range),
        "images": sum(map(len, sets.values())),
        "splits": {split: len(part) for split, part in sets.items()},
        "seed": seed,
        "fingerprint": first.fingerprint,
    }
    if isinstance(first, KonIQ10k):
        description["image_folder"] = first.image_folder
    else:
        description["references"] = {split: sorted(Counter(part.groups)) for split, part in sets.items()}
        if first.type_level_srocc is not None:
            description["type_level_srocc"] = first.type_level_srocc
    return description
