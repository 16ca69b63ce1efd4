from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy import CONFIG, ToyModel, ToySet

import srm_model.training.loop as loop
import srm_model.training.state as state
from srm_model.checkpoint import load_weights, read_card
from srm_model.metrics import LogisticMap, srocc
from srm_model.training import DivergenceError, predict, train
from srm_model.training.optimisation import lr_factor


def fit(folder: Path, model: ToyModel | None = None, **changes: Any) -> list[dict[str, Any]]:
    model = model or ToyModel(changes.pop("config", CONFIG))
    arguments: dict[str, Any] = {"progress": False, "device": "cpu", **changes}
    train_set, val_set = arguments.pop("train_set", ToySet()), arguments.pop("val_set", ToySet(9, seed=1))
    return train(model, train_set, val_set, folder, **arguments)


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "data_share")}
        for row in history
    ]


def test_the_history_and_the_files_of_a_run(tmp_path: Path):
    model = ToyModel()
    history = fit(tmp_path, model, card={"dataset": {"name": "toy"}})
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for row in history:
        assert row["loss"] == pytest.approx(row["loss_mse"] + CONFIG.weight_tau * row["loss_tau"], rel=1e-5)
        assert row["diagnostics"] == {
            "tau": pytest.approx(row["diagnostics"]["tau"]),
            "gate_weights": [0.5, 0.5],
            "nothing": None,
        }
        last_step = lr_factor(5 * row["epoch"] - 1, steps=15, warmup=3)  # 18 images in batches of 4
        assert row["lr"] == pytest.approx({"backbone": 1e-2 * last_step, "neck": 1e-2 * last_step})
    assert history[-1]["loss_mse"] < history[0]["loss_mse"]
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == history
    assert model.calls == ["calibrate 4"] + ["clamp"] * 15
    assert list((tmp_path / "tensorboard").iterdir())
    assert read_card(tmp_path)["card"]["dataset"] == {"name": "toy"}
    assert not list(tmp_path.glob(".*"))


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"tensorboard .*pip install 'srm-iqa\[model\]'"):
        fit(tmp_path)


def test_the_checkpoint_is_the_best_epoch_by_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = iter([0.3, 0.8, 0.8, float("nan"), 0.5])
    monkeypatch.setattr(loop, "srocc", lambda scores, mos: next(figures))
    weights = []
    save = loop.save_state

    def record(folder: Path, model: Any, *rest: Any) -> None:
        weights.append(model.head.weight.detach().clone())
        save(folder, model, *rest)

    monkeypatch.setattr(loop, "save_state", record)
    history = fit(tmp_path, config=CONFIG.replace(epochs=5))
    assert [row["val_srocc"] for row in history] == [0.3, 0.8, 0.8, None, 0.5]
    card = read_card(tmp_path)["card"]
    assert (card["epoch"], card["val"]["srocc"]) == (2, 0.8)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["head.weight"], weights[1])


def test_the_card_s_logistic_map_and_figures_are_the_best_epoch_s(tmp_path: Path):
    val_set = ToySet(30, seed=1)
    fit(tmp_path, val_set=val_set)
    model = ToyModel()
    load_weights(model, tmp_path)
    scores = predict(model, val_set)
    card = read_card(tmp_path)["card"]
    assert card["val"]["srocc"] == pytest.approx(srocc(scores, val_set.mos), abs=1e-9)
    refitted = LogisticMap.fit(scores, val_set.mos)
    np.testing.assert_allclose(LogisticMap.from_dict(card["logistic"])(scores), refitted(scores), atol=1e-5)


