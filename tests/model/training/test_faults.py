"""Test that the same call resumes an interrupted training and gives the result of an uninterrupted training."""

from __future__ import annotations

import errno
import gc
import itertools
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import start
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from toy import CONFIG, ToyModel, ToySet

import srm_model.training.loop as loop
import srm_model.training.state as state
from srm_model.checkpoint import read_card
from srm_model.metrics import srocc
from srm_model.training import DivergenceError, Preempted, WorkerError, predict, train
from srm_model.training.faults import outlive_sigterm, reading
from srm_model.training.seeding import random_state, set_random_state

pytestmark = pytest.mark.forks

LONG = CONFIG.replace(epochs=6, weights_ema=0.9)
TIMES = ("seconds", "images_per_second", "data_share")


def fit(folder: Path, model: ToyModel | None = None, **changes: Any) -> list[dict[str, Any]]:
    config = changes.pop("config", LONG)
    arguments: dict[str, Any] = {"progress": False, "device": "cpu", "save_every": 1, **changes}
    train_set, val_set = arguments.pop("train_set", ToySet()), arguments.pop("val_set", ToySet(9, seed=1))
    return train(model or ToyModel(config), train_set, val_set, folder, config=config, **arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    fit(folder)
    return folder


def check_same(folder: Path, whole: Path) -> None:
    """Check that `folder` has the same results as `whole`, the folder of an uninterrupted training, except for times.

    Weights and training states must be bitwise equal.
    """
    for name in ("model.safetensors", "state.safetensors"):
        a, b = load_file(whole / name), load_file(folder / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert read_card(folder) == read_card(whole)
    histories = [
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_state_history(path)]
        for path in (folder, whole)
    ]
    assert histories[0] == histories[1]
    assert not list(folder.glob(".*"))


def read_state_history(folder: Path) -> list[dict[str, Any]]:
    stored = state.read_state(folder)
    assert stored is not None
    return stored.values["history"]


def test_killed_at_five_random_moments(whole: Path, tmp_path: Path):
    draw = random.Random(0)
    for _ in range(5):
        process = start(lambda: fit(tmp_path, train_set=SlowSet(delay=0.005)) and None)
        for _ in range(draw.randint(1, 4)):  # few saves, because every kill must come before step 30
            wait_for_another(tmp_path / "state.safetensors")
        time.sleep(draw.uniform(0, 0.02))  # a step takes about 0.02 s
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    stored = state.read_state(tmp_path)
    assert stored is not None
    assert 0 < 5 * len(stored.values["history"]) + (stored.values["progress"] or {"step": 0})["step"] < 30
    fit(tmp_path)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("moment", range(5))
def test_killed_inside_a_save(whole: Path, tmp_path: Path, moment: int):
    """Send SIGKILL to a training directly after one operation of a save, and check that the training resumes."""
    names = [
        (state, "plain_tensors"),
        (state, "save_file"),
        (state, "_flush"),
        (state, "_rotate"),
        (loop, "save_model"),
    ]
    module, name = names[moment]

    def killed() -> None:
        real, calls = getattr(module, name), itertools.count()

        def call(*arguments: Any, **keywords: Any) -> Any:
            result = real(*arguments, **keywords)
            if next(calls) == (0 if module is loop else 9):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, call)
        fit(tmp_path)

    process = start(killed)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    fit(tmp_path)
    check_same(tmp_path, whole)


class SlowSet(ToySet):
    """A dataset that waits `delay` seconds before it returns an image."""

    def __init__(self, count: int = 18, seed: int = 0, delay: float = 0.02) -> None:
        super().__init__(count, seed)
        self.delay = delay

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.delay)
        return super().__getitem__(index)


class Ending(ToySet):
    """A dataset that sends SIGTERM when image 5 is read for the `read`-th time.

    The signal goes to the process that reads the image, or with `whole_group` to its process group.
    """

    def __init__(self, *arguments: int, read: int = 2, whole_group: bool = False) -> None:
        super().__init__(*arguments)
        self.read, self.whole_group = read, whole_group
        self.reads = torch.zeros(1).share_memory_()  # shared, because every epoch starts new workers

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            self.reads += 1
            if self.reads == self.read:
                os.killpg(0, signal.SIGTERM) if self.whole_group else os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


