"""Test `srm-iqa score --map`: the map shows where an image is damaged; its picture is written to the given path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from srm_model import load_model
from srm_model.cli import main
from srm_model.quality_map import PARTS, SHARE, WINDOWS, quality_map
from srm_model.reports.maps import draw_map

SIDE = 64


class Contrast(nn.Module):
    """A model whose score is the local contrast: the mean absolute difference of horizontally adjacent pixels.

    With `corner`, the model scores only the upper left quarter of an image.
    """

    def __init__(self, corner: bool = False) -> None:
        super().__init__()
        self.corner, self.sizes = corner, list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if self.corner:
            images = images[..., : images.shape[-2] // 2, : images.shape[-1] // 2]
        return images.diff(dim=-1).abs().mean((1, 2, 3))


class Calm(Contrast):
    """The opposite of `Contrast`: noise lowers the score."""

    def forward(self, images: Tensor) -> Tensor:
        return 1 - super().forward(images)


def textured(seed: int = 0) -> Tensor:
    return torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def damaged(flat: bool) -> tuple[Tensor, np.ndarray]:
    """Return an image with one damaged part, and the mask of this part.

    With `flat`, the image is noise and the part is grey. Otherwise, the image is grey and the part is noise.
    """
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[36:60, 4:28] = True
    grey = torch.full((3, SIDE, SIDE), 0.5)
    return torch.where(inside, *((grey, textured()) if flat else (textured(), grey))), inside.numpy()


@pytest.mark.parametrize(("model", "flat"), [(Contrast(), True), (Calm(), False)], ids=["blur", "noise"])
def test_the_map_points_to_the_damage(model: nn.Module, flat: bool):
    image, inside = damaged(flat)
    found = quality_map(model, image)
    assert found.change.shape == (SIDE, SIDE)
    assert inside[np.unravel_index(found.change.argmax(), inside.shape)]
    assert found.change[inside].mean() > 0
    # Windows outside the damage are sometimes replaced by damaged parts, which lower the score.
    assert found.change[~inside].mean() < 0
    assert found.score == pytest.approx(float(model(image[None])))


def test_the_checkpoint_of_the_package_does_not_see_a_blurred_square(shared: Callable[[str], Path]):
    """Repeat the example in docs/RECIPES.md. A change of −1 % of the score or less is blue (`draw_map`)."""
    photograph = Image.open(shared("data/kodak") / "3.png").convert("RGB")
    model, _ = load_model()
    size = model.config.image_size
    left, top = (photograph.width - size) // 2, (photograph.height - size) // 2
    image = photograph.crop((left, top, left + size, top + size))
    start, end = size // 8, size // 8 + size // 3
    box = (start, start, end, end)
    image.paste(image.filter(ImageFilter.GaussianBlur(6)).crop(box), box[:2])
    pixels = np.asarray(image, np.float32) / 255
    found = quality_map(model, torch.from_numpy(pixels).permute(2, 0, 1))
    assert found.change[start:end, start:end].max() < -0.01 * found.score


def test_places_that_the_model_does_not_see_do_not_change_the_score():
    image = torch.full((3, SIDE, SIDE), 0.5)
    image[:, :, SIDE // 2 :] = textured()[:, :, SIDE // 2 :]
    change = quality_map(Contrast(corner=True), image).change
    reach = SIDE // 2 + SIDE // SHARE  # end of the last window that overlaps the corner
    assert change[: SIDE // 4, : SIDE // 4].min() > 0
    assert not change[reach:].any()
    assert not change[:, reach:].any()


def test_batches_do_not_change_the_map_and_have_the_given_size():
    image, _ = damaged(True)
    maps = []
    for size in (1, 8, 5):
        model = Contrast().train()
        maps.append(quality_map(model, image, batch_size=size).change)
        assert max(model.sizes) == size
        assert sum(model.sizes) == WINDOWS**2 * PARTS + 1
        assert model.training
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-6)
    np.testing.assert_allclose(maps[0], maps[2], atol=1e-6)
    assert np.array_equal(maps[1], quality_map(Contrast(), image, batch_size=8).change)


def test_a_wrong_image_and_a_score_that_is_no_number_are_sentences():
    with pytest.raises(ValueError, match=r"image has shape \(3, 2, 64\); expected \(3, H, W\) with sides"):
        quality_map(Contrast(), torch.zeros(3, 2, 64))
    with pytest.raises(ValueError, match="not all finite"):
        quality_map(Contrast(), torch.full((3, 64, 64), float("nan")))


def test_the_picture_is_the_same_each_time_and_shows_both_parts(tmp_path: Path):
    image, _ = damaged(True)
    change = quality_map(Contrast(), image).change
    about = {"score": 0.25, "caption": "Gradient-free occlusion", "model": "toy"}
    for name in ("a.png", "b.png"):
        draw_map(tmp_path / name, image.permute(1, 2, 0).numpy(), change, **about)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"], "no temporary file stays"
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    # The map is the right half of the picture. The damage is in the lower left of the map.
    reddish = (pixels[..., 0] - pixels[..., 2])[:, pixels.shape[1] // 2 : pixels.shape[1] * 7 // 8]
    height = len(reddish)
    assert reddish[height // 2 : height * 7 // 8].max() > 60 > reddish[height // 8 : height * 3 // 8].max()


def test_changes_far_below_the_score_have_no_strong_colour(tmp_path: Path):
    """Changes of 2 % of the score are red; changes of 0.02 % are not, though they are the largest of their map."""
    redness = []
    for size in (0.005, 0.00005):
        change = np.zeros((SIDE, SIDE))
        change[: SIDE // 2] = size
        draw_map(
            tmp_path / "map.png", np.full((SIDE, SIDE, 3), 0.5), change, score=0.25, caption="", model="toy"
        )
        pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
        shown = (pixels[..., 0] - pixels[..., 2])[:, pixels.shape[1] // 2 : pixels.shape[1] * 7 // 8]
        redness.append(shown.max())
    assert redness[0] > 40
    assert redness[1] < 15


def test_red_marks_lost_quality_also_if_low_scores_are_good(tmp_path: Path):
    """A falling score is red if low scores mean high quality, and blue otherwise."""
    grey, change = np.full((SIDE, SIDE, 3), 0.5), np.full((SIDE, SIDE), -0.1)
    reddest = []
    for lower in (True, False):
        about = {"score": 0.25, "caption": "", "model": "toy", "lower_is_better": lower}
        draw_map(tmp_path / "map.png", grey, change, **about)
        pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
        shown = (pixels[..., 0] - pixels[..., 2])[:, pixels.shape[1] // 2 : pixels.shape[1] * 3 // 4]
        reddest.append(shown[len(shown) // 2].mean())
    assert reddest[0] > 20 > -20 > reddest[1]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    image, _ = damaged(True)
    path = tmp_path / "photos" / "one.png"
    path.parent.mkdir()
    Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs `srm-iqa score` with a model that scores local contrast."""
    (tmp_path / "contrast_model.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.diff(dim=-1).abs().mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--model", "contrast_model:Model", "--size", "32", "--device", "cpu", "--batch-size", "64"]
    return lambda *names: main(["score", *map(str, names), *options])


