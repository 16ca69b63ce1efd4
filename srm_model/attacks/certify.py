"""Statistical bounds on scores by median smoothing (Chiang et al., "Detection as Regression", NeurIPS 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srm_model.attacks.guard import as_found, check_images, check_model, scores_of, to_model
from srm_model.attacks.problem import check_count, check_number
from srm_model.attacks.suite import spread
from srm_model.config import SRMConfig
from srm_model.norms import NORMS

_DEFAULTS = SRMConfig()


@dataclass(frozen=True)
class Certificate:
    """Smoothed scores of images, with bounds."""

    eps: float  # L2 radius on an image's 3×H×W tensor
    sigma: float  # standard deviation of the noise, per pixel value
    samples: int  # noisy copies of each image
    confidence: float  # confidence of each image's interval
    median: list[float]  # median of each image's samples
    lower: list[float]  # lower bounds; -inf if the samples are too few
    upper: list[float]  # upper bounds; inf if the samples are too few

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values. `write_json` writes infinite bounds as null."""
        return dict(vars(self))


def smoothed_scores(
    model: nn.Module,
    images: Tensor,
    *,
    sigma: float = _DEFAULTS.smoothing_sigma,
    samples: int = _DEFAULTS.smoothing_samples,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Score noisy copies of each image; return the scores, (samples, B), on the CPU.

    Column i has the scores of image i in ascending order. The noisy copies are clipped to [0, 1]. The bounds
    of `certify` still hold, because the clipping counts as the first operation of the model. Arguments and
    errors are as in `certify`.
    """
    check_model(model)
    check_images(images)
    samples, batch_size = check_count("samples", samples), check_count("batch_size", batch_size)
    sigma = check_number("sigma", sigma)
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma={sigma!r}: expected a positive number")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    columns = []
    with as_found(model, to_model(model, images[:1]), seed=seed), torch.no_grad():
        for image in images:
            scores = []
            for start in range(0, samples, batch_size):
                shape = (min(batch_size, samples - start), *image.shape)
                noise = torch.randn(shape, generator=generator, device=generator.device, dtype=image.dtype)
                noisy = (image + sigma * noise.to(image.device)).clamp_(0, 1)
                scores.append(scores_of(model, to_model(model, noisy)).double().cpu())
            columns.append(torch.cat(scores))
    found = torch.stack(columns, 1)
    broken = int((~found.isfinite()).sum())
    if broken:
        raise ValueError(
            f"{broken} of {found.numel()} scores of noisy images are not finite; expected finite scores"
        )
    return found.sort(0).values


def certify(
    model: nn.Module,
    images: Tensor,
    *,
    eps: float,
    sigma: float = _DEFAULTS.smoothing_sigma,
    samples: int = _DEFAULTS.smoothing_samples,
    confidence: float = _DEFAULTS.smoothing_confidence,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> Certificate:
    """Bound the median-smoothed score of each image x for all perturbations δ with ‖δ‖₂ ≤ eps.

    The median-smoothed score of an image is the median of the scores of its noisy copies. The noise is Gaussian with
    standard deviation σ. For every perturbation δ with ‖δ‖₂ ≤ eps, the median-smoothed score of x + δ lies between two
    quantiles of the scores of noisy copies of x: the Φ(−eps/σ)-quantile and the Φ(eps/σ)-quantile. Φ is the standard
    normal distribution function.

    The quantiles are not known exactly, because only `samples` noisy copies of x are scored. The order statistics of
    these scores give a lower bound of the Φ(−eps/σ)-quantile and an upper bound of the Φ(eps/σ)-quantile. Each of the
    two bounds is wrong with a probability of at most (1 − confidence)/2. The bounds hold for the smoothed model, not
    for the given model.

    Args:
        model: Any module that `pgd` accepts. Its state does not change.
        images: Images (B, 3, H, W) in [0, 1].
        eps: Largest L2 norm of a perturbation δ, over all 3·H·W values of an image.
        sigma: Standard deviation of the Gaussian noise that is added to each of these values.
        samples: Number of noisy copies of each image.
        confidence: Confidence level of the interval [lower bound, upper bound] of each image.
        batch_size: Largest number of copies that run at once.
        generator: Generator of the noise. Default: seed 0.

    Returns:
        For each image x, the median score of its noisy copies, and a lower and an upper bound of the median-smoothed
        score of x + δ for every perturbation δ with ‖δ‖₂ ≤ eps.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or a score is not finite.
    """
    scores = smoothed_scores(
        model, images, sigma=sigma, samples=samples, batch_size=batch_size, generator=generator
    )
    return certificate(scores, eps=eps, sigma=sigma, confidence=confidence)


def certificate(scores: Tensor, *, eps: float, sigma: float, confidence: float) -> Certificate:
    """Compute the bounds for the L2 radius `eps` from the sorted scores (n, B) that `smoothed_scores` returned."""
    eps, sigma = check_number("eps", eps), check_number("sigma", sigma)
    confidence = check_number("confidence", confidence)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps!r}: expected a finite number, zero or more")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}: expected a probability between 0 and 1")
    count = len(scores)
    low, high = order_statistics(count, eps / sigma, confidence)
    infinite = np.full(scores.shape[1], math.inf)
    ordered = scores.numpy()
    return Certificate(
        eps=eps,
        sigma=sigma,
        samples=count,
        confidence=confidence,
        median=np.median(ordered, axis=0).tolist(),
        lower=(-infinite if low is None else ordered[low - 1]).tolist(),
        upper=(infinite if high is None else ordered[high - 1]).tolist(),
    )


def certify_dataset(model: nn.Module, dataset: Any, config: SRMConfig, limit: int) -> list[dict[str, Any]]:
    """Bound the median-smoothed scores of some images of a dataset.

    Args:
        model: Any module that `pgd` accepts. Its state does not change.
        dataset: Dataset whose items are `(image, label)`.
        config: The fields `smoothing_*`, `eps_smoothing`, `attack_batch_size` and `seed` are used. The
            budgets in `eps_smoothing` are L2 budgets, stated for 512×512 pixels.
        limit: Number of images to use, evenly spaced over the dataset.

    Returns:
        A dict for each budget of `config.eps_smoothing`, with the fields of `Certificate` and two further
        entries. "stated" is the budget in the config; `eps` is this budget scaled to the size of the images.
        "ordered" is the share of image pairs whose score intervals do not overlap. The score interval of an
        image is [lower, upper].

    Raises:
        ValueError: A score is not finite.
    """
    indices = spread(len(dataset), limit)
    images = torch.stack([torch.as_tensor(dataset[index][0]) for index in indices])
    scores = smoothed_scores(
        model,
        images,
        sigma=config.smoothing_sigma,
        samples=config.smoothing_samples,
        batch_size=config.attack_batch_size,
        generator=torch.Generator().manual_seed(config.seed),
    )
    found = []
    for stated in config.eps_smoothing:
        entry = certificate(
            scores,
            eps=NORMS["l2"].radius(stated, images[0]),
            sigma=config.smoothing_sigma,
            confidence=config.smoothing_confidence,
        )
        found.append({"stated": stated, **entry.to_dict(), "ordered": _ordered(entry)})
    return found


def _ordered(found: Certificate) -> float:
    """Return the share of image pairs whose score intervals do not overlap."""
    lower, upper = np.array(found.lower), np.array(found.upper)
    apart = (lower[:, None] > upper[None, :]) | (lower[None, :] > upper[:, None])
    pairs = len(lower) * (len(lower) - 1)
    return float(apart.sum() / pairs) if pairs else 0.0


def order_statistics(count: int, shift: float, confidence: float) -> tuple[int | None, int | None]:
    """Choose two of `count` sorted samples as bounds of quantiles; return their positions, counted from 1.

    The sample at the first position is a lower bound of the Φ(−shift)-quantile. The sample at the second position is an
    upper bound of the Φ(shift)-quantile. Φ is the standard normal distribution function. A position is None if no
    sample is a bound with this confidence.

    Let n = `count`. Each of the two bounds may be wrong with a probability of at most α = (1 − confidence)/2.

    A lower bound is wrong if it is above its quantile. The k-th of n sorted samples is above the p-quantile with
    probability at most P(Bin(n, p) ≤ k − 1). The first position is therefore the largest k with
    P(Bin(n, Φ(−shift)) ≤ k − 1) ≤ α.

    An upper bound is wrong if it is below its quantile. The k-th of n sorted samples is below the p-quantile with
    probability at most P(Bin(n, p) ≥ k). The second position is therefore the smallest k with
    P(Bin(n, Φ(shift)) ≥ k) ≤ α.
    """
    from scipy.stats import binom, norm  # imported here because the import takes 0.5 s

    error = (1 - confidence) / 2
    places = np.arange(1, count + 1)
    below = np.flatnonzero(binom.cdf(places - 1, count, norm.cdf(-shift)) <= error)
    above = np.flatnonzero(binom.sf(places - 1, count, norm.cdf(shift)) <= error)
    return (
        int(places[below[-1]]) if len(below) else None,
        int(places[above[0]]) if len(above) else None,
    )
