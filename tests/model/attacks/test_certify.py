"""Test median smoothing: exact binomial bounds, closed forms for a linear score, and coverage of the interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attack_models import Convolutional, Linear, OfFirstPixel, batch, weight
from scipy.stats import beta, binom, norm
from torch import nn

from srm_model.attacks import Signed, certify, pgd
from srm_model.attacks.certify import certificate, certify_dataset, order_statistics, smoothed_scores
from srm_model.config import SRMConfig


class Unclipped(nn.Module):
    """f(x) = ⟨w, x⟩. The test uses mid-grey images and little noise, so that clipping has almost no effect."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images):
        return (images * self.weight).flatten(1).sum(1)


@pytest.mark.parametrize("count", [50, 1000])
@pytest.mark.parametrize("shift", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("confidence", [0.9, 0.999])
def test_order_statistics_are_clopper_and_pearsons(count, shift, confidence):
    low, high = order_statistics(count, shift, confidence)
    error = (1 - confidence) / 2
    p_low, p_high = norm.cdf(-shift), norm.cdf(shift)
    if low is not None:
        # The binomial tail is at most `error`. For the next order statistic it would exceed `error`.
        assert binom.cdf(low - 1, count, p_low) <= error < binom.cdf(low, count, p_low)
        # Equivalently, the upper Clopper-Pearson limit of `low` − 1 successes is at most `p_low`.
        assert beta.ppf(1 - error, low, count - low + 1) <= p_low
    if high is not None:
        assert binom.sf(high - 1, count, p_high) <= error < binom.sf(high - 2, count, p_high)
        assert beta.ppf(error, high, count - high + 1) >= p_high
    if shift == 0:
        assert low + high == count + 1


def test_too_few_samples_bound_nothing():
    assert order_statistics(10, 3.0, 0.99) == (None, None)
    found = certificate(torch.zeros(10, 2, dtype=torch.float64), eps=3.0, sigma=1.0, confidence=0.99)
    assert (found.lower, found.upper) == ([-math.inf] * 2, [math.inf] * 2)


def test_bounds_are_the_samples_at_those_places():
    samples = torch.arange(1, 501, dtype=torch.float64)[:, None].expand(-1, 3)
    found = certificate(samples, eps=0.3, sigma=1.0, confidence=0.99)
    low, high = order_statistics(500, 0.3, 0.99)
    assert (found.lower, found.upper, found.median) == ([low] * 3, [high] * 3, [250.5] * 3)


def test_a_linear_score_s_interval_is_its_closed_form():
    # f(x + σz) is normal with standard deviation σ‖w‖, so its Φ(±ε/σ) quantiles lie exactly ±ε‖w‖ from the median.
    w, images, sigma, eps = weight(), torch.full((2, 3, 8, 8), 0.5), 0.05, 0.04
    model = Unclipped(w)
    found = certify(model, images, eps=eps, sigma=sigma, samples=4000, confidence=0.99)
    exact = model(images).detach().double()
    reach = eps * float(w.norm())
    low, high = order_statistics(4000, eps / sigma, 0.99)
    for value, lower, upper, median in zip(exact, found.lower, found.upper, found.median, strict=True):
        # The tolerance is five standard errors of the quantile p: sqrt(p(1−p)/n) / density.
        for bound, place, side in ((lower, low, -1), (upper, high, 1)):
            p = place / 4000
            expected = float(value) + sigma * float(w.norm()) * norm.ppf(p)
            error = math.sqrt(p * (1 - p) / 4000) / norm.pdf(norm.ppf(p)) * sigma * float(w.norm())
            assert abs(bound - expected) < 5 * error
            assert side * (bound - float(value)) > reach - 5 * error  # an attacker cannot leave the interval
        assert abs(median - float(value)) < 5 * 1.2533 * sigma * float(w.norm()) / math.sqrt(4000)


def test_no_attack_within_the_budget_takes_the_median_out_of_its_interval():
    model, images = Convolutional().eval(), batch(3)
    eps, sigma = 0.3, 0.25
    found = certify(model, images, eps=eps, sigma=sigma, samples=1000, confidence=0.99)
    for sign in (1, -1):
        attacked = pgd(model, images, [0.0] * 3, Signed(sign), norm="l2", eps=eps, steps=10, restarts=1)
        generator = torch.Generator().manual_seed(9)
        median = (
            smoothed_scores(model, attacked, sigma=sigma, samples=1000, generator=generator).median(0).values
        )
        assert (torch.tensor(found.lower) <= median).all()
        assert (median <= torch.tensor(found.upper)).all()


def test_the_bounds_cover_as_often_as_they_say():
    # The samples are uniform on [0, 1], so that their quantile of order p is p. Here, p is Φ(−0.5) and Φ(0.5).
    rng = np.random.default_rng(0)
    draws = torch.tensor(np.sort(rng.uniform(size=(200, 3000)), axis=0))
    found = certificate(draws, eps=0.5, sigma=1.0, confidence=0.9)
    missed = np.mean((np.array(found.lower) > norm.cdf(-0.5)) | (np.array(found.upper) < norm.cdf(0.5)))
    # At most 10 % of the intervals may miss a quantile, with a tolerance of five standard errors. The bounds are order
    # statistics, which are discrete, so that fewer intervals miss.
    assert 0.05 < missed < 0.1 + 5 * math.sqrt(0.1 * 0.9 / 3000)


def test_images_stay_images_and_seeds_decide():
    seen = []

    class Watching(Linear):
        def forward(self, images):
            seen.append((images.min().item(), images.max().item(), len(images)))
            return super().forward(images)

    first = smoothed_scores(Watching(weight()), batch(2), sigma=1.0, samples=70)
    assert all(low >= 0 and high <= 1 for low, high, _ in seen)
    assert [size for _, _, size in seen] == [32, 32, 6] * 2
    assert torch.equal(first, first.sort(0).values)
    other = smoothed_scores(Watching(weight()), batch(2), sigma=1.0, samples=70, batch_size=70)
    assert torch.allclose(first, other)
    another = smoothed_scores(
        Watching(weight()), batch(2), sigma=1.0, samples=70, generator=torch.Generator().manual_seed(1)
    )
    assert not torch.allclose(first, another)


def test_certificates_of_a_dataset_count_the_pairs_that_do_not_overlap():
    values = [0.2, 0.3, 0.2, 0.7]
    dataset = [(torch.full((3, 8, 8), value), 0.5) for value in values for _ in range(2)]
    settings = {"smoothing_sigma": 0.01, "smoothing_samples": 100, "eps_smoothing": (0.0, 100.0), "seed": 3}
    model = Linear(torch.full((3, 8, 8), 1 / 192))
    narrow, wide = certify_dataset(model, dataset, SRMConfig(**settings), 4)
    images = torch.stack([image for image, _ in dataset[1::2]])
    own = certify(model, images, eps=0.0, sigma=0.01, samples=100, generator=torch.Generator().manual_seed(3))
    # Of the six pairs, only that of the two equal images has overlapping intervals at eps 0.
    assert narrow == {"stated": 0.0, **own.to_dict(), "ordered": 5 / 6}
    # A budget is stated for 512² pixels. The budget of 100 is so large that 100 samples give no finite bound.
    assert (wide["stated"], wide["eps"], wide["ordered"]) == (100.0, 100 * 8 / 512, 0.0)
    (alone,) = certify_dataset(model, dataset, SRMConfig(**settings | {"eps_smoothing": (0.0,)}), 1)
    assert alone["ordered"] == 0.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eps": -1}, "eps=-1"),
        ({"sigma": 0.0}, r"sigma=0\.0: expected a positive number"),
        ({"samples": 0}, "samples=0"),
        ({"confidence": 1.0}, r"confidence=1\.0"),
        ({"model": OfFirstPixel(lambda p: p / 0)}, "20 of 20 scores of noisy images are not finite"),
    ],
)
def test_bad_input_is_one_sentence(changes, words):
    arguments = {"model": Linear(weight()), "eps": 0.1, "samples": 5, **changes}
    with pytest.raises(ValueError, match=words):
        certify(arguments.pop("model"), batch(4), **arguments)