@pytest.mark.parametrize("phase", ["steps", "steps, workers too", "validation"])
def test_sigterm_saves_and_ends(whole: Path, tmp_path: Path, phase: str):
    def preempted() -> int:
        os.setpgid(0, 0)
        # Every signal is sent in the second epoch. Validation reads an image twice per epoch, once for the diagnostics.
        sets = {"steps": {"train_set": Ending()}, "validation": {"val_set": Ending(9, 1, read=3)}}
        sets["steps, workers too"] = {"train_set": Ending(whole_group=True), "workers": 1}
        try:
            fit(tmp_path, save_every=None, **sets[phase])
        except Preempted as stop:
            (tmp_path / "said").write_text(str(stop))
            return 143
        return 0

    process = start(preempted)
    process.join(60)
    assert process.exitcode == 143
    said = (tmp_path / "said").read_text()
    assert said.startswith("epoch 2, before its validation" if phase == "validation" else "epoch 2, step ")
    stored = state.read_state(tmp_path)
    assert stored is not None
    assert stored.values["progress"] is not None
    fit(tmp_path)
    check_same(tmp_path, whole)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def wait_for_another(path: Path) -> None:
    """Wait until the file at `path` is created or replaced."""
    before = path.stat().st_mtime_ns if path.exists() else None
    wait_for(lambda: path.exists() and path.stat().st_mtime_ns != before)


def test_sigterm_means_what_it_did_before_and_after():
    handler = signal.getsignal(signal.SIGTERM)
    with loop.Termination() as termination:
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.received
        with pytest.raises(Preempted), termination.at_once():
            raise AssertionError("the block was entered")
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("call", [1, 3, 7])
def test_a_full_disk_loses_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int):
    real, calls = state.save_file, itertools.count()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if next(calls) == call:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        with pytest.raises(OSError, match=r"cannot be written to \(No space left on device\).*make room"):
            fit(tmp_path)
    assert not list(tmp_path.glob(".*"))
    fit(tmp_path)
    check_same(tmp_path, whole)


def test_a_write_that_fails_inside_safetensors_is_reported_too(tmp_path: Path):
    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        try:
            fit(tmp_path)
        except OSError as error:
            return 7 if "cannot be written to" in str(error) and "make room" in str(error) else 1
        return 0

    process = start(limited)
    process.join(60)
    assert process.exitcode == 7
    assert not list(tmp_path.glob(".*"))


class Breaking(ToySet):
    """A dataset whose image 5 cannot be read in the second epoch, until the file `mended` exists.

    With `how` = "killed", reading image 5 kills the process that reads it.
    """

    def __init__(self, mended: Path, how: str) -> None:
        super().__init__()
        self.mended, self.how = mended, how
        self.shared = torch.zeros(1).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self.shared)

    @epoch.setter
    def epoch(self, value: int) -> None:
        if hasattr(self, "shared"):
            self.shared.fill_(value)

    def __getitem__(self, index: int) -> Any:
        if self.epoch == 1 and index == 5 and not self.mended.exists():
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("image5.png: no such image")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_image_is_named(whole: Path, tmp_path: Path, workers: int):
    images = Breaking(tmp_path / "mended", "vanished")
    with pytest.raises(ValueError, match=r"^image5\.png: no such image$"):
        fit(tmp_path, train_set=images, workers=workers, save_every=None)
    assert (
        not multiprocessing.active_children()
    )  # the error object still exists, but must not keep workers alive: Python would wait for them at exit
    stored = state.read_state(tmp_path)
    assert stored is not None
    assert len(stored.values["history"]) == 1
    assert stored.values["progress"] is not None
    images.mended.touch()
    fit(tmp_path, train_set=images)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_image_of_validation_is_named_and_the_epoch_s_training_kept(
    whole: Path, tmp_path: Path, workers: int
):
    class Gone(ToySet):
        def __getitem__(self, index: int) -> Any:
            raise ValueError("image7.png: no such image")

    with pytest.raises(ValueError, match=r"^image7\.png: no such image$"):
        fit(tmp_path, val_set=Gone(9, seed=1), workers=workers, save_every=None)
    assert not multiprocessing.active_children()
    stored = state.read_state(tmp_path)
    assert stored is not None
    assert stored.values["progress"]["step"] == 5
    fit(tmp_path)
    check_same(tmp_path, whole)


def test_a_killed_worker_is_reported(whole: Path, tmp_path: Path):
    images = Breaking(tmp_path / "mended", "killed")

    def train_until_killed() -> int:
        try:
            fit(tmp_path, train_set=images, workers=1)
        except WorkerError as error:
            return 7 if str(error).count("a process that loads images was killed") == 1 else 1
        return 0

    process = start(
        train_until_killed
    )  # in another process, because torch's handler for dead workers stays installed
    process.join(60)
    assert process.exitcode == 7
    images.mended.touch()
    fit(tmp_path, train_set=images)
    check_same(tmp_path, whole)


def test_a_worker_killed_while_a_checkpoint_is_judged_is_reported(tmp_path: Path):
    class Deadly(ToySet):
        def __getitem__(self, index: int) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    def predict_until_killed() -> int:
        try:
            predict(ToyModel(), Deadly(), workers=1)
        except WorkerError:
            return 7
        return 0

    process = start(predict_until_killed)
    process.join(60)
    assert process.exitcode == 7


