"""A statistical bound for scalar scores: median smoothing (Chiang et al., 2020, "Detection as Regression")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srm_model.attacks.guard import as_found, check_images, check_model, scores_of, to_model
from srm_model.attacks.problem import check_count, check_number
from srm_model.config import SRMConfig

_DEFAULTS = SRMConfig()


@dataclass(frozen=True)
class Certificate:
    """What the smoothed score of each image is, and the interval it cannot leave."""

    eps: float  # the L2 radius on the whole 3×H×W tensor
    sigma: float
    samples: int
    confidence: float
    median: list[float]  # of the samples
    lower: list[float]  # -inf where the samples are too few to bound it
    upper: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; bounds that are infinite are written as null by `write_json`."""
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
    """Scores of `samples` noisy copies of each image, sorted: (samples, B), on the CPU.

    The function that is smoothed is f(clip(z)) with z Gaussian about the image, standard deviation `sigma` per pixel
    value: clipping to [0, 1] is part of it, so that the model sees images. `batch_size` copies run at once. The model
    is left as found; a generator of None is seed 0.
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
            f"{broken} of {found.numel()} scores of noisy images are not finite: nothing to bound"
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
    """Per image, an interval that the median-smoothed score cannot leave within ‖δ‖₂ ≤ eps.

    images: (B, 3, H, W) float32 in [0, 1]. eps: the actual radius on the whole image tensor.

    For any measurable score the quantiles of its smoothed distribution move at most from p to Φ(Φ⁻¹(p) ± eps/σ). So the
    median at x + δ lies between the quantiles Φ(−eps/σ) and Φ(eps/σ) at x, and order statistics of the samples bound
    those two, each with error (1 − confidence)/2. The confidence is each image's own, over the drawn noise. The bound
    is on the smoothed score, which is another model than the one given: nothing is said of f(x) itself.
    """
    scores = smoothed_scores(
        model, images, sigma=sigma, samples=samples, batch_size=batch_size, generator=generator
    )
    return certificate(scores, eps=eps, sigma=sigma, confidence=confidence)


def certificate(scores: Tensor, *, eps: float, sigma: float, confidence: float) -> Certificate:
    """The intervals for one budget from sorted samples (n, B), as `smoothed_scores` returns them."""
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


def order_statistics(count: int, shift: float, confidence: float) -> tuple[int | None, int | None]:
    """Which of `count` sorted samples (from 1) bound the quantiles Φ(−shift) and Φ(shift); None where none does.

    The k-th is above the p-quantile with probability P(Bin(n, p) ≤ k − 1) at most, and below it with P(Bin(n, p) ≥ k)
    at most: the lower bound is the largest k, the upper one the smallest, at which that is (1 − confidence)/2 or less.
    """
    from scipy.stats import binom, norm  # half a second to import, and only needed here

    error = (1 - confidence) / 2
    places = np.arange(1, count + 1)
    below = np.flatnonzero(binom.cdf(places - 1, count, norm.cdf(-shift)) <= error)
    above = np.flatnonzero(binom.sf(places - 1, count, norm.cdf(shift)) <= error)
    return (
        int(places[below[-1]]) if len(below) else None,
        int(places[above[0]]) if len(above) else None,
    )
