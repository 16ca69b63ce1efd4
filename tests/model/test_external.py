"""Tests of `--model`: attacks, audits and scores of models from outside this package."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from srm_model.attacks.guard import differentiable
from srm_model.cli import main
from srm_model.data import load_image
from srm_model.data.labelled import labelled_images
from srm_model.external import ExternalModel, Interface, open_model
from srm_model.files import read_json

SIZE = 32
MODULE = '''
import torch
from torch import nn


class Sharpness(nn.Module):
    def forward(self, images):
        grey = images.mean(1)
        return (grey[:, 1:] - grey[:, :-1]).abs().mean((1, 2))


class Blur(Sharpness):
    lower_better = True

    def forward(self, images):
        return -super().forward(images)


class Counted(nn.Module):
    """No gradient: a statistic that NumPy takes."""

    def forward(self, images):
        return torch.tensor([float(image.numpy().std()) for image in images.detach()])


class Attached(nn.Module):
    """No gradient: NumPy refuses images that require one."""

    def forward(self, images):
        return torch.tensor([float(image.numpy().std()) for image in images])


class Bytes(Sharpness):
    def forward(self, images):
        assert images.max() > 2, "expected 0 to 255"
        return super().forward(images)


class Channels(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


class WithReference(nn.Module):
    def forward(self, images, reference):
        return (images - reference).mean((1, 2, 3))


class FullReference(nn.Module):
    metric_mode = "FR"

    def forward(self, target, ref=None):
        return (target - ref).mean((1, 2, 3))


class Picky(Sharpness):
    def forward(self, images):
        assert images.std((1, 2, 3)).min() > 0.02, "too flat"
        return super().forward(images)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 1)

    def forward(self, images):
        return self.head(images.flatten(1))


made = Sharpness()
three = 3


def with_argument(name):
    return Sharpness()


def broken():
    raise RuntimeError("no weights\\nsecond line")
'''


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create eight images with increasing noise and decreasing labels."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = ["file,opinion"]
    for number in range(8):
        noise = rng.normal(0, 2 + 6 * number, (40, 48, 3))
        Image.fromarray(np.clip(128 + noise, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{9 - number}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a module `theirs` in the current folder."""
    (tmp_path / "theirs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs", raising=False)


def command(name: str, model: str, images: Path, *more: str) -> list[str]:
    return [
        *(name, "--model", model, "--images", str(images), "--labels", str(images / "labels.csv")),
        *("--size", str(SIZE), "--out", "out", "--device", "cpu", "--no-progress"),
        *("--steps", "3", "--restarts", "1", "--set", "attack_queries=20", *more),
    ]


def attacked(model: str, images: Path, *more: str) -> dict[str, Any]:
    assert main(command("attack", model, images, "--norm", "linf", "--eps", "4/255", *more)) == 0
    return dict(read_json(Path("out/attacks/linf-0.0156863.json")))


def test_a_model_is_attacked_on_the_scale_of_the_labels(images: Path, capsys: pytest.CaptureFixture[str]):
    found = attacked("theirs:Sharpness", images, "--lower-is-better")
    assert found["clean"]["srocc"] == pytest.approx(1)
    assert np.mean(found["clean"]["scores"]) == pytest.approx(np.mean(found["mos"]), abs=1e-6)
    assert np.std(found["clean"]["scores"]) == pytest.approx(np.std(found["mos"]), abs=1e-6)
    assert found["worst"]["srocc"] < found["clean"]["srocc"]
    assert found["incomplete"] == ["transfer"]
    out = capsys.readouterr()
    assert "theirs:Sharpness" in out.out
    assert out.err == ""


def test_what_is_there_is_not_attacked_again(images: Path, monkeypatch: pytest.MonkeyPatch):
    first = attacked("theirs:Sharpness", images, "--lower-is-better")
    monkeypatch.setattr("srm_model.attacks.Suite.run", None)
    assert attacked("theirs:Sharpness", images, "--lower-is-better") == first
    with pytest.raises(AssertionError):
        attacked("theirs:Sharpness", images, "--lower-is-better", "--seed", "1")


