"""Tests of model cards: results and confidence intervals of the weights in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from srm_model import SRMConfig
from srm_model.files import write_json
from srm_model.metrics import LogisticMap, plcc, srocc
from srm_model.reports import bootstrap
from srm_model.reports.card import model_card, results_of

LABELS = {"labels": "opinions:TID2013", "name": "synthesised", "type_level_srocc": 0.925}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    document = {"format": "srm-iqa/1", "backbone": "test_convnext", "neck": "srm", "sha256": "abc"}
    card = {"epoch": 2, "dataset": LABELS}
    write_json(tmp_path / "config.json", {**document, "config": SRMConfig().to_dict(), "card": card})
    return tmp_path


def test_intervals_are_those_of_the_worst_attack_in_each_resample(folder: Path):
    rng = np.random.default_rng(0)
    mos = rng.uniform(size=40)
    good, bad = (mos + rng.normal(0, spread, 40) for spread in (0.1, 0.4))
    mapped = LogisticMap.fit(good, mos)
    about = {"mos": mos.tolist(), "logistic": mapped.to_dict()}
    values = {"srocc": srocc(good, mos), "plcc": plcc(mapped(good), mos), "n": 40}
    write_json(folder / "evaluation.json", {**about, **values, "scores": good.tolist(), "sha256": "abc"})
    attacks = {"pgd_mse": {"scores": good.tolist()}, "pgd_drift": {"scores": bad.tolist()}}
    worst = {"srocc": srocc(bad, mos), "plcc": plcc(mapped(bad), mos), "srocc_attack": "pgd_drift"}
    attacked = {**about, "norm": "linf", "eps": 1 / 255, "attacks": attacks, "worst": worst}
    write_json(folder / "attacks" / "a.json", {**attacked, "settings": {"checkpoint": "abc"}})
    write_json(folder / "attacks" / "b.json", {**attacked, "settings": {"checkpoint": "of other weights"}})
    clean, found = results_of(folder)
    assert (clean.attack, clean.images, found.attack, found.worst) == ("none", 40, "linf 1/255", "pgd_drift")
    both = bootstrap.resampled_srocc(mos, [good, bad])
    assert clean.srocc_interval == bootstrap.interval(both[0])
    assert found.srocc_interval == bootstrap.interval(both.min(0))
    linear = bootstrap.resampled_plcc(mos, [mapped(good), mapped(bad)])
    assert clean.plcc_interval == bootstrap.interval(linear[0])
    assert found.plcc_interval == bootstrap.interval(linear.min(0))
    text = model_card(folder, notes=["a note"], licences=["a licence"])
    low, high = np.round(found.srocc_interval, 3)
    assert f"| linf 1/255 | 40 | {worst['srocc']:.3f} [{low:.3f}, {high:.3f}] |" in text
    for sentence in (
        "distortion type and level has an SROCC of 0.925",
        "may be too narrow",
        "## Not intended for",
        "Attacks beyond the measured budgets (linf 1/255)",
        "- a note",
        "- a licence",
    ):
        assert sentence in text
    assert "not trained" not in text
