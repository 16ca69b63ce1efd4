"""Fixtures that write a run folder in the format of the command line, without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srm_model.config import SRMConfig
from srm_model.metrics import LogisticMap, plcc, srocc

ATTACKS = ("pgd_mse", "pgd_drift", "pgd_pair_inversion", "transfer")
BUDGETS = (("linf", 1 / 255),)
CONFIG = SRMConfig(image_size=160, batch_size=16, epochs=4, lr_neck=1e-3, lr_backbone=2e-4)


def make_run(
    folder: Path,
    *,
    necks: tuple[str, ...] = ("srm", "none"),
    budgets: tuple[tuple[str, float], ...] = BUDGETS,
    labels: str = "metric:vsi",
    count: int = 120,
    attacked: int = 48,
    examples: int = 2,
    side: int = 16,
    seed: int = 0,
) -> Path:
    """Write a plausible run with `count` test images.

    Attacks lower the scores of images with labels above the median and raise the other scores. At larger budgets, they
    change the scores more.
    """
    rng = np.random.default_rng(seed)
    dataset = {
        "name": "synthesised in TID2013's layout",
        "root": "absent",
        "fingerprint": "5f1c" * 8,
        "labels": labels,
    }
    dataset["splits"] = {"train": 360, "val": 120, "test": count}
    names = [f"i{1 + i // 24:02d}_{1 + i % 24:02d}_{1 + i % 5}.bmp" for i in range(count)]
    mos = rng.beta(3, 2, count)
    _json(
        folder / "run.json",
        {
            "title": "Demo: two necks, trained and attacked",
            "command": ["srm-iqa demo --out runs/demo"],
            "dataset": dataset,
            "created": "2026-11-23T02:10:00+00:00",
            "seconds": 221.4,
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
        },
    )
    for neck in necks:
        scores = 0.8 * mos + 0.1 + rng.normal(0, 0.09 if neck == "none" else 0.11, count)
        logistic = LogisticMap((0.5, 1.8, 0.0, 0.02, mos.mean()), scores.mean(), scores.std())
        _neck(folder / neck, neck, dataset, logistic, rng)
        _json(
            folder / neck / "evaluation.json",
            {
                **_correlations(scores, mos, logistic),
                "split": "test",
                "n": count,
                "mos": mos.tolist(),
                "names": names,
                "logistic": logistic.to_dict(),
                "labels": labels,
            },
        )
        for norm, eps in budgets:
            strength = 1.2 * np.log2(1 + (255 * eps if norm == "linf" else eps))
            _attack(
                folder / neck / "attacks" / f"{norm}-{eps:.6g}",
                (norm, eps, strength),
                (names[:attacked], mos[:attacked], scores[:attacked], logistic),
                (examples, side),
                rng,
            )
    return folder


class Page(HTMLParser):
    """A parsed HTML page: its text, its elements with their attributes, and its tables as rows of cell texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag  # elements are closed in the right order

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data + " "
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data

    def rows(self, column: str) -> list[list[str]]:
        """Return the rows of the first table that has a column with this heading."""
        return next(table for table in self.tables if table and column in table[0])