def test_changed_code_is_attacked_again(images: Path, monkeypatch: pytest.MonkeyPatch):
    """Both versions have the same name and no weights."""
    first = attacked("theirs:Sharpness", images, "--lower-is-better")
    monkeypatch.delitem(sys.modules, "theirs")
    Path("theirs.py").write_text(MODULE.replace("(1, 2))", "(1, 2)) ** 2"))
    importlib.invalidate_caches()
    assert attacked("theirs:Sharpness", images, "--lower-is-better") != first


def test_results_of_another_model_are_kept(images: Path, capsys: pytest.CaptureFixture[str]):
    first = attacked("theirs:Sharpness", images, "--lower-is-better")
    assert main(command("attack", "theirs:Blur", images, "--norm", "linf", "--eps", "4/255")) == 2
    assert "has results of theirs:Sharpness; expected another folder as --out" in capsys.readouterr().err
    assert read_json(Path("out/attacks/linf-0.0156863.json")) == first


def test_an_audit_of_another_model_is_kept(images: Path, capsys: pytest.CaptureFixture[str]):
    """The audit refuses the folder before it loads the model."""
    Path("out").mkdir()
    Path("out/audit.json").write_text('{"model_name": "theirs:Blur"}')
    assert main(command("audit", "theirs:nope", images)) == 2
    expected = "out/audit.json: has results of theirs:Blur; expected another folder as --out"
    assert capsys.readouterr().err == f"srm-iqa audit: {expected}\n"
    assert Path("out/audit.json").read_text() == '{"model_name": "theirs:Blur"}'
    assert main(command("attack", "theirs:nope", images)) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.json", "audit.json", "attacks/linf-0.0156863.json"])
def test_the_folder_of_a_checkpoint_is_refused(name: str, images: Path, capsys: pytest.CaptureFixture[str]):
    path = Path("out", name)
    path.parent.mkdir(parents=True)
    path.write_text('{"title": "a run", "settings": {"checkpoint": "0"}}')
    for what in ("attack", "audit"):
        assert main(command(what, "theirs:made", images)) == 2
        error = capsys.readouterr().err
        assert f"{path}: has results of a checkpoint or a run; expected another folder as --out" in error


@pytest.mark.parametrize("model", ["theirs:Sharpness", "theirs:Counted"])
def test_the_attacks_on_a_model_have_a_page(model: str, images: Path, capsys: pytest.CaptureFixture[str]):
    found = attacked(model, images, "--lower-is-better")
    assert main(["report", "out"]) == 0
    assert capsys.readouterr().out.endswith("out/report.html\n")
    page = re.sub(r"(?s)<style>.*?</style>|<[^>]*>", "", Path("out/report.html").read_text())
    assert f"The model {model} comes from another package." in page
    assert "It was attacked on 8 images at L∞" in page
    assert "srm-iqa attack --model" in page
    assert "label (scores of labels.csv, column opinion)" in Path("out/report.html").read_text()
    for scores in found["attacks"].values():
        assert f"{scores['srocc']:.3f}".replace("-", "−") in page
    for words in ("neck", "logistic", "was trained", "Training"):
        assert words not in page
    assert ("with 20 queries per image" in page) is (model == "theirs:Counted")
    assert ("3 steps with 1 random start" in page) is (model != "theirs:Counted")
    Path("out/run.json").unlink()
    assert main(["report", "out"]) == 0
    assert f"The model {model} comes from another package." in Path("out/report.html").read_text()


@pytest.mark.parametrize(
    ("model", "options", "remedy"),
    [
        ("theirs:Sharpness", [], "--lower-is-better reverses them"),
        ("theirs:Raised", ["--lower-is-better"], "they are reversed by --lower-is-better"),
        ("theirs:Lowered", [], "because the model's attribute lower_better is true"),
    ],
)
def test_the_remedy_for_reversed_scores_fits_their_cause(
    model: str, options: list[str], remedy: str, images: Path, capsys: pytest.CaptureFixture[str]
):
    """`Raised` rates sharp images, which have low labels, as bad. `Lowered` also says that low scores are good."""
    raised = "class Raised(Sharpness):\n    def forward(self, x):\n        return -super().forward(x)\n"
    lowered = "class Lowered(Raised):\n    lower_better = True\n"
    Path("theirs.py").write_text(f"{MODULE}\n\n{raised}\n\n{lowered}")
    attacked(model, images, *options)
    assert remedy in capsys.readouterr().err


