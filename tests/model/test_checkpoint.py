from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import srm_model.checkpoint as checkpoint
from srm_model import build_model, load_model
from srm_model.checkpoint import load_weights, pack, read_card, save_model
from srm_model.config import SRMConfig
from srm_model.files import sha256_of


class Small(nn.Module):
    backbone_name, neck_name = "test_convnext", "srm"

    def __init__(self, value: float = 0.0, width: int = 4) -> None:
        super().__init__()
        self.config = SRMConfig(channels=32, heads=4)
        self.conv = nn.Conv2d(3, width, 3)
        self.tied = self.conv
        self.brief = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(7))
        with torch.no_grad():
            self.conv.weight.add_(value)
        self.to(memory_format=torch.channels_last)


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


CARD: dict[str, Any] = {"dataset": {"name": "toy"}, "epoch": 3, "val": {"srocc": 0.5, "plcc": None}}


def test_round_trip_of_shared_channels_last_and_half_precision_tensors(tmp_path: Path):
    model = Small()
    save_model(model, tmp_path / "run", card=CARD)
    other = Small(1.0)
    assert not equal(model, other)
    load_weights(other, tmp_path / "run")
    assert equal(model, other)
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
    document = read_card(tmp_path / "run")
    assert document["card"] == CARD
    assert SRMConfig.from_dict(document["config"]) == model.config
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("step", ["save_file", "write_json", "replace"])
def test_a_kill_while_saving_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    old, new = Small(1.0), Small(2.0)
    save_model(old, tmp_path, card={"epoch": 1})

    def kill(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "save_file":
            patch.setattr("safetensors.torch.save_file", kill)
        elif step == "write_json":
            patch.setattr(checkpoint, "write_json", kill)
        else:
            replace = Path.replace
            patch.setattr(
                Path,
                "replace",
                lambda self, to: (kill if self.name == checkpoint._PENDING else replace)(self, to),
            )
        with pytest.raises(KeyboardInterrupt):
            save_model(new, tmp_path, card={"epoch": 2})
    expected, epoch = (new, 2) if step == "replace" else (old, 1)
    found = Small(3.0)
    load_weights(found, tmp_path)
    assert equal(found, expected)
    assert read_card(tmp_path)["card"] == {"epoch": epoch}

    save_model(new, tmp_path, card={"epoch": 2})
    load_weights(found, tmp_path)
    assert equal(found, new)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_weights_file_is_reported(tmp_path: Path):
    save_model(Small(), tmp_path, card=CARD)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for broken in (whole[:-5], b"", bytes(flipped)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged, or it does not belong"):
            load_weights(Small(), tmp_path)
    path.unlink()
    for read in (read_card, load_model, lambda file: build_model("test_convnext", weights=file)):
        with pytest.raises(ValueError, match=r"config\.json is a file; expected the folder of a checkpoint"):
            read(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        load_weights(Small(), tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other/1"}, "not a checkpoint of this program"),
        ({"format": "srm-iqa/2"}, "checkpoint format 'srm-iqa/2' is not supported; expected 'srm-iqa/1'"),
        ({"optimizer": 1}, "unknown key optimizer"),
        ({"sha256": None}, "sha256 is None, expected str"),
        ({"neck": "mlp"}, "neck 'mlp' is not one of srm, quadratic, none"),
        ({"backbone": "hf-hub:some/model"}, "backbone 'hf-hub:some/model' is not the name of a timm model"),
        ({"config": {"rnak": 4}}, "unknown config key rnak"),
        ({"config": {"rank": 0}}, "config rank=0: expected at least 1"),
        ({"config": {"rank": "64"}}, "config rank='64': expected int"),
    ],
)
def test_a_foreign_or_invalid_config_is_a_sentence_naming_the_file(
    tmp_path: Path, change: dict[str, Any], sentence: str
):
    save_model(Small(), tmp_path, card=CARD)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for read in (read_card, load_model, lambda folder: load_weights(Small(), folder)):
        with pytest.raises(ValueError, match=r"config\.json: ") as caught:
            read(tmp_path)
        assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1]", "not a checkpoint"),
        ("{", "not readable as JSON"),
        ("{}", "not a checkpoint"),
        (None, "no such file"),
    ],
)
def test_what_is_no_config_at_all(tmp_path: Path, text: str | None, sentence: str):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_card(tmp_path)


def test_a_missing_key_is_named(tmp_path: Path):
    save_model(Small(), tmp_path, card=CARD)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match="no key sha256; a checkpoint has format, backbone, neck, config, sha256, card"
    ):
        read_card(tmp_path)


