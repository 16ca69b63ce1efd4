"""Test `bench.blind`, the comparison with classical metrics: the wrapper, the rows, resuming, and the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import blind
from bench.classical import METRICS, SVM, Classical, Metric
from srm_model import SRMConfig, build_model, load_model
from srm_model.checkpoint import save_model
from srm_model.crops import CropMean
from srm_model.data import open_dataset
from srm_model.metrics import plcc
from srm_model.profiling.results import read
from srm_model.reports.bootstrap import REPLICATES, SEED

QUERIES = 6


def roughness(image: np.ndarray) -> float:
    """Return a score for which low values mean high quality."""
    return float(np.abs(np.diff(image.astype(float), axis=0)).mean())


ROUGHNESS = Metric("roughness", ("numpy",), lambda: roughness)
ABSENT = Metric("absent", ("srm-iqa-no-such-package",), lambda: roughness)
BROKEN = Metric("broken", ("numpy",), lambda: lambda image: float("nan"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dataset in the layout of TID2013: five references, each with five levels of noise."""
    root = tmp_path_factory.mktemp("tid")
    (root / "distorted_images").mkdir()
    rng, lines = np.random.default_rng(0), []
    for reference in range(1, 6):
        base = rng.uniform(80, 170) + 20 * np.sin(np.mgrid[:40, :48].sum(0) / rng.uniform(4, 9))
        for level in range(1, 6):
            noisy = base[..., None] + 6 * level * rng.standard_normal((40, 48, 3))
            name = f"i{reference:02}_01_{level}.bmp"
            pixels = np.clip(noisy, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "distorted_images" / name)
            lines.append(f"{8 - level + rng.uniform(-0.2, 0.2):.3f} {name}\n")
    (root / "mos_with_names.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "none"
    torch.manual_seed(0)
    config = SRMConfig(channels=16, heads=2, image_size=32)
    save_model(build_model("test_convnext", neck="none", config=config), folder, card={})
    return folder


@pytest.fixture
def run(
    dataset: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Return a function that runs `bench.blind` with the given metrics and returns the path of the written rows."""

    def command(
        *more: str, metrics: tuple[Metric, ...] = (ROUGHNESS, ABSENT), checkpoint: Path = checkpoint
    ) -> Path:
        monkeypatch.setattr(blind, "METRICS", metrics)
        out = tmp_path / "rows.jsonl"
        given = {"data": dataset, "checkpoint": checkpoint, "out": out, "device": "cpu", "images": 3}
        given |= {"batch-size": 2, "queries": QUERIES}
        pairs = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        assert blind.main([*pairs, *more]) == 0
        return out

    return command


def test_a_metric_gets_8_bit_images_and_low_scores_mean_high_quality():
    seen = []
    model = blind.ExternalModel(Classical(lambda image: seen.append(image) or len(seen)))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    assert model(images + 0.3 / 255).tolist() == [-1.0, -2.0]
    assert [image.dtype for image in seen] == [np.uint8] * 2
    assert np.array_equal(np.stack(seen), pixels)


def test_a_libsvm_model_is_read_and_evaluated(tmp_path: Path):
    path = tmp_path / "model"
    header = "svm_type epsilon_svr\nkernel_type rbf\ngamma 0.5\nnr_class 2\ntotal_sv 2\nrho -3\n"
    path.write_text(header + "SV\n2 1:1 3:-1 \n-1 2:0.5 \n")
    features = np.array([1.0, 0.5, 0.0])
    expected = 2 * np.exp(-0.5 * (0.25 + 1)) - np.exp(-0.5 * 1) + 3
    assert SVM.read(path, 3)(features) == pytest.approx(expected, rel=1e-12)
    path.write_text(header.replace("rbf", "linear") + "SV\n2 1:1\n")
    with pytest.raises(ValueError, match="expected a LIBSVM model of type epsilon_svr with kernel rbf"):
        SVM.read(path, 3)


def test_the_intervals_of_plcc_use_the_resamples_of_srocc():
    rng = np.random.default_rng(1)
    mos, scores = rng.standard_normal((2, 12))
    found = blind.resampled_plcc(mos, [mos + scores])[0]
    draws = np.random.default_rng(SEED).integers(12, size=(12, REPLICATES))
    for number in (0, 7, REPLICATES - 1):
        own = draws[:, number]
        assert found[number] == pytest.approx(plcc((mos + scores)[own], mos[own]), abs=1e-12)


def test_the_table_and_its_rows(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], checkpoint: Path
):
    rows = read(run())
    printed, errors = capsys.readouterr()
    assert "absent: left out, needs srm-iqa-no-such-package" in errors
    lines = printed.splitlines()
    assert "test split: 5 images, 32×32" in lines[0]
    assert f"{QUERIES} queries: SROCC of 3 images" in lines[1]
    assert len(lines) == 5
    assert lines[3].startswith(str(checkpoint))
    start = lines[2].index("PLCC")
    assert {line[start - 1] for line in lines[2:]} == {" "}
    assert lines[4].split()[:2] == ["roughness", "1.000"]  # noise lowers the quality and raises the metric
    clean = {row["model"]: row for row in rows if row["kind"] == "clean"}
    assert list(clean) == [str(checkpoint), "roughness"]
    attacked = [row for row in rows if row["kind"] == "attack"]
    order = [(row["batch"], row["eps"], row["model"]) for row in attacked]
    assert order == [(i, eps, name) for i in (0, 1) for eps in blind.BUDGETS for name in clean]
    assert {row["attack"] for row in attacked} == {"square_mse"}


def test_with_opinions_the_table_ends_with_what_type_and_level_alone_predict(
    run: Callable[..., Path], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rated = shutil.copytree(dataset, tmp_path / "rated")
    labels = {"format": "srm-iqa-labels/1", "direction": "higher is better", "range": [0, 9]}
    (rated / "labels.json").write_text(json.dumps({**labels, "opinions": "TID2013"}))
    listed = rated / "mos_with_names.txt"
    names = [line.split()[1] for line in listed.read_text().splitlines()]
    opinions = np.random.default_rng(3).uniform(1, 8, len(names))
    listed.write_text(
        "".join(f"{opinion:.3f} {name}\n" for opinion, name in zip(opinions, names, strict=True))
    )
    run("--data", str(rated))
    test = open_dataset(rated, "test")
    attacked = [test.names[index] for index in (0, 2, 4)]
    values = test.type_level_srocc_of(test.names), test.type_level_srocc_of(attacked)
    assert values[0] != values[1]
    assert capsys.readouterr().out.splitlines()[5:] == [
        "predictor that knows only distortion type and level: "
        f"SROCC {values[0]:.3f} on the 5 images, SROCC {values[1]:.3f} on the 3 attacked images"
    ]


def test_all_models_are_attacked_on_the_scale_of_the_labels_and_more_with_a_larger_budget(
    run: Callable[..., Path],
):
    rows = read(run())
    for name in {row["model"] for row in rows}:
        (clean,) = (row for row in rows if row["kind"] == "clean" and row["model"] == name)
        val, test = clean["val"], clean["test"]
        slope = np.std(val["mos"]) / np.std(val["scores"])
        expected = np.mean(val["mos"]) + slope * (np.array(test["scores"]) - np.mean(val["scores"]))
        errors = {}
        for eps in blind.BUDGETS:
            own = [row for row in rows if row.get("eps") == eps and row["model"] == name]
            mos, before, after = (
                np.array([value for row in own for value in row[key]]) for key in ("mos", "clean", "attacked")
            )
            chosen = [test["mos"].index(value) for value in mos]  # evenly spaced images of the split
            assert chosen == [0, 2, 4]
            np.testing.assert_allclose(before, expected[chosen], rtol=1e-5)
            errors[eps] = np.square(after - mos).mean()
            errors["clean"] = np.square(before - mos).mean()
        assert errors["clean"] < errors["1/255"] < errors["2/255"] < errors["4/255"], name


def test_an_interrupted_run_is_resumed_and_rows_are_not_mixed(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    out = run()
    table = capsys.readouterr().out
    whole = out.read_text().splitlines()
    with pytest.raises(SystemExit):
        run()
    assert "give --resume to keep them" in capsys.readouterr().err
    out.write_text("\n".join(whole[:5]) + "\n")
    run("--resume")

    def values(line: str) -> dict[str, object]:
        row = json.loads(line)
        return {name: row.get(name) for name in (*blind.KEYS, "mos", "clean", "attacked", "test")}

    assert list(map(values, out.read_text().splitlines())) == list(map(values, whole))
    printed = capsys.readouterr().out
    assert [line.split()[:-1] for line in printed.splitlines()[3:]] == [
        line.split()[:-1]
        for line in table.splitlines()[3:]  # the last column is a time
    ]
    run("--resume", "--queries", "7")  # a different attack: only the clean rows are reused
    assert len(read(out)) == len(whole) + len(blind.BUDGETS) * 4


def test_a_metric_that_fails_has_an_error_and_the_others_continue(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    rows = read(run(metrics=(BROKEN, ROUGHNESS)))
    (failed,) = (row for row in rows if row["model"] == "broken")
    assert failed["error"] == "5 of 5 scores of the val split are not finite"
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split(maxsplit=1) == ["broken", failed["error"]]
    assert len(lines[5].split()) > 10


def test_checkpoints_of_different_sizes_are_refused(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = SRMConfig(channels=16, heads=2, image_size=64)
    save_model(build_model("test_convnext", neck="none", config=config), tmp_path / "other", card={})
    with pytest.raises(SystemExit):
        run("--checkpoint", str(tmp_path / "other"))
    assert "expected equal ones" in capsys.readouterr().err


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_an_installed_metric_prefers_a_photograph_to_its_noisy_copy(metric: Metric):
    try:
        metric.version()
    except ModuleNotFoundError:
        pytest.skip(f"needs {' and '.join(metric.packages)}")
    from skimage.data import astronaut

    photograph = astronaut()[:384, :384]
    noise = np.random.default_rng(0).normal(0, 25, photograph.shape)
    noisy = np.clip(photograph + noise, 0, 255).astype(np.uint8)
    score = metric.load()
    assert score(photograph) < score(noisy)


def test_brisque_has_the_value_in_the_readme_of_image_quality(shared: Callable[[str], Path]):
    """The README of image-quality gives this score for a photograph of its tests. Both packages have the same model."""
    pytest.importorskip("brisque")
    (score,) = (metric.load() for metric in METRICS if metric.packages == ("brisque",))
    photograph = np.asarray(Image.open(shared("data/kodak") / "5.png").convert("RGB"))
    assert score(photograph) == pytest.approx(4.9541572815704455, rel=1e-6)


@pytest.fixture
def cropping(checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint whose card says that no training image was resized."""
    model, _ = load_model(checkpoint)
    save_model(model, tmp_path / "cropping", card={"dataset": {"resized": False}})
    return tmp_path / "cropping"


def test_larger_images_are_scored_by_the_mean_over_crops(
    run: Callable[..., Path], dataset: Path, cropping: Path
):
    rows = read(run("--size", "40", metrics=(), checkpoint=cropping))
    (clean,) = [row for row in rows if row["kind"] == "clean"]
    images = [image for image, _ in open_dataset(dataset, "test", image_size=40)]
    model, _ = load_model(cropping)
    with torch.no_grad():
        expected = CropMean(model, 32)(torch.stack(images)).tolist()
    np.testing.assert_allclose(clean["test"]["scores"], expected, rtol=1e-5)
    assert clean["settings"]["size"] == 40


def test_sizes_that_a_checkpoint_does_not_accept(
    run: Callable[..., Path], checkpoint: Path, cropping: Path, capsys: pytest.CaptureFixture[str]
):
    for folder, size, accepted in (
        (checkpoint, "40", "only 32, because its card does not say that no training image was resized"),
        (cropping, "31", "32 or more"),
    ):
        with pytest.raises(SystemExit):
            run("--size", size, metrics=(), checkpoint=folder)
        assert f"--size {size}: {folder} accepts {accepted}" in capsys.readouterr().err