def test_a_model_for_values_up_to_255_is_pointed_to_its_option(
    images: Path, capsys: pytest.CaptureFixture[str]
):
    body = "    def forward(self, x):\n        raise ValueError('expects 0-255')\n"
    Path("theirs.py").write_text(f"{MODULE}\n\nclass Wide(Sharpness):\n{body}")
    assert main(command("attack", "theirs:Wide", images)) == 2
    expected = "the model raised ValueError: expects 0-255; --peak 255 gives it values from 0 to 255"
    assert expected in capsys.readouterr().err


def test_a_program_with_a_static_batch_says_how_to_export_it(
    images: Path, capsys: pytest.CaptureFixture[str]
):
    torch.export.save(torch.export.export(Weighted(), (torch.rand(1, 3, SIZE, SIZE),)), Path("static.pt2"))
    assert main(command("attack", "static.pt2", images)) == 2
    assert "export it with a dynamic batch size" in capsys.readouterr().err


def test_a_table_without_a_header_is_refused(images: Path, tmp_path: Path):
    """Otherwise, the first image would be left out without notice."""
    table = tmp_path / "table.csv"
    table.write_text((images / "labels.csv").read_text().partition("\n")[2])
    with pytest.raises(ValueError, match=r"the first line names the image 0\.png; expected a header"):
        labelled_images(images, table, image_size=SIZE)


def test_scores_against_the_labels_are_pointed_out(images: Path, capsys: pytest.CaptureFixture[str]):
    assert attacked("theirs:Sharpness", images)["clean"]["srocc"] == pytest.approx(-1)
    assert "the scores fall as the labels rise (SROCC -1.000)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["theirs:made", "theirs:Sharpness"])
def test_an_instance_and_a_class_are_models(name: str):
    assert isinstance(open_model(name), ExternalModel)


def test_the_attribute_lower_better_is_followed_unless_overruled(images: Path):
    image = load_image(images / "3.png", SIZE)[None]
    score = open_model("theirs:Sharpness")(image)
    assert torch.equal(open_model("theirs:Blur")(image), score)
    assert torch.equal(open_model("theirs:Blur", Interface(lower_is_better=False))(image), -score)


def test_images_are_normalised_as_asked(images: Path):
    seen: list[Tensor] = []

    class Looking(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.mean((1, 2, 3))

    image = torch.rand(2, 3, 4, 4)
    ExternalModel(Looking(), Interface((0.1, 0.2, 0.3), (0.5, 1.0, 2.0), 255.0))(image)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0])
    expected = (image - mean[:, None, None]) / std[:, None, None] * 255
    assert torch.allclose(seen[0], expected, rtol=1e-6, atol=1e-4)
    attacked("theirs:Bytes", images, "--peak", "255")


@pytest.mark.parametrize("model", ["theirs:Counted", "theirs:Attached"])
def test_a_model_without_gradient_is_attacked_by_queries_alone(
    model: str, images: Path, capsys: pytest.CaptureFixture[str]
):
    found = attacked(model, images, "--lower-is-better")
    assert list(found["attacks"]) == ["square_mse", "square_raise", "square_lower"]
    assert found["worst"]["srocc"] <= found["clean"]["srocc"]
    assert "only query attacks are run" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["theirs:Counted", "theirs:Attached"])
def test_the_audit_says_what_it_could_not_ask(model: str, images: Path, capsys: pytest.CaptureFixture[str]):
    assert main(command("audit", model, images, "--lower-is-better")) == 0
    found = read_json(Path("out/audit.json"))
    checks = {check["name"]: check for check in found["checks"]}
    unasked = [name for name, check in checks.items() if "have no gradient" in check["figure"]]
    assert unasked == ["steps", "eps", "gradients", "restarts", "derivative", "black_box"]
    assert [name for name, check in checks.items() if check["passed"] is None] == [
        *unasked[:5],
        "transfer",
        "black_box",
    ]
    assert (
        checks["unbounded"]["passed"] is checks["randomness"]["passed"] is checks["batch"]["passed"] is True
    )
    assert found["has_gradient"] is False
    text = Path("out/audit.html").read_text()
    assert f"Audit of {model}" in text
    assert "<strong>The scores have no gradient.</strong> This is not evidence of robustness" in text
    out, err = capsys.readouterr()
    assert "0 of 10 checks failed; the scores have no gradient, which is not evidence of robustness" in out
    assert "checks that need gradients are not run" in err
    capsys.readouterr()


