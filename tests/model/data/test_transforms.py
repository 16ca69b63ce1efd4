from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from srm_model.data import load_image
from srm_model.data.transforms import LONGEST, centre_crop, load_resized, random_crop_and_flip, to_tensor


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (64, 64), (21, 13), (200, 50)])
@pytest.mark.parametrize("size", [64, 32])
def test_the_shorter_side_is_brought_to_the_size(tmp_path, width, height, size):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    resized = load_resized(path, size)
    assert min(resized.shape[:2]) == size
    assert resized.shape[0] / resized.shape[1] == pytest.approx(height / width, rel=1 / size)
    assert load_image(path, size).shape == (3, size, size)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("long", "short", "size"), [(1203, 3, 8), (2000, 40, 16), (700, 8, 8), (1001, 9, 16)]
)
def test_of_a_long_image_the_middle_is_resized(tmp_path, photograph, long, short, size, turned):
    """Only the middle of a long image is resized.

    The centre crop of the result differs by at most one of 255 levels from the centre crop of the whole resized image.
    The difference comes from the rounding of the coefficients of the filter.
    """
    pixels = np.resize(photograph(96), (short, long, 3))
    image = Image.fromarray(pixels.transpose(1, 0, 2) if turned else pixels)
    image.save(tmp_path / "a.png")
    sides = [round(side * size / short) for side in image.size]
    whole = np.asarray(image.resize(sides, Image.Resampling.BICUBIC))
    found = load_resized(tmp_path / "a.png", size)
    assert found.shape == ((LONGEST * size, size, 3) if turned else (size, LONGEST * size, 3))
    difference = centre_crop(found, size).astype(int) - centre_crop(whole, size)
    assert abs(difference).max() <= 1
    kept = np.asarray(load_image(tmp_path / "a.png", size) * 255).round().transpose(1, 2, 0)
    np.testing.assert_array_equal(kept, centre_crop(found, size))


@pytest.mark.parametrize("shape", [(30_000, 1), (1, 30_000)])
def test_memory_is_bounded_by_the_crop(tmp_path, shape):
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 512).shape == (3, 512, 512)
    assert load_resized(tmp_path / "a.png", 512).nbytes == 512 * 512 * 3 * LONGEST


@pytest.mark.parametrize(("width", "height"), [(96, 64), (96, 37), (95, 6), (64, 96), (21, 13)])
def test_other_images_are_resized_whole_to_the_bit(tmp_path, photograph, width, height):
    image = Image.fromarray(np.ascontiguousarray(photograph(96)[:height, :width]))
    image.save(tmp_path / "a.png")
    sides = [round(side * 32 / min(image.size)) for side in image.size]
    expected = np.asarray(image.resize(sides, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(load_resized(tmp_path / "a.png", 32), expected)


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255  # every second column is white; a smaller image can only show the mean
    path = tmp_path / "a.png"
    Image.fromarray(stripes).save(path)
    inner = load_resized(path, 32)[:, 2:-2]
    assert abs(inner.astype(int) - 127.5).max() < 8


def test_an_image_of_the_right_size_is_untouched(tmp_path, photograph):
    path = tmp_path / "a.png"
    Image.fromarray(photograph(64)).save(path)
    expected = torch.from_numpy(photograph(64)).permute(2, 0, 1) / 255
    torch.testing.assert_close(load_image(path, 64), expected, rtol=0, atol=0)


def test_centre_crop():
    pixels = np.arange(5 * 8 * 3, dtype=np.uint8).reshape(5, 8, 3)
    np.testing.assert_array_equal(centre_crop(pixels, 4), pixels[0:4, 2:6])


def test_random_crops_reach_every_place_and_half_are_mirrored():
    pixels = np.zeros((4, 7, 3), np.uint8)
    pixels[..., 0] = np.arange(7)
    rng = np.random.default_rng(0)
    crops = [random_crop_and_flip(pixels, 4, rng)[0, :, 0] for _ in range(2000)]
    assert {int(crop.min()) for crop in crops} == {0, 1, 2, 3}
    mirrored = np.mean([crop[0] > crop[-1] for crop in crops])
    assert mirrored == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)  # four standard errors


def test_to_tensor():
    tensor = to_tensor(np.array([[[0, 51, 255]]], np.uint8))
    assert tensor.dtype == torch.float32
    assert tensor.flatten().tolist() == pytest.approx([0, 0.2, 1])