def test_same_seed_same_result_and_the_caller_s_random_state_is_untouched(tmp_path: Path):
    model = ToyModel()
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = fit(tmp_path / "a", model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002
    torch.manual_seed(6)
    assert without_times(fit(tmp_path / "b")) == without_times(first)
    assert without_times(fit(tmp_path / "c", config=CONFIG.replace(seed=1))) != without_times(first)


@pytest.mark.parametrize("moment", ["in an epoch", "before the state", "after the state", "in the state"])
def test_a_cut_off_training_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    config = CONFIG.replace(epochs=4)
    whole = fit(tmp_path / "whole", config=config)

    folder, save, publish = tmp_path / "cut", loop.save_state, loop._Run._publish
    with monkeypatch.context() as patch:
        kill = ToyModel(config)
        if moment == "in an epoch":
            kill.clamp_ = _raise_after(13)  # in the third of four epochs
        if moment == "before the state":
            patch.setattr(loop, "save_state", _raise_after(2, save))
        if moment == "after the state":
            patch.setattr(loop._Run, "_publish", _raise_after(3, publish))  # in the last and best epoch
        if moment == "in the state":
            patch.setattr(state, "save_file", _raise_after(2, state.save_file))
        with pytest.raises(KeyboardInterrupt):
            fit(folder, kill, config=config)
    assert not list(folder.glob(".*"))

    other = ToyModel(config)
    with torch.no_grad():
        other.head.weight.fill_(9.0)  # the weights before resuming must have no effect
    resumed = fit(folder, other, config=config)
    assert without_times(resumed) == without_times(whole)
    assert "calibrate 4" not in other.calls
    for name in ("model.safetensors", "state.safetensors"):
        a, b = load_file(tmp_path / "whole" / name), load_file(folder / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert read_card(folder) == read_card(tmp_path / "whole")
    assert len((folder / "history.jsonl").read_text().splitlines()) == 4


def _raise_after(calls: int, then: Any = None) -> Any:
    count = iter(range(calls))

    def call(*arguments: Any, **keywords: Any) -> Any:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return then(*arguments, **keywords) if then else None

    return call


def test_a_finished_training_is_not_repeated(tmp_path: Path):
    history = fit(tmp_path)
    model = ToyModel()
    assert fit(tmp_path, model) == history
    assert model.calls == []


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"config": CONFIG.replace(epochs=5)}, "epochs 3 there, 5 here"),
        ({"train_set": ToySet(20)}, "training set '18 images of 18-0' there, '20 images of 20-0' here"),
        ({"val_set": ToySet(7, seed=1)}, "validation set '9 images of 9-1' there, '7 images of 7-1' here"),
        ({"freeze_backbone": True}, "freeze_backbone False there, True here"),
    ],
)
def test_resuming_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], difference: str):
    fit(tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=difference):
        fit(tmp_path, **changes)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert len(fit(tmp_path, resume=False, **changes)) == changes.get("config", CONFIG).epochs


def test_a_damaged_state_is_a_warning_while_the_one_before_it_is_whole(tmp_path: Path):
    history = fit(tmp_path)
    path, before = tmp_path / "state.safetensors", tmp_path / "state.previous.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.warns(UserWarning, match=r"state\.safetensors: not readable .* from state\.previous\.saf"):
        assert without_times(fit(tmp_path)) == without_times(history)
    assert load_file(path).keys() == load_file(before).keys()
    for damaged in (path, before):
        damaged.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"state\.safetensors: not readable as safetensors"):
        fit(tmp_path)


def test_a_frozen_backbone_keeps_its_weights(tmp_path: Path):
    model = ToyModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(tmp_path, model, freeze_backbone=True)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"tau", "neck.weight", "neck.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("what", ["image", "gradient"])
def test_divergence_names_the_images_of_the_batch(tmp_path: Path, what: str):
    images, model = ToySet(12), ToyModel()
    if what == "image":
        images.images[7] = float("nan")
    else:
        # The loss is finite, but its gradient is not: the derivative of sqrt(x) at 0 is infinite.
        clean = model.forward

        def forward(batch: torch.Tensor, return_losses: bool = False) -> Any:
            scores, losses = clean(batch, True)
            return (scores + (0 * model.tau).sqrt(), losses) if return_losses else scores

        model.forward = forward
    with pytest.raises(
        DivergenceError, match=r"not finite in epoch 1, batch \d of 3: image\d+\.png, image"
    ) as caught:
        fit(tmp_path, model, train_set=images)
    if what == "image":
        assert "image7.png" in str(caught.value)
    assert not (tmp_path / "model.safetensors").exists()