def test_maps_of_one_image_and_of_several(photo: Path, tmp_path: Path, score, capsys):
    assert score(photo, "--map", tmp_path / "map.png") == 0
    assert Image.open(tmp_path / "map.png").format == "PNG"
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "one.png"
    other.write_bytes(photo.read_bytes())
    capsys.readouterr()
    assert score(photo, other, "--json", "--map", tmp_path / "maps") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["map"]).name for row in rows] == ["one.png.map.png", "one.png-2.map.png"]
    assert all(Path(row["map"]).is_file() for row in rows)
    assert {row["model"] for row in rows} == {"contrast_model:Model"}


def test_wrong_uses_of_map_are_one_sentence(photo: Path, tmp_path: Path, score, capsys):
    before = photo.read_bytes()
    (tmp_path / "file").write_text("no folder")
    for names, sentence in (
        ((photo, photo, "--map", tmp_path / "map.png"), "map.png: expected a folder, because several images"),
        ((photo, "--map", tmp_path / "map.jpg"), "map.jpg: expected a name that ends in .png, or a folder"),
        ((photo, photo, "--map", tmp_path / "file"), "file is a file; expected a folder"),
        ((photo, "--map", photo), "one.png: is the image itself; expected another name"),
    ):
        assert score(*names) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("scoring with")]
        assert len(said) == 1
        assert sentence in said[0]
    assert photo.read_bytes() == before
