"""Tests of `diagnose` and its page. The measurements match their definitions on a small model with random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from srm_kernels import full_attention, nystrom_attention, select_landmarks
from srm_model import SRMConfig, build_model
from srm_model.checkpoint import save_model
from srm_model.cli import main
from srm_model.data.synthesize import synthesize
from srm_model.diagnosis import MEASURED_METHODS, diagnose, table_rows
from srm_model.reports.conditioning import markdown, render

SMALL = SRMConfig(channels=16, heads=2, rank=8, pool_size=2, image_size=128)
FIGURES = ("kappa", "residual", "gain", "error")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = build_model("test_convnext", config=SMALL)
    made.calibrate(torch.rand(2, 3, 128, 128))
    return made


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(count, 3, 128, 128, generator=generator) for count in (2, 1)]


@pytest.fixture(scope="module")
def found(model: Any, batches: list[torch.Tensor]) -> dict[str, Any]:
    return diagnose(model, batches)


def test_rows_and_matrices(found):
    """Three links, two heads and three images give 18 matrices in every row of Table 1."""
    assert list(found["table"]) == list(table_rows(SMALL))
    assert set(found["table"]) >= {
        "full",
        "leverage landmarks",
        "pivoted Cholesky landmarks",
        "no ridge",
        "no fp32",
        "equilibrated",
        "k-means++ landmarks",
    }
    for row in found["table"].values():
        assert row["matrices"] == 18
        assert sum(row["solvers"].values()) == pytest.approx(1)
        for name in FIGURES:
            assert row[name]["median"] <= row[name]["p90"] <= row[name]["max"]
    assert found["table"]["full"]["solvers"] == {"cholesky": 1.0}
    assert set(found["table"]["no ridge"]["solvers"]) <= {"lu", "svd"}
    assert list(found["links"]) == ["4→3", "4→2", "4→1"]
    for link in found["links"].values():
        assert link["all"]["matrices"] == 6
        assert [head["matrices"] for head in link["heads"]] == [3, 3]
        assert [batch["matrices"] for batch in link["batches"]] == [4, 2]
        assert len(link["kappas"]) == 6
        assert len(link["spectrum"]["median"]) == 8


def test_figures_are_those_of_the_operators(model, batches, found):
    """κ, ρ and the error of one link match the operators' values. The error is also checked for one changed setting."""
    expected: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("kappa", "residual", "error", "leverage")
    }
    neck = model.neck
    with torch.no_grad():
        for images in batches:
            aligned = neck.aligned(model.pyramid(images))
            q, k, v = neck.link(4, 3).project(aligned[3], aligned[4])
            exact = full_attention(q, k, v, qk_norm="keys")
            y, solution = nystrom_attention(q, k, v, 8, qk_norm="keys", method="uniform", diagnostics=True)
            other = nystrom_attention(q, k, v, 8, qk_norm="keys", method="leverage")
            for name, value in (("error", y), ("leverage", other)):
                norm = exact.flatten(2).norm(dim=-1)
                expected[name].append(((value - exact).flatten(2).norm(dim=-1) / norm).flatten())
            expected["kappa"].append(solution.kappa.flatten())
            expected["residual"].append(solution.residual.flatten())
    link = found["links"]["4→3"]
    for name in ("kappa", "residual", "error"):
        values = torch.cat(expected[name])
        assert link["all"][name]["max"] == pytest.approx(float(values.max()), rel=1e-3)
        assert link["batches"][1][name]["max"] == pytest.approx(float(values[4:].max()), rel=1e-3)
        for number, head in enumerate(link["heads"]):
            assert head[name]["max"] == pytest.approx(float(values[number::2].max()), rel=1e-3)
    assert link["kappas"] == pytest.approx(sorted(torch.cat(expected["kappa"]).tolist()), rel=1e-3)
    spectrum = link["spectrum"]
    ratio = [high / low for high, low in zip(spectrum["median"][:1], spectrum["median"][-1:], strict=True)]
    assert min(link["kappas"]) * 0.5 < ratio[0] < max(link["kappas"]) * 2
    assert (
        found["table"]["leverage landmarks"]["error"]["max"]
        >= float(torch.cat(expected["leverage"]).max()) * 0.999
    )


