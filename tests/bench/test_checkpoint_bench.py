"""Test `bench.checkpoint` at a small size, from the photographs to the shipped folder, and its error messages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import srm_model.checkpoint
from bench import checkpoint
from srm_model import SRMConfig, build_model, load_model
from srm_model.checkpoint import read_card, save_model
from srm_model.files import read_json
from srm_model.profiling.results import read

RECIPE = {
    "image_size": 32,
    "channels": 8,
    "heads": 2,
    "rank": 1,
    "pool_size": 2,
    "batch_size": 8,
    "epochs": 1,
    "warmup_epochs": 0,
    "attack_steps": 2,
    "attack_restarts": 1,
    "attack_queries": 2,
    "eps_linf_tables": [0.5 / 255, 1 / 255],
}


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Write five small photographs and opinions on distortion types 1 and 8; return the arguments of a run on them."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(1, 6):
        draw = np.random.default_rng(number)
        wave = np.sin(np.arange(80) * number / 9)[None, :, None] + draw.uniform(0, 0.3, (64, 80, 3))
        Image.fromarray((255 * (wave - wave.min()) / np.ptp(wave)).astype(np.uint8)).save(
            photographs / f"kodim{number:02}.png"
        )
    lines = [
        f"{9 - level - number / 10 - kind / 100:.5f} i{number:02}_{kind:02}_{level}.bmp"
        for number in range(1, 6)
        for kind in (1, 8)
        for level in range(1, 6)
    ]
    (tmp_path / "mos_with_names.txt").write_text("\n".join(lines))
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    paths = {
        "photographs": "photographs",
        "opinions": "mos_with_names.txt",
        "recipe": "recipe.json",
        "out": "out",
    }
    named = [word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path))]
    sizes = ["--crop", "80x64", "--types", "1", "8", "--levels", "1", "3", "5", "--images", "4"]
    other = ["--audit-images", "2", "--backbone", "test_convnext", "--device", "cpu", "--no-progress"]
    return [*named, *sizes, *other]


def written(out: Path) -> dict[str, int]:
    """Return the modification time of each file that takes long to compute."""
    found = [*out.glob("packed/*/model.safetensors"), *out.glob("packed/*/*.json")]
    found += out.glob("packed/*/attacks/*.json")
    return {str(path): path.stat().st_mtime_ns for path in found}


def test_a_miniature_from_photographs_to_the_shipped_folder(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert checkpoint.main(given) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    shipped = out / "shipped"
    assert sorted(path.name for path in shipped.iterdir()) == [
        "MODEL_CARD.md",
        "config.json",
        "model.safetensors",
    ]
    monkeypatch.setattr(srm_model.checkpoint, "SHIPPED", shipped)
    model, card = load_model()
    assert (model.neck_name, card["epoch"], card["dataset"]["labels"]) == ("srm", 1, "opinions:TID2013")
    assert str(tmp_path) not in (shipped / "config.json").read_text(), "no path of this machine"
    rows = read(out / "results.jsonl")
    attacks = ["none", "linf 0.5/255", "linf 1/255"]
    assert [(row["neck"], row["attack"]) for row in rows if "attack" in row] == [
        (neck, attack) for neck in ("srm", "none") for attack in attacks
    ]
    differences = [row["packing_difference"] for row in rows if "packing_difference" in row]
    assert all(0 <= difference < 1e-3 for difference in differences)
    text = (shipped / "MODEL_CARD.md").read_text()
    for row in rows[:3]:
        assert f"| {row['attack']} | {row['images']} | {row['srocc']:.3f} " in text
    sentences = (
        "people's opinions of similar images",
        "no result here is a result on TID2013",
        "type and level",
        "not tested on camera photographs",
        "KonIQ-10k",
        "Apache-2.0",
        "Ponomarenko",
        "a miniature that shows that the pipeline works",
        "model, card = load_model()",
    )
    assert [sentence for sentence in sentences if sentence not in text] == []
    assert "Not audited" not in text
    assert "efficientnet" not in text, "another backbone"
    assert "was not trained" not in text
    assert (out / "table.md").read_text().count("| none | ") == 2
    attacked = map(read_json, (out / "packed" / "srm" / "attacks").glob("*.json"))
    (ceiling,) = {found["type_level_srocc"] for found in attacked}
    assert f"; a predictor that knows only distortion type and level has {ceiling:.3f} on them" in text
    before = written(out)
    assert len(before) == 2 + 2 * 3 + 1 + 2 * 2
    assert checkpoint.main(given) == 0
    assert written(out) == before
    assert (shipped / "MODEL_CARD.md").read_text() == text
    (tmp_path / "recipe.json").write_text(json.dumps({**RECIPE, "epochs": 2}))
    assert checkpoint.main(given) == 2
    assert "an earlier call had another recipe" in capsys.readouterr().err


def test_help_states_the_duration(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        checkpoint.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Duration on one thread of a CPU, by an estimate: 2 hours" in text
    assert "Each of the two trainings takes 30 to 50 minutes." in text
    for neck in checkpoint.NECKS:
        history = read(checkpoint.RECIPE.parent / "checkpoint" / f"history-{neck}.jsonl")
        assert 30 < sum(row["seconds"] for row in history) / 60 < 50


def replaced(given: list[str], option: str, *values: str) -> list[str]:
    start = given.index(option) + 1
    end = next((i for i in range(start, len(given)) if given[i].startswith("--")), len(given))
    return [*given[:start], *values, *given[end:]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"types": ("2",)},
            "no opinion for 15 of 15 images, such as i01_02_1.bmp; the file has opinions of photographs 1 to",
        ),
        (
            {"photographs": "kodim77.png"},
            "kodim77.png: is not a Kodak photograph; expected a number from 1 to 24",
        ),
        ({"photographs": "sunset.png"}, "sunset.png: has no number in its name"),
        ({"recipe": {"epoch": 3}}, "recipe.json: unknown config key epoch"),
        ({"recipe": [1]}, "recipe.json: expected an object of SRMConfig fields"),
        ({"opinions": None}, "no dataset was given; expected --photographs and --opinions, or --data"),
    ],
)
def test_bad_input_is_one_sentence(
    given: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    sentence: str,
):
    ((name, value),) = change.items()
    if name == "photographs":
        (tmp_path / "photographs" / "kodim05.png").rename(tmp_path / "photographs" / value)
        if value == "kodim77.png":
            Image.new("RGB", (80, 64)).save(tmp_path / "photographs" / "kodim05.png")
    elif name == "recipe":
        (tmp_path / "recipe.json").write_text(json.dumps(value))
    elif value is None:
        del given[given.index(f"--{name}") : given.index(f"--{name}") + 2]
    else:
        given = replaced(given, f"--{name}", *value)
    assert checkpoint.main(given) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert sentence in said


def test_a_damaged_checkpoint_is_not_packed(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = SRMConfig.from_dict(RECIPE)
    torch.manual_seed(0)
    save_model(build_model("test_convnext", config=config), tmp_path / "run" / "srm", card={})
    path = tmp_path / "run" / "srm" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    assert checkpoint.main([*given, "--data", str(tmp_path), "--trained", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "model.safetensors: damaged, or it does not belong to config.json" in said
    assert not (tmp_path / "out" / "packed").exists()


def _cell(row: dict[str, Any]) -> str:
    low, high = row["srocc_interval"]
    return f"{row['srocc']:.3f} [{low:.3f}, {high:.3f}]".replace("-", "−")


def test_the_pages_have_the_measured_results():
    folder = checkpoint.RECIPE.parent
    found = {
        (row["neck"], row["attack"]): row
        for row in read(folder / "checkpoint" / "results.jsonl")
        if "attack" in row
    }
    page = (folder / "README.md").read_text()
    budgets = ("linf 0.5/255", "linf 1/255", "linf 2/255")
    for neck, label in (("srm", "`srm` (checkpoint of the package)"), ("none", "`none`")):
        assert {found[neck, attack]["images"] for attack in budgets} == {96}
        pattern = re.escape(f"| {label} | {_cell(found[neck, 'none'])} |") + r" 0\.\d{3} \| "
        pattern += re.escape(" | ".join(_cell(found[neck, attack]) for attack in budgets)) + r" \|"
        assert re.search(pattern, page), pattern
    readme = (folder.parent / "README.md").read_text()
    worst = found["srm", "linf 1/255"]
    low, high = worst["srocc_interval"]
    card = (srm_model.checkpoint.SHIPPED / "MODEL_CARD.md").read_text()
    (before,) = re.findall(
        r"before the attack, the 96 attacked test images have an SROCC of (0\.\d{3})", card
    )
    assert f"| `srm` (checkpoint of the package) | {_cell(found['srm', 'none'])} | {before} |" in page
    for sentence in (
        f"| SROCC of the checkpoint, not attacked | {found['srm', 'none']['srocc']:.2f} | all 525 test images; "
        f"{float(before):.2f} on the 96 images of the next row |",
        f"1/255 | {worst['srocc']:.2f} | 96 of the test images, evenly spaced; 95 % interval {low:.2f} to {high:.2f}. "
        f"For a budget of 2/255 it is {found['srm', 'linf 2/255']['srocc']:.2f} |",
        f"The checkpoint has {found['srm', 'none']['srocc']:.2f}, ",
    ):
        assert sentence in readme
    for attack in ("none", *budgets):
        assert (
            f"| {attack} | {found['srm', attack]['images']} | {found['srm', attack]['srocc']:.3f} [" in card
        )
    lowest, highest = re.findall(r"scores of the test images: from (0\.\d{3}) to (0\.\d{3})", card)[0]
    assert f"scores are between\n{float(lowest):.2f} and {float(highest):.2f}." in readme


def test_the_miniature_accepts_the_recipe_of_the_package():
    recipe = json.loads(checkpoint.RECIPE.read_text())
    config = SRMConfig.from_dict(recipe | checkpoint.SMALL)
    assert (config.image_size, config.crop_size) == (96, None)


def test_the_shipped_checkpoint_has_the_recipe():
    recipe = SRMConfig.from_dict(json.loads(checkpoint.RECIPE.read_text())).to_dict()
    model, card = load_model()
    own = model.config.to_dict()
    assert {key for key in own if own[key] != recipe[key]} <= {"eps_linf_tables"}  # only of attacks
    assert card["dataset"]["resized"] is False


def test_the_page_has_the_results_of_stronger_attacks():
    folder = checkpoint.RECIPE.parent
    page = " ".join((folder / "README.md").read_text().split())
    usual, extended, strong = read(folder / "checkpoint" / "results-stronger.jsonl")
    digest = read_card(srm_model.checkpoint.SHIPPED)["sha256"]
    settings = [
        (row["settings"]["suite"], row["steps"], row["restarts"]) for row in (usual, extended, strong)
    ]
    assert settings == [("paper", 10, 1), ("extended", 10, 1), ("paper", 40, 5)]
    assert {row["settings"]["checkpoint"] for row in (usual, extended, strong)} == {digest}
    for sentence in (
        f"On 24 of the test images, with an SROCC of {usual['clean']['srocc']:.3f} before the attack,",
        f"is {usual['worst']['srocc']:.3f} with 10 steps and 1 restart, {strong['worst']['srocc']:.3f} with 40 steps",
        f"and {extended['worst']['srocc']:.3f} with the attacks of `Suite.extended()`, 10 steps and 100 queries",
    ):
        assert sentence in page
