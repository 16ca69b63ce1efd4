"""Tests of the locks on folders that commands write to.

A second command is refused until the first one ends. If the first one is killed, its lock ends with it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srm_model import SRMConfig, build_model, load_model, runs
from srm_model.checkpoint import save_model
from srm_model.cli import main
from srm_model.cli.parser import make_parser
from srm_model.data.synthesize import synthesize
from srm_model.files import LOCK, held, make_folder, write_json

FORK = multiprocessing.get_context("fork")
CONFIG = SRMConfig(channels=16, heads=2, rank=4, pool_size=2, image_size=32, batch_size=8, epochs=1)
STUDY = 'title = "A study"\nbackbones = ["test_convnext"]\nseeds = [0]\n[data]\nnoise = "set"\n'
WRITING = {
    "train": ["train", "--data", "DATA", "--out", "RUN"],
    "evaluate": ["evaluate", "RUN"],
    "attack": ["attack", "RUN"],
    "audit": ["audit", "RUN"],
    "ablate": ["ablate", "STUDY.toml", "--out", "RUN"],
    "diagnose": ["diagnose", "RUN"],
    "export": ["export", "RUN/srm", "RUN"],
    "report": ["report", "RUN"],
    "demo": ["demo", "--out", "RUN"],
    "data": ["data", "synthesize", "RUN"],
}
IN_USE = "another process writes here; expected a folder that no other command is using"
# `score` writes nothing, `profile` appends lines to a shared file, and `verify` writes to the user's cache.
ELSEWHERE = {"score", "profile", "verify"}


@pytest.fixture(scope="module")
def noise_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    (folder / "photographs").mkdir()
    for number in range(5):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / f"{number}.png")
    given = {"photographs": folder / "photographs", "metric": "ssim", "progress": False}
    return synthesize(folder / "set", types=(1,), levels=(1, 5), **given)


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create RUN, a run folder with one checkpoint, and STUDY.toml in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("STUDY.toml").write_text(STUDY)
    torch.manual_seed(0)
    save_model(build_model("test_convnext", config=CONFIG), tmp_path / "RUN" / "srm", card={})
    write_json(tmp_path / "RUN" / runs.RUN, {"title": "A run"})
    return tmp_path / "RUN"


@contextmanager
def another_process(work: Callable[[], AbstractContextManager[None]]) -> Iterator[int]:
    """Yield the id of another process that stays inside `work()` during the block."""
    inside = FORK.Event()

    def stay() -> None:
        with work():
            inside.set()
            time.sleep(120)

    process = FORK.Process(target=stay)
    process.start()
    try:
        assert inside.wait(60)
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join()


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", WRITING)
def test_a_folder_in_use_is_refused_in_one_sentence(
    command: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
):
    with another_process(lambda: runs.writing(run_folder)):
        before = contents(run_folder)
        assert main(WRITING[command]) == 2
        assert contents(run_folder) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"srm-iqa {command}: {run_folder}: {IN_USE}"


def test_every_command_is_one_of_these():
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert commands.choices.keys() == WRITING.keys() | ELSEWHERE


def test_a_killed_process_leaves_no_lock(tmp_path: Path):
    """The lock is released even if children of the killed process, such as data loader workers, end later."""
    child = FORK.Value("i", 0)

    @contextmanager
    def with_a_child() -> Iterator[None]:
        with held(tmp_path):
            forked = os.fork()
            if forked == 0:
                time.sleep(120)
                os._exit(0)
            child.value = forked
            yield

    with another_process(with_a_child) as process:
        with pytest.raises(ValueError, match="another process writes here"), held(tmp_path):
            pass
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        try:
            with held(tmp_path):
                pass
        finally:
            os.kill(child.value, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path):
    with pytest.raises(ValueError, match="bad"), held(tmp_path / "new" / "out"):
        raise ValueError("bad")
    assert list(tmp_path.iterdir()) == []


SMALL = "--backbone test_convnext --set channels=16 --set heads=2 --set rank=4 --set pool_size=2 --set image_size=32"
# Commands that are refused, each with a text that its error message contains.
REFUSED = {
    "no data": ("train --data DATA --out RUN", "DATA"),
    "no data, new folder": ("train --data DATA --out NEW/out", "DATA"),
    "no data, a cache": ("train --data DATA --out NEW --cache CACHE/images", "DATA"),
    "no such compiler": (f"train --data SET --out NEW --compile nonsense {SMALL}", "compile='nonsense'"),
    "no such compiler, a run": (
        f"train --data SET --out RUN --compile nonsense {SMALL}",
        "compile='nonsense'",
    ),
    "no such device": ("train --data SET --out NEW --device nonsense", "--device nonsense"),
    "no such backbone": ("train --data SET --out NEW --backbone nonsense", "backbone 'nonsense'"),
    "evaluate without data": ("evaluate RUN", "--data"),
    "attack without data": ("attack RUN", "--data"),
    "no such surrogate": ("attack RUN --data SET --surrogate NEW", "NEW"),
    "audit without data": ("audit RUN", "--data"),
    "a study without its set": ("ablate STUDY.toml --out NEW/out", "set"),
    "the same into a folder": ("ablate STUDY.toml --out RUN", "set"),
    "no such job": ("ablate STUDY.toml --data noise=SET --out NEW --job nonsense", "job 'nonsense'"),
    "diagnose without data": ("diagnose RUN --out NEW/out", "--data"),
    "export onto itself": ("export RUN/srm RUN/srm", "the checkpoint itself"),
    "export of nothing": ("export DATA NEW", "DATA"),
    "report of no run": ("report NEW", "NEW"),
    "tables of no study": ("report RUN --table 1", "study.json"),
    "demo on no device": ("demo --out NEW --device nonsense", "--device nonsense"),
    "no photographs": ("data synthesize NEW/out --photographs DATA", "DATA"),
    "a set into a run": ("data synthesize RUN", "not an empty folder"),
    "profile on no device": ("profile --out NEW --device nonsense", "--device nonsense"),
}


@pytest.mark.parametrize(("command", "named"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_leaves_nothing_behind(
    command: str, named: str, run_folder: Path, noise_set: Path, capsys: pytest.CaptureFixture[str]
):
    Path("SET").symlink_to(noise_set)

    def state() -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in run_folder.parent.rglob("*")}

    before = state()
    assert main([*command.split(), "--no-progress"]) == 2
    assert state() == before
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_an_attack_of_a_model_that_fails_leaves_nothing_behind(run_folder: Path, noise_set: Path):
    """The scores are NaN, which is found only when the model runs.

    The attack has then already created a folder for unfinished batches, which must not remain.
    """
    model, _ = load_model(run_folder / "srm")
    with torch.no_grad():
        next(model.head.parameters()).fill_(float("nan"))
    save_model(model, run_folder / "srm", card={})
    before = sorted(run_folder.rglob("*"))
    options = "--norm linf --eps 4/255 --images 2 --set attack_steps=1 --no-progress"
    assert main(["attack", "RUN", "--data", str(noise_set), *options.split()]) == 2
    assert sorted(run_folder.rglob("*")) == before


def test_the_last_that_shares_a_folder_removes_its_lock(tmp_path: Path):
    with another_process(lambda: held(tmp_path, shared=True)):
        with held(tmp_path, shared=True):
            pass
        assert (tmp_path / LOCK).exists()  # the other process holds it
        with pytest.raises(ValueError, match="another process"), held(tmp_path):
            pass
    with held(tmp_path, shared=True):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_a_folder_that_another_process_removes_meanwhile_is_made_again(error, tmp_path: Path, monkeypatch):
    mkdir, folder, calls = os.mkdir, tmp_path / "new", []

    def removed_after_the_first(path, *arguments, **options):
        calls.append(path)
        if len(calls) == 1:
            raise error(path)
        return mkdir(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", removed_after_the_first)
    make_folder(folder)
    assert folder.is_dir()
    assert len(calls) > 1


def test_a_link_to_nowhere_is_no_folder_and_ends(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"link: not writable \(File exists\)"):
        make_folder(tmp_path / "link")


def test_many_processes_share_a_folder_and_none_is_refused(tmp_path: Path):
    """Processes take and release the lock at any time, so some open the lock file while another process removes it."""
    refused, folder = FORK.Value("i", 0), tmp_path / "new"

    def come_and_go() -> None:
        for _ in range(200):
            try:
                with held(folder, shared=True):
                    pass
            except ValueError:
                refused.value += 1

    processes = [FORK.Process(target=come_and_go) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert refused.value == 0
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [*folder.glob("*")] == []


def test_processes_of_a_study_share_it_and_others_do_not(run_folder: Path):
    with another_process(lambda: runs.writing(run_folder, shared=True)):
        with runs.writing(run_folder, shared=True):
            pass
        with pytest.raises(ValueError, match="another process writes here"), runs.writing(run_folder):
            pass
        (run_folder / "study.json").write_text("{}")
        with pytest.raises(ValueError, match="another process"), runs.writing(run_folder / "srm"):
            pass


def test_checkpoints_of_one_run_are_used_side_by_side(run_folder: Path):
    with another_process(lambda: runs.writing(run_folder / "srm")):
        with runs.writing(run_folder / "none"):
            pass
        for taken in (run_folder, run_folder / "srm"):
            with pytest.raises(ValueError, match="another process writes here"), runs.writing(taken):
                pass


def test_what_writes_nothing_is_not_refused(run_folder: Path, capsys: pytest.CaptureFixture[str]):
    with another_process(lambda: runs.writing(run_folder)):
        assert main(["evaluate", "RUN", "--data", "DATA"]) == 2
    assert "another process" not in capsys.readouterr().err
