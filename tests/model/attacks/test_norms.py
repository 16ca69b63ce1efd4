"""Test the norms, and that an entry in `NORMS` is enough to add another norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attack_models import Convolutional, batch
from torch import Tensor

from srm_model.attacks import MSE, Suite, apgd, audit, fgsm, pgd, square
from srm_model.cli import main
from srm_model.config import SRMConfig
from srm_model.norms import NORMS, Norm, norm_of
from srm_model.reports.text import budget_text

CONFIG = SRMConfig(attack_steps=4, attack_restarts=1, attack_queries=8)


class L1(Norm):
    """The L1 norm: the sum of the absolute changes of all pixels."""

    name = "l1"
    symbol = "L1"
    step = 4.0
    step_words = "along the largest entries"
    tables = (20.0,)
    budgets = (5.0, 20.0)

    def length(self, delta: Tensor) -> Tensor:
        return delta.abs().sum((1, 2, 3))

    def direction(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        largest = flat.abs().topk(max(1, flat.shape[1] // 100), dim=1)
        spread = torch.zeros_like(flat).scatter(1, largest.indices, 1 / largest.indices.shape[1])
        return (spread * flat.sign()).view_as(gradient)

    def noise(self, shape: torch.Size, radius: float, source: dict[str, Any]) -> Tensor:
        noise = -torch.rand(shape, **source).log() * (torch.randint(2, shape, **source) * 2 - 1)
        return noise / self.length(noise)[:, None, None, None] * radius

    def projection(self, images: Tensor, radius: float) -> Callable[[Tensor], Tensor]:
        inside = radius * (1 - 1e-5)

        def project(points: Tensor) -> Tensor:
            delta = (points - images).flatten(2)
            size = delta.abs()
            ordered = size.sort(2, descending=True).values
            excess = (ordered.cumsum(2) - inside) / torch.arange(1, size.shape[2] + 1)
            threshold = excess.amax(2, keepdim=True).clamp_min(0)
            shrunk = (size - threshold).clamp_min(0) * delta.sign()
            return (images + shrunk.view_as(points)).clamp(0, 1)

        return project


class Images:
    """Eight images with labels."""

    def __init__(self) -> None:
        self.images = batch(8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        return self.images[index], index / 8


@pytest.fixture
def l1(monkeypatch: pytest.MonkeyPatch) -> Norm:
    norm = L1()
    monkeypatch.setitem(NORMS, "l1", norm)
    return norm


def test_another_norm_serves_every_attack(l1: Norm):
    model, images = Convolutional(), batch()
    mos = torch.zeros(len(images))
    for attack, options in (
        (fgsm, {}),
        (pgd, {"steps": 4, "restarts": 1}),
        (apgd, {"steps": 4, "restarts": 1}),
        (square, {"queries": 8}),
    ):
        attacked = attack(model, images, mos, MSE(), norm="l1", eps=2.0, **options)
        assert 0 < float(l1.length(attacked - images).max()) <= 2.0
        assert attacked.min() >= 0
        assert attacked.max() <= 1


def test_another_norm_serves_suite_and_audit(l1: Norm):
    result = Suite.extended(CONFIG).run(Convolutional(), Images(), norm="l1", eps=2.0, batch_size=4)
    assert (result.norm, result.radius, result.step_size) == ("l1", 2.0, 4.0 * 2.0 / 4)
    assert audit(Convolutional(), Images(), norm="l1", eps=2.0, config=CONFIG, images=4).checks
    assert l1.diameter(torch.zeros(3, 4, 5)) == 60


def test_another_norm_is_known_by_name(l1: Norm, capsys: pytest.CaptureFixture[str]):
    assert norm_of("l1").tables_of(SRMConfig()) == (20.0,)
    assert budget_text(("l1", 20.0)) == "L1 ε = 20"
    assert SRMConfig(adversarial_norm="l1", adversarial_eps=20.0).adversarial_norm == "l1"
    assert main(["audit", "--help"]) == 0
    assert "{linf,l2,l1}" in capsys.readouterr().out


@pytest.mark.parametrize("name", NORMS)
def test_a_direction_has_unit_length_and_noise_fills_the_ball(name: str):
    norm, source = (
        NORMS[name],
        {"generator": torch.Generator().manual_seed(0), "device": "cpu", "dtype": torch.float32},
    )
    gradient = torch.randn(4, 3, 5, 6, **source)
    assert norm.length(norm.direction(gradient.clone())).tolist() == pytest.approx([1] * 4)
    lengths = norm.length(norm.noise(torch.Size((400, 3, 5, 6)), 0.5, source))
    assert 0.49 < float(lengths.max()) <= 0.5 * (1 + 1e-6)


def test_what_a_stated_budget_means():
    image = torch.zeros(3, 128, 128)
    assert NORMS["linf"].radius(0.1, image) == 0.1
    assert NORMS["l2"].radius(10.0, image) == 10.0 / 4
    assert (NORMS["linf"].diameter(image), NORMS["l2"].diameter(image)) == (
        1,
        pytest.approx(math.sqrt(3) * 128),
    )
    assert [norm.brief(4 / 255) for norm in NORMS.values()] == ["4/255", "0.01569"]
    assert budget_text(("lp", 2.0)) == "lp ε = 2"
