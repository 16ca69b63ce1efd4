from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from srm_model import SRMConfig, build_model, cli
from srm_model.attacks.suite import spread
from srm_model.checkpoint import read_card, save_model
from srm_model.cli import main, tables
from srm_model.cli.parser import make_parser
from srm_model.data import describe, load_image, open_dataset
from srm_model.data.synthesize import synthesize
from srm_model.files import read_json, write_json
from srm_model.metrics import LogisticMap, plcc, srocc
from srm_model.norms import NORMS, LInf
from srm_model.reports import study_tables

SMALL = {
    "channels": 16,
    "heads": 2,
    "rank": 4,
    "pool_size": 2,
    "image_size": 32,
    "batch_size": 8,
    "epochs": 2,
}
SETTINGS = [f"--set={key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthesize a dataset from five photographs of gradients and noise, with two distortion types."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 64)
    for number in range(5):
        pixels = ramp[:, None, None] * rng.uniform(size=3) + ramp[None, :, None] * rng.uniform(size=3)
        Image.fromarray((pixels / 2 + rng.uniform(0, 50, (64, 64, 3))).astype(np.uint8)).save(
            folder / f"{number}.png"
        )
    out = tmp_path_factory.mktemp("data") / "set"
    return synthesize(out, photographs=folder, types=(1, 8), levels=(1, 3, 5), metric="ssim", progress=False)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and evaluate two necks."""
    out = tmp_path_factory.mktemp("run") / "run"
    arguments = ["train", "--data", str(data), "--out", str(out), "--neck", "srm", "none", *SETTINGS]
    assert main([*arguments, "--backbone", "test_convnext", "--no-progress", "--device", "cpu"]) == 0
    return out


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = build_model("test_convnext", config=SRMConfig(**{**SMALL, "image_size": 64}))
    save_model(model, tmp_path / "checkpoint", card={})
    return tmp_path / "checkpoint"


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Return the one-line error message of a command that exits with code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_a_file_in_the_place_of_a_folder_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "taken").write_text("")
    for command in (
        [
            "train",
            "--data",
            data,
            "--out",
            tmp_path / "taken" / "run",
            "--backbone",
            "test_convnext",
            *SETTINGS,
        ],
        ["demo", "--quick", "--out", tmp_path / "taken"],
        ["data", "synthesize", tmp_path / "taken" / "set"],
    ):
        told = fails(capsys, *command, *(["--no-progress"] if command[0] == "train" else []))
        assert f"{tmp_path / 'taken'} is a file; expected a folder" in told
        assert "Errno" not in told


def test_train_writes_what_reports_and_attacks_read(run: Path, data: Path):
    for neck in ("srm", "none"):
        names = {path.name for path in (run / neck).iterdir()}
        assert {
            "model.safetensors",
            "config.json",
            "history.jsonl",
            "evaluation.json",
            "tensorboard",
        } <= names
        document = read_card(run / neck)
        assert (document["backbone"], document["neck"]) == ("test_convnext", neck)
        assert {key: document["config"][key] for key in SMALL} == SMALL
        dataset = document["card"]["dataset"]
        assert (dataset["root"], dataset["labels"]) == (str(data), "metric:ssim")
        assert dataset["fingerprint"] == open_dataset(data, "test", image_size=32).fingerprint
    rows = [json.loads(line) for line in (run / "srm" / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"loss_tau", "loss_entropy", "loss_balance", "val_srocc", "images_per_second"} <= rows[0].keys()
    assert 0 <= rows[0]["gain_active"] <= 1
    assert len(rows[0]["diagnostics"]["gate_weights"]) == 3
    about = read_json(run / "run.json")
    assert about["command"][0].startswith(f"srm-iqa train --data {data} --out {run}")
    assert about["seconds"] > 0
    assert about["dataset"]["fingerprint"] == dataset["fingerprint"]


def test_the_evaluation_is_of_the_best_checkpoint_on_the_test_split(run: Path, data: Path):
    from srm_model import load_model

    found = read_json(run / "srm" / "evaluation.json")
    test = open_dataset(data, "test", image_size=32)
    model, card = load_model(run / "srm")
    with torch.no_grad():
        scores = model(torch.stack([test[i][0] for i in range(len(test))])).numpy()
    np.testing.assert_allclose(found["scores"], scores, atol=1e-5)
    assert (found["split"], found["n"], found["labels"], found["names"]) == (
        "test",
        6,
        "metric:ssim",
        test.names,
    )
    assert found["srocc"] == pytest.approx(srocc(found["scores"], test.mos))
    assert "reference for" in found["kernels"]
    logistic = LogisticMap.from_dict(card["logistic"])
    assert found["plcc"] == pytest.approx(plcc(logistic(found["scores"]), test.mos))


def test_training_again_repeats_nothing_and_another_config_is_refused(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [
        "train",
        "--data",
        data,
        "--out",
        run,
        "--neck",
        "srm",
        *SETTINGS,
        "--backbone",
        "test_convnext",
    ]
    before = (run / "srm" / "state.safetensors").stat().st_mtime_ns
    assert main([*map(str, arguments), "--no-progress", "--device", "cpu"]) == 0
    assert (run / "srm" / "state.safetensors").stat().st_mtime_ns == before
    assert "srm " in capsys.readouterr().out
    message = fails(capsys, *arguments, "--epochs", "3", "--set=epochs=5", "--no-progress", "--device", "cpu")
    assert "epochs 2 there, 5 here" in message


def test_evaluate_agrees_with_training(run: Path, capsys: pytest.CaptureFixture[str]):
    before = read_json(run / "none" / "evaluation.json")
    assert main(["evaluate", str(run), "--batch-size", "4", "--device", "cpu", "--no-progress"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "srm", "none"]
    assert lines[2].split()[1:] == [f"{before['srocc']:.3f}", f"{before['plcc']:.3f}", "6"]
    after = read_json(run / "none" / "evaluation.json")
    np.testing.assert_allclose(after["scores"], before["scores"], atol=1e-5)
    assert after["sha256"] == before["sha256"]
    assert main(["evaluate", str(run / "none"), "--split", "val", "--device", "cpu", "--no-progress"]) == 0
    assert read_json(run / "none" / "evaluation.json") == after


def test_attack_writes_results_and_pictures_and_goes_on_where_it_stopped(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    arguments = ["attack", str(run), "--norm", "linf", "--eps", "4/255", "--steps", "2", "--restarts", "1"]
    arguments += ["--keep", "2", "--images", "5", "--device", "cpu", "--no-progress"]
    assert main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3
    for neck, other in (("srm", "none"), ("none", "srm")):
        path = run / neck / "attacks" / "linf-0.0156863.json"
        found = read_json(path)
        assert list(found["attacks"]) == ["pgd_mse", "pgd_drift", "pgd_pair_inversion", "transfer"]
        assert (found["steps"], found["restarts"], len(found["names"])) == (2, 1, 5)
        assert found["settings"]["surrogate"] == read_card(run / other)["sha256"]
        assert found["logistic"] == read_card(run / neck)["card"]["logistic"]
        entries = read_json(path.with_suffix("") / "examples.json")
        assert len(entries) == 2
        assert all(
            (path.with_suffix("") / entry[k]).is_file() for entry in entries for k in ("clean", "attacked")
        )
        assert not (path.with_suffix("") / "unfinished").exists()

    def not_again(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("attacked again")

    with monkeypatch.context() as patch:
        patch.setattr("srm_model.attacks.suite._attack_batch", not_again)
        assert main(arguments) == 0
        assert capsys.readouterr().out.splitlines() == table
        with pytest.raises(AssertionError, match="attacked again"):
            main([*arguments, "--steps", "3"])


def test_a_norm_without_default_budgets_needs_eps(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    class Bare(LInf):
        name = "bare"
        stated = "a bare budget is for any size"

    monkeypatch.setitem(NORMS, "bare", Bare())
    folder = shutil.copytree(run, tmp_path / "run") / "none"
    quiet = ("--norm", "bare", "--device", "cpu", "--no-progress")
    for command in ("attack", "audit"):
        told = fails(capsys, command, folder, *quiet)
        assert told == f"srm-iqa {command}: --norm bare: has no default budget; expected --eps\n"
        assert main([command, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "512×512 pixels and scaled to other sizes; a bare budget is for any size (default: " in text
        assert ("(default: linf l2)" in text) == (command == "attack")
        assert "(default: 1/255 and 4/255 for linf, 2.5 and 10 for l2)" in text or command == "audit"
        assert "(default: 4/255 for linf, 10 for l2)" in text or command == "attack"
    arguments = [*quiet, "--eps", "1/255", "--steps", "1", "--restarts", "1", "--keep", "0"]
    assert main(["attack", str(folder), *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["none", "bare", "1/255"]


PRINTS = re.compile(r"\bprint_(?:rows|json|table|clean|results)\(")


def test_every_command_that_prints_a_table_has_json():
    folder = Path(cli.__file__).parent
    printing, with_json = set(), set()
    for name, parser in _commands(make_parser()):
        if (run := parser.get_default("run")) is None:
            continue
        module = folder / f"{run.partition(':')[0]}.py"
        printing |= {name} if PRINTS.search(module.read_text(encoding="utf-8")) else set()
        with_json |= {name} if "--json" in parser._option_string_actions else set()
    assert printing | {" verify"} == with_json  # the module of `verify` calls `srm_kernels`, which prints
    assert len(printing) == 12
    for path in folder.glob("*.py"):
        assert path.name == "tables.py" or '"--json"' not in path.read_text(encoding="utf-8"), path


def test_what_type_and_level_alone_predict_is_printed_beside_each_srocc(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rated = shutil.copytree(data, tmp_path / "rated")
    labels = read_json(rated / "labels.json")
    del labels["metric"]
    write_json(rated / "labels.json", {**labels, "opinions": "TID2013"})
    names = [text.split()[1] for text in (rated / "mos_with_names.txt").read_text().splitlines()]
    opinions = np.random.default_rng(0).uniform(1, 8, len(names))
    (rated / "mos_with_names.txt").write_text(
        "".join(f"{opinion:.3f} {name}\n" for opinion, name in zip(opinions, names, strict=True))
    )
    dataset = open_dataset(rated, "test")
    whole, chosen = dataset.type_level_srocc, [dataset.names[i] for i in spread(6, 2)]
    assert whole == dataset.type_level_srocc_of(dataset.names)
    part = dataset.type_level_srocc_of(chosen)
    assert abs(part) == 1 > abs(whole)
    line = "Predictor that knows only distortion type and level: SROCC {:.3f} on the same {} images"
    out, common = tmp_path / "out", ["--device", "cpu", "--no-progress"]

    settings = ["--neck", "none", "--backbone", "test_convnext", *SETTINGS, "--set=epochs=1"]
    assert main(["train", "--data", str(rated), "--out", str(out), *settings, *common]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [line.format(whole, 6)]
    assert read_json(out / "none" / "evaluation.json")["type_level_srocc"] == whole

    evaluate = ["evaluate", str(out), *common]
    assert main(evaluate) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [line.format(whole, 6)]
    assert main([*evaluate, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["type_level_srocc"] == whole
    assert read_json(out / "none" / "evaluation.json")["type_level_srocc"] == whole
    validation = open_dataset(rated, "val")
    assert main([*evaluate, "--split", "val", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["type_level_srocc"] == validation.type_level_srocc_of(
        validation.names
    )

    attack = ["attack", str(out), "--norm", "linf", "--eps", "4/255", "--steps", "1", "--restarts", "1"]
    attack += ["--limit", "2", *common]
    path = out / "none" / "attacks" / "linf-0.0156863.json"
    for stored in (True, False):  # a result of an earlier version has no such entry
        assert main(attack) == 0
        assert capsys.readouterr().out.splitlines()[2] == line.format(part, 2)
        found = read_json(path)
        assert (found["names"], found.get("type_level_srocc")) == (chosen, part if stored else None)
        write_json(path, {k: v for k, v in found.items() if k != "type_level_srocc"})
    assert main([*attack, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["type_level_srocc"] == part


def test_checkpoints_of_several_test_sets_have_a_line_each(capsys: pytest.CaptureFixture[str]):
    values = {"a": (0.9, 6), "b": (0.8, 6), "c": (0.9, 6), "d": (None, 4)}
    tables.print_type_level(
        [{"name": n, "type_level_srocc": v, "images": i} for n, (v, i) in values.items()], "name"
    )
    start = "Predictor that knows only distortion type and level: SROCC"
    assert capsys.readouterr().out.splitlines() == [
        f"{start} 0.900 on the 6 images of a, c",
        f"{start} 0.800 on the 6 images of b",
    ]


def in_both_forms(
    capsys: pytest.CaptureFixture[str], *arguments: Any
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Return the lines of a command's table, split into words, and the rows that `--json` prints."""
    texts = []
    for more in ([], ["--json"]):
        assert main([*map(str, arguments), "--device", "cpu", "--no-progress", *more]) in (0, 1)
        texts.append(capsys.readouterr().out.splitlines())
    return [line.split() for line in texts[0]], [json.loads(line) for line in texts[1]]


