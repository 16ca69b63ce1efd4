"""Test `srm-iqa score`: file names of any bytes, file lists, folders, unreadable images, choice of the checkpoint."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from srm_model import SRMConfig, build_model
from srm_model.checkpoint import read_card, save_model
from srm_model.cli import main

NAMES = [b"plain.png", "Größe.png".encode(), b"\xff\xfe.png", b"two\nlines.png", b"tab\there.png", b" .png"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(tmp_path_factory.mktemp("checkpoint"))


def _saved(folder: Path, bias: float = 0.0) -> Path:
    torch.manual_seed(0)
    model = build_model("test_convnext", neck="none", config=SRMConfig(channels=16, heads=2, image_size=32))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += bias
    save_model(model, folder, card={})
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of images with unusual names."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (40, 50), (200, 100, 50)).save(folder / "plain.png")
    for name in NAMES[1:]:
        shutil.copy(folder / "plain.png", os.fsencode(folder) + b"/" + name)
    return folder


def line_of(checkpoint: Path) -> str:
    """Return the line on stderr that names the model."""
    digest = read_card(checkpoint)["sha256"]
    return f"scoring with the checkpoint test_convnext/none@{digest[:12]} in {checkpoint}, which is not trained\n"


def score(checkpoint: Path, *arguments: Any) -> int:
    return main(["score", str(checkpoint), "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize(
    "locale",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:strict"},
    ],
)
def test_names_of_any_bytes_are_printed_in_any_locale(
    checkpoint: Path, pictures: Path, locale: dict[str, str]
):
    names = [*NAMES[:3], b"broken\xff.png", NAMES[4]]
    (pictures / os.fsdecode(names[3])).write_bytes(b"no image")
    paths = [os.fsencode(pictures) + b"/" + name for name in names]
    command = [sys.executable, "-m", "srm_model", "score", str(checkpoint), "--device", "cpu", *paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **locale}
    found = subprocess.run(command, capture_output=True, env=environment, timeout=100)
    assert found.returncode == 2
    lines = found.stdout.split(b"\n")
    assert [line.partition(b"\t")[2] for line in lines[:-1]] == [*paths[:3], paths[4]]
    said, fault = found.stderr.splitlines(keepends=True)
    assert said == os.fsencode(line_of(checkpoint))
    assert b"broken" in fault


def test_json_names_of_any_bytes_are_read_back(
    checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    paths = [str(pictures / os.fsdecode(name)) for name in NAMES]
    assert score(checkpoint, "--json", *paths) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert [json.loads(line)["path"] for line in out.splitlines()] == paths


def test_a_line_break_in_a_name_breaks_no_line(
    checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    assert score(checkpoint, pictures / "two\nlines.png", pictures / "plain.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("\t")[2] for line in lines] == [
        f"{pictures}/two\\nlines.png",
        f"{pictures}/plain.png",
    ]
    assert score(checkpoint, "--null", pictures / "two\nlines.png", pictures / "plain.png") == 0
    first, second, rest = capsys.readouterr().out.split("\0")
    assert (first.partition("\t")[2], rest) == (f"{pictures}/two\nlines.png", "")
    assert second.partition("\t")[2] == f"{pictures}/plain.png"


@pytest.mark.parametrize("null", [False, True])
def test_names_from_a_file_and_from_stdin(
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    null: bool,
):
    names = NAMES if null else [name for name in NAMES if b"\n" not in name]
    listed = [os.fsencode(pictures) + b"/" + name for name in names]
    data = b"".join(name + (b"\0" if null else b"\n") for name in listed)
    (tmp_path / "list").write_bytes(data)
    options = ["--json", *(["--null"] if null else [])]
    given = str(pictures / "plain.png")
    assert score(checkpoint, *options, given, "--files-from", tmp_path / "list") == 0
    rows = [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]
    assert list(map(os.fsencode, rows)) == [os.fsencode(given), *listed]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert score(checkpoint, *options, "--files-from", "-") == 0
    rows = [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]
    assert list(map(os.fsencode, rows)) == listed


def test_lists_as_editors_write_them(
    checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    names = [str(pictures / "Größe.png"), str(pictures / "plain.png")]
    text = "\r\n".join(names) + "\r\n\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        (tmp_path / "list").write_bytes(text.encode(encoding))
        assert score(checkpoint, "--json", "--files-from", tmp_path / "list") == 0, encoding
        rows = [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]
        assert rows == names
    for data, reason in ((b"a.png\0b.png\0", "--null for names"), (None, "not readable")):
        (tmp_path / "list").unlink()
        if data is not None:
            (tmp_path / "list").write_bytes(data)
        assert score(checkpoint, "--files-from", tmp_path / "list") == 2
        assert reason in capsys.readouterr().err
    assert score(checkpoint) == 2
    assert "no image was given; expected IMAGE or --files-from FILE" in capsys.readouterr().err


def test_folders(checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (pictures / "below" / ".hidden").mkdir(parents=True)
    for name in ("below/B.JPG", "below/.c.png", "below/.hidden/d.png", "below/text.txt"):
        Image.new("RGB", (40, 40)).save(pictures / name, "PNG")
    (tmp_path / "empty").mkdir()
    arguments = [pictures, tmp_path / "empty", pictures / "below" / "text.txt"]
    assert score(checkpoint, "--json", "--recursive", *arguments) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = sorted(os.fsdecode(name) for name in NAMES)
    found = [os.path.relpath(row["path"], pictures) for row in rows if row["score"] is not None]
    assert found == [*expected, "below/B.JPG", "below/text.txt"]
    (fault,) = [row for row in rows if row["score"] is None]
    assert fault["path"] == str(tmp_path / "empty")
    assert "no image in this folder (.png" in fault["error"]
    assert score(checkpoint, pictures, pictures / "plain.png") == 2
    captured = capsys.readouterr()
    assert "a folder; expected an image, or --recursive" in captured.err
    assert captured.out.endswith("plain.png\n")


def test_a_score_that_is_no_number_is_an_error(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    broken = _saved(tmp_path / "broken", bias=float("nan"))
    assert score(broken, "--json", pictures / "plain.png") == 2
    captured = capsys.readouterr()
    row = json.loads(captured.out, parse_constant=lambda text: pytest.fail(text))
    assert row["score"] is None
    assert row["error"] == f"{pictures}/plain.png: the model's score is nan"
    assert score(broken, pictures / "plain.png") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"{line_of(broken)}srm-iqa score: {row['error']}\n"


def test_no_image_ends_the_run(checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]):
    long, empty, pipe = (pictures / name for name in ("long.png", "empty.png", "pipe.png"))
    os.mkfifo(pipe)
    Image.fromarray(np.arange(30_000, dtype=np.uint32).astype(np.uint8)[None]).save(long)
    empty.touch()
    paths = [long, pipe, empty, "a\0b.png", "x" * 300 + ".png", pictures / "plain.png"]
    assert score(checkpoint, "--json", *paths) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["score"] is None for row in rows] == [False, True, True, True, True, False]
    assert [row["path"] for row in rows] == list(map(str, paths))


def test_the_limit_of_pixels_is_a_sentence_and_an_option(
    checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    before = Image.MAX_IMAGE_PIXELS
    assert score(checkpoint, pictures / "plain.png", "--max-pixels", "1998") == 2
    told = capsys.readouterr().err
    assert "plain.png: not readable as an image (it has more than 1,998 pixels; --max-pixels" in told
    assert told.startswith(line_of(checkpoint))
    assert told.count("\n") == 2
    for enough in ("2000", "0"):
        assert score(checkpoint, pictures / "plain.png", "--max-pixels", enough) == 0
        assert capsys.readouterr().err == line_of(checkpoint)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the checkpoint that comes with the package by a smaller one."""
    folder = _saved(tmp_path / "shipped", bias=0.1)
    monkeypatch.setattr("srm_model.checkpoint.SHIPPED", folder)
    return folder


