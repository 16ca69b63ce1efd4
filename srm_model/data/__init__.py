"""Open datasets of images with quality scores: TID2013, KonIQ-10k, and synthesised datasets in TID2013's layout."""

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
    """Open a dataset whose type is detected from its files.

    A folder with `mos_with_names.txt` or `labels.json` is opened as TID2013. (An unfinished synthesised dataset has
    `labels.json` only.) A folder with a table that has KonIQ-10k's columns is opened as KonIQ-10k.

    Args:
        root, split, seed, image_size, train, cache, verify, progress: As in `TID2013` and `KonIQ10k`.

    Returns:
        The dataset.

    Raises:
        ValueError: The folder has files of neither type or of both types, or the dataset is faulty.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    kind: type[TID2013 | KonIQ10k] | None = None
    if (root / LIST).exists() or (root / LABELS).exists():
        kind = TID2013
    try:
        find_lists(root)
    except ValueError as error:
        if kind is None:
            raise ValueError(f"{root}: neither TID2013 (no {LIST}) nor KonIQ-10k ({error})") from None
    else:
        if kind is not None:
            raise ValueError(
                f"{root}: holds both {LIST} and KonIQ-10k's table; expected one dataset per folder"
            )
        kind = KonIQ10k
    return kind(
        root,
        split,
        seed=seed,
        image_size=image_size,
        train=train,
        cache=cache,
        verify=verify,
        progress=progress,
    )


def describe(
    root: str | Path, *, seed: int = SRMConfig.seed, verify: str = "full", progress: bool = True
) -> dict[str, Any]:
    """Check all files of a dataset and describe it in plain JSON values.

    Args:
        root, seed, verify, progress: As in `TID2013` and `KonIQ10k`.

    Returns:
        A dict with these entries:

        - name, root, seed and fingerprint of the dataset;
        - labels: "mos", "metric:<name>" or "opinions:<dataset>";
        - label_range: [lowest, highest] label;
        - images: number of images;
        - splits: number of images in each split;
        - references, only in TID2013's layout: ids of the references in each split;
        - type_level_srocc, only with labels "opinions:<dataset>": as in `TID2013`;
        - image_folder, only for KonIQ-10k: name of the folder of images.

    Raises:
        ValueError: The dataset is faulty, as in `TID2013` and `KonIQ10k`.
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
