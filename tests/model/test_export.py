"""Tests of `srm-iqa export`.

The folder loads, the program agrees with the model, and the card states only known facts.
"""

from __future__ import annotations

import socket

import pytest
import torch

from srm_model import SRMConfig, build_model, load_model
from srm_model.checkpoint import read_card, save_model
from srm_model.cli import export, main
from srm_model.files import write_json

CONFIG = SRMConfig(channels=32, heads=2, rank=4, pool_size=4, image_size=64)


def test_export_writes_a_folder_that_loads_and_a_program_that_agrees(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    model = build_model("test_convnext", config=CONFIG)
    model.calibrate(torch.rand(4, 3, 64, 64))
    card = {
        "dataset": {"name": "toy", "labels": "metric:vsi"},
        "epoch": 3,
        "val": {"srocc": 0.5, "plcc": None},
    }
    save_model(model, tmp_path / "checkpoint", card=card)
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "program.pt2",
        "MODEL_CARD.md",
    }
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("asked the network"))
    assert torch.equal(build_model("test_convnext", weights=tmp_path / "out")(images), model(images))
    loaded, read = load_model(tmp_path / "out")
    assert read == card
    assert torch.equal(loaded(images), model(images))
    program = torch.export.load(tmp_path / "out" / "program.pt2")
    # The program uses another fp32 implementation; the tolerance is 100 eps.
    assert (program.module()(images) - model(images)).abs().max() <= 100 * torch.finfo(torch.float32).eps
    text = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    for fact in (
        "metric VSI, not people's opinions",
        "SROCC 0.500, PLCC undefined",
        "neither evaluated nor attacked",
        "Not audited",
        "epoch 3",
    ):
        assert fact in text
    assert "largest difference between the program and the model" in capsys.readouterr().out


def test_the_card_tells_what_was_measured_of_these_weights_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_export_program", lambda *_: 0.0)
    folder = tmp_path / "checkpoint"
    save_model(build_model("test_convnext", neck="none", config=CONFIG), folder, card={})
    digest = read_card(folder)["sha256"]

    def exported() -> str:
        assert main(["export", str(folder), str(tmp_path / "out")]) == 0
        return (tmp_path / "out" / "MODEL_CARD.md").read_text()

    write_json(folder / "evaluation.json", {"srocc": 0.81, "plcc": 0.8, "n": 240, "sha256": digest})
    assert "| none | 240 | 0.810 | 0.800 |" in exported()
    assert "The model has not been attacked" in exported()
    for other in ("other", None):
        write_json(folder / "evaluation.json", {"srocc": 0.9, "plcc": 0.9, "n": 240, "sha256": other})
        assert "neither evaluated nor attacked" in exported()
    write_json(folder / "evaluation.json", {"srocc": 0.81, "plcc": 0.8, "n": 240, "sha256": digest})
    worst = {"srocc": -0.3, "plcc": None, "srocc_attack": "pgd_mse"}
    attacked = {"norm": "linf", "eps": 4 / 255, "mos": [0.5] * 48, "worst": worst}
    write_json(folder / "attacks" / "a.json", {**attacked, "settings": {"checkpoint": digest}})
    write_json(folder / "attacks" / "b.json", {**attacked, "eps": 0.1, "settings": {"checkpoint": "other"}})
    checks = [{"title": title, "passed": passed} for title, passed in (("a", True), ("b", None), ("c", True))]
    audited = {"norm": "linf", "eps": 4 / 255, "checks": checks, "sha256": digest}
    write_json(folder / "audit.json", audited)
    text = exported()
    assert "| linf 4/255 | 48 | -0.300 | undefined | pgd_mse |" in text
    assert "may overstate" not in text
    assert text.count("| linf ") == 1
    assert "The model has not been attacked" not in text
    assert "Passed at linf 4/255: none of 2 checks found masked gradients. Not run: b." in text
    entry = {"zero_gradients": 0.5, "nonfinite_gradients": None}
    write_json(
        folder / "attacks" / "a.json",
        {**attacked, "attacks": {"pgd_mse": entry}, "settings": {"checkpoint": digest}},
    )
    assert "- linf 4/255, pgd_mse: 50 % of its gradients were zero and 0 % not finite, so" in exported()
    checks[0]["passed"] = False
    write_json(folder / "audit.json", {"checks": checks, "sha256": digest})
    assert "**Failed**: 1 of 2 checks (a)" in exported()
    write_json(folder / "audit.json", {"checks": checks, "sha256": "other"})
    assert "Not audited" in exported()


def test_export_refuses_its_own_folder_and_what_is_no_checkpoint(tmp_path, capsys):
    save_model(build_model("test_convnext", neck="none", config=CONFIG), tmp_path / "m", card={})
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "m")]) == 2
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