def test_tensors_that_do_not_fit_are_named_and_nothing_is_changed(tmp_path: Path):
    model = Small(width=8)
    model.extra = nn.Parameter(torch.zeros(1))
    del model.brief
    save_model(model, tmp_path, card=CARD)
    other = Small()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        load_weights(other, tmp_path)
    assert (
        "1 missing (brief), 1 unexpected (extra), 4 of another shape (conv.bias (8,) instead of (4,))"
        in str(caught.value)
    )
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_weights_that_are_no_safetensors_are_refused_though_their_digest_fits(tmp_path: Path):
    save_model(Small(), tmp_path, card=CARD)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    path.write_bytes(b"\x80\x04K\x01.")
    document = json.loads(config.read_text())
    config.write_text(json.dumps({**document, "sha256": sha256_of(path)}))
    with pytest.raises(ValueError, match="not readable as safetensors"):
        load_weights(Small(), tmp_path)


def test_a_stored_file_is_plain_safetensors(tmp_path: Path):
    model = Small()
    save_model(model, tmp_path, card=CARD)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert tensors["conv.weight"].is_contiguous()
    save_file(tensors, tmp_path / "again.safetensors")


def test_a_checkpoint_of_earlier_versions_with_a_cap_that_never_started(tmp_path: Path):
    config = SRMConfig(channels=16, heads=2, rank=4, pool_size=2, image_size=32)
    save_model(build_model("test_convnext", neck="srm", config=config), tmp_path, card=CARD)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["neck.median_rms"].fill_(math.inf)
    for name in [name for name in tensors if name.endswith("sigma_started")]:
        tensors[name] = tensors[name].bool()
    save_file(tensors, tmp_path / "model.safetensors")
    document = json.loads((tmp_path / "config.json").read_text())
    document["sha256"] = sha256_of(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(document))
    model, _ = load_model(tmp_path)
    assert not model.neck.calibrated
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_a_packed_checkpoint_has_half_the_size_and_the_same_scores(tmp_path: Path):
    torch.manual_seed(0)
    config = SRMConfig(channels=16, heads=2, rank=4, pool_size=2, image_size=64, landmarks="uniform")
    model = build_model("test_convnext", config=config)
    images = torch.rand(4, 3, 64, 64)
    model.calibrate(images)
    model.neck.median_rms.fill_(1e6)  # beyond the range of fp16, as σ̄ and M₀ can be
    card = {**CARD, "dataset": {"name": "toy", "root": "/home/user/toy"}}
    save_model(model, tmp_path / "full", card=card)
    pack(tmp_path / "full", tmp_path / "packed")
    loaded, read = load_model(tmp_path / "packed")
    assert read == CARD, "all but the dataset's folder on this machine"
    assert loaded.config == config
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert (loaded(images) - model(images)).abs().max() < 1e-3
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert stored[name].dtype == (torch.float16 if tensor.dim() >= 2 else torch.float32), name
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "packed")]
    assert sizes[1] < 0.6 * sizes[0]


def test_packing_keeps_what_fp16_cannot_hold(tmp_path: Path):
    model = Small()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = 1e5
    save_model(model, tmp_path / "full", card={})
    pack(tmp_path / "full", tmp_path / "packed")
    other = Small(1.0)
    load_weights(other, tmp_path / "packed")
    assert equal(model, other)
    with pytest.raises(ValueError, match="is the checkpoint itself; expected another folder"):
        pack(tmp_path / "full", tmp_path / "full")


def test_the_shipped_checkpoint_loads_without_an_argument_and_is_small():
    model, card = load_model()
    document = read_card(checkpoint.SHIPPED)
    assert (model.backbone_name, model.neck_name) == (document["backbone"], document["neck"])
    assert not model.training
    assert card == document["card"]
    assert "root" not in card.get("dataset", {})
    files = {path.name: path.stat().st_size for path in checkpoint.SHIPPED.iterdir()}
    assert files.keys() == {"model.safetensors", "config.json", "MODEL_CARD.md"}
    assert files["model.safetensors"] <= 12_000_000
    about = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "shipped/*" in about["tool"]["setuptools"]["package-data"]["srm_model"]


def test_a_damaged_or_missing_shipped_checkpoint_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "shipped"
    monkeypatch.setattr(checkpoint, "SHIPPED", folder)
    config = SRMConfig(channels=8, heads=2, rank=4, pool_size=2, image_size=32)
    save_model(build_model("test_convnext", neck="none", config=config), folder, card=CARD)
    assert load_model()[1] == CARD
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(bytes(whole))
    with pytest.raises(
        ValueError, match=r"model\.safetensors: damaged, or it does not belong to config\.json"
    ):
        load_model()
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(
            ValueError, match=f"shipped has no {name}, .* make one with python -m bench.checkpoint"
        ):
            load_model()


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"absent: no such folder; expected the folder of a checkpoint, with model"
    ):
        load_model(tmp_path / "absent")
