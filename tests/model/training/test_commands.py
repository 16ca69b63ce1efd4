"""Test `srm-iqa train` as a user calls it: under torchrun, interrupted, and with invalid arguments."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forked import on_ranks, start
from photographs import FLAGS, write_set
from safetensors.torch import load_file

from srm_model.checkpoint import read_card
from srm_model.cli import main
from srm_model.cli.options import byte_count
from srm_model.files import held, read_json
from srm_model.training.state import read_state

pytestmark = pytest.mark.forks


def test_two_processes_train_evaluate_and_write_once(tmp_path: Path, capfd):
    data = write_set(tmp_path / "data")
    command = ["train", "--data", str(data), *FLAGS, "--accumulate", "2", "--save-every", "1"]
    command += ["--cache", str(tmp_path / "cache"), "--cache-size", "20kB"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    output = capfd.readouterr().out
    assert output.count("test images") == 1
    on_ranks(2, main, [*command, "--out", str(tmp_path / "two")], join=False)
    assert without_figures(capfd.readouterr().out) == without_figures(output)
    kept = [path.stat().st_size for path in (tmp_path / "cache").glob("*.npy")]
    assert kept == [32 * 32 * 3 + 128] * 6  # the limit of 20,000 bytes allows six files
    one, two = (tmp_path / name / "srm" for name in ("one", "two"))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert len(list((two / "tensorboard").iterdir())) == 1
    assert len(read_json(tmp_path / "two" / "run.json")["command"]) == 1
    weights = [load_file(folder / "state.safetensors") for folder in (one, two)]
    check_close(*weights)
    check_evaluated(one, two)


def test_of_two_trainings_started_together_one_trains(tmp_path: Path, capfd, monkeypatch):
    """Start two trainings with different seeds in the same folder; one must finish and the other must be refused.

    The refused training ends with an error message. Config, weights, evaluation and stored command are those of the
    training that finishes.
    """
    data, out = write_set(tmp_path / "data"), tmp_path / "out"
    forking = multiprocessing.get_context("fork")
    together, refused = forking.Barrier(2), forking.Event()

    @contextmanager
    def held_until_the_other_is_refused(folder: Path, *, shared: bool = False) -> Iterator[None]:
        with held(folder, shared=shared):
            # A training on so few images is short. It could end before the other process asks for the lock.
            refused.wait(60)
            yield

    monkeypatch.setattr("srm_model.runs.held", held_until_the_other_is_refused)

    def train(seed: int) -> int:
        together.wait(60)
        code = main(["train", "--data", str(data), "--out", str(out), "--seed", str(seed), *FLAGS])
        if code:
            refused.set()
        return code

    processes = {seed: start(train, seed) for seed in (1, 2)}
    for process in processes.values():
        process.join(240)
    codes = {seed: process.exitcode for seed, process in processes.items()}
    assert sorted(codes.values()) == [0, 2]
    assert f"{out}: another process writes here" in capfd.readouterr().err
    (seed,) = (seed for seed, code in codes.items() if code == 0)
    card = read_card(out / "srm")
    assert card["config"]["seed"] == seed
    assert read_json(out / "srm" / "evaluation.json")["sha256"] == card["sha256"]
    (command,) = read_json(out / "run.json")["command"]
    assert f"--seed {seed}" in command


def test_every_rank_ends_where_another_process_writes(tmp_path: Path, capfd):
    command = ["train", "--data", "DATA", "--out", str(tmp_path / "out"), *FLAGS]
    with held(tmp_path / "out"):
        on_ranks(2, lambda: main(command) != 2, join=False)
    assert capfd.readouterr().err.count("another process writes here") == 2


def without_figures(text: str) -> str:
    """Replace the decimal numbers of a text by #.

    The numbers depend on how a batch is split, because rounding errors differ. Even a rank correlation can change: a
    small error can swap the ranks of two images.
    """
    return re.sub(r"−?\d+\.\d+|undefined", "#", text)


def check_evaluated(one: Path, other: Path) -> None:
    """Check that two trainings were evaluated on the same images. Scores are not compared, because rounding differs."""
    found, expected = (read_json(folder / "evaluation.json") for folder in (other, one))
    assert (found.keys(), found["mos"]) == (expected.keys(), expected["mos"])


def check_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Check that the models of two states agree up to the effect of rounding on Adam.

    Adam divides a gradient by its own magnitude. If a gradient is only rounding error, a step can still be as large as
    the learning rate, in either direction. After six steps with a learning rate of 1e-3, two weights can therefore
    differ by 2 · 6 · 1e-3 = 1.2e-2.
    """
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name.startswith("model."):
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1.2e-2, msg=name)


