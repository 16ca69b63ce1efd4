"""Test the output of commands on full disks, closed pipes and narrow terminals, and in several processes."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srm_model import runs
from srm_model.checkpoint import read_card
from srm_model.cli import main
from srm_model.cli.options import device_from
from srm_model.cli.streams import prepared
from srm_model.files import json_text, read_json, write_json

COMMANDS = (
    "",
    "verify",
    "data",
    "data synthesize",
    "data check",
    "demo",
    "train",
    "evaluate",
    "attack",
    "audit",
    "ablate",
    "profile",
    "diagnose",
    "score",
    "report",
    "export",
)


def started(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `srm-iqa` in a shell; `redirection` follows the arguments."""
    return subprocess.run(
        ["bash", "-c", f'"$0" -m srm_model "$@" {redirection}', sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("arguments", [["--version"], ["score", "--help"]])
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        ("> /dev/full", "No space left on device"),
        (">&-", "Bad file descriptor"),
        (None, "Broken pipe"),
    ],
)
def test_output_that_cannot_be_written_is_a_sentence(
    arguments: list[str], redirection: str | None, reason: str
):
    found = _to_a_closed_pipe(arguments) if redirection is None else started(redirection, *arguments)
    code, errors = found.returncode, found.stderr
    assert errors == f"srm-iqa: standard output cannot be written ({reason})\n"
    assert code == 2


def _to_a_closed_pipe(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, "-m", "srm_model", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writing)


def test_messages_that_cannot_be_written_change_no_exit_code():
    for redirection in ("2> /dev/full", "2>&-"):
        found = started(redirection, "report", "nowhere")
        assert (found.returncode, found.stdout) == (2, "")


def test_a_command_in_the_middle_of_its_output(monkeypatch: pytest.MonkeyPatch, capsys):
    """Check that a failed write is reported, both while a command is running and in argparse.

    A running command writes whenever the buffer of stdout is full, not only at its end. argparse itself ignores write
    errors.
    """

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr("srm_model.cli.data._print", lambda *_: print("text"))
    for arguments in (["data", "check", "anywhere"], ["--help"], ["--version"]):
        with contextlib.redirect_stdout(Full()):
            assert main(arguments) == 2
        assert capsys.readouterr().err == (
            "srm-iqa: standard output cannot be written (No space left on device)\n"
        )


def test_names_become_their_bytes_and_other_text_escapes():
    raw = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding="ascii")) as stream:
        with prepared() as output:
            print(os.fsdecode(b"\xff.png"), "κ")
            assert output.lost() is None
        assert raw.getvalue() == b"\xff.png \\u03ba\n"
        assert stream.errors == "strict"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_sixty_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "60")
    assert main([*name.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert [line for line in lines if len(line) > 60] == []


def test_an_option_may_stand_between_the_positions(capsys: pytest.CaptureFixture[str]):
    assert main(["score", "nowhere", "--json", "a.png", "b.png"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cuda:99", "abacus", "cpu:x"])
def test_a_device_that_is_not_here_is_one_short_sentence(name: str):
    with pytest.raises(ValueError, match=f"--device {name}: cannot be used on this machine") as raised:
        device_from(name)
    assert len(str(raised.value)) < 260
    assert "\n" not in str(raised.value)
    assert "expected a device such as cpu or cuda:0" in str(raised.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_prints(
    rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    first = rank == 0
    for arguments, code in (["--version"], 0), (["train", "--help"], 0), (["fly"], 2):
        assert main(arguments) == code
        captured = capsys.readouterr()
        assert bool(captured.out + captured.err) == first, arguments
    assert main(["report", str(tmp_path / "nowhere")]) == (2 if first else 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    expected = [
        "srm-iqa report: runs only in the process of rank 0",
        "no such folder; expected the folder of a run",
    ]
    assert len(captured.err.splitlines()) == (2 if first else 0)
    assert all((text in captured.err) == first for text in expected)


def test_json_has_no_number_that_is_not_finite():
    values = [float("nan"), float("inf"), {"a": (-float("inf"), np.float64("nan"), 1.5)}]
    assert json_text(values) == '[null, null, {"a": [null, null, 1.5]}]'


def test_no_writer_of_json_goes_past_it():
    """Check that no code calls `json.dumps` instead of `json_text`, with two exceptions.

    By default, `json.dumps` writes NaN and infinity, which are not JSON. A call of `json.dumps` is allowed if only this
    program reads the result, or if the call raises an error for NaN and infinity.
    """
    within = {
        "training/state.py",
        "attacks/records.py",
        "attacks/suite.py",
    }  # metadata of safetensors files, and hashes
    package = Path(runs.__file__).parent.parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if "json.dumps(" in line
        and not any(word in line for word in ("allow_nan=False", "json.loads(json.dumps", "identity"))
    }
    assert found - within <= {"reports/records.py", "profiling/results.py"}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A dataset in a folder whose name is not UTF-8."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/set\xff"))
    (root / "distorted_images").mkdir(parents=True)
    names = [f"i{reference:02}_01_{level}.bmp" for reference in range(1, 6) for level in (1, 2)]
    rng = np.random.default_rng(0)
    for name in names:
        pixels = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "distorted_images" / name)
    lines = [f"{0.5 * number:.5f} {name}" for number, name in enumerate(names)]
    (root / "mos_with_names.txt").write_text("\n".join(lines))
    return root


def test_commands_take_folders_of_any_name(
    odd: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
):
    assert main(["data", "check", str(odd), "--no-progress"]) == 0
    assert b"root: " + os.fsencode(odd) + b"\n" in capsysbinary.readouterr().out
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xfe"))
    settings = [
        "image_size=32",
        "channels=16",
        "heads=2",
        "rank=4",
        "pool_size=2",
        "epochs=1",
        "batch_size=2",
    ]
    train = ["train", "--data", str(odd), "--out", str(run), "--neck", "none", "--backbone", "test_convnext"]
    train += ["--device", "cpu", "--no-progress", *(f"--set={setting}" for setting in settings)]
    for _ in range(2):  # the second run reads the state that the first run saved
        assert main(train) == 0
    assert read_card(run / "none")["card"]["dataset"]["root"] == str(odd)
    assert str(run) in shlex.split(read_json(run / "run.json")["command"][0])
    assert main(["evaluate", str(run), "--device", "cpu", "--no-progress"]) == 0
    attack = ["attack", str(run), "--norm", "linf", "--eps", "1/255", "--steps", "1", "--restarts", "1"]
    assert main([*attack, "--device", "cpu", "--no-progress"]) == 0
    capsysbinary.readouterr()
    assert main(["report", str(run)]) == 0
    assert capsysbinary.readouterr().out == os.fsencode(run) + b"/report.html\n"
    assert (run / "report.html").read_bytes().decode("utf-8")
    write_json(run / "odd.json", {"name": os.fsdecode(b"\xfe")})
    assert (run / "odd.json").read_text() == '{\n "name": "\\udcfe"\n}\n'