def test_a_model_of_one_size_scores_at_that_size(images: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["score", "--model", "theirs:Fixed", "--size", str(SIZE), str(images / "0.png")]) == 0
    assert capsys.readouterr().out.endswith("\t" + str(images / "0.png") + "\n")
    assert main(["score", "--model", "theirs:Fixed", "--size", "40", str(images / "0.png")]) == 2
    assert "the model fails on torch.float32 images of shape (1, 3, 40, 40)" in capsys.readouterr().err


def test_an_image_that_the_model_fails_on_is_named_and_the_others_are_scored(
    images: Path, capsys: pytest.CaptureFixture[str]
):
    files = [str(images / f"{number}.png") for number in (5, 0, 6)]
    assert main(["score", "--model", "theirs:Picky", "--size", str(SIZE), "--json", *files]) == 2
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["path"] for row in found] == files
    assert [row["score"] is None for row in found] == [False, True, False]
    assert found[1]["error"].startswith(f"{files[1]}: the model fails on")
    assert err.count("too flat") == 1


def test_scores_are_the_models_own(images: Path, capsys: pytest.CaptureFixture[str]):
    files = [str(images / f"{number}.png") for number in (0, 5)]
    assert main(["score", "--model", "theirs:Blur", "--size", str(SIZE), *files, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = open_model("theirs:Blur", Interface(lower_is_better=False))(
        torch.stack([load_image(file, SIZE) for file in files])
    )
    assert [row["score"] for row in found] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("theirs", "expected MODULE:NAME"),
        ("theirs:", "expected MODULE:NAME"),
        ("nothing_of_this_name:x", "No module named"),
        ("theirs:nope", "theirs has no nope"),
        ("theirs:three", "a int; expected an nn.Module"),
        ("theirs:with_argument", "needs arguments"),
        ("theirs:broken", "broken() failed (RuntimeError: no weights)"),
        ("theirs:Channels", "shape (1, 3) for 1 images"),
        ("theirs:WithReference", "needs images, reference"),
        ("theirs:FullReference", "compares with a reference image"),
        ("absent.pt2", "no such file"),
        ("theirs.py.pt2", "not an exported program"),
        (
            "pickled.pt2",
            "has pickled objects, as torch.save and torch.jit.save write them; expected a file that",
        ),
        ("empty.pt2", "not loadable as an exported program"),
        ("./theirs:made", "./theirs is a path; expected a module"),
        ("theirs.py:made", "such as theirs:made"),
    ],
)
def test_what_is_no_model_is_one_sentence(
    model: str, words: str, images: Path, capsys: pytest.CaptureFixture[str]
):
    Path("theirs.py.pt2").write_text("no archive")
    torch.save(nn.Linear(2, 1), "pickled.pt2")
    with zipfile.ZipFile("empty.pt2", "w") as archive:
        archive.writestr("empty/other", "")
    assert main(command("attack", model, images)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert "\nW" not in error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--limit", "1"], "--limit 1: expected at least 2, because a correlation needs two images"),
        (
            ["--label-range", "9", "0"],
            "--label-range 9 0: expected the worst score, then the best score, which is",
        ),
        (["--label-range", "0", "nan"], "--label-range 0 nan: expected the worst score"),
        (["--out", "/proc"], "/proc: not writable ("),
        (["--out", "/proc/absent"], "/proc/absent: not writable ("),
    ],
)
def test_options_that_cannot_work_are_one_sentence(
    options: list[str], words: str, images: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("attack", "audit"):
        assert main(command(name, "theirs:made", images, *options)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"srm-iqa {name}: {words}")
        assert error.count("\n") == 1


def test_a_table_with_one_image_is_refused(images: Path, capsys: pytest.CaptureFixture[str]):
    table = Path("one.csv")
    table.write_text("file,opinion\n3.png,2\n")
    given = command("attack", "theirs:made", images, "--label-range", "0", "9", "--labels", "one.csv")
    assert main(given) == 2
    assert "one.csv: lists one image; expected at least two" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["attack", "audit"])