def test_two_nodes_meet_by_torchrun_s_rendezvous(tmp_path: Path):
    data = write_set(tmp_path / "data")
    command = ["train", "--data", str(data), *FLAGS, "--no-progress"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint", endpoint]
    torchrun += ["--local-addr", "127.0.0.1", "-m", "srm_model", *command, "--out", str(tmp_path / "two")]
    nodes = [
        subprocess.Popen(torchrun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted(bool(output) for output, _ in said) == [False, True]  # only the first process writes
    one, two = (tmp_path / name / "srm" for name in ("one", "two"))
    check_close(*(load_file(folder / "state.safetensors") for folder in (one, two)))
    check_evaluated(one, two)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_are_the_same_training_over_nccl(tmp_path: Path):
    data = write_set(tmp_path / "data")
    command = [
        "-m",
        "srm_model",
        "train",
        "--data",
        str(data),
        *FLAGS,
        "--precision",
        "fp32",
        "--no-progress",
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        subprocess.run(
            [sys.executable, *launcher, *command, "--out", str(tmp_path / name)], check=True, timeout=120
        )
    check_close(*(load_file(tmp_path / name / "srm" / "state.safetensors") for name in ("one", "two")))


def test_sigterm_ends_a_command_with_143_and_the_same_command_goes_on(tmp_path: Path, capfd):
    data = write_set(tmp_path / "data")
    command = ["train", "--data", str(data), *FLAGS, "--epochs", "40", "--save-every", "1"]
    process = start(main, [*command, "--out", str(tmp_path / "run")])
    state = tmp_path / "run" / "srm" / "state.safetensors"
    end = time.monotonic() + 60
    while not state.exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    assert re.search(
        r"srm-iqa train: stopped by SIGTERM, saved at epoch \d+, step \d", capfd.readouterr().err
    )
    short = [*command, "--out", str(tmp_path / "run"), "--epochs", "3"]
    assert main(short) == 2
    assert "differs from this one (epochs 40 there, 3 here)" in capfd.readouterr().err
    before = read_state(tmp_path / "run" / "srm")
    assert before is not None
    assert before.values["progress"] is not None


def test_a_set_in_which_one_label_has_changed_is_another_set(tmp_path: Path, capfd):
    data = write_set(tmp_path / "data")
    command = ["train", "--data", str(data), *FLAGS, "--out", str(tmp_path / "run"), "--epochs", "1"]
    assert main(command) == 0
    path = data / "mos_with_names.txt"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(first.replace(first.split()[0], "5.00001") + "\n" + rest)
    capfd.readouterr()
    assert main(command) == 2
    found = capfd.readouterr().err
    assert re.search(r"training set '18 images of \w{12}' there, '18 images of \w{12}' here", found)
    path.write_text(first + "\n" + rest)
    assert main(command) == 0


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 5 * 10**8), ("1.5 GB", 15 * 10**8), ("20kB", 20_000), ("7", 7)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int):
    assert byte_count(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1.2.3GB", "5 bytes"])
def test_what_is_no_size_is_refused(text: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--data", "D", "--out", "O", "--cache", "C", f"--cache-size={text}"]) == 2
    assert "is not a size such as 500MB or 20GB" in capsys.readouterr().err
