"""Tests of SRMConfig: round trip, the article's settings, and one-line errors for invalid values."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from srm_kernels import backends, checks, nystrom_attention, select_landmarks
from srm_kernels.landmarks.methods import LANDMARK_METHODS, Keys, LandmarkMethod
from srm_model import SRMConfig
from srm_model.cli import main
from srm_model.config import REGISTERED, registered
from srm_model.profiling.counting import link_macs


def test_round_trip_through_json_keeps_every_field():
    config = SRMConfig(links=((3, 1), (2, 1)), gain_cap=None, qk_norm=None, eps_linf=(0.1,), rank=16)
    assert SRMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_reading_and_its_overrides():
    paper = SRMConfig.paper(rank=32)
    assert (paper.landmarks, paper.solver, paper.qk_norm, paper.rank) == ("leverage", "auto", None, 32)
    changed = {name for name, value in paper.to_dict().items() if value != getattr(SRMConfig(), name)}
    assert changed == {"landmarks", "solver", "qk_norm", "rank"}


def test_it_is_frozen_and_replace_checks():
    config = SRMConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3  # type: ignore[misc]
    assert config.replace(rank=3).rank == 3
    with pytest.raises(ValueError, match="unknown config key ranks"):
        config.replace(ranks=3)


def test_its_backends_are_those_of_the_operators():
    assert [SRMConfig(backend=name).backend for name in backends()] == list(backends())


@pytest.mark.parametrize("field", REGISTERED)
def test_registered_fields_take_what_is_registered_and_nothing_else(field):
    """`SRMConfig` does not check defaults, so this test checks that the registered names include the default."""
    assert REGISTERED[field] == getattr(SRMConfig, field)
    assert REGISTERED[field] in registered(field)
    for name in registered(field):
        assert getattr(SRMConfig(**{field: name}), field) == name
    with pytest.raises(ValueError, match=f"config {field}='other': expected one of"):
        SRMConfig(**{field: "other"})


def test_a_landmark_method_that_is_registered_is_known_everywhere(monkeypatch, capsys):
    """An entry in `LANDMARK_METHODS` is enough for the operators, the config and the command line."""

    def first(keys: Keys) -> torch.Tensor:
        return torch.arange(keys.options.rank).expand(*keys.key.shape[:2], -1).clone()

    monkeypatch.setitem(
        LANDMARK_METHODS, "first", LandmarkMethod(first, "the first keys", lambda rank, keys, d: 0)
    )
    key = torch.randn(1, 2, 9, 8)
    assert select_landmarks(key, 3, method="first")[0].tolist() == [[0, 1, 2]] * 2
    assert nystrom_attention(key, key, key, 3, method="first").shape == key.shape
    config = SRMConfig(landmarks="first")
    assert link_macs(config, "srm", 100, 80) == link_macs(SRMConfig(landmarks="uniform"), "srm", 100, 80)
    assert main(["train", "--help"]) == 0
    assert "first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank=0: expected at least 1"),
        ({"rank": 2.5}, TypeError, "rank=2.5: expected int"),
        ({"rank": True}, TypeError, "rank=True: expected int"),
        ({"dyt": 1}, TypeError, "dyt=1: expected bool"),
        ({"solver": "qr"}, ValueError, "solver='qr': expected one of 'cholesky'"),
        ({"qk_norm": "query"}, ValueError, "qk_norm='query': expected one of None, 'keys', 'both'"),
        ({"landmarks": "random"}, ValueError, "landmarks='random'"),
        ({"channels": 250}, ValueError, "channels=250: expected a multiple of heads=8"),
        ({"ridge": 0.0}, ValueError, "ridge=0.0: expected above 0 with solver='cholesky'"),
        ({"links": ((5, 1),)}, ValueError, "links=((5, 1),): expected stages out of (1, 2, 3, 4)"),
        ({"links": ((1, 4),)}, ValueError, "from a deeper stage to a shallower one"),
        ({"links": ((4, 1), (4, 1))}, ValueError, "each link once"),
        ({"links": (4, 1)}, TypeError, "expected pairs of integers"),
        ({"fused_stages": ()}, ValueError, "fused_stages=()"),
        ({"fused_stages": (1, 1)}, ValueError, "distinct stages"),
        ({"kv_pool_prob": 1.5}, ValueError, "expected a probability"),
        ({"gamma": float("nan")}, ValueError, "expected a finite number"),
        ({"gain_cap": -1.0}, ValueError, "a positive number or None"),
        ({"betas": (0.9,)}, ValueError, "two numbers"),
        ({"backend": 3}, TypeError, "backend=3: expected str"),
        (
            {"backend": "nope"},
            ValueError,
            "backend='nope': expected one of None, 'reference', 'torch', 'triton'",
        ),
        ({"nokey": 1}, TypeError, "unexpected keyword argument 'nokey'"),
        ({"attack_sweep_steps": (0,)}, ValueError, "attack_sweep_steps=(0,): expected steps of at least 1"),
        ({"attack_sweep_steps": (0.5,)}, TypeError, "expected integers"),
        ({"attack_square_area": 0.0}, ValueError, "a share of the image in (0, 1]"),
        ({"attack_restart_batch": 0}, ValueError, "attack_restart_batch=0"),
        ({"gradient_norm": "l3"}, ValueError, "gradient_norm='l3': expected one of 'l1', 'l2'"),
        ({"gradient_step": 0.02}, ValueError, "at most 0.01"),
        ({"weight_gradient": -1.0}, ValueError, "weight_gradient=-1.0: expected zero or more"),
        ({"weight_consistency": -1.0}, ValueError, "weight_consistency=-1.0: expected zero or more"),
        (
            {"weight_consistency": 1.0},
            ValueError,
            "weight_consistency=1.0: expected 0 with adversarial_eps=0",
        ),
        ({"adversarial_eps": 4.0}, ValueError, "at most 1 for norm 'linf'"),
        ({"crop_size": 513}, ValueError, "crop_size=513: expected 1 to image_size=512, or None"),
        ({"crop_size": 0}, ValueError, "crop_size=0: expected 1 to image_size=512, or None"),
        ({"crop_size": 2.5}, TypeError, "crop_size=2.5: expected int"),
        ({"smoothing_confidence": 1.0}, ValueError, "a probability below 1"),
    ],
)
def test_bad_values_are_one_sentence(changes, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        SRMConfig(**changes)
    assert "\n" not in str(caught.value)


def test_numpys_scalars_are_kept_as_pythons():
    given = SRMConfig(
        rank=np.int32(8), ridge=np.float32(0.5), dyt=np.bool_(False), links=((np.int64(4), np.int64(1)),),
        eps_linf=[np.float64(0.25)], backend=np.str_("torch"), attack_sweep_steps=(np.uint8(3),),
    )  # fmt: skip
    plain = SRMConfig(
        rank=8,
        ridge=0.5,
        dyt=False,
        links=((4, 1),),
        eps_linf=(0.25,),
        backend="torch",
        attack_sweep_steps=(3,),
    )
    assert given == plain
    assert json.dumps(given.to_dict()) == json.dumps(plain.to_dict())
    assert type(given.dyt) is bool
    with pytest.raises(TypeError, match="expected int"):
        SRMConfig(rank=np.float64(8))


def test_a_config_of_the_last_release_names_the_backend_anew():
    """A renamed backend is accepted with a warning.

    The test covers `from_dict` and `replace`, which get the values of config.json, `--set` and `--backend`.
    """
    checks._warn_renamed.cache_clear()
    with pytest.warns(FutureWarning, match="now called 'torch'"):
        assert SRMConfig.from_dict({**SRMConfig().to_dict(), "backend": "sdpa"}).backend == "torch"
    assert SRMConfig().replace(backend="sdpa").to_dict()["backend"] == "torch"
