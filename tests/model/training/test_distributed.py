"""Test that a training gives the same result if batches are split into micro-batches or across processes."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from toy import ToyModel, ToySet

from srm_model import SRMConfig, build_model, ranks
from srm_model.statistics import BatchStatistics
from srm_model.training import Preempted, predict, train
from srm_model.training.batches import deal, epoch_batches
from srm_model.training.state import read_state

pytestmark = pytest.mark.forks

# Each of the two epochs has batches of 8, 8 and 5 images, so that slices of unequal sizes occur.
CONFIG = SRMConfig(
    channels=16,
    heads=2,
    rank=4,
    pool_size=2,
    image_size=32,
    batch_size=8,
    epochs=2,
    lr_backbone=1e-3,
    lr_neck=1e-2,
    weight_balance=1.0,
    gain_cap=0.9,
    weights_ema=0.9,
)
BUFFERS = ("sigma", "median_rms")


class Images(ToySet):
    def __init__(self, count: int = 21, seed: int = 0) -> None:
        super().__init__(count, seed)
        grown = self.images.repeat_interleave(4, 2).repeat_interleave(4, 3)
        noise = torch.rand(grown.shape, generator=torch.Generator().manual_seed(seed))
        self.images = (0.7 * grown + 0.3 * noise).clamp(0, 1)


def model(config: SRMConfig = CONFIG, neck: str = "srm") -> Any:
    torch.manual_seed(0)
    made = build_model("test_convnext", neck=neck, config=config).double()
    with torch.no_grad():
        for readout in (
            made.neck.gate.readouts if neck == "srm" else ()
        ):  # a uniform gate would have a balance loss of 0
            readout.weight.normal_(std=3.0)
    return made


def fit(folder: Path, config: SRMConfig = CONFIG, neck: str = "srm", **options: Any) -> list[dict[str, Any]]:
    return train(
        model(config, neck),
        Images(),
        Images(7, seed=1),
        folder,
        config=config,
        progress=False,
        device="cpu",
        **options,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in one process without gradient accumulation."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder)
    return folder


def check_equal(one: Path, other: Path) -> None:
    """Check that the histories and states of two trainings agree up to the rounding of scores to fp32.

    Model and optimiser are fp64, so another order of summation changes a sum by a relative error of only about 1e-16.
    But before the squared error is computed, scores are rounded to fp32, with a relative error of at most 6e-8. If the
    scores of an image differ slightly between the two trainings, they can be rounded in different directions. The
    gradients of a step can then have a relative difference of about 6e-8 too. These differences add up over six steps,
    so the tolerance is 1e-6.
    """
    histories = [
        [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        for folder in (one, other)
    ]
    for a, b in zip(*histories, strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "loss_mse", "loss_tau", "loss_entropy", "loss_balance", "gain_active"):
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-6), key
        assert a["val_srocc"] == b["val_srocc"]
        assert a["val_plcc"] == pytest.approx(b["val_plcc"], abs=1e-6)
    first, second = (load_file(folder / "state.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert any("average" in name for name in first)
    for name, value in first.items():
        if value.is_floating_point():
            torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_accumulation_is_the_same_training(whole: Path, tmp_path: Path):
    fit(tmp_path, CONFIG.replace(accumulate=3))
    check_equal(whole, tmp_path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_are_the_same_training(
    whole: Path, tmp_path: Path, accumulate: int, capfd: pytest.CaptureFixture[str]
):
    config = CONFIG.replace(accumulate=accumulate)
    on_ranks(2, fit, tmp_path / "two", config)
    check_equal(whole, tmp_path / "two")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert "find_unused_parameters" not in capfd.readouterr().err


def test_statistics_move_on_and_losses_act(whole: Path):
    """Check that `check_equal` compares values that matter: buffers change during training, and losses are not zero."""
    start, end = model().state_dict(), load_file(whole / "state.safetensors")
    for name, value in start.items():
        if name.endswith(BUFFERS):
            assert not torch.equal(value, end[f"model.{name}"]), name
    rows = [json.loads(line) for line in (whole / "history.jsonl").read_text().splitlines()]
    assert all(row["loss_balance"] > 1e-3 and row["loss_tau"] > 0 for row in rows)
    assert 0 < rows[0]["gain_active"] < 1


def test_a_cut_off_training_goes_on_with_another_number_of_processes(whole: Path, tmp_path: Path):
    def cut(folder: Path) -> None:
        made = model()
        clamp, calls = made.clamp_, iter(range(4))

        def clamp_() -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            clamp()

        made.clamp_ = clamp_
        with pytest.raises(KeyboardInterrupt):
            train(
                made,
                Images(),
                Images(7, seed=1),
                folder,
                config=CONFIG,
                progress=False,
                device="cpu",
                save_every=1,
            )

    on_ranks(2, cut, tmp_path)
    fit(tmp_path)
    check_equal(whole, tmp_path)


def test_a_model_without_a_neck_is_dealt_as_well(tmp_path: Path):
    config = CONFIG.replace(epochs=1)
    fit(tmp_path / "one", config, neck="none")
    on_ranks(2, partial(fit, neck="none"), tmp_path / "two", config.replace(accumulate=2))
    check_equal(tmp_path / "one", tmp_path / "two")


def test_parameters_that_reach_no_score_do_not_stop_several_processes(tmp_path: Path):
    config = CONFIG.replace(fused_stages=(1, 2), epochs=1)  # the link into stage 3 has no effect on scores
    fit(tmp_path / "one", config)
    on_ranks(2, fit, tmp_path / "two", config)
    check_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("what", ["sigterm", "vanished"])
def test_what_meets_one_process_stops_all_at_one_step(tmp_path: Path, what: str):
    class Trouble(ToySet):
        def __getitem__(self, index: int) -> Any:
            if index == 11 and not (tmp_path / "mended").exists():
                if what == "vanished":
                    raise ValueError("image11.png: no such image")
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    def on_rank() -> None:
        with pytest.raises(Preempted if what == "sigterm" else ValueError) as caught:
            train_toy(Trouble())
        (tmp_path / f"{ranks.place()[0]}").write_text(str(caught.value))

    def train_toy(images: ToySet) -> None:
        train(ToyModel(), images, ToySet(9, seed=1), tmp_path / "run", progress=False, device="cpu")

    on_ranks(2, on_rank)
    said = {(tmp_path / str(rank)).read_text() for rank in range(2)}
    stored = read_state(tmp_path / "run")
    assert stored is not None
    step = stored.values["progress"]["step"]
    assert said == {f"epoch 1, step {step} of 5" if what == "sigterm" else "image11.png: no such image"}
    (tmp_path / "mended").touch()
    on_ranks(2, train_toy, Trouble())
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 3


def test_a_plain_loop_under_ddp_gets_the_whole_batch_too(tmp_path: Path):
    """Check that statistics, losses and averaged gradients on two ranks equal those of one process."""
    images, mos = Images(6).images, torch.linspace(0, 1, 6).double()

    def step(rank: int, world: int) -> dict[str, torch.Tensor]:
        made = model().train()
        with torch.no_grad():
            made.neck.median_rms.fill_(0.5)
        wrapped = DistributedDataParallel(made, find_unused_parameters=True) if world > 1 else made
        share = slice(3 * rank, 3 * rank + 3) if world > 1 else slice(None)
        scores, losses = wrapped(images[share], return_losses=True)
        loss = (scores - mos[share]).square().mean() + losses["tau"] + losses["entropy"] + losses["balance"]
        loss.backward()
        gradients = {f"grad.{n}": p.grad for n, p in made.named_parameters() if p.grad is not None}
        found = {name: value.detach() for name, value in losses.items()}
        return {**gradients, **dict(made.named_buffers()), **found}

    def on_rank() -> None:
        torch.save(step(*ranks.place()), tmp_path / f"{ranks.place()[0]}.pt")

    on_ranks(2, on_rank)
    expected = step(0, 1)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # The order of summation in fp64 differs. The derivative of attention amplifies the rounding errors.
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_scores_are_one_process_s_to_the_bit(tmp_path: Path):
    def score() -> None:
        found = predict(model().float(), Images(11), batch_size=4)
        torch.save(torch.from_numpy(found), tmp_path / f"{ranks.place()[0]}.pt")

    on_ranks(2, score)
    expected = predict(model().float(), Images(11), batch_size=4)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), torch.from_numpy(expected))


def test_moments_of_parts_combine_to_the_whole_s_whatever_their_sizes_and_means():
    y = torch.randn(7, 2, 5, 3, dtype=torch.float64) + 1e3 * torch.arange(7.0)[:, None, None, None]
    whole, cut = BatchStatistics(), BatchStatistics()
    for statistics, parts in ((whole, [y]), (cut, [y[:1], y[1:5], y[5:]])):
        for part in parts:
            statistics.add_link("4to1", part, backend=None)
            statistics.add_gate(torch.full((len(part), 3), 1 / 3), torch.ones(len(part)))
        statistics.finish()
    # a few fp64 additions in another order
    torch.testing.assert_close(cut.sigma["4to1"], whole.sigma["4to1"], rtol=1e-13, atol=0)
    assert len(cut.norms) == 7


@pytest.mark.parametrize("size", [2, 5, 8])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_image_of_a_batch_is_dealt_once_and_no_share_is_empty(
    size: int, accumulate: int, processes: int
):
    batch = list(range(10, 10 + size))
    shares = [deal(batch, accumulate=accumulate, rank=rank, processes=processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for part in share for i in part) == batch
    sizes = [len(part) for share in shares for part in share]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 2


def test_batches_with_too_few_images_for_the_processes_are_dropped_or_refused():
    assert [len(batch) for batch in epoch_batches(10, 4, seed=0, epoch=0, processes=3)] == [4, 4]
    with pytest.raises(ValueError, match="no batch has an image for each of 3 processes"):
        epoch_batches(2, 4, seed=0, epoch=0, processes=3)
