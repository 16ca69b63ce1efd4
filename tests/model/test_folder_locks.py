"""Commands that write into one folder: the second is refused while the first runs, whatever ends the first."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from srm_model import SRMConfig, build_model, runs
from srm_model.checkpoint import save_model
from srm_model.cli import _parser, main
from srm_model.files import held, write_json

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
# The first writes nothing, the second adds lines to a file of all its calls, the third writes to the user's cache.
ELSEWHERE = {"score", "profile", "verify"}


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """RUN, a run folder with one checkpoint, and STUDY.toml, beside one another in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("STUDY.toml").write_text(STUDY)
    torch.manual_seed(0)
    save_model(build_model("test_convnext", config=CONFIG), tmp_path / "RUN" / "srm", card={})
    write_json(tmp_path / "RUN" / runs.RUN, {"title": "A run"})
    return tmp_path / "RUN"


@contextmanager
def another_process(work: Callable[[], AbstractContextManager[None]]) -> Iterator[int]:
    """The id of a process that has entered `work()` and stays in it for the block."""
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
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert commands.choices.keys() == WRITING.keys() | ELSEWHERE


def test_a_killed_process_leaves_no_lock(tmp_path: Path):
    """Nor do its children, such as the workers of a data loader, which end some seconds after it."""
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