def rows_of(capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], list[str]]:
    said = capsys.readouterr()
    return [json.loads(line) for line in said.out.splitlines()], said.err.splitlines()


def test_without_a_checkpoint_the_shipped_one_scores(
    shipped: Path, checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain, options = str(pictures / "plain.png"), ["--json", "--device", "cpu"]
    (tmp_path / "list").write_text(plain)
    assert main(["score", str(shipped), plain, *options]) == 0
    ((named,), _) = rows_of(capsys)
    assert score(checkpoint, plain, "--json") == 0
    ((other,), _) = rows_of(capsys)
    assert abs(other["score"] - named["score"]) > 1e-3
    assert other["model"] != named["model"] == f"test_convnext/none@{read_card(shipped)['sha256'][:12]}"
    for images in ([plain], ["--recursive", str(pictures)], ["--files-from", str(tmp_path / "list")]):
        assert main(["score", *images, *options]) == 0
        rows, said = rows_of(capsys)
        (row,) = (row for row in rows if row["path"] == plain)
        assert row == {**named, "score": pytest.approx(named["score"], abs=1e-5)}
        assert said == [
            f"scoring with the checkpoint {named['model']} that comes with the package, which is not trained"
        ]


def test_only_a_folder_with_a_checkpoint_is_one(
    shipped: Path, checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain = str(pictures / "plain.png")
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "none")
    assert main(["score", str(run), plain, "--json"]) == 0
    assert rows_of(capsys)[0][0]["model"].endswith(read_card(checkpoint)["sha256"][:12])
    (tmp_path / "empty").mkdir()
    typo = str(tmp_path / "rnu")
    for arguments, sentence in (
        ([str(run)], "no image was given; expected IMAGE or --files-from FILE"),
        ([], "no image was given"),
        ([typo, plain], f"{typo}: no such folder or file; expected a checkpoint or an image"),
        ([plain, str(run)], f"{run}: is a checkpoint or a run; expected it as the first argument only"),
        (
            [str(tmp_path / "empty"), plain],
            "empty: is a folder and has no checkpoint; expected a checkpoint",
        ),
        ([str(run / "none" / "config.json"), plain], "is a file of a checkpoint; expected its folder"),
        ([str(run), plain, "--model", "m:N"], f"{run} and --model m:N were given; expected one of them"),
    ):
        assert main(["score", *arguments]) == 2, arguments
        faults = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith("scoring with")
        ]
        assert len(faults) == 1, arguments
        assert sentence in faults[0], arguments


def test_an_installation_without_a_checkpoint_says_what_to_do(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("srm_model.checkpoint.SHIPPED", tmp_path / "shipped")
    assert main(["score", str(pictures / "plain.png")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "shipped has no config.json, so this installation of srm-iqa has no checkpoint of its own" in said
    assert "name a checkpoint, install a release, or make one with python -m bench.checkpoint" in said
