"""Test that an honest model passes the audit, and that models with hidden gradients or other faults do not."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from attack_models import batch
from torch import Tensor, nn

from srm_model.attacks import audit
from srm_model.config import SRMConfig

CONFIG = SRMConfig(attack_steps=10, attack_restarts=3, attack_queries=150)
QUICK = CONFIG.replace(attack_steps=2, attack_restarts=1, attack_queries=10)
CHECKS = [
    "steps",
    "eps",
    "gradients",
    "restarts",
    "derivative",
    "transfer",
    "black_box",
    "unbounded",
    "randomness",
    "batch",
]


class Honest(nn.Module):
    """A small smooth network."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.features = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.GELU()
            )
            self.head = nn.Linear(8 * 64, 1)

    def raw(self, images: Tensor) -> Tensor:
        return self.head(self.features(images - 0.5).flatten(1))[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.raw(images)


class Quantising(Honest):
    """A model that rounds pixels to 16 levels first. Its gradient is zero, but attacks without gradients succeed."""

    def forward(self, images: Tensor) -> Tensor:
        return self.raw((images * 15).round() / 15)


class Saturated(Honest):
    """A model with a sigmoid so steep that the scores are exactly 0 or 1."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(3e4 * self.raw(images))


class Detached(Honest):
    """A model whose score is detached from autograd, except for a small decoy term."""

    def forward(self, images: Tensor) -> Tensor:
        return self.raw(images.detach()) + 0.01 * images[:, :, ::2].mean((1, 2, 3))


class Blind(Honest):
    """A model whose whole score is detached from autograd."""

    def forward(self, images: Tensor) -> Tensor:
        return self.raw(images.detach())


class RandomCrop(Honest):
    """A model that crops images at random and does not declare itself stochastic."""

    def forward(self, images: Tensor) -> Tensor:
        top, left = torch.randint(0, 5, (2,)).tolist()
        return self.raw(F.pad(images, (2, 2, 2, 2))[..., top : top + 16, left : left + 16])


class OwnDice(Honest):
    """A model that adds noise from its own random generator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.raw(images) + 0.1 * torch.rand((), generator=self.generator)


class Relative(Honest):
    """A model that scores an image relative to the other images of its batch."""

    def forward(self, images: Tensor) -> Tensor:
        scores = self.raw(images)
        return scores - scores.mean()


class Rugged(Honest):
    """A model whose score has ripples, each with a local maximum."""

    def forward(self, images: Tensor) -> Tensor:
        score = self.raw(images)
        return score + 0.3 * torch.sin(150 * images.mean((1, 2, 3)) * 16)


class Kinked(Honest):
    """A model whose score has a kink at every 2⁻¹² of each pixel value, and the gradient of this score."""

    def forward(self, images: Tensor) -> Tensor:
        period = 2.0**-11
        folded = (
            images.double() / period
        ) % 1  # float64, because the wave is far finer than the pixel values
        wave = period * torch.minimum(folded, 1 - folded)
        return self.raw(images) + 0.1 * wave.sum((1, 2, 3)).float()


class Jumping(Honest):
    """A model whose score jumps at every 2⁻¹² of each pixel value. Its gradient is that of the smooth part."""

    def forward(self, images: Tensor) -> Tensor:
        return (
            self.raw(images) + 2e-5 * ((images.detach().double() * 2**12).floor() % 2).sum((1, 2, 3)).float()
        )


class Broken(Honest):
    def forward(self, images: Tensor) -> Tensor:
        return self.raw(images) * math.nan


class Images:
    """Random 16×16 images. Their labels are the scores of `Honest` plus a little noise."""

    def __init__(self, count: int = 12) -> None:
        self.images = batch(count, side=16)
        with torch.no_grad():
            scores = Honest()(self.images)
        noise = torch.randn(count, generator=torch.Generator().manual_seed(2))
        self.mos = (0.5 + scores - scores.mean() + 0.01 * noise).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index], self.mos[index]


def run(model, **changes):
    return audit(model, Images(), **{"eps": 4 / 255, "config": CONFIG, "surrogate": Honest(1), **changes})


def plain(result):
    return json.dumps(result.to_dict())