def test_a_loader_that_fails_to_start_leaves_no_workers(monkeypatch: pytest.MonkeyPatch):
    class Stopped:
        def __iter__(self) -> Any:
            yield from ()
            raise KeyboardInterrupt  # at the first batch, after the workers have started

    loader = DataLoader(ToySet(), batch_sampler=Stopped(), num_workers=2, worker_init_fn=outlive_sigterm)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt) as caught, reading(loader):
        raise AssertionError("the block was entered")
    assert not multiprocessing.active_children()
    assert caught.tb is not None  # the traceback keeps the iterator alive until here
    assert not any(thread.name == "QueueFeederThread" for thread in threading.enumerate())
    # The garbage collector now deletes the iterator. This must not start threads that close pipes a second time.
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))
    del caught
    gc.collect()
    assert not started


def half(**changes: Any) -> Any:
    return CONFIG.replace(precision="fp16", **changes)


class Spoiling(ToyModel):
    """A model whose loss is NaN in the given training steps."""

    def __init__(self, config: Any, steps: set[int]) -> None:
        super().__init__(config)
        self.steps, self.passes = steps, itertools.count()

    def forward(self, images: torch.Tensor, return_losses: bool = False) -> Any:
        output = super().forward(images, return_losses)
        if return_losses and next(self.passes) in self.steps:
            return output[0] * float("nan"), output[1]
        return output


def test_a_loss_scaler_skips_two_bad_losses_in_a_row(tmp_path: Path):
    model = Spoiling(half(), {1, 2, 5, 6})
    history = fit(tmp_path, model, config=half())
    skipped = [row["skipped_steps"] for row in history]
    assert skipped[0] >= 2  # more than 2 if the scaler's initial scale is too large
    assert skipped[1:] == [2, 0]
    assert model.calls.count("clamp") == 15 - sum(skipped)
    assert all(row["loss"] > 0 for row in history)  # mean loss of the steps that were not skipped
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_three_bad_losses_in_a_row_end_the_training_with_the_files_names(tmp_path: Path):
    model = Spoiling(half(), {7, 8, 9})
    with pytest.raises(DivergenceError, match=r"epoch 2, batch 5 of 5 and the 2 before it: image\d+\.png, "):
        fit(tmp_path, model, config=half())
    stored = state.read_state(tmp_path)
    assert stored is not None
    assert (stored.values["progress"]["step"], stored.values["progress"]["failures"]) == (4, 2)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_gradients_that_overflow_in_fp16_lower_the_scale_until_they_do_not(tmp_path: Path):
    class Steep(ToyModel):
        """A model whose loss is finite, but whose scaled gradient overflows in fp16.

        The gradient is finite once the scale is 32 times smaller than the initial scale.
        """

        def forward(self, images: torch.Tensor, return_losses: bool = False) -> Any:
            output = super().forward(images, return_losses)
            if not return_losses:
                return output
            steep = (output[0].half() * 0.0 + 1.0) * self.tau.half()  # the gradient of τ is computed in fp16
            return output[0], {"tau": 1600 * steep.sum().float() / len(images)}

    model = Steep(half())
    scales = []
    step = torch.amp.GradScaler.update

    def record(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        scales.append(self.get_scale())

    torch.amp.GradScaler.update = record  # type: ignore[method-assign]
    try:
        history = fit(tmp_path, model, config=half())
    finally:
        torch.amp.GradScaler.update = step  # type: ignore[method-assign]
    skipped = history[0]["skipped_steps"]
    assert skipped >= 1
    assert scales[:skipped] == [2.0 ** (15 - i) for i in range(skipped)]
    assert set(scales[skipped:]) == {scales[skipped - 1]}
    assert model.calls.count("clamp") == 15 - skipped
    assert read_state_history(tmp_path)[0]["skipped_steps"] == skipped


def test_generators_are_restored_to_the_state_that_was_stored():
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    before = random_state()
    try:
        np.random.standard_normal()  # noqa: NPY002 — draws two numbers and keeps one for the next call
        kept = random_state()
        first = draw()
        set_random_state(kept)
        assert draw() == first
    finally:
        set_random_state(before)


def test_the_average_is_what_is_judged_and_kept(tmp_path: Path):
    fit(tmp_path, config=LONG.replace(epochs=1))
    kept, end = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(end[f"average.{name}"], value) for name, value in kept.items())
    assert not any(torch.equal(end[f"model.{name}"], value) for name, value in kept.items())
    average = ToyModel()
    average.load_state_dict(kept)
    assert read_card(tmp_path)["card"]["val"]["srocc"] == srocc(
        predict(average, ToySet(9, seed=1)), ToySet(9, seed=1).mos
    )
