from __future__ import annotations

import io
import math
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from srm_model.data.distortions import (
    BLOCK_PSNR,
    BLOCKS,
    BLUR,
    DENOISING,
    DISTORTIONS,
    JPEG_QUALITY,
    LEVEL_PSNR,
    _target,
    psnr,
)
from srm_model.data.labels import metric_labels
from srm_model.data.opinions import CROP
from srm_model.data.photographs import Frame, from_folder, from_packages

KINDS = list(DISTORTIONS)
BLOCKWISE = 15
FIXED = (8, 9, 10)  # the same parameters for every photograph
FALLING = [kind for kind in KINDS if kind != BLOCKWISE]
LADDER = [kind for kind in FALLING if kind not in FIXED]
LEVELS = range(1, 6)
RANDOM = {1, 2, 3, 4, 5, 6, 9, 12, 13, 14, 15, 16, 19, 20, 21, 23, 24}


def distort(image, kind, level, seed=0):
    return DISTORTIONS[kind](image, level, np.random.default_rng([seed, kind, level]))


@pytest.fixture(scope="module")
def photographs():
    chosen = ("astronaut.png", "coffee.png")
    return [photo.pixels for photo in from_packages(Frame(96)) if photo.file in chosen]


@pytest.fixture(scope="module")
def distorted(photographs):
    """Map each (photograph, type) to its distorted images at levels 1 to 5."""
    return {
        (i, kind): [distort(photo, kind, level) for level in LEVELS]
        for i, photo in enumerate(photographs)
        for kind in KINDS
    }


def test_all_types_are_there_in_order():
    assert set(range(1, 25)) == set(KINDS)
    assert sorted(KINDS) == KINDS
    assert len({distortion.name for distortion in DISTORTIONS.values()}) == 24


@pytest.mark.parametrize("kind", LADDER)
def test_levels_are_those_of_the_ladder(photographs, distorted, kind):
    for i, photo in enumerate(photographs):
        images = distorted[i, kind]
        assert all(image.dtype == np.uint8 and image.shape == photo.shape for image in images)
        found = [psnr(photo, image) for image in images]
        assert all(a > b + 0.8 for a, b in pairwise(found)), found
        # Types 12 and 13 damage whole regions and type 22 uses whole palette colours, so their PSNR is less exact.
        # At level 1 of type 22, dithering alone lowers the PSNR by a few dB.
        tolerance = {12: 1.6, 13: 1.6, 14: 0.6, 16: 0.5, 22: 3.5}.get(kind, 0.35)
        if found[-1] <= LEVEL_PSNR[-1] + tolerance:
            assert found == pytest.approx(LEVEL_PSNR, abs=tolerance)
        else:  # the photograph limits the PSNR range; levels are evenly spaced within it
            assert kind == 14
            assert np.diff(found) == pytest.approx(np.diff(found).mean(), abs=0.5)


def test_levels_of_blocks_concentrate_one_error_in_fewer_blocks(photographs, distorted):
    for i, photo in enumerate(photographs):
        side = round(min(photo.shape[:2]) / 12)
        for image, blocks in zip(distorted[i, BLOCKWISE], BLOCKS, strict=True):
            assert psnr(photo, image) == pytest.approx(BLOCK_PSNR, abs=0.35)
            changed = (image != photo).any(-1)
            assert 0.9 * blocks * side**2 <= changed.sum() <= blocks * side**2
            if blocks <= 6:  # with more blocks, the error of each block is smaller and some texture stays
                assert len(np.unique(image[changed], axis=0)) <= blocks
        labels = metric_labels("ssim", distorted[i, BLOCKWISE], photo)
        assert labels == sorted(labels)


def test_blur_and_jpeg_have_the_same_parameters_for_every_photograph(photographs, distorted):
    for i, photo in enumerate(photographs):
        for level in LEVELS:
            stream = io.BytesIO()
            Image.fromarray(photo).save(stream, "JPEG", quality=JPEG_QUALITY[level - 1])
            np.testing.assert_array_equal(distorted[i, 10][level - 1], np.asarray(Image.open(stream)))
            deviation = BLUR[level - 1]
            blurred = ndimage.gaussian_filter(
                photo.astype(np.float32), (deviation, deviation, 0), mode="nearest"
            )
            # not equal: SciPy's default truncates the Gaussian at another radius, and the distorted image is rounded
            assert psnr(blurred, distorted[i, 8][level - 1]) > 45


def test_their_psnr_is_the_levels_on_average_over_the_kodak_photographs(shared):
    photographs = list(from_folder(shared("data/kodak"), Frame(crop=CROP)))
    assert len(photographs) == 24
    # JPEG quality (type 10) is an integer, so the tolerance of this type is larger
    for kind, tolerance in ((8, 0.3), (9, 0.3), (10, 0.5)):
        found = [
            [psnr(photo.pixels, distort(photo.pixels, kind, level)) for level in LEVELS]
            for photo in photographs
        ]
        assert np.mean(found, axis=0) == pytest.approx(LEVEL_PSNR, abs=tolerance)


def test_pale_colours_go_past_grey_to_their_complements(photographs):
    """At level 5, type 18 inverts pale colours, because a change to grey would not lower the PSNR enough."""
    photo = photographs[0].astype(float)
    grey = photo.mean(-1, keepdims=True)
    pale = (grey + 0.4 * (photo - grey)).round().astype(np.uint8)
    colour, changed = (
        x - x.mean(-1, keepdims=True) for x in (pale.astype(float), distort(pale, 18, 5).astype(float))
    )
    assert (colour * changed).mean() < 0


