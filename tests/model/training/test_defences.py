"""Test training with defences, and test that an interrupted training ends with the same result as a full one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy import CONFIG, ToyModel, ToySet

import srm_model.training.loop as loop
from srm_model import SRMConfig, build_model
from srm_model.attacks import MSE, Drift, pgd
from srm_model.attacks.guard import derived_seed
from srm_model.training import train
from srm_model.training.defences import Randomness, adversarial, consistency, gradient_norm

DEFENCES = {
    "gradient l1": {"weight_gradient": 0.1},
    "gradient l2": {"weight_gradient": 0.1, "gradient_norm": "l2"},
    "adversarial": {"adversarial_eps": 0.05, "adversarial_steps": 2},
    "adversarial l2": {"adversarial_eps": 10.0, "adversarial_norm": "l2"},
    "both": {"weight_gradient": 0.1, "adversarial_eps": 0.05, "adversarial_steps": 1},
    "consistency": {"weight_consistency": 2.0, "adversarial_eps": 0.05, "adversarial_steps": 1},
    "all": {
        "weight_consistency": 2.0,
        "weight_gradient": 0.1,
        "adversarial_eps": 0.05,
        "adversarial_steps": 1,
    },
}


def fit(folder: Path, config: SRMConfig, **changes: Any) -> list[dict[str, Any]]:
    return train(
        ToyModel(config), ToySet(), ToySet(9, seed=1), folder, progress=False, device="cpu", **changes
    )


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("seconds", "images_per_second", "data_share")
    return [{k: v for k, v in row.items() if k not in times} for row in history]


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.weight).flatten(1).sum(1)


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_of_a_linear_score_the_penalty_is_its_weights_norm(norm: str, order: int):
    model = Linear()
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    randomness = Randomness(torch.device("cpu"))
    config = SRMConfig(gradient_norm=norm)
    penalty = gradient_norm(model, images, model(images), config, randomness)
    expected = torch.linalg.vector_norm(model.weight, order)
    # The penalty is a difference of two sums near 5, divided by 0.01. In fp32, about five digits are exact.
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(penalty, model.weight)
    (exact,) = torch.autograd.grad(expected, model.weight)
    assert torch.allclose(gradient, exact, rtol=1e-3, atol=1e-4)


def test_the_second_pass_repeats_the_first_s_draws_and_moves_no_buffer():
    class Drawing(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ema", torch.zeros(()))
            self.dropout = nn.Dropout(0.5)

        def forward(self, images: Tensor) -> Tensor:
            self.ema = 0.5 * self.ema + images.detach().mean()
            return super().forward(self.dropout(images))

    model = Drawing().train()
    images = torch.rand(2, 3, 4, 4).requires_grad_()
    randomness = Randomness(torch.device("cpu"))
    scores = model(images)
    ema, state = model.ema.clone(), torch.get_rng_state()
    assert torch.equal(randomness.replay(model, images), scores)
    assert torch.equal(model.ema, ema)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", DEFENCES)
def test_a_cut_off_training_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    config = CONFIG.replace(**DEFENCES[name])
    whole = fit(tmp_path / "whole", config)
    assert without_times(whole) != without_times(fit(tmp_path / "plain", CONFIG))
    save, calls = loop.save_state, []

    def stop(*arguments: Any) -> None:
        save(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "cut", config)
    assert without_times(fit(tmp_path / "cut", config)) == without_times(whole)
    for file in ("model.safetensors", "state.safetensors"):
        a, b = load_file(tmp_path / "whole" / file), load_file(tmp_path / "cut" / file)
        assert all(torch.equal(a[key], b[key]) for key in a), file


def test_the_penalty_is_logged_and_flattens_the_score(tmp_path: Path):
    def steepness(folder: Path) -> float:
        model = ToyModel()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        images = ToySet(9, seed=1).images.requires_grad_()
        (gradient,) = torch.autograd.grad(model.eval()(images).sum(), images)
        return float(gradient.abs().flatten(1).sum(1).mean())

    config = CONFIG.replace(weight_gradient=10.0)
    history = fit(tmp_path / "regularised", config)
    for row in history:
        expected = row["loss_mse"] + config.weight_tau * row["loss_tau"] + 10 * row["loss_gradient"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert "loss_gradient" not in fit(tmp_path / "plain", CONFIG)[0]
    assert steepness(tmp_path / "regularised") < 0.5 * steepness(tmp_path / "plain")


def test_adversarial_batches_are_pgd_s_of_their_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    config = CONFIG.replace(adversarial_eps=0.05, adversarial_steps=2, epochs=2)
    seen: list[tuple[Tensor, Tensor]] = []
    seeds: list[tuple[int, ...]] = []
    genuine = loop.adversarial

    def spy(model: Any, images: Tensor, *rest: Any, **options: Any) -> Tensor:
        attacked = genuine(model, images, *rest, **options)
        seen.append((images.clone(), attacked.clone()))
        seeds.append(rest[2:])
        return attacked

    monkeypatch.setattr(loop, "adversarial", spy)
    fit(tmp_path, config)
    # The five numbers are the seed of the config, the epoch, the batch, the rank and the micro-batch.
    assert seeds == [(0, epoch, index, 0, 0) for epoch in range(2) for index in range(5)]
    for images, attacked in seen:
        assert 0.04 < (attacked - images).abs().max() <= 0.05
        assert attacked.is_contiguous(memory_format=torch.channels_last)
    model, (images, _) = ToyModel(config), seen[0]
    mos = torch.zeros(len(images))
    seed = int(np.random.SeedSequence([0, 0, 0]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    expected = pgd(
        model,
        images,
        mos,
        MSE(),
        eps=0.05,
        steps=2,
        restarts=1,
        generator=torch.Generator().manual_seed(seed),
    )
    assert torch.equal(adversarial(model, images, mos, config, 0, 0, 0), expected)
    assert not torch.equal(adversarial(model, images, mos, config, 0, 0, 1), expected)
    far = CONFIG.replace(adversarial_eps=64.0, adversarial_norm="l2")
    moved = (adversarial(model, images, mos, far, 0) - images).flatten(1).norm(dim=1)
    assert (moved <= 64 * 8 / 512).all()  # the budget of 64 is for 512² pixels


def test_the_budget_rises_linearly_during_its_warm_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Check the budget of every step. An epoch has five steps.

    The warm-up is the first epoch: its steps use 1/5, 2/5, …, 5/5 of the budget. The second epoch uses the full budget.
    """
    config = CONFIG.replace(adversarial_eps=0.05, adversarial_steps=2, adversarial_warmup=1, epochs=2)
    largest: list[float] = []
    genuine = loop.adversarial

    def spy(model: Any, images: Tensor, *rest: Any, **options: Any) -> Tensor:
        attacked = genuine(model, images, *rest, **options)
        largest.append(float((attacked - images).abs().max()))
        return attacked

    monkeypatch.setattr(loop, "adversarial", spy)
    fit(tmp_path, config)
    assert largest == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05, *[0.05] * 5], abs=1e-6)