def test_nearly_equal_scores_point_to_the_option_for_0_to_255(
    name: str, images: Path, capsys: pytest.CaptureFixture[str]
):
    """`Rounding` works on whole numbers, as models for pixels from 0 to 255 do."""
    rounding = "return 50 + 1e-4 * super().forward(x) + super().forward((x - 2).relu())"
    body = f"    def forward(self, x):\n        {rounding}\n"
    flat = "class Flat(Rounding):\n    def forward(self, x):\n        return x.sum((1, 2, 3)) * 0 + 1\n"
    Path("theirs.py").write_text(f"{MODULE}\n\nclass Rounding(Sharpness):\n{body}\n\n{flat}")
    hint = "; if the model takes pixels from 0 to 255, add --peak 255\n"
    main(command(name, "theirs:Rounding", images, "--lower-is-better"))
    error = capsys.readouterr().err
    assert "theirs:Rounding: the scores of all 8 images are nearly equal (50 to 50)" in error
    assert hint in error
    main(command(name, "theirs:Rounding", images, "--lower-is-better", "--peak", "255", "--out", "other"))
    assert "nearly equal" not in capsys.readouterr().err
    assert main(command(name, "theirs:Flat", images, "--out", "third")) == 2
    error = capsys.readouterr().err
    assert error == f"srm-iqa {name}: theirs:Flat: the scores of all 8 images are equal (1 to 1){hint}"


def test_an_error_of_every_image_is_reported_once(images: Path, capsys: pytest.CaptureFixture[str]):
    files = [str(images / f"{number}.png") for number in range(5)]
    for size in ("2", "8"):
        assert main(["score", "--model", "theirs:Channels", "--json", "--batch-size", size, *files]) == 2
        out, err = capsys.readouterr()
        assert [json.loads(line)["path"] for line in out.splitlines()] == files
        assert all("of shape (1, 3) for 1 images" in json.loads(line)["error"] for line in out.splitlines())
        assert err.count("of shape (1, 3) for 1 images") == 1
        assert f"srm-iqa score: {files[0]}: the model returned" in err
        assert err.endswith("srm-iqa score: the model fails with the same error on 4 more images\n")


def test_images_that_fail_before_the_first_score_are_all_named(
    images: Path, capsys: pytest.CaptureFixture[str]
):
    """`Picky` fails on image 0 and not on image 5."""
    copies = [f"{number}.png" for number in range(3)]
    for copy in copies:
        Path(copy).write_bytes((images / "0.png").read_bytes())
    given = ["score", "--model", "theirs:Picky", "--size", str(SIZE), "--batch-size", "2"]
    assert main([*given, *copies, str(images / "5.png"), copies[0]]) == 2
    err = capsys.readouterr().err
    assert [err.count(f"{copy}: the model fails") for copy in copies] == [2, 1, 1]
    assert "more image" not in err


@pytest.mark.parametrize(
    ("model", "options", "lower"),
    [
        ("theirs:Sharpness", [], False),
        ("theirs:Sharpness", ["--lower-is-better"], True),
        ("theirs:Blur", [], True),
    ],
)
def test_a_map_shows_the_loss_of_quality_also_if_lower_is_better(
    model: str, options: list[str], lower: bool, images: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr("srm_model.cli.maps.draw_map", lambda *_, **about: drawn.append(about))
    given = ["score", "--model", model, "--size", str(SIZE), "--no-progress", "--map", "map.png", *options]
    assert main([*given, str(images / "3.png")]) == 0
    assert drawn[0]["lower_is_better"] is lower
    worse = "falls" if lower else "rises"
    assert f"Red: the score {worse}, so the model sees a loss of quality here." in drawn[0]["caption"]
    own = open_model(model, Interface(lower_is_better=False))(load_image(images / "3.png", SIZE)[None])
    assert drawn[0]["score"] == pytest.approx(float(own))


@pytest.mark.parametrize("option", ["--images", "--labels"])
def test_score_says_that_images_are_arguments(option: str, capsys: pytest.CaptureFixture[str]):
    assert main(["score", "--model", "theirs:made", option, "photos"]) == 2
    expected = "score takes images as arguments, and folders with --recursive"
    assert f"{option} goes with attack and audit; {expected}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attack"], "expected RUN, or --model"),
        (["attack", "run", "--model", "theirs:made"], "expected one of them"),
        (["attack", "--model", "theirs:made"], "--model needs --labels FILE"),
        (["attack", "--model", "theirs:made", "--labels", "l", "--out", "o"], "--images FOLDER"),
        (["attack", "--model", "theirs:made", "--labels", "l", "--out", "o", "--images", "4"], "--limit N"),
        (["attack", "run", "--labels", "l"], "--labels goes with --model"),
        (["attack", "run", "--images", "folder"], "expected a number"),
        (["audit", "run", "--lower-is-better"], "--lower-is-better goes with"),
        (["score", "x.png", "--lower-is-better"], "--lower-is-better goes with"),
        (["attack", "run", "--images", "1"], "--images 1: expected at least 2"),
        (["audit", "--model", "theirs:made", "--data", "d"], "--data goes with a checkpoint"),
        (["score"], "no image was given; expected IMAGE or --files-from FILE"),
        (["score", "--model", "theirs:made"], "no image was given"),
        (["score", "--model", "theirs:made", "--imagenet", "--mean", "0", "0", "0", "x.png"], "one of them"),
        (["score", "--model", "theirs:made", "--std", "0", "1", "1", "x.png"], "three numbers above 0"),
        (["score", "--model", "theirs:made", "--peak", "0", "x.png"], "a number above 0"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["attack", "audit", "score"])