ROWS = {
    "full": {},
    "leverage landmarks": {"method": "leverage"},
    "pivoted Cholesky landmarks": {"method": "pivoted_cholesky"},
    "no ridge": {"ridge": 0.0, "solver": "auto"},
    "no fp32": {"solve_dtype": "model"},
    "equilibrated": {"equilibrate": True},
    "k-means++ landmarks": {"method": "kmeans++"},
    "keys as they are": {"qk_norm": None},
}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_table_is_what_its_name_says(model, batches, found, row):
    """κ and the error of all links match the operator with one setting changed.

    For the row "no fp32", the inputs of the operator are bf16.
    """
    neck, settings = model.neck, {"method": "uniform", "qk_norm": "keys", **ROWS[row]}
    kappas, errors = [], []
    with torch.no_grad():
        for images in batches:
            aligned = neck.aligned(model.pyramid(images))
            for source, target in neck.acting:
                q, k, v = neck.link(source, target).project(aligned[target], aligned[source])
                exact = full_attention(q, k, v, qk_norm=settings["qk_norm"])
                if row == "no fp32":
                    q, k, v = (t.bfloat16() for t in (q, k, v))
                y, solution = nystrom_attention(q, k, v, 8, diagnostics=True, **settings)
                norm = exact.flatten(2).norm(dim=-1)
                kappas.append(solution.kappa.flatten().double())
                errors.append(((y.float() - exact).flatten(2).norm(dim=-1) / norm).flatten())
    for name, values in (("kappa", torch.cat(kappas)), ("error", torch.cat(errors))):
        ordered = values.sort().values.tolist()  # 18 values
        told = found["table"][row][name]
        assert [told[q] for q in ("median", "p90", "max")] == pytest.approx(
            [ordered[n] for n in (9, 16, 17)], rel=1e-3
        )


def test_errors_by_method_and_rank(found):
    """Errors are measured at 1/4, 1/2, 1 and 2 times the rank of 8.

    There are 16 keys; with all of them as landmarks, only the ridge causes an error.
    """
    ranks = {entry["rank"] for entry in found["errors"]}
    assert ranks == {2, 4, 8, 16}
    assert {entry["method"] for entry in found["errors"]} == set(MEASURED_METHODS)
    for method in MEASURED_METHODS:
        by_rank = {e["rank"]: e["median"] for e in found["errors"] if e["method"] == method}
        assert by_rank[16] < 0.05 < by_rank[2]


def test_landmark_sets_that_a_small_step_changes(model, batches, found):
    """The share of landmark sets that change matches a direct count over 12 sets (3 links × 2 heads × 2 images)."""
    seen: list[torch.Tensor] = []
    images = batches[0]
    signs = 2.0 * torch.randint(2, images.shape, generator=torch.Generator().manual_seed(0)) - 1
    neck = model.neck
    with torch.no_grad():
        for x in (images, images + signs / 255):
            aligned = neck.aligned(model.pyramid(x))
            for source, target in SMALL.links:
                _, k, _ = neck.link(source, target).project(aligned[target], aligned[source])
                keys = torch.nn.functional.normalize(k, dim=-1) * k.shape[-1] ** 0.5
                seen += select_landmarks(keys, 8, gamma=SMALL.gamma).flatten(0, 1)
    changed = [set(a.tolist()) != set(b.tolist()) for a, b in zip(seen[:12], seen[12:], strict=True)]
    assert sum(changed) > 0
    shares = {(entry["method"], entry["step"]): entry["share"] for entry in found["changes"]}
    assert shares["leverage", 1.0] == pytest.approx(sum(changed) / 12)
    assert {shares["uniform", step] for step in (1.0, 0.1, 0.01)} == {0.0}
    assert "| uniform | 0 % | 0 % | 0 % |" in markdown(found)


