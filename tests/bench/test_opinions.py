"""Test the rows and summary of `bench.opinions`, which correlates metrics of distorted photographs with opinions."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import opinions
from srm_model.data.labels import import_piq
from srm_model.data.opinions import LEFT_OUT
from srm_model.profiling.results import read


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