@pytest.mark.parametrize("option", ["--size 64", "--imagenet", "--mean 0 0 0", "--std 1 1 1", "--peak 255"])
def test_an_option_of_another_model_needs_model(name: str, option: str, capsys: pytest.CaptureFixture[str]):
    images = ["x.png"] if name == "score" else []
    assert main([name, "run", *images, *option.split()]) == 2
    expected = f"srm-iqa {name}: {option.split()[0]} goes with --model, which was not given\n"
    assert capsys.readouterr().err == expected


# Exported programs


class Weighted(nn.Module):
    """Sharpness times a learned weight, with a constant buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.register_buffer("channels", torch.ones(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        grey = (images * self.channels).mean(1)
        return (grey[:, 1:] - grey[:, :-1]).abs().mean((1, 2)) * self.weight


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "weighted.pt2"
    batch = {"images": {0: torch.export.Dim("batch")}}
    example = (torch.rand(2, 3, SIZE, SIZE),)
    torch.export.save(torch.export.export(Weighted(), example, dynamic_shapes=batch), path)
    return path


def test_an_exported_program_is_attacked_and_audited(
    program: Path, images: Path, capsys: pytest.CaptureFixture[str]
):
    image = load_image(images / "3.png", SIZE)
    model = open_model(str(program))
    assert torch.allclose(model(image[None]), Weighted()(image[None]))
    capitals = program.rename(program.with_suffix(".PT2"))
    assert torch.allclose(open_model(str(capitals))(image[None]), Weighted()(image[None]))
    capitals.rename(program)
    assert differentiable(model, image)
    found = attacked(str(program), images, "--lower-is-better")
    assert found["worst"]["srocc"] < found["clean"]["srocc"] == pytest.approx(1)
    assert main(command("audit", str(program), images, "--lower-is-better")) in (0, 1)
    checks = {check["name"]: check["passed"] for check in read_json(Path("out/audit.json"))["checks"]}
    assert checks["gradients"] is True
    capsys.readouterr()


class Hostile:
    """An object that creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("harmed",))


