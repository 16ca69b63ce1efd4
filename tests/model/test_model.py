"""Test the model: scores do not depend on the other images of a batch, gradients reach the pixels, checkpoints load."""

from __future__ import annotations

import pytest
import torch

from srm_model import IQAModel, SRMConfig, build_model

CONFIG = SRMConfig(channels=32, heads=2, rank=4, pool_size=4, image_size=64)


def images(count, seed=0, side=64):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["srm", "quadratic", "none"])
def model(request):
    torch.manual_seed(0)
    made = build_model("test_convnext", neck=request.param, config=CONFIG)
    made.calibrate(images(4, seed=1))
    return made


def test_scores_do_not_depend_on_the_batch_they_come_in(model):
    x = images(5)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(5)])
        padded = model(torch.cat([x, torch.zeros(3, 3, 64, 64)]))[:5]
    assert together.shape == (5,)
    assert len(set(together.tolist())) == 5
    # Matrix products round differently for other batch sizes; the tolerance is 100 eps.
    assert (together - alone).abs().max() <= 100 * torch.finfo(torch.float32).eps
    assert (together - padded).abs().max() <= 100 * torch.finfo(torch.float32).eps


def test_gradient_reaches_the_pixels_of_its_own_image_only(model):
    x = images(3).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[1], x)
    assert gradient[1].abs().max() > 0
    assert not gradient[[0, 2]].any()


def test_losses_on_request(model):
    scores, losses = model(images(2), return_losses=True)
    torch.testing.assert_close(scores, model(images(2)))
    assert set(losses) == {"tau", "entropy", "balance"}
    assert all(loss.shape == () for loss in losses.values())
    again = model.scores_and_losses(images(2))
    assert torch.equal(again[0], scores)
    assert again[1] == losses


def test_normalisation_is_inside(model):
    x = images(2)
    direct = model.head(model.neck(model.backbone((x - 0.5) / 0.5)).fused)
    torch.testing.assert_close(model(x), direct)


def test_same_seed_same_model_and_eval_mode():
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(build_model("test_convnext", config=CONFIG))
    assert isinstance(made[0], IQAModel)
    assert not made[0].training
    assert torch.equal(made[0](images(2)), made[1](images(2)))


def test_bf16_autocast_runs_and_stays_near_fp32(model):
    x = images(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    with torch.no_grad():
        high = model(x)
    assert low.isfinite().all()
    assert (low.float() - high).abs().max() < 0.1


def test_any_size_and_channels_last(model):
    with torch.no_grad():
        assert model(images(1, side=96)).shape == (1,)
        x = images(2)
        other = model(x.to(memory_format=torch.channels_last))
        assert (other - model(x)).abs().max() <= 100 * torch.finfo(torch.float32).eps


def test_unknown_names_are_one_sentence():
    with pytest.raises(ValueError, match="neck='fpn': expected one of 'srm', 'quadratic', 'none'"):
        build_model("test_convnext", neck="fpn", config=CONFIG)
    with pytest.raises(ValueError, match="expected the name of a timm model"):
        build_model("convnext_enormous", config=CONFIG)


def test_weights_by_folder_and_refusals(tmp_path):
    from srm_model.checkpoint import save_model

    torch.manual_seed(0)
    model = build_model("test_convnext", config=CONFIG)
    model.calibrate(images(4, seed=1))
    save_model(model, tmp_path / "m", card={})
    loaded = build_model("test_convnext", weights=tmp_path / "m")
    assert loaded.config == CONFIG
    assert torch.equal(loaded(images(2)), model(images(2)))
    with pytest.raises(ValueError, match="backbone 'test_convnext'; expected 'resnet18'"):
        build_model("resnet18", weights=tmp_path / "m")
    with pytest.raises(ValueError, match="neck 'srm'; expected 'none'"):
        build_model("test_convnext", neck="none", weights=tmp_path / "m")
    with pytest.raises(ValueError, match="config differs from the given config in rank"):
        build_model("test_convnext", weights=tmp_path / "m", config=CONFIG.replace(rank=3))


def test_a_checkpoint_is_evaluated_by_another_backend_than_it_was_trained_with(tmp_path, monkeypatch):
    """A checkpoint trained with the Triton backend on a GPU can be evaluated on a CPU with another backend."""
    from srm_model import load_model
    from srm_model.checkpoint import save_model

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.manual_seed(0)
    model = build_model("test_convnext", config=CONFIG)
    model.calibrate(images(4, seed=1))
    trained = IQAModel("test_convnext", "srm", CONFIG.replace(backend="triton"))
    trained.load_state_dict(model.state_dict())
    save_model(trained, tmp_path, card={})
    with pytest.raises(NotImplementedError, match="'triton' cannot run"):
        load_model(tmp_path)[0](images(2))
    for backend in (None, "reference"):
        wanted = CONFIG.replace(backend=backend)
        for loaded in (
            load_model(tmp_path, backend=backend)[0],
            build_model("test_convnext", weights=tmp_path, config=wanted),
        ):
            assert loaded.config == wanted
            torch.testing.assert_close(loaded(images(2)), model(images(2)))
    with pytest.raises(ValueError, match="backend='gpu': expected"):
        load_model(tmp_path, backend="gpu")


def test_images_it_cannot_take_are_one_sentence(model):
    with pytest.raises(TypeError, match=r"^images is torch.float64 and the model torch.float32; expected"):
        model(images(2).double())
    with pytest.raises(ValueError, match=r"^images is on meta and the model on cpu; expected one device$"):
        model(images(2).to("meta"))
    with pytest.raises(ValueError, match=r"expected sides of at least 32"):
        model(images(2, side=24))
    with pytest.raises(TypeError, match=r"^config is a dict; expected an SRMConfig or None$"):
        build_model("test_convnext", config={"rank": 8})


def test_a_neck_names_the_stage_whose_dtype_is_not_its_own(model):
    if model.neck_name == "none":
        pytest.skip("it has no maps of its own to check")
    pyramid = model.pyramid(images(1))
    with pytest.raises(TypeError, match=r"^stage 2 is torch.float64 and the model torch.float32"):
        model.neck([pyramid[0], pyramid[1].double(), *pyramid[2:]])
