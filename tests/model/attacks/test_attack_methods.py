"""Test the registry of attack methods: with one entry, a suite runs a method and checks its settings on resume."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_models import Linear, batch, weight
from torch import Tensor

from srm_model.attack_suites import SUITES, Planned
from srm_model.attacks import MSE, Attack, PGDTrace, Suite, SuiteResult
from srm_model.attacks.gradient import trace_of
from srm_model.attacks.methods import ATTACK_METHODS, AttackMethod
from srm_model.attacks.problem import Best, attacking
from srm_model.attacks.suite import Job, settings_of
from srm_model.config import SRMConfig

CONFIG = SRMConfig(attack_steps=2, attack_restarts=1, attack_queries=5)
EPS = 4 / 255


class Images:
    """Six images with labels."""

    def __init__(self) -> None:
        self.images = batch(6)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        return self.images[index], index / 6


class Brightening:
    """A toy search that returns the best of several brighter copies of the images."""

    def __init__(self) -> None:
        self.shades: list[int] = []

    def __call__(
        self, model, images, mos, objective, *, norm, eps, eot, generator, on_step, shades
    ) -> PGDTrace:
        self.shades.append(shades)
        with attacking(model, images, mos, objective, norm, eps, eot, generator) as problem:
            best, losses = Best(problem), []
            for number in range(1, shades + 1):
                x = problem.project(problem.images + problem.eps * number / shades)
                losses.append(problem.loss(x))
                best.offer(x, losses[-1])
                if on_step is not None:
                    on_step()
            return trace_of(images, problem, best, torch.stack(losses, 1), gradients=0)


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Brightening:
    """Register the toy search with one entry, and add a suite that uses it."""
    search = Brightening()
    method = AttackMethod(
        search, {"shades": "attack_queries"}, lambda config, passes, objective: config.attack_queries
    )
    monkeypatch.setitem(ATTACK_METHODS, "brightening", method)
    monkeypatch.setitem(SUITES, "toy", (Planned("brighter", "brightening", "mse", "brightening"),))
    return search


def run(config: SRMConfig = CONFIG, **options: Any) -> SuiteResult:
    model = Linear(weight().abs() * 0.1)
    return Suite.named("toy", config).run(model, Images(), norm="linf", eps=EPS, batch_size=3, **options)


def test_a_registered_search_runs_in_a_suite(search: Brightening, capsys: pytest.CaptureFixture[str]):
    result = run(progress=True, keep=6)
    assert search.shades == [5, 5]
    assert "10/10" in capsys.readouterr().err
    entry = result.attacks["brighter"]
    assert entry["method"] == "brightening"
    assert math.isnan(entry["zero_gradients"])
    for example in result.examples:
        assert example.attacked_score > example.clean_score
        torch.testing.assert_close(example.attacked, example.clean + EPS)


def test_a_registered_search_is_resumed_only_with_its_settings(search: Brightening, tmp_path: Path):
    first = run(resume=tmp_path).attacks["brighter"]["scores"]
    assert run(resume=tmp_path).attacks["brighter"]["scores"] == first
    run(CONFIG.replace(attack_steps=9), resume=tmp_path)  # the search does not use the steps
    assert search.shades == [5, 5]
    with pytest.raises(ValueError, match="made with queries 5; this run has 6"):
        run(CONFIG.replace(attack_queries=6), resume=tmp_path)
    (tmp_path / "batch-000001.safetensors").unlink()
    assert run(resume=tmp_path).attacks["brighter"]["scores"] == first
    assert search.shades == [5, 5, 5]


@pytest.mark.parametrize("name", ATTACK_METHODS)
def test_an_entry_is_complete(name: str):
    """A method has the common keyword arguments and those of its settings.

    Every setting is recorded, so that a run with another value cannot resume.
    """
    method = ATTACK_METHODS[name]
    parameters = inspect.signature(method.trace).parameters
    own = {argument for argument, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    common = {"norm", "eps", "eot", "generator", "on_step", *(["step_size"] if method.step_size else [])}
    assert own == common | set(method.settings)
    assert set(method.settings.values()) <= set(CONFIG.attack_settings())
    job = Job(
        config=CONFIG,
        model=Linear(weight()),
        surrogate=None,
        attacks=(Attack(name, MSE(), method=name),),
        numbers={name: 1},
        dataset=Images(),
        norm="linf",
        eps=EPS,
        batch_size=3,
        seed=0,
        limit=None,
    )
    recorded = settings_of(job)
    for field in method.settings.values():
        assert recorded[field.removeprefix("attack_")] == getattr(CONFIG, field)


def test_suites_name_registered_methods():
    assert {attack.method for attacks in SUITES.values() for attack in attacks} == set(ATTACK_METHODS)
