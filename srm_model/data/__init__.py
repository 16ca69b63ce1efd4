"""Open datasets of images with quality scores: TID2013, KonIQ-10k, and synthesised datasets in TID2013's layout."""

from __future__ import annotations

from srm_model.data.base import SPLITS, ImageQualityDataset
from srm_model.data.cache import ImageCache
from srm_model.data.datasets import describe, open_dataset
from srm_model.data.koniq10k import KonIQ10k
from srm_model.data.tid2013 import TID2013
from srm_model.data.transforms import load_image, load_whole

__all__ = [
    "SPLITS",
    "TID2013",
    "ImageCache",
    "ImageQualityDataset",
    "KonIQ10k",
    "describe",
    "load_image",
    "load_whole",
    "open_dataset",
]