def test_consistency_is_the_squared_change_of_the_score_with_both_gradients():
    model = Linear()
    generator = torch.Generator().manual_seed(1)
    images, change = (
        torch.rand(5, 3, 4, 4, generator=generator),
        0.1 * torch.rand(5, 3, 4, 4, generator=generator),
    )
    term = consistency(model, images + change, model(images), Randomness(torch.device("cpu")))
    expected = (change * model.weight).flatten(1).sum(1).square().mean()  # the score is linear, so x cancels
    # The term is a difference of two sums near 5. In fp32, about five digits are exact.
    assert term.item() == pytest.approx(expected.item(), rel=1e-3)
    (gradient,) = torch.autograd.grad(term, model.weight)
    (exact,) = torch.autograd.grad(expected, model.weight)
    assert torch.allclose(gradient, exact, rtol=1e-3, atol=1e-4)


def test_with_consistency_the_other_losses_use_clean_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Check which images the model scores, the objective of the attack, and the sum of the losses."""
    config = CONFIG.replace(weight_consistency=3.0, adversarial_eps=0.05, adversarial_steps=1, epochs=1)
    genuine, clean, twins = loop.adversarial, [], []

    def spy(model: Any, images: Tensor, mos: Tensor, config: SRMConfig, *seed: int, share: float) -> Tensor:
        found = genuine(model, images, mos, config, *seed, share=share)
        number = torch.Generator().manual_seed(derived_seed(*seed))
        settings = {"eps": 0.05 * share, "steps": 1, "restarts": 1, "generator": number}
        assert torch.equal(found, pgd(model, images, mos, Drift(), **settings))
        clean.append(images.clone())
        twins.append(found.clone())
        return found

    scored: list[Tensor] = []
    attacked: list[Tensor] = []
    forward, term = ToyModel.forward, loop.consistency

    def record(self: ToyModel, images: Tensor, return_losses: bool = False, **options: Any) -> Any:
        if return_losses:
            scored.append(images.clone())
        return forward(self, images, return_losses, **options)

    def compare(model: Any, images: Tensor, *rest: Any) -> Tensor:
        attacked.append(images.clone())
        return term(model, images, *rest)

    monkeypatch.setattr(loop, "adversarial", spy)
    monkeypatch.setattr(loop, "consistency", compare)
    monkeypatch.setattr(ToyModel, "forward", record)
    (row,) = fit(tmp_path, config)
    assert len(clean) == len(attacked) == 5
    assert all(torch.equal(a, b) for a, b in zip(clean, scored[-5:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(twins, attacked, strict=True))
    assert row["loss_consistency"] > 0
    expected = row["loss_mse"] + config.weight_tau * row["loss_tau"] + 3 * row["loss_consistency"]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("neck", ["srm", "quadratic", "none"])
def test_all_defences_work_with_every_neck(neck: str, tmp_path: Path):
    config = SRMConfig(
        channels=16,
        heads=2,
        rank=4,
        pool_size=2,
        image_size=32,
        batch_size=4,
        epochs=1,
        weight_gradient=1e-3,
        adversarial_eps=1 / 255,
        adversarial_steps=1,
        weight_consistency=1.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("test_convnext", neck=neck, config=config)
    images = ToySet(8)
    images.images = images.images.repeat(1, 1, 4, 4)
    (row,) = train(model, images, images, tmp_path, progress=False, device="cpu")
    assert row["loss_gradient"] > 0
    assert row["loss_consistency"] > 0
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    Randomness(torch.device("cpu")).replay(model, images.images[:4])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model(images.images[:4])
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert bool(moved) == (neck != "none")  # buffers can change, so the check above can fail
