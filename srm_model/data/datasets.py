"""Detect the type of the dataset in a folder, and open the dataset.

To add a type, write a subclass of `ImageQualityDataset` in a module of its own, and add the subclass to `DATASETS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srm_model.config import SRMConfig
from srm_model.data.base import SPLITS
from srm_model.data.cache import ImageCache
from srm_model.data.koniq10k import KonIQ10k
from srm_model.data.tid2013 import TID2013

DATASETS: dict[str, type[TID2013 | KonIQ10k]] = {"TID2013": TID2013, "KonIQ-10k": KonIQ10k}


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

    A folder with `mos_with_names.txt` or `labels.json` is detected as TID2013. If it has `labels.json` without
    `mos_with_names.txt`, it is an unfinished synthesised dataset, and ValueError is raised. A folder with a table that
    has KonIQ-10k's columns is detected as KonIQ-10k.

    Args:
        root, split, seed, image_size, train, cache, verify, progress: As in `TID2013` and `KonIQ10k`.

    Returns:
        The dataset.

    Raises:
        ValueError: The folder does not exist, its files match no dataset type or more than one, or the dataset is
            unfinished or faulty.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected the folder of a dataset")
    missing = {name: dataset.missing(root) for name, dataset in DATASETS.items()}
    held = [name for name, reason in missing.items() if reason is None]
    if not held:
        reasons = " nor ".join(f"{name} ({reason})" for name, reason in missing.items())
        raise ValueError(f"{root}: neither {reasons}")
    if len(held) > 1:
        raise ValueError(f"{root}: holds files of {' and '.join(held)}; expected one dataset per folder")
    return DATASETS[held[0]](
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
        - references: ids of the reference images in each split, only for the type TID2013;
        - type_level_srocc: see `TID2013`; only with labels "opinions:<dataset>", and only if this SROCC is defined;
        - image_folder: name of the folder of images, only for the type KonIQ-10k.

    Raises:
        ValueError: As in `open_dataset`.
    """
    sets = {
        split: open_dataset(
            root, split, seed=seed, verify=verify if split == SPLITS[0] else "fast", progress=progress
        )
        for split in SPLITS
    }
    first = sets["train"]
    return {
        "name": first.name,
        "root": str(root),
        "labels": first.labels,
        "label_range": list(first.label_range),
        "images": sum(map(len, sets.values())),
        "splits": {split: len(part) for split, part in sets.items()},
        "seed": seed,
        "fingerprint": first.fingerprint,
        **first.details(sets),
    }
