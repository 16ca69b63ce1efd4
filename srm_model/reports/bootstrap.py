"""Percentile bootstrap of rank correlations over test images, paired between models and attacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

REPLICATES = 2000
SEED = 0


def resampled_srocc(mos: np.ndarray, scores: Sequence[np.ndarray]) -> np.ndarray:
    """SROCC of every score vector on the same 2,000 resamples of the images.

    `mos` and each of `scores` are (n,); the result is (len(scores), 2000), NaN where a resample has constant
    labels or scores. Images are drawn with replacement, independently: images that share a photograph are
    not independent in truth, so that intervals from this are, if anything, too narrow.
    """
    n = len(mos)
    draws = np.random.default_rng(SEED).integers(n, size=(REPLICATES, n))
    labels = _ranks(mos[draws])
    return np.stack([_rowwise_correlation(_ranks(values[draws]), labels) for values in scores])


def interval(replicates: np.ndarray) -> tuple[float, float] | None:
    """The central 95 % of the replicates, NaN left out; None where more than one in twenty is NaN."""
    finite = replicates[np.isfinite(replicates)]
    if len(finite) < 0.95 * len(replicates):
        return None
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def _ranks(values: np.ndarray) -> np.ndarray:
    return rankdata(values, axis=1)


def _rowwise_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a = a - a.mean(axis=1, keepdims=True)
    b = b - b.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
