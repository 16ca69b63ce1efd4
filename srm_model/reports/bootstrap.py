"""Compute percentile bootstrap intervals of correlations. All models and attacks share the resamples of the images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

REPLICATES = 2000
SEED = 0


def resampled_srocc(mos: np.ndarray, scores: Sequence[np.ndarray]) -> np.ndarray:
    """Compute the SROCC of every score vector on the same resamples of the images.

    A resample draws images independently of each other, with replacement. However, distorted versions of the same
    photograph are not independent, so bootstrap intervals from these resamples may be too narrow.

    Args:
        mos: Labels, (n,).
        scores: Score vectors, (n,) each.

    Returns:
        The SROCC of each score vector on each resample, (len(scores), REPLICATES). An SROCC is NaN if all labels or all
        scores in the resample are equal. If a label or a score of a vector is not finite, all SROCCs of this vector are
        NaN.
    """
    counts = _counts(len(mos))
    labels = _centred_ranks(mos, counts)
    return np.stack([_correlation(_centred_ranks(values, counts), labels, counts) for values in scores])


def resampled_plcc(mos: np.ndarray, scores: Sequence[np.ndarray]) -> np.ndarray:
    """Compute the PLCC of every score vector on the resamples of `resampled_srocc`.

    The arguments are those of `resampled_srocc`, but the scores must already be mapped by the logistic map
    (docs/METHOD.md §5). The result has the same shape as that of `resampled_srocc`, and is NaN in the same cases.
    """
    counts = _counts(len(mos))
    labels = _centred(mos, counts)
    return np.stack([_correlation(_centred(values, counts), labels, counts) for values in scores])


def _counts(n: int) -> np.ndarray:
    """Return how often each of n images is in each resample, (n, REPLICATES)."""
    draws = np.random.default_rng(SEED).integers(n, size=(n, REPLICATES))
    counts = np.bincount((draws * REPLICATES + np.arange(REPLICATES)).ravel(), minlength=n * REPLICATES)
    return counts.reshape(n, REPLICATES)


def _centred(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the values minus their mean in each resample, (n, R)."""
    if not np.isfinite(values).all():
        return np.full(counts.shape, np.nan)
    values = values - values[0]  # constant values become exactly 0
    return values[:, None] - values @ counts / len(values)


def interval(replicates: np.ndarray) -> tuple[float, float] | None:
    """Return the central 95 % interval of finite replicates, or None if over 5 % of all replicates are not finite."""
    finite = replicates[np.isfinite(replicates)]
    if len(finite) < 0.95 * len(replicates):
        return None
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def _centred_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the rank of each value in each of R resamples, minus the mean rank, (n, R).

    Equal values get the mean of their ranks. `counts` (n, R) states how often each value occurs in each resample.
    """
    if not np.isfinite(values).all():
        return np.full(counts.shape, np.nan)
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)
    tied = np.add.reduceat(counts[order], starts)
    ranks = np.cumsum(tied, axis=0) - (tied - 1) / 2
    place = np.searchsorted(values[order][starts], values)
    return ranks[place] - (len(values) + 1) / 2


def _correlation(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    weighted = counts * a
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((weighted * a).sum(axis=0) * (counts * b * b).sum(axis=0))
        return (weighted * b).sum(axis=0) / spread
