"""`srm-iqa export`: the folder loads, the program agrees, the card says what is known and nothing more."""

from __future__ import annotations

import torch

from srm_model import SRMConfig, build_model, load_model
from srm_model.checkpoint import save_model
from srm_model.cli import main

CONFIG = SRMConfig(channels=32, heads=2, rank=4, pool_size=4, image_size=64)


def test_export_writes_a_folder_that_loads_and_a_program_that_agrees(tmp_path, capsys):
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
    loaded, read = load_model(tmp_path / "out")
    assert read == card
    assert torch.equal(loaded(images), model(images))
    program = torch.export.load(tmp_path / "out" / "program.pt2")
    # another implementation of the same fp32 mathematics: 100 units of rounding
    assert (program.module()(images) - model(images)).abs().max() <= 100 * torch.finfo(torch.float32).eps
    text = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    for fact in (
        "metric VSI, not people's opinion",
        "SROCC 0.500, PLCC undefined",
        "not evaluated",
        "epoch 3",
    ):
        assert fact in text
    assert "differ by at most" in capsys.readouterr().out


def test_export_refuses_its_own_folder_and_what_is_no_checkpoint(tmp_path, capsys):
    save_model(build_model("test_convnext", neck="none", config=CONFIG), tmp_path / "m", card={})
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "m")]) == 2
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