@pytest.mark.parametrize("kind", FALLING)
def test_quality_falls_with_the_level(photographs, distorted, kind):
    """The mean of the default metric over the photographs falls with the level.

    The test uses levels 1, 3 and 5, because type 17 lowers the contrast at these levels and raises it at the others.
    """
    labels = [metric_labels("vsi", distorted[i, kind][::2], photo) for i, photo in enumerate(photographs)]
    first, middle, last = np.mean(labels, axis=0)
    assert 8.95 > first > middle > last > 1
    assert first - last > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_decides_everything(photographs, distorted, kind):
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    again = distort(photographs[0], kind, 3)
    np.testing.assert_array_equal(again, distorted[0, kind][2])
    # if only a sign is random, all eight other seeds have the sign of seed 0 with probability 1/256
    others = (distort(photographs[0], kind, 3, seed=seed) for seed in range(1, 9))
    changed = not all(np.array_equal(again, other) for other in others)
    assert changed == (kind in RANDOM)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_photographs_do_not_break(value):
    flat = np.full((64, 80, 3), value, np.uint8)
    with np.errstate(all="raise"):
        for kind in KINDS:
            image = distort(flat, kind, 3)
            assert image.shape == flat.shape
            assert image.dtype == np.uint8
    for kind in (8, 14, 17, 18, 23):  # these types cannot change a flat photograph
        np.testing.assert_array_equal(distort(flat, kind, 5), flat)


def test_a_grey_photograph_has_no_colour_to_lose(photographs):
    grey = np.repeat(photographs[0][..., :1], 3, -1)
    np.testing.assert_array_equal(distort(grey, 18, 5), grey)


def test_what_each_type_does(photographs, distorted):
    photo = photographs[0].astype(float)

    def change(kind, level=5):
        return distorted[0, kind][level - 1].astype(float) - photo

    def luma(x):
        return x @ [0.299, 0.587, 0.114]

    def roughness(x):
        return np.mean(np.diff(x, axis=1) ** 2) / np.var(x)  # 2 for white noise

    assert luma(change(2)).std() < 0.5 * luma(change(1)).std()
    assert roughness(change(3, 1)) < 1 < 1.9 < roughness(change(1, 1)) < 2.1 < 2.3 < roughness(change(5, 1))
    extremes = distorted[0, 6][4][np.abs(change(6)) > 0]
    assert set(np.unique(extremes)) == {0, 255}
    assert len(np.unique(distorted[0, 7][4])) <= 5
    gradient = np.abs(np.diff(photo, axis=1)).mean()
    assert (
        change(9, 3).std() < DENOISING[2] / 2**0.5
    )  # the remaining noise and the lost texture together have less than half of the noise power
    for kind in (8, 11):
        assert np.abs(np.diff(distorted[0, kind][4].astype(float), axis=1)).mean() < 0.8 * gradient
    assert (
        np.abs(change(12, 3)).max(-1).astype(bool).mean() > 0.9 > np.mean(np.abs(change(12, 3)).max(-1) > 30)
    )
    assert 0.3 > np.mean(np.abs(change(15)).max(-1) > 0) > 0.02
    inner = (photo > 40).all(-1) & (photo < 215).all(-1)
    assert np.ptp(change(16)[inner]) == 0
    assert [np.sign(distorted[0, 17][level].std() - photo.std()) for level in range(5)] == [-1, 1, -1, 1, -1]
    colour = [np.ptp(image.astype(float), axis=-1).mean() for image in (photo, *distorted[0, 18])]
    assert colour == sorted(colour, reverse=True)
    assert np.abs(luma(change(18))).max() < 1.01  # rounding
    dark, bright = luma(photo) < 40, luma(photo) > 150
    assert change(19, 1)[dark].std() < 0.4 * change(19, 1)[bright].std()
    assert len(np.unique(distorted[0, 22][4].reshape(-1, 3), axis=0)) < 16
    assert np.abs(change(23)[..., 1]).max() == 0 < np.abs(change(23)[..., ::2]).max()


def test_rungs_are_spread_over_what_can_be_reached():
    assert [_target(level, math.inf, 10) for level in LEVELS] == [33, 30, 27, 24, 21]
    assert [_target(level, 29, 10) for level in LEVELS] == [29, 27, 25, 23, 21]
    assert [_target(level, math.inf, 25) for level in LEVELS] == [33, 31, 29, 27, 25]
    assert [_target(level, math.inf, 40) for level in LEVELS] == [46, 44.5, 43, 41.5, 40]
    assert _target(1, math.inf, math.inf) == math.inf


@pytest.mark.parametrize("shape", [(63, 80, 3), (80, 80), (80, 80, 4)])
def test_bad_photographs_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected uint8 of shape \(H, W, 3\) with sides of at least 64"):
        distort(np.zeros(shape, np.uint8), 1, 1)


def test_other_bad_input_is_refused(photographs):
    with pytest.raises(ValueError, match="photograph of float64"):
        distort(photographs[0] / 255, 1, 1)
    with pytest.raises(ValueError, match="level 6: expected 1 to 5"):
        distort(photographs[0], 1, 6)