def test_landmarks_are_counted_over_heads(found):
    for entry in found["landmarks"]:
        counts = np.array(entry["counts"])
        assert counts.shape == (4, 4)
        assert counts.sum() == 2 * 8
        assert counts.max() <= entry["heads"] == 2
        if entry["method"] == "uniform":
            assert set(np.unique(counts)) <= {0, 2}
    assert {entry["image"] for entry in found["landmarks"]} == {0, 1}


def test_the_page_holds_what_was_found_and_nothing_from_outside(found):
    about = {"checkpoint": "a <checkpoint>", "data": "a set", "images": 3}
    page = render(found, about, [Image.new("RGB", (40, 40), "teal")] * 2)
    assert "a &lt;checkpoint&gt;" in page
    for name in found["table"]:
        assert name in page
    # Only the landmarks of methods that draw no random numbers are drawn.
    drawn = {entry["method"] for entry in found["landmarks"]}
    assert drawn >= {"leverage", "uniform", "pivoted_cholesky"}
    assert "kmeans++" not in drawn
    assert page.count("<figure") == 3 + 2 * 3 * len(drawn)  # three charts; two images, three links
    assert "http" not in page
    assert "<script" not in page
    assert ", r = 8. Every link" in " ".join(page.split())


def test_no_more_landmarks_are_reported_than_there_are_keys(batches):
    """An image of 128×128 pixels has only 16 keys. With a rank of 64, the page therefore reports 16 landmarks."""
    many = build_model("test_convnext", config=SMALL.replace(rank=64))
    found = diagnose(many, batches[1:], pictured=0)
    assert {link["rank"] for link in found["links"].values()} == {16}
    page = render(found, {"checkpoint": "c", "data": "d", "images": 1}, [])
    assert "r = 16 instead of 64, because there are no more keys" in page


def test_a_figure_that_is_not_finite_is_shown_as_infinite(found):
    broken = json.loads(json.dumps(found))
    broken["table"]["no ridge"]["kappa"]["max"] = math.inf
    broken["table"]["no ridge"]["residual"]["max"] = None
    line = next(line for line in markdown(broken).splitlines() if line.startswith("| no ridge"))
    assert line.count("∞") == 2


@pytest.mark.parametrize("neck", ["quadratic", "none"])
def test_a_neck_without_landmarks_is_refused(neck, batches):
    other = build_model("test_convnext", neck=neck, config=SMALL)
    with pytest.raises(ValueError, match="landmark"):
        diagnose(other, batches)


def test_the_command_writes_three_files(model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    data = synthesize(
        tmp_path / "set", photographs=folder, types=(1,), levels=(1, 3), metric="ssim", progress=False
    )
    save_model(model, tmp_path / "run" / "srm", card={})
    arguments = ["diagnose", str(tmp_path / "run"), "--data", str(data), "--images", "2", "--no-progress"]
    assert main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "| pivoted Cholesky |" in printed
    out = tmp_path / "run" / "srm"
    document = json.loads((out / "diagnosis.json").read_text("utf-8"))
    assert document["images"] == 2
    assert document["config"]["rank"] == 8
    assert (out / "diagnosis.md").read_text("utf-8") in printed
    assert "<!doctype html>" in (out / "diagnosis.html").read_text("utf-8")
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"{out / 'diagnosis.html'}\n"
    rows = [json.loads(text) for text in shown.out.splitlines()]
    assert {row.pop("checkpoint") for row in rows} == {str(out)}
    tables = {row["table"]: [] for row in rows}
    for row in rows:
        tables[row.pop("table")].append(row)
    assert list(tables) == ["settings", "links", "errors", "changes"]
    assert tables["settings"] == [{"setting": name, **found} for name, found in document["table"].items()]
    assert [row["kappa"] for row in tables["links"]] == [
        link["all"]["kappa"] for link in document["links"].values()
    ]
    assert [tables["errors"], tables["changes"]] == [document["errors"], document["changes"]]
    assert main(["diagnose", str(tmp_path / "nowhere")]) == 2
