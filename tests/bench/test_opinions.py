"""Test the rows and summary of `bench.opinions`, which correlates metrics of distorted photographs with opinions."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import opinions, pages
from bench.harness import write_lines
from srm_model.checkpoint import read_card, shipped
from srm_model.data.labels import import_piq
from srm_model.data.opinions import LEFT_OUT
from srm_model.data.tid2013 import split_by_reference
from srm_model.profiling.results import append, read


def row(kind: int, mos: list[float], metric: list[float]) -> dict[str, object]:
    return {"photograph": 1, "type": kind, "seed": 0, "mos": mos, **dict.fromkeys(opinions.METRICS, metric)}


def test_the_summary_has_each_type_and_all_beside_the_published_figures():
    rising, falling = [1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]
    lines = opinions.summary([row(1, rising, rising), row(17, rising, falling)])
    assert lines[1].split()[-3:] == ["1.000"] * 3
    assert lines[2].split()[-3:] == ["-1.000"] * 3
    assert [text[-1] for text in lines[3].split()[1:]] == ["!"] * 3
    assert [float(text[:-1]) for text in lines[3].split()[1:]] == pytest.approx([0.0] * 3, abs=1e-3)
    assert lines[4].split()[:2] == ["without", "types"]
    assert lines[4].split()[-3:] == ["1.000!"] * 3  # type 17 is left out
    assert lines[5].split()[-3:] == ["0.897", "0.802", "0.637"]


def test_ssim_is_that_of_the_luminance_at_full_resolution():
    """The score does not depend on chroma. Fine noise lowers the score; downsampling would hide much of the noise."""
    rng = np.random.default_rng(0)
    grey = torch.full((1, 3, 384, 384), 0.5)
    chroma = torch.tensor([0.587, -0.299, 0.0]).view(1, 3, 1, 1) * 0.2  # its luminance is 0
    piq = import_piq()
    assert float(opinions._scores(piq, grey + chroma, grey)["ssim"]) == pytest.approx(1.0, abs=1e-4)
    noisy = (grey + 0.1 * torch.from_numpy(rng.standard_normal((1, 1, 384, 384), np.float32))).clamp(0, 1)
    full = float(opinions._scores(piq, noisy, grey)["ssim"])
    assert full < 0.5 * float(piq.ssim(noisy, grey, data_range=1.0))


def test_rows_are_added_and_none_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (384, 512, 3), np.uint8)).save(photographs / "kodim07.png")
    listed = tmp_path / "mos.txt"
    listed.write_text("".join(f"{6 - level}.5 i07_16_{level}.bmp\n" for level in opinions.LEVELS))
    out = tmp_path / "rows.jsonl"
    command = [
        "--photographs",
        str(photographs),
        "--opinions",
        str(listed),
        "--types",
        "16",
        "--out",
        str(out),
    ]
    for _ in range(2):
        assert opinions.main(command) == 0
    (found,) = map(json.loads, out.read_text().splitlines())
    assert (found["photograph"], found["type"], found["mos"]) == (7, 16, [5.5, 4.5, 3.5, 2.5, 1.5])
    assert all(0 < value <= 1 for name in opinions.METRICS for value in found[name])
    assert "mean shift" in capsys.readouterr().out


@pytest.fixture
def evaluation() -> dict[str, object]:
    """Return the `evaluation.json` of the checkpoint of the package on three images of type 8 and one of type 15."""
    names = ["i02_15_1.bmp", "i02_08_1.bmp", "i02_08_2.bmp", "i10_08_5.bmp"]
    about = {"sha256": read_card(shipped())["sha256"], "split": "test", "labels": "opinions:TID2013"}
    return {**about, "names": names, "mos": [0.5, 0.9, 0.8, 0.1], "scores": [0.3, 0.123456789, 0.4, 0.5]}


def test_the_scores_of_the_checkpoint_are_stored_by_type(tmp_path: Path, evaluation: dict[str, object]):
    path, out = tmp_path / "evaluation.json", tmp_path / "out" / "rows.jsonl"
    path.write_text(json.dumps(evaluation))
    append(out, row(8, [1.0] * 5, [1.0] * 5))
    for _ in range(2):  # the second call replaces the rows
        assert opinions.main(["--evaluation", str(path), "--out", str(out)]) == 0
    assert read(out.parent / opinions.CHECKPOINT_ROWS) == [
        {
            "checkpoint": evaluation["sha256"],
            "type": kind,
            **{key: [evaluation[key][i] for i in chosen] for key in ("names", "mos", "scores")},
        }
        for kind, chosen in ((8, (1, 2, 3)), (15, (0,)))
    ]


@pytest.mark.parametrize("change", [{"sha256": "0"}, {"split": "val"}, {"labels": "metric:vsi"}])
def test_scores_of_other_weights_or_images_are_refused(
    change: dict[str, str],
    tmp_path: Path,
    evaluation: dict[str, object],
    capsys: pytest.CaptureFixture[str],
):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**evaluation, **change}))
    with pytest.raises(SystemExit):
        opinions.main(["--evaluation", str(path), "--out", str(tmp_path / "rows.jsonl")])
    assert "expected" in capsys.readouterr().err
    assert [found.name for found in tmp_path.iterdir()] == ["evaluation.json"]


def test_the_level_alone_predicts_the_mean_opinion_of_the_training_photographs():
    parts = split_by_reference(map(str, range(1, 25)), 0)
    rows = [
        {
            **row(8, [10.0 * level + (part == "train") for level in opinions.LEVELS], []),
            "photograph": int(number),
        }
        for number, part in parts.items()
    ]
    number = {part: int(number) for number, part in parts.items()}
    assert opinions.level_means(rows, [f"i{number['test']:02}_08_{level}.bmp" for level in (5, 1)]) == [
        51,
        11,
    ]
    with pytest.raises(ValueError, match="images of training photographs"):
        opinions.level_means(rows, [f"i{number['train']:02}_08_1.bmp"])


def test_the_page_lists_types_that_the_checkpoint_hardly_sees(tmp_path: Path):
    shutil.copytree(opinions.RESULTS / "cpu", tmp_path / "cpu")
    path = tmp_path / "cpu" / opinions.CHECKPOINT_ROWS
    rows = read(path)
    for share, seen in ((1.0, True), (0.0, False)):
        scores = {found["type"]: [share * mos for mos in found["mos"]] for found in rows}
        write_lines(path, [{**found, "scores": scores[found["type"]]} for found in rows])
        text = pages.types(path.parent)
        assert ("Its SROCC is at least 0.3 for each type." in text) == seen
        assert text.count("SROCC —, scores from 0.000 to 0.000") == (
            0 if seen else 21
        )  # an SROCC is undefined


def test_the_rows_of_the_checkpoint_are_those_of_the_package():
    """Check that the page shows the checkpoint of the package. `bench.checkpoint` writes its evaluation.json.

    To update the page, run `python -m bench.opinions --evaluation OUT/packed/srm/evaluation.json`, then
    `python -m bench.report bench/results/cpu --pages docs/DATASETS.md`.
    """
    rows = read(opinions.RESULTS / "cpu" / opinions.CHECKPOINT_ROWS)
    assert [found["type"] for found in rows] == [kind for kind in range(1, 25) if kind not in LEFT_OUT]
    assert {found["checkpoint"] for found in rows} == {read_card(shipped())["sha256"]}


def test_the_page_of_the_datasets_has_the_figures_of_the_rows():
    rows = read(opinions.RESULTS / "cpu" / "opinions.jsonl")
    assert {(found["photograph"], found["type"]) for found in rows} == set(
        product(range(1, 25), range(1, 25))
    )
    page = (Path(__file__).parents[2] / "docs" / "DATASETS.md").read_text(encoding="utf-8")
    for name, chosen in (
        ("synthesised images, all types", rows),
        (
            "synthesised images without types 16, 17 and 18 (default)",
            [found for found in rows if found["type"] not in LEFT_OUT],
        ),
    ):
        cells = [f"{opinions.correlation(chosen, metric):.3f}" for metric in opinions.METRICS]
        assert f"| {name} | {' | '.join(cells)} |" in page
    published = [f"{opinions.PUBLISHED[metric]:.3f}" for metric in opinions.METRICS]
    assert f"| published for TID2013, all types | {' | '.join(published)} |" in page
