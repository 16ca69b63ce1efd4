"""`srm-iqa train` as a user calls it: under torchrun, stopped, and with what it must refuse."""

from __future__ import annotations

from pathlib import Path

import torch
from forked import on_ranks
from photographs import FLAGS, write_set
from safetensors.torch import load_file

from srm_model.cli import main
from srm_model.files import read_json


def test_two_processes_train_evaluate_and_write_once(tmp_path: Path, capfd):
    data = write_set(tmp_path / "data")
    command = ["train", "--data", str(data), *FLAGS, "--accumulate", "2", "--save-every", "1"]
    on_ranks(2, main, [*command, "--out", str(tmp_path / "two")], join=False)
    output = capfd.readouterr().out
    assert output.count("test images") == 1
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    assert capfd.readouterr().out == output
    one, two = (tmp_path / name / "srm" for name in ("one", "two"))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert len(list((two / "tensorboard").iterdir())) == 1
    assert len(read_json(tmp_path / "two" / "run.json")["command"]) == 1
    weights = [load_file(folder / "state.safetensors") for folder in (one, two)]
    for name, value in weights[0].items():
        if name.startswith("model."):
            # Adam divides a gradient by its own size, so that where it is all rounding a step of up to the learning
            # rate is too: six steps of 1e-3, at most twice.
            torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1.2e-2, msg=name)
    assert read_json(two / "evaluation.json")["srocc"] == read_json(one / "evaluation.json")["srocc"]