@pytest.fixture
def page() -> Callable[[Path], Page]:
    """Return a function that parses a written report."""
    return lambda path: Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that calls `make_run` on a fresh folder."""
    return lambda **options: make_run(tmp_path / "run", **options)


def _neck(folder: Path, neck: str, dataset: dict, logistic: LogisticMap, rng: np.random.Generator) -> None:
    _json(
        folder / "config.json",
        {
            "format": "srm-iqa/1",
            "backbone": "tf_efficientnet_lite0",
            "neck": neck,
            "config": CONFIG.to_dict(),
            "sha256": "0" * 64,
            "card": {
                "dataset": dataset,
                "epoch": 4,
                "val": {"srocc": 0.8, "plcc": 0.82},
                "logistic": logistic.to_dict(),
            },
        },
    )
    rows = []
    for epoch in range(1, 5):
        row = {
            "epoch": epoch,
            "lr": {"backbone": 2e-4, "neck": 1e-3},
            "loss": 0.09 / epoch + (0.02 / epoch if neck == "srm" else 0),
            "loss_mse": 0.09 / epoch,
            "val_srocc": 0.84 - 0.5 / epoch + rng.normal(0, 0.02),
            "val_plcc": 0.85 - 0.5 / epoch,
            "seconds": 24.0,
            "images_per_second": 44.0 + rng.normal(),
            "data_share": 0.25,
            "diagnostics": {},
        }
        if neck == "srm":
            gate = np.array([1 / 3 + 0.02 * epoch, 1 / 3, 1 / 3 - 0.02 * epoch])
            row |= {
                "gain_active": 0.04 * epoch,
                "loss_tau": 0.9 / epoch,
                "loss_entropy": 0.0,
                "loss_balance": 0.001 * epoch,
            }
            row["diagnostics"] = {
                "gate_weights": gate.tolist(),
                "gate_entropy": float(-(gate * np.log(gate)).sum() / np.log(3)),
                "gain": {"median": 1.0, "p90": 1.0},
                "gain_active": 0.05 * epoch,
                "norm": {"median": 110.0 + epoch, "p90": 130.0},
                "update_ratio": {"1": 0.3, "2": 0.4, "3": 0.5},
                "links": {
                    link: {
                        "logit_std": {"median": 1 + 0.1 * epoch, "p90": 1.5},
                        "attention_entropy": {"median": 0.93 - 0.02 * epoch, "p90": 0.95},
                        "tau": rng.uniform(0.9, 1.1, 8).tolist(),
                        "sigma_before_tau": rng.uniform(0.8, 1.3, 8).tolist(),
                        "sigma_after_tau": rng.uniform(0.9, 1.1, 8).tolist(),
                        "kappa": {"median": 20.0 + epoch, "p90": 40.0},
                        "residual": {"median": 2e-7, "p90": 4e-7},
                        "gain": {"median": 1.4, "p90": 2.0},
                    }
                    for link in ("4to3", "4to2", "4to1")
                },
            }
        rows.append(json.dumps(row))
    (folder / "history.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _attack(
    path: Path,
    budget: tuple[str, float, float],
    clean: tuple[list[str], np.ndarray, np.ndarray, LogisticMap],
    examples: tuple[int, int],
    rng: np.random.Generator,
) -> None:
    (norm, eps, strength), (names, mos, scores, logistic) = budget, clean
    attacks = {}
    for i, name in enumerate(ATTACKS):
        share = strength * (0.15 if name.startswith("transfer") else 0.5 - 0.05 * i)
        pushed = scores + share * np.sign(np.median(mos) - mos) * rng.uniform(0.6, 1, len(mos))
        attacks[name] = {**_correlations(pushed, mos, logistic), "zero_gradients": 0.002 * i}
    worst = {f"{key}_attack": min(attacks, key=lambda name: attacks[name][key]) for key in ("srocc", "plcc")}
    worst |= {key: attacks[worst[f"{key}_attack"]][key] for key in ("srocc", "plcc")}
    _json(
        path.with_name(path.name + ".json"),
        {
            "norm": norm,
            "eps": eps,
            "steps": 10,
            "restarts": 1,
            "seed": 0,
            "clean": _correlations(scores, mos, logistic),
            "mos": mos.tolist(),
            "names": names,
            "attacks": attacks,
            "worst": worst,
            "incomplete": [],
        },
    )
    kept = []
    count, side = examples
    for i in range(count):
        files = {kind: f"{i:02d}-pgd_mse-{kind}.png" for kind in ("clean", "attacked", "difference")}
        smooth = np.add.outer(np.linspace(0, 160, side), np.linspace(0, 90, side))[..., None] * [
            1,
            0.8,
            0.5 + i / 4,
        ]
        noise = rng.choice([-1, 1], (side, side, 3)) * (255 * eps if norm == "linf" else 1)
        for kind, pixels in zip(files, (smooth, smooth + noise, 128 + 10 * noise), strict=True):
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path / files[kind])
        kept.append(
            {
                "name": names[i],
                "mos": mos[i],
                "clean_score": scores[i],
                "adversarial_score": attacks["pgd_mse"]["scores"][i],
                "attack": "pgd_mse",
                "magnification": 10,
                **files,
            }
        )
    if kept:
        _json(path / "examples.json", kept)


def _correlations(scores: np.ndarray, mos: np.ndarray, logistic: LogisticMap) -> dict:
    return {"srocc": srocc(scores, mos), "plcc": plcc(logistic(scores), mos), "scores": scores.tolist()}


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
