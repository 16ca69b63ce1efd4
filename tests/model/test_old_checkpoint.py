"""Test that the weights of an earlier version of the neck load and give the same outputs and gradients as before.

The file `fixtures/old_neck.safetensors` was written when the neck was a single Python file. It holds a state dict of
seeded weights and a pyramid. For each `attention` ("nystrom" and "full"), in fp32 and in fp64, it also holds the
outputs of the neck, and the gradients of a loss with respect to the pyramid. The loss is Σ fused·cos(fused), where
cos(fused) is detached.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from srm_kernels.numerics import error_ratio
from srm_model import SRMConfig, SRMNeck

FILE = Path(__file__).parent / "fixtures" / "old_neck.safetensors"
OUTPUTS = ("fused", "weights", "gain", "norm", "losses")


def part(name: str) -> dict[str, Tensor]:
    """Return the tensors whose names in the file begin with `name` and a dot. The returned names lack this prefix."""
    with safe_open(FILE, "pt") as file:
        return {
            key.removeprefix(f"{name}."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118, not a dict
            if key.startswith(f"{name}.")
        }


def load(attention: str) -> SRMNeck:
    with safe_open(FILE, "pt") as file:
        config = SRMConfig.from_dict(json.loads(file.metadata()["config"]))
    neck = SRMNeck([m.shape[1] for m in part("map").values()], config, attention=attention)
    neck.load_state_dict(part("state"))
    return neck.eval()


def outputs(neck: SRMNeck) -> dict[str, Tensor]:
    maps = [m.requires_grad_() for m in part("map").values()]
    out = neck(maps)
    (out.fused * out.fused.detach().cos()).sum().backward()
    found = {name: getattr(out, name) for name in OUTPUTS[:-1]}
    found["losses"] = torch.stack(list(out.losses.values()))
    return found | {f"gradient.{i}": m.grad for i, m in enumerate(maps) if m.grad is not None}


def ratios(attention: str, neck: SRMNeck) -> dict[str, float]:
    """Return the error ratio of every output and gradient; a ratio of at most 1 satisfies the numerics rule."""
    plain, exact = part(f"{attention}.float32"), part(f"{attention}.float64")
    found = outputs(neck)
    assert found.keys() == plain.keys() == exact.keys()
    gradients = [value for name, value in exact.items() if name.startswith("gradient")]
    return {
        name: error_ratio(value, plain[name], exact[name], gradients if name.startswith("gradient") else None)
        for name, value in found.items()
    }


@pytest.mark.parametrize("attention", ["nystrom", "full"])
def test_an_old_state_dict_gives_what_it_gave(attention: str):
    wrong = {name: ratio for name, ratio in ratios(attention, load(attention)).items() if not ratio <= 1}
    assert wrong == {}


def test_the_rule_tells_a_neck_whose_weights_moved():
    neck = load("nystrom")
    with torch.no_grad():
        neck.links["4to1"].theta.add_(1e-4)
    assert ratios("nystrom", neck)["fused"] > 1