def with_pickle(program: Path, target: Path, *, member: str, payload: bytes, config: bool) -> None:
    """Copy a program and add a payload that torch's own loader would unpickle."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if config and name.endswith("model_weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            new.writestr(name, payload if name.endswith(member) else content)
        if not any(name.endswith(member) for name in old.namelist()):
            new.writestr(f"{old.namelist()[0].partition('/')[0]}/{member}", payload)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("member", "config"),
    [
        ("data/weights/weight_0", True),
        ("data/sample_inputs/model.pt", False),
        ("data/constants/opaque_obj_0", False),
        ("data/constants/custom_obj_0", False),
    ],
)
def test_nothing_is_unpickled(program: Path, member: str, config: bool, tmp_path: Path):
    payload = pickle.dumps(Hostile()) if "_obj_" in member else saved(OrderedDict(weight=Hostile()))
    target = tmp_path / "hostile.pt2"
    with_pickle(program, target, member=member, payload=payload, config=config)
    with pytest.raises(ValueError, match=r"pickle|not loadable"):
        open_model(str(target))
    assert not Path("harmed").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


# Stand-ins for the interfaces of other packages


def test_the_output_of_a_hugging_face_regressor_is_its_logits():
    class Regressor(nn.Module):
        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
            return SimpleNamespace(loss=labels, logits=pixel_values.mean((2, 3))[:, :1])

    image = torch.rand(2, 3, 4, 4)
    assert torch.equal(ExternalModel(Regressor())(image), image.mean((2, 3))[:, 0])


def test_an_output_that_is_no_tensor_is_refused():
    class Several(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"score": images.mean((1, 2, 3))}

    with pytest.raises(TypeError, match="returned a dict; expected a tensor"):
        ExternalModel(Several())(torch.rand(1, 3, 4, 4))


def test_scores_that_are_all_the_same_cannot_be_matched():
    model = ExternalModel(nn.Identity())
    with pytest.raises(ValueError, match="all 3 images the same score"):
        model.match([1, 1, 1], [0, 0.5, 1])
    with pytest.raises(ValueError, match="of 1 of 3 images are not finite"):
        model.match([1, np.nan, 1], [0, 0.5, 1])


def test_matching_twice_changes_nothing():
    model = ExternalModel(nn.Flatten(0), Interface(lower_is_better=True))
    raw = torch.tensor([3.0, 1.0, 2.0, 7.0])[:, None, None, None]
    labels = [0.0, 0.2, 0.7, 1.0]
    model.mean.zero_()

    def scores() -> Tensor:
        return raw.flatten() * model.line[0] + model.line[1]

    model.match(scores(), labels)
    first = scores()
    model.match(scores(), labels)
    assert torch.allclose(scores(), first, rtol=1e-12)
    assert first.mean() == pytest.approx(np.mean(labels))
    assert scores()[1] > scores()[3], "the order was turned round, as low is better"


# Tables


def table(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text)
    return path


def test_columns_are_guessed_only_if_unambiguous(images: Path, tmp_path: Path):
    two = table(tmp_path, "file;copy;a;b\n" + "".join(f"{i}.png;{i}.png;{i};{i + 1}\n" for i in range(3)))
    with pytest.raises(
        ValueError, match=r"each of file, copy names a file .* choose one with --image-column"
    ):
        labelled_images(images, two)
    with pytest.raises(ValueError, match=r"each of a, b has a number .* choose one with --score-column"):
        labelled_images(images, two, image_column="copy")
    found = labelled_images(images, two, image_column="copy", score_column="b", image_size=SIZE)
    assert found.names == ["0.png", "1.png", "2.png"]
    assert found.mos.tolist() == [0, 0.5, 1]
    assert found[1][0].shape == (3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("file,score\nno.png,1\n", {}, "none of them names a file"),
        ("file,score\n0.png,1\nno.png,2\n", {}, "column file: no.png is not in "),
        ("file,score\n0.png,good\n1.png,2\n", {}, "none of them has a number"),
        ("file,score\n0.png,1\nno.png,2\n", {"image_column": "file"}, "no.png is not in"),
        ("file,score\n0.png,nan\n1.png,2\n", {}, "the score nan is outside"),
        ("file,score\n0.png,1\n1.png,7\n", {"label_range": (0, 5)}, "the score 7 is outside 0 to 5"),
        ("file,score\n0.png,1\n1.png,1\n", {}, "all scores are 1"),
        ("file,score\n0.png,1\n0.png,2\n", {}, "already listed in row 2"),
        ("file,score\n", {}, "no rows below the header"),
        ("file,score\n0.png,1\n", {"score_column": "mos"}, "--score-column mos: .* columns file, score"),
    ],
)
def test_a_table_that_does_not_fit(
    text: str, options: dict[str, Any], words: str, images: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=words):
        labelled_images(images, table(tmp_path, text), **options)


def test_labels_are_on_the_range_given(images: Path, tmp_path: Path):
    rows = table(tmp_path, "file,score\n0.png,1\n1.png,4\n")
    assert labelled_images(images, rows, label_range=(0, 5)).mos.tolist() == [0.2, 0.8]
