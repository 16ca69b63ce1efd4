"""Test the mean over crops, and which checkpoints `srm-iqa score` uses it for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from srm_model import SRMConfig, build_model
from srm_model.checkpoint import save_model
from srm_model.cli import main
from srm_model.crops import CropMean, at_full_resolution
from srm_model.data import load_image, load_whole

SIDE = 32


class Brightness(nn.Module):
    """The mean of all pixels; refuses images of another size than SIDE×SIDE."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, SIDE, SIDE)
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("shape", [(32, 32), (33, 32), (50, 90), (64, 96), (32, 95)])
def test_every_pixel_counts_in_as_many_crops_as_contain_it(shape: tuple[int, int]):
    """By the gradient of the mean brightness, which is the number of crops with the pixel, up to a constant."""
    images = torch.rand(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    CropMean(Brightness(), SIDE)(images).sum().backward()
    crops, found = 1, []
    for side in shape:
        count = -(-side // SIDE)
        crops *= count
        along = np.zeros(side)
        for number in range(count):
            start = round((side - SIDE) * number / max(1, count - 1))
            along[start : start + SIDE] += 1
        assert along.min() >= 1
        found.append(along)
    expected = np.outer(*found) / (crops * 3 * SIDE * SIDE)
    assert images.grad is not None
    np.testing.assert_allclose(images.grad, np.broadcast_to(expected, images.shape), rtol=1e-12)


def test_an_image_of_the_size_of_a_crop_has_the_score_of_the_model():
    images = torch.rand(3, 3, SIDE, SIDE)
    assert torch.equal(CropMean(Brightness(), SIDE)(images), Brightness()(images))


def test_a_short_side_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 31, 40\); expected sides of at least 32 pixels"):
        CropMean(Brightness(), SIDE)(torch.rand(1, 3, 31, 40))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((32, 32), (32, 32)),
        ((96, 50), (96, 50)),  # the longer side is three crops
        ((33, 70), (33, 70)),
        ((16, 20), (32, 40)),  # enlarged
        ((192, 128), (96, 64)),  # shrunk
        ((100, 32), (96, 32)),  # cannot be shrunk, so cropped
        ((640, 64), (96, 32)),  # shrunk and cropped
        ((8, 64), (32, 96)),  # enlarged and cropped
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_sides_of_a_whole_image(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int], turned: bool
):
    size, expected = (size[::-1], expected[::-1]) if turned else (size, expected)
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert load_whole(tmp_path / "a.png", SIDE).shape == (3, *expected[::-1])


def test_pixels_of_a_whole_image_stay(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(256, size=(40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    kept = load_whole(tmp_path / "a.png", SIDE).mul(255).round().numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(kept, pixels)
    long = np.random.default_rng(0).integers(256, size=(32, 101, 3), dtype=np.uint8)
    Image.fromarray(long).save(tmp_path / "b.png")
    kept = load_whole(tmp_path / "b.png", SIDE).mul(255).round().numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(kept, long[:, 2:98])


@pytest.mark.parametrize("resized", [False, True, None])
def test_score_uses_crops_only_if_no_training_image_was_resized(
    tmp_path: Path, resized: bool | None, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    config = SRMConfig(channels=16, heads=2, image_size=SIDE)
    model = build_model("test_convnext", neck="none", config=config)
    card = {} if resized is None else {"dataset": {"resized": resized}}
    save_model(model, tmp_path / "model", card=card)
    paths = [str(tmp_path / f"{name}.png") for name in "abc"]
    for path, size in zip(paths, ((70, 40), (32, 32), (40, 70)), strict=True):
        pixels = np.random.default_rng(1).integers(256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    assert at_full_resolution(card) is (resized is False)
    assert main(["score", str(tmp_path / "model"), *paths, "--json", "--device", "cpu"]) == 0
    found = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    with torch.no_grad():
        crops = [float(CropMean(model, SIDE)(load_whole(path, SIDE)[None])) for path in paths]
        whole = [float(model(load_image(path, SIDE)[None])) for path in paths]
    assert abs(crops[0] - whole[0]) > 1e-3, "the two ways differ on this image"
    np.testing.assert_allclose(found, crops if resized is False else whole, rtol=1e-5)


def test_a_map_covers_the_whole_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = SRMConfig(channels=16, heads=2, image_size=SIDE)
    model = build_model("test_convnext", neck="none", config=config)
    save_model(model, tmp_path / "model", card={"dataset": {"resized": False}})
    Image.new("RGB", (70, 40), "red").save(tmp_path / "a.png")
    drawn: dict[str, Any] = {}

    def draw(path: Path, pixels: np.ndarray, change: np.ndarray, **_: Any) -> None:
        drawn.update(pixels=pixels.shape, change=change.shape)

    monkeypatch.setattr("srm_model.cli.maps.draw_map", draw)
    arguments = [str(tmp_path / "model"), str(tmp_path / "a.png"), "--map", str(tmp_path / "map.png")]
    assert main(["score", *arguments, "--no-progress", "--device", "cpu"]) == 0
    assert drawn == {"pixels": (40, 70, 3), "change": (40, 70)}