def test_kinks_of_the_score_do_not_fail_the_check_of_derivatives_and_jumps_do():
    """The two scores differ from a smooth score at the same pixel values, by a kink or by a jump."""
    found = {}
    for model in (Kinked(), Jumping()):
        result = run(model, config=QUICK)
        (found[type(model)],) = (check for check in result.checks if check.name == "derivative")
    assert found[Kinked].passed
    errors = found[Kinked].data["errors"]
    assert errors[-1] < 0.2 < min(errors[:-1])  # larger steps cross too many kinks
    assert not found[Jumping].passed
    assert found[Jumping].data["errors"][-1] > 0.5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_honest_model_passes(norm):
    result = run(Honest(), norm=norm, eps=4 / 255 if norm == "linf" else 10.0)
    assert [check.name for check in result.checks] == CHECKS
    assert result.failed == []
    assert result.passed
    assert all(check.passed for check in result.checks)
    curves = {check.name: check.data for check in result.checks}
    assert len(curves["steps"]["y"]) == 11
    assert curves["eps"]["x"] == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert curves["unbounded"]["srocc"] < -0.5
    assert plain(run(Honest(), norm=norm, eps=result.eps)) == plain(result)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        (Quantising(), {"steps", "gradients", "derivative", "black_box"}),
        (Saturated(), {"steps", "eps", "gradients", "derivative", "unbounded"}),
        (Detached(), {"derivative", "black_box"}),
        (Blind(), {"gradients"}),
        (RandomCrop(), {"randomness"}),
        (OwnDice(), {"randomness"}),
        (Relative(), {"batch"}),
        (Rugged(), {"steps", "eps", "restarts"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_masked_models_are_flagged(model, flags):
    result = run(model)
    assert flags <= set(result.failed)
    assert not result.passed
    for check in result.checks:
        assert check.figure
        assert check.meaning.count(".") >= 1
    assert result.has_gradient is (type(model) is not Blind)


def test_a_model_without_gradient_is_asked_by_queries():
    """A model that is meant to be differentiable fails; another model gets no verdict about its gradients."""
    (reach,) = (check.data["other"] for check in run(Honest()).checks if check.name == "black_box")
    for expected in (True, False):
        result = run(Blind(), expect_gradient=expected)
        found = {check.name: check for check in result.checks}
        assert list(found) == CHECKS
        assert not result.has_gradient
        assert result.passed is not expected
        assert result.failed == (["gradients"] if expected else [])
        assert {name for name, check in found.items() if check.passed} == {"unbounded", "randomness", "batch"}
        for name in set(CHECKS) - {"unbounded", "randomness", "batch"}:
            assert "have no gradient" in found[name].figure
        # `Blind` and `Honest` have the same scores, so the same search reaches the same scores.
        assert found["black_box"].data["other"] == pytest.approx(reach)
        assert "150 queries" in found["unbounded"].figure
        assert found["unbounded"].data["srocc"] < 0 < found["unbounded"].data["clean"]


def test_a_search_that_does_not_move_the_scores_is_not_a_pass():
    class Deaf(nn.Module):
        """Scores that do not depend on the pixels, only on their position in the batch."""

        def forward(self, images: Tensor) -> Tensor:
            return torch.arange(len(images)).float()

    class Ordered(Images):
        def __init__(self) -> None:
            super().__init__()
            self.mos = torch.linspace(0, 1, len(self.images)).tolist()

    config = QUICK.replace(attack_batch_size=12)
    found = audit(Deaf(), Ordered(), eps=4 / 255, config=config, images=12, expect_gradient=False)
    assert "unbounded" in found.failed


class Plateau(Honest):
    """A metric that is constant on images with strong contrast, as BRISQUE. With `fails`, it raises an error there."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def forward(self, images: Tensor) -> Tensor:
        strong = images.std((1, 2, 3)) > 0.3
        if self.fails and strong.any():
            raise ValueError("the contrast is too strong")
        return torch.where(strong, 0.0, self.raw(images)).detach()


def test_a_plateau_or_an_error_at_an_unbounded_budget_is_not_a_failure_of_the_model():
    (equal,) = (
        c for c in run(Plateau(False), config=QUICK, expect_gradient=False).checks if c.name == "unbounded"
    )
    assert equal.passed
    assert "all scores are equal with any image allowed, by 10 queries" in equal.figure
    (failed,) = (
        c for c in run(Plateau(True), config=QUICK, expect_gradient=False).checks if c.name == "unbounded"
    )
    assert failed.passed is None
    assert failed.figure == "not checked: with any image allowed, the contrast is too strong"


def test_a_gradient_is_checked_even_if_none_is_expected():
    assert run(Honest(), expect_gradient=False).to_dict() == run(Honest()).to_dict()
    assert "gradients" in run(Quantising(), expect_gradient=False).failed


def test_declared_randomness_is_no_fault():
    class Declared(Honest):
        stochastic = True

        def forward(self, images: Tensor) -> Tensor:
            return self.raw(images) + 1e-3 * torch.rand(())

    result = run(Declared(), config=CONFIG.replace(eot_samples=2, attack_queries=60))
    found = {check.name: check for check in result.checks}
    assert found["randomness"].passed
    assert "EOT" in found["randomness"].figure
    assert found["batch"].passed is None


def test_randomness_between_few_things_is_found():
    class TwoFaces(Honest):
        def forward(self, images: Tensor) -> Tensor:
            return self.raw(images.flip(3) if random.random() < 0.5 else images)

    draws = random.Random(0)
    assert draws.random() > 0.5  # no flip
    assert draws.random() > 0.5  # no flip in a second pass either
    assert "randomness" in run(TwoFaces(), config=QUICK).failed


def test_the_gradient_of_a_random_model_is_compared_within_one_draw():
    class Declared(RandomCrop):
        stochastic = True

    class DeclaredAndDetached(Declared):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.detach()) + 0.01 * images.mean((1, 2, 3))

    config = QUICK.replace(eot_samples=2)
    assert "derivative" not in run(Declared(), config=config).failed
    assert "derivative" in run(DeclaredAndDetached(), config=config).failed


def cropped(base: type[Honest]) -> type[Honest]:
    """Return a subclass of `base` that crops images at random and declares itself stochastic."""

    class Cropped(base):
        stochastic = True

        def raw(self, images: Tensor) -> Tensor:
            top, left = torch.randint(0, 5, (2,)).tolist()
            return super().raw(F.pad(images, (2, 2, 2, 2))[..., top : top + 16, left : left + 16])

    return Cropped


class DeclaredDice(OwnDice):
    """A model that multiplies its score by a random factor.

    The audit averages over an attack that raises the scores and one that lowers them. If the noise were added to the
    score, it would cancel in this average.
    """

    stochastic = True

    def forward(self, images: Tensor) -> Tensor:
        return self.raw(images) * (0.1 + 1.8 * torch.randint(2, (), generator=self.generator))


EOT = CONFIG.replace(attack_steps=6, attack_restarts=2, eot_samples=8, attack_queries=16)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("model", [cropped(Honest)(), DeclaredDice()], ids=["crop", "dice"])
def test_the_noise_of_a_declared_random_model_is_not_taken_for_a_fall(model, norm):
    # Even scores averaged over eight draws vary by more than the attack changes them.
    assert run(model, norm=norm, eps=4 / 255 if norm == "linf" else 10.0, config=EOT, images=6).failed == []


@pytest.mark.parametrize(
    ("base", "flags"),
    [(Quantising, {"steps", "restarts", "gradients"}), (Rugged, {"steps"}), (Blind, {"gradients"})],
)
def test_a_masked_model_is_flagged_behind_declared_randomness_too(base, flags):
    assert flags <= set(run(cropped(base)(), config=EOT, images=6).failed)


def test_what_cannot_be_asked_is_left_open():
    result = run(Honest(), surrogate=None, config=CONFIG.replace(attack_restarts=1))
    found = {check.name: check.passed for check in result.checks}
    assert found["transfer"] is None
    assert found["restarts"] is None
    assert result.passed


def test_few_images_and_progress():
    seen = []
    result = run(Honest(), images=4, progress=seen.append)
    assert result.images == 4
    assert seen == [name.replace("_", " ") for name in CHECKS]


def test_the_model_is_left_as_found():
    model = Honest().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    run(model)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"eps": 0.0}, ValueError, "eps=0: expected a budget above 0"),
        ({"norm": "l1"}, ValueError, "norm='l1'"),
        ({"images": 1}, ValueError, "limit=1"),
        ({"model": 3}, TypeError, "torch.nn.Module"),
        ({"model": Broken()}, ValueError, "12 of 12 scores of clean images are not finite"),
        ({"surrogate": 3}, TypeError, "torch.nn.Module"),
    ],
)
def test_bad_input_is_one_sentence(changes, error, words):
    arguments = {"model": Honest(), **changes}
    with pytest.raises(error, match=words):
        run(arguments.pop("model"), **arguments)


def test_a_score_that_becomes_nan_is_no_pass():
    class Fragile(Honest):
        def forward(self, images: Tensor) -> Tensor:
            scores = self.raw(images)
            return torch.where(scores > self.limit, math.nan, scores)

    model = Fragile()
    model.limit = float(Honest()(Images().images).detach().max()) + 1e-3
    result = run(model)
    assert not result.passed
    assert next(check for check in result.checks if check.name == "unbounded").passed


def test_a_ranking_that_was_inverted_before_the_attack_is_not_taken_for_a_broken_one():
    class Inverted(Honest):
        def forward(self, images: Tensor) -> Tensor:
            return -self.raw(images)

    check = next(check for check in run(Inverted()).checks if check.name == "unbounded")
    assert check.data["clean"] < 0
    assert check.passed is None
