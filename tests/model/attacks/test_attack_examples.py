from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from srm_model.attacks import Example, SuiteResult, save_examples
from srm_model.files import read_json


def result_with(examples: list[Example]) -> SuiteResult:
    return SuiteResult(
        norm="linf",
        eps=0.01,
        radius=0.01,
        steps=1,
        step_size=0.01,
        restarts=1,
        eot=1,
        batch_size=8,
        seed=0,
        names=["a.png", "b.png", "c.png"],
        mos=[0.1, 0.2, 0.3],
        logistic=None,
        clean={},
        attacks={},
        worst={},
        incomplete=[],
        examples=examples,
    )


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_and_entries(tmp_path):
    clean = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    change = torch.full((3, 6, 5), 0.01)
    change[1] *= -1
    entries = save_examples(
        result_with(
            [
                Example(2, clean, clean + change, 0.4, 0.9, "pgd_mse"),
                Example(0, clean, clean, 0.4, 0.4, "transfer"),
            ]
        ),
        tmp_path / "new",
    )
    assert entries == read_json(tmp_path / "new" / "examples.json")
    assert entries[0] == {
        "name": "c.png",
        "mos": 0.3,
        "clean_score": 0.4,
        "adversarial_score": 0.9,
        "attack": "pgd_mse",
        "clean": "00-pgd_mse-clean.png",
        "attacked": "00-pgd_mse-attacked.png",
        "difference": "00-pgd_mse-difference.png",
        "magnification": 50,
    }
    assert (entries[1]["magnification"], entries[1]["attack"]) == (1, "transfer")
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"examples.json"} | {
        e[kind] for e in entries for kind in ("clean", "attacked", "difference")
    }

    folder = tmp_path / "new"
    expected = (clean.permute(1, 2, 0) * 255).round().int().numpy()
    assert np.abs(pixels(folder / entries[0]["clean"]) - expected).max() == 0
    # The change is 2.55 grey levels; rounding both pictures makes it 2 or 3.
    shown = pixels(folder / entries[0]["attacked"]) - pixels(folder / entries[0]["clean"])
    assert set(np.unique(shown)) <= {-3, -2, 2, 3}
    difference = pixels(folder / entries[0]["difference"])
    assert set(np.unique(difference[..., 0])) <= {254, 255}  # ½ + 50 · 0.01
    assert set(np.unique(difference[..., 1])) <= {0, 1}
    assert set(np.unique(pixels(folder / entries[1]["difference"]))) == {128}


@pytest.mark.parametrize(
    ("size", "magnification"), [(1 / 255, 127), (0.25 / 255, 510), (1e-6, 1000), (0.8, 1)]
)
def test_the_magnification_fills_the_range_but_for_outliers(tmp_path, size, magnification):
    clean = torch.full((3, 40, 40), 0.1)
    attacked = clean + size
    attacked[0, 0, 0] = 1.0  # one of 4800 values
    (entry,) = save_examples(result_with([Example(0, clean, attacked, 0.0, 0.0, "a")]), tmp_path)
    assert entry["magnification"] == magnification


def test_no_examples_make_an_empty_list(tmp_path):
    assert save_examples(result_with([]), tmp_path) == []
    assert read_json(tmp_path / "examples.json") == []