def test_gradients_are_clipped_by_their_global_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def record(self: Any, *arguments: Any, **keywords: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))))
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    fit(tmp_path, config=CONFIG.replace(epochs=1, clip_norm=1e-3))
    assert norms
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)


def test_deterministic_mode_lasts_for_the_training_only(tmp_path: Path):
    seen = []

    class Watching(ToyModel):
        def calibrate(self, images: torch.Tensor) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())

    fit(tmp_path / "on", Watching(CONFIG.replace(epochs=1)))
    fit(tmp_path / "off", Watching(CONFIG.replace(epochs=1, deterministic=False)))
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train_too(tmp_path: Path, precision: str):
    seen = []

    class Watching(ToyModel):
        def forward(self, images: torch.Tensor, return_losses: bool = False) -> Any:
            output = super().forward(images, return_losses)
            seen.append((self.training, (output[0] if return_losses else output).dtype))
            return output

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    history = fit(tmp_path, Watching(CONFIG.replace(precision=precision)))
    assert set(seen) == {(True, dtype), (False, torch.float32)}
    assert history[-1]["loss_mse"] < history[0]["loss_mse"]


def test_every_epoch_draws_its_own_numbers(tmp_path: Path):
    seeds: list[int] = []

    class Watching(ToyModel):
        def clamp_(self) -> None:
            seeds.append(torch.initial_seed())

    fit(tmp_path, Watching())
    assert len(seeds) == 15
    assert len(set(seeds)) == 3


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_cut_off_inside_an_epoch_of_its_own_precision_it_ends_the_same_to_the_bit(
    tmp_path: Path, device: str
):
    config = CONFIG.replace(precision="bf16" if device == "cpu" else "auto")
    options = {"config": config, "device": device, "save_every": 1}
    expected = fit(tmp_path / "whole", **options)
    model = ToyModel(config)
    model.clamp_ = _raise_after(8)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", model, **options)
    assert without_times(fit(tmp_path / "cut", **options)) == without_times(expected)
    whole, cut = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(cut[name], value) for name, value in whole.items())


def test_the_history_says_what_share_of_the_time_was_spent_waiting_for_data(tmp_path: Path):
    class Slow(ToySet):
        def __getitem__(self, index: int) -> Any:
            time.sleep(0.02)
            return super().__getitem__(index)

    fast, slow = (fit(tmp_path / name, train_set=kind(8))[-1] for name, kind in (("f", ToySet), ("s", Slow)))
    assert 0 < fast["data_share"] < slow["data_share"] < 1
    assert slow["data_share"] * slow["seconds"] >= 8 * 0.02


def test_the_data_set_learns_the_epoch_before_it_is_read(tmp_path: Path):
    seen = []

    class Watching(ToySet):
        def __getitem__(self, index: int) -> Any:
            seen.append(self.epoch)
            return super().__getitem__(index)

    fit(tmp_path, train_set=Watching(8))
    assert seen == [0] * 8 + [1] * 8 + [2] * 8


def test_the_config_s_crop_size_reaches_the_training_set_only(tmp_path: Path):
    train_set, val_set = ToySet(), ToySet(seed=1)
    train_set.crop_size = val_set.crop_size = 8  # type: ignore[attr-defined]
    for crop, expected in ((4, 4), (None, 4)):  # None keeps the crop size of the caller
        config = CONFIG.replace(epochs=1, crop_size=crop)
        train(ToyModel(config), train_set, val_set, tmp_path / str(crop), config=config, progress=False)
        assert (train_set.crop_size, val_set.crop_size) == (expected, 8)  # type: ignore[attr-defined]