def test_json_has_the_values_of_the_table(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = shutil.copytree(run, tmp_path / "run")

    def figures(*values: float | None) -> list[str]:
        return ["undefined" if value is None else f"{value:.3f}" for value in values]

    table, rows = in_both_forms(capsys, "evaluate", folder)
    assert table[0] == ["checkpoint", "SROCC", "PLCC", "images"]
    assert table[1:] == [
        [row["checkpoint"], *figures(row["srocc"], row["plcc"]), str(row["images"])] for row in rows
    ]
    evaluation = read_json(folder / "srm" / "evaluation.json")
    assert rows[0] == {
        "checkpoint": "srm",
        **{k: evaluation[k] for k in ("srocc", "plcc")},
        "images": 6,
        "type_level_srocc": None,  # the labels are no opinions
    }

    trained = ["--data", data, "--out", folder, "--neck", "srm", "none", *SETTINGS]
    table, rows = in_both_forms(capsys, "train", *trained, "--backbone", "test_convnext")
    assert table[0] == ["neck", "SROCC", "PLCC", "test", "images"]
    assert table[1:] == [
        [row["neck"], *figures(row["srocc"], row["plcc"]), str(row["images"])] for row in rows
    ]

    brief = ("--steps", "1", "--restarts", "1", "--limit", "4")
    table, rows = in_both_forms(capsys, "attack", folder, "--norm", "linf", "--eps", "4/255", *brief)
    assert len(rows) == 2
    for line, row in zip(table[1:], rows, strict=False):
        correlations = [row[f"{which}_{name}"] for name in ("srocc", "plcc") for which in ("clean", "worst")]
        assert line == [
            row["model"],
            "linf",
            "4/255",
            *figures(*correlations),
            row["worst_attack"],
            str(row["images"]),
        ]
        assert row["eps"] == 4 / 255
        result = read_json(folder / row["model"] / "attacks" / "linf-0.0156863.json")
        assert row["worst_srocc"] == result["worst"]["srocc"]
        assert row["doubts"] == result["worst"]["doubts"]

        assert row["type_level_srocc"] is None

    table, rows = in_both_forms(capsys, "audit", folder / "none", *brief, "--queries", "5")
    checks = read_json(folder / "none" / "audit.json")["checks"]
    assert len(rows) == len(checks) == len(table) - 2 == 10
    for line, row, check in zip(table[1:-1], rows, checks, strict=True):
        verdict = {True: "passed", False: "failed", None: "not run"}[row["passed"]]
        assert " ".join(line) == f"{row['title']} {verdict} {row['figure']}"
        assert row.pop("check") == check["name"]
        assert row == {"model": "none", "norm": "linf", "eps": 4 / 255} | {
            key: check[key] for key in ("title", "passed", "figure", "data")
        }


def test_json_keeps_other_text_off_standard_output(capsys: pytest.CaptureFixture[str]):
    rows = [
        {"name": "κ\udcff", "value": float("nan"), "hidden": 1 / 3},
        {"name": "b", "value": 2, "hidden": None},
    ]
    columns: tables.Columns = {"name": "name", "doubled": lambda row: 2 * row["value"]}
    tables.print_rows(rows[1:], columns)
    tables.print_text("beside")
    assert capsys.readouterr() == ("name  doubled\nb           4\nbeside\n", "")
    tables.print_rows(rows, columns, as_json=True, table="first")
    tables.print_text("\nbeside\n", as_json=True)
    printed, said = capsys.readouterr()
    assert [json.loads(line) for line in printed.splitlines()] == [
        {"table": "first", "name": "κ\udcff", "value": None, "hidden": 1 / 3},
        {"table": "first", **rows[1]},
    ]
    assert said == "beside\n"


def test_report_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text()
    assert "metric" in page
    assert "none" in page


def test_a_data_set_that_changed_since_training_is_reported(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    import shutil

    copy, moved = tmp_path / "run", tmp_path / "set"
    shutil.copytree(run / "none", copy)
    shutil.copytree(data, moved)
    config = copy / "config.json"
    config.write_text(config.read_text().replace(str(data), str(moved)))
    assert main(["evaluate", str(copy), "--device", "cpu", "--no-progress"]) == 0
    capsys.readouterr()
    lines = (moved / "mos_with_names.txt").read_text().splitlines()
    (moved / "mos_with_names.txt").write_text("\n".join(lines[:-1]) + "\n")
    message = fails(capsys, "evaluate", copy, "--device", "cpu", "--no-progress")
    assert "differs from the dataset of training" in message
    assert main(["evaluate", str(copy), "--data", str(moved), "--device", "cpu", "--no-progress"]) == 0


def test_score_prints_a_line_per_photograph(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    paths = [folder / "astronaut.png", folder / "chelsea.png", folder / "rocket.jpg"]
    images = torch.stack([load_image(path, 64) for path in paths])
    model = build_model("test_convnext", weights=checkpoint)
    with torch.no_grad():
        expected = model(images)
    assert main(["score", str(checkpoint), *map(str, paths), "--batch-size", "2", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert re.fullmatch(
        rf"scoring with the checkpoint test_convnext/\w+@[0-9a-f]{{12}} in {checkpoint}.*\n", captured.err
    )
    rows = [line.split("\t") for line in captured.out.splitlines()]
    assert [row[1] for row in rows] == [str(path) for path in paths]
    # four decimals are printed
    np.testing.assert_allclose([float(row[0]) for row in rows], expected, atol=6e-5)

    assert main(["score", str(checkpoint), *map(str, paths), "--json", "--device", "cpu"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in found] == [str(path) for path in paths]
    np.testing.assert_allclose([row["score"] for row in found], expected, atol=1e-5)


def test_backends_of_a_checkpoint_are_changed_by_an_argument(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A checkpoint with the Triton backend fails on a CPU. `--backend` and `--set` select another backend."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "srm"
    document = read_json(folder / "config.json")
    document["config"]["backend"] = "triton"
    write_json(folder / "config.json", document)
    photograph = next((Path(read_json(run / "run.json")["dataset"]["root"]) / "reference_images").iterdir())
    brief = ("--norm", "linf", "--eps", "1/255", "--steps", "1", "--restarts", "1")
    for arguments, change in (
        (("evaluate", folder, "--no-progress"), ("--backend", "none")),
        (("score", folder, photograph), ("--backend", "torch")),
        (("diagnose", folder, "--images", "2", "--no-progress"), ("--backend", "reference")),
        (("attack", folder, *brief, "--no-progress"), ("--set", "backend=none")),
    ):
        given = [str(a) for a in (*arguments, "--device", "cpu")]
        assert "backend 'triton' cannot run" in fails(capsys, *given)
        assert main([*given, *change]) == 0
        capsys.readouterr()


def test_score_tells_of_bad_files_and_scores_the_good_ones(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    good, text, absent = tmp_path / "good.png", tmp_path / "text.png", tmp_path / "absent.png"
    Image.new("L", (30, 90), 100).save(good)
    text.write_text("no image")
    arguments = ["score", str(checkpoint), str(text), str(good), str(absent), "--device", "cpu"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert [line.split("\t")[1] for line in captured.out.splitlines()] == [str(good)]
    said, *errors = captured.err.splitlines()
    assert said.startswith("scoring with the checkpoint ")
    assert len(errors) == 2
    assert str(text) in errors[0]
    assert f"{absent}: no such file; expected an image" in errors[1]
    assert main([*arguments, "--json"]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [sorted(row) for row in rows] == [
        ["error", "model", "path", "score"],
        ["model", "path", "score"],
        ["error", "model", "path", "score"],
    ]


def test_bad_arguments_are_one_sentence(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path
):
    train = [
        "train",
        "--data",
        data,
        "--out",
        tmp_path / "new",
        "--backbone",
        "test_convnext",
        "--device",
        "cpu",
    ]
    for arguments, sentence in [
        (["train"], "the following arguments are required: --data, --out"),
        (["fly"], "invalid choice: 'fly'"),
        ([*train, "--epochs", "many"], "invalid int value: 'many'"),
        ([*train, "--set", "rank"], "--set rank: expected KEY=VALUE"),
        (["attack", run, "--set", "landmarks=leverage"], "landmarks: fixed by training; here, --set"),
        (["audit", run, "--set", "landmarks=leverage"], "landmarks: fixed by training; here, --set"),
        ([*train, "--set", "rnak=3"], "unknown config key rnak"),
        ([*train, "--set", "rank=0"], "config rank=0: expected at least 1"),
        ([*train, "--set", "epochs=2.5"], "config epochs=2.5: expected int"),
        ([*train, "--config", tmp_path / "none.json"], "none.json: no such file"),
        ([*train, "--device", "abacus"], "--device abacus: cannot be used on this machine"),
        ([*train[:1], "--data", tmp_path, *train[3:]], "neither TID2013"),
        (
            [*train[:5], "--backbone", "test_convent"],
            "backbone 'test_convent': expected the name of a timm model",
        ),
        (["evaluate", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["evaluate", tmp_path], "has no checkpoint"),
        (["evaluate", checkpoint], "does not name its dataset of training"),
        (["attack", run, "--eps", "1/255"], "--eps was given with --norm linf l2; expected only the norm"),
        (["attack", run, "--norm", "l2", "--eps", "x"], "'x' is neither a number nor a fraction"),
        (["score", run, "a.png"], "has several checkpoints"),
        (["score", tmp_path, "a.png"], "has no checkpoint"),
        (["report", tmp_path / "nowhere"], "no such folder; expected the folder of a run"),
        (["data", "check", tmp_path / "nowhere"], "no such folder"),
        (["data", "synthesize", tmp_path / "out", "--types", "25"], "types [25]"),
    ]:
        assert sentence in fails(capsys, *arguments), arguments
    assert not (tmp_path / "new").exists()


def test_every_config_field_can_be_set_and_order_of_precedence(tmp_path: Path):
    import argparse

    from srm_model.cli.options import add_config, config_from

    parser = argparse.ArgumentParser()
    add_config(parser, "epochs", "seed")
    other = SRMConfig(
        qk_norm=None,
        gain_cap=None,
        links=((4, 3), (3, 2)),
        landmarks="uniform",
        solver="lu",
        dyt=False,
        ridge=0.5,
    )
    pairs = []
    for key, value in other.to_dict().items():
        text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
        pairs += ["--set", f"{key}={text}"]
    assert config_from(parser.parse_args(pairs)) == other
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"epochs": 7, "seed": 7, "rank": 7}))
    args = parser.parse_args(["--config", str(file), "--epochs", "8", "--seed", "8", "--set", "seed=9"])
    config = config_from(args)
    assert (config.rank, config.epochs, config.seed) == (7, 8, 9)
    file.write_text(json.dumps({"format": "srm-iqa/1", "config": {"rank": 5}}))
    assert config_from(parser.parse_args(["--config", str(file)])).rank == 5


def test_data_check_says_what_is_there(data: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "check", str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "labels: metric:ssim" in lines
    assert "splits: train 18, val 6, test 6" in lines
    assert main(["data", "check", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(data, progress=False)


def test_an_unexpected_error_keeps_its_traceback(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def fault(*arguments: Any) -> None:
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr("srm_model.runs.open_checkpoint", fault)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        main(["score", str(checkpoint), "x.png"])


def test_a_bad_input_shows_where_it_arose_if_asked(tmp_path: Path):
    with pytest.raises(ValueError, match="no such folder; expected the folder of a run"):
        main(["report", str(tmp_path / "nowhere"), "--traceback"])


def test_ctrl_c_ends_with_130_and_leaves_the_last_epoch_whole(data: Path, tmp_path: Path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "srm_model", "train", "--data", str(data), "--out", str(out), *SETTINGS]
    command += ["--backbone", "test_convnext", "--device", "cpu", "--set=epochs=10000"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Shells start background jobs with SIGINT ignored, and child processes inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    limit = time.monotonic() + 100
    while not (out / "srm" / "history.jsonl").exists() and time.monotonic() < limit:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "srm-iqa: interrupted; finished results are kept"
    assert not list(out.rglob(".*"))
    finished = len((out / "srm" / "history.jsonl").read_text().splitlines())
    assert 1 <= finished < 10000
    assert build_model("test_convnext", weights=out / "srm").config.epochs == 10000


def test_help_tells_of_every_table_and_every_option(capsys: pytest.CaptureFixture[str]):
    main(["report", "--help"])
    assert list(study_tables._BUILDERS) == [1, 2, *range(5, 16)]
    assert "only these tables of a study (1, 2, and 5 to 15), " in " ".join(capsys.readouterr().out.split())
    silent = []
    for name, parser in _commands(make_parser()):
        silent += [f"{name} {a.dest}" for a in parser._actions if a.option_strings and not a.help]
    assert silent == []


def _commands(
    parser: argparse.ArgumentParser, name: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, made in action.choices.items():
                yield f"{name} {word}", made
                yield from _commands(made, f"{name} {word}")


def test_help_imports_nothing_heavy():
    code = (
        "import sys, srm_model.cli; srm_model.cli.main(['--help']); "
        "print(sorted({'torch', 'numpy', 'timm'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    for name in "demo data train evaluate attack audit ablate diagnose profile score report export".split():
        assert f"\n    {name} " in found.stdout


def test_audit_writes_a_page_and_says_what_failed(run: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["audit", str(run / "none"), "--images", "4", "--steps", "3", "--restarts", "2"]
    arguments += [
        "--queries",
        "10",
        "--certify",
        "--set",
        "smoothing_samples=40",
        "--set",
        "eps_smoothing=[0.1]",
    ]
    code = main([*arguments, "--device", "cpu", "--no-progress"])
    found = read_json(run / "none" / "audit.json")
    assert code == int(not found["passed"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 10 + 1
    assert (found["images"], found["steps"], found["queries"]) == (4, 3, 10)
    assert found["eps"] == 4 / 255
    assert {check["name"]: check["passed"] for check in found["checks"]}["transfer"] is not None
    (certificate,) = found["certificates"]
    assert certificate["eps"] == pytest.approx(0.1 * 32 / 512)
    assert len(certificate["median"]) == 4
    page = (run / "none" / "audit.html").read_text()
    assert "Bounds by median smoothing" in page
    assert "test split" in page


def _attack_as_rank(rank: int, port: int, arguments: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with (Path(folder) / f"rank{rank}.txt").open("w") as said, contextlib.redirect_stdout(said):
        code = main(arguments)
    (Path(folder) / f"rank{rank}.code").write_text(str(code))


@pytest.mark.forks
def test_under_torchrun_the_ranks_share_the_batches_and_one_writes(run: Path, tmp_path: Path):
    folders = {name: tmp_path / name for name in ("one", "two")}
    for folder in folders.values():
        shutil.copytree(run, folder)
        for neck in ("srm", "none"):
            shutil.rmtree(folder / neck / "attacks", ignore_errors=True)

    def arguments(name: str) -> list[str]:
        settings = ["--norm", "linf", "--eps", "4/255", "--steps", "2", "--restarts", "1", "--keep", "2"]
        settings += ["--batch-size", "2", "--suite", "extended", "--set", "attack_queries=10"]
        return ["attack", str(folders[name] / "none"), *settings, "--device", "cpu", "--no-progress"]

    assert main(arguments("one")) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(
        _attack_as_rank, args=(port, arguments("two"), str(tmp_path)), nprocs=2, start_method="fork"
    )
    assert [(tmp_path / f"rank{rank}.code").read_text() for rank in range(2)] == ["0", "0"]
    assert (tmp_path / "rank0.txt").read_text().startswith("model")
    assert (tmp_path / "rank1.txt").read_text() == ""
    one, two = (folder / "none" / "attacks" for folder in folders.values())
    files = {path.relative_to(one) for path in one.rglob("*")}
    assert files == {path.relative_to(two) for path in two.rglob("*")}
    for file in files:
        if (one / file).is_file():
            assert (one / file).read_bytes() == (two / file).read_bytes()
    assert len(read_json(two / "linf-0.0156863.json")["attacks"]) == 10


def test_a_set_is_synthesised_by_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The output folder can be new, or existing and empty."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for path in (data / "reference_images").iterdir():
        (photographs / path.name.lower()).write_bytes(path.read_bytes())
    for name in ("new", "empty"):
        out = tmp_path / name
        if name == "empty":
            out.mkdir()
        arguments = ["data", "synthesize", str(out), "--photographs", str(photographs), "--no-progress"]
        assert main([*arguments, "--types", "1", "--levels", "1", "5", "--metric", "ssim"]) == 0
        assert "labels: metric:ssim" in capsys.readouterr().out
        assert len((out / "mos_with_names.txt").read_text().splitlines()) == 10
    opinions = tmp_path / "mos.txt"
    opinions.write_text("".join(f"{n}.5 I0{n}_01_{level}.bmp\n" for n in range(1, 6) for level in (1, 5)))
    arguments = [
        "data",
        "synthesize",
        str(tmp_path / "people"),
        "--photographs",
        str(photographs),
        "--crop",
        "64x64",
    ]
    assert (
        main([*arguments, "--opinions", str(opinions), "--types", "1", "--levels", "1", "5", "--no-progress"])
        == 0
    )
    assert "labels: opinions:TID2013" in capsys.readouterr().out


@pytest.mark.parametrize("quiet", [[], ["--no-progress"]])
@pytest.mark.parametrize("action", ["check", "synthesize"])
def test_checking_shows_a_bar_unless_switched_off(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, quiet: list[str]
):
    from srm_model.data import base

    shown: list[bool] = []
    original = base.find_faults

    def recorded(paths: Any, *, verify: str, progress: bool) -> Any:
        shown.append(progress)
        return original(paths, verify=verify, progress=progress)

    monkeypatch.setattr(base, "find_faults", recorded)
    photographs = ["--photographs", str(data / "reference_images"), "--types", "8", "--levels", "1"]
    arguments = {
        "check": [str(data)],
        "synthesize": [str(tmp_path / "set"), *photographs, "--metric", "ssim"],
    }
    assert main(["data", action, *arguments[action], *quiet]) == 0
    assert set(shown) == {not quiet}
