"""Test attacks and audits of modules that overwrite their input, refuse `eval`, or lack calibration or a gradient."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_models import Convolutional, Linear, Noisy, batch, weight
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from srm_model import SRMConfig, build_model
from srm_model.attacks import MSE, Attack, Suite, audit, certify, fgsm, pgd, square
from srm_model.attacks.apgd import apgd
from srm_model.attacks.guard import predict
from srm_model.cli.attack import print_results
from srm_model.modules import evaluating
from srm_model.training import predict as predict_dataset

EPS = 4 / 255
TINY = SRMConfig(attack_steps=2, attack_restarts=2, attack_queries=8, eot_samples=2, attack_batch_size=4)
ATTACKS = {
    "fgsm": lambda m, x, y, **o: fgsm(m, x, y, MSE(), **{"eps": EPS} | o),
    "pgd": lambda m, x, y, **o: pgd(m, x, y, MSE(), **{"eps": EPS, "steps": 3, "restarts": 2} | o),
    "apgd": lambda m, x, y, **o: apgd(m, x, y, MSE(), **{"eps": EPS, "steps": 3, "restarts": 2} | o),
    "square": lambda m, x, y, **o: square(m, x, y, MSE(), **{"eps": EPS, "queries": 12} | o),
}


class Images:
    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.names, self.split = images, [str(i) for i in range(len(images))], "test"
        self.mos = torch.linspace(0.1, 0.9, len(images)).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index], self.mos[index]


class InPlace(nn.Module):
    """A module that normalises the images, in place or in a copy, and then calls `model`.

    In place, it overwrites its input, as torchvision's `normalize(inplace=True)` does.
    """

    def __init__(self, model: nn.Module, *, inplace: bool) -> None:
        super().__init__()
        self.model, self.inplace, self.stochastic = model, inplace, getattr(model, "stochastic", False)

    def forward(self, x):
        return self.model(x.sub_(0.5).div_(0.25) if self.inplace else x.sub(0.5).div(0.25))


def pair(model: nn.Module) -> tuple[InPlace, InPlace]:
    return InPlace(model, inplace=True), InPlace(model, inplace=False)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eot", [1, 2])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_of_a_model_that_writes_into_its_input(name, eot, norm):
    model = Noisy(weight() * 0.1, 0.01) if eot > 1 else Convolutional()
    images, mos = batch(3), [0.2, 0.5, 0.8]
    before = images.clone()
    found, expected = (ATTACKS[name](m, images, mos, eot=eot, norm=norm) for m in pair(model))
    assert torch.equal(images, before)
    assert torch.equal(found, expected)
    delta = (found - images).abs().max() if norm == "linf" else (found - images).flatten(1).norm(dim=1).max()
    assert 0 < delta <= EPS * (1 + 1e-6)


def test_scores_bounds_and_suites_of_a_model_that_writes_into_its_input():
    data = Images(batch(6))
    before = data.images.clone()
    for measure in (
        lambda m: predict(m, data.images, samples=2).tolist(),
        lambda m: predict_dataset(m, data).tolist(),
        lambda m: certify(m, data.images, eps=0.1, samples=20).to_dict(),
        lambda m: Suite.extended(TINY).run(m, data, norm="linf", eps=EPS, surrogate=m, keep=2).to_dict(),
        lambda m: audit(m, data, eps=EPS, config=TINY, surrogate=m, images=4).to_dict()["checks"],
    ):
        found, expected = (measure(m) for m in pair(Convolutional()))
        assert repr(found) == repr(expected)
        assert torch.equal(data.images, before)


# Modules without a training and an evaluation mode


class Refusing(Convolutional):
    """A module that raises an error in `train` and in `eval`, as an exported program does."""

    def train(self, mode: bool = True):
        raise RuntimeError("modes? none")


def exported() -> nn.Module:
    side = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Convolutional().eval(), (batch(2),), dynamic_shapes=({0: side},))
    return program.module()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("make", [exported, Refusing])
def test_a_module_that_refuses_eval_is_attacked_and_audited_as_another(make, wrapped):
    module, plain = make(), Convolutional()
    if wrapped:
        module = nn.Sequential(module, nn.Identity())
    modes = [part.training for part in module.modules()]
    data = Images(batch(4))
    for name, attack in ATTACKS.items():
        found = attack(module, data.images, data.mos)
        assert torch.allclose(found, attack(plain, data.images, data.mos), atol=1e-6), name
    assert audit(module, data, eps=EPS, config=TINY, images=4).checks[0].passed is not None
    assert np.allclose(predict_dataset(module, data), predict_dataset(plain, data))
    assert [part.training for part in module.modules()] == modes


def test_a_refusing_part_does_not_keep_its_neighbours_in_training():
    whole = nn.Sequential(Refusing(), nn.Dropout(0.5)).requires_grad_(False)
    with evaluating(whole):
        assert not any(part.training for part in whole.modules())
    assert all(part.training for part in whole.modules())


# Necks that were never calibrated


def test_attacks_and_audits_of_an_uncalibrated_neck_warn_once_and_have_gradients():
    config = SRMConfig(channels=16, heads=2, rank=4, pool_size=2, image_size=32)
    images, mos = batch(2, side=32), [0.2, 0.8]
    for measure in (
        lambda m: pgd(m, images, mos, MSE(), eps=EPS, steps=2, restarts=1),
        lambda m: certify(m, images, eps=0.1, samples=2),
        lambda m: Suite([Attack("pgd", MSE())], TINY).run(m, Images(images), norm="linf", eps=EPS),
        lambda m: audit(m, Images(images), eps=EPS, config=TINY, images=2),
    ):
        torch.manual_seed(0)
        model = build_model("test_convnext", neck="srm", config=config)
        with pytest.warns(UserWarning, match="never calibrated") as said:
            found = measure(model)
        assert len([w for w in said if "never calibrated" in str(w.message)]) == 1
        if isinstance(found, torch.Tensor):
            assert 0.5 * EPS < (found - images).abs().max() <= EPS
        model.calibrate(images)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*never calibrated")
            measure(model)


HIDING = {
    "compiled in a module": lambda m: nn.Sequential(torch.compile(m, backend="eager")),
    "a function of a module": lambda m: Calling(lambda x: m(x)),
    "a compiled function": lambda m: Calling(torch.compile(lambda x: m(x), backend="eager")),
}


class Calling(nn.Module):
    """A module that calls its model through a function, so that `modules()` does not list the model."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("around", HIDING)
def test_an_uncalibrated_neck_is_reported_whatever_wraps_it(around):
    config = SRMConfig(channels=16, heads=2, rank=4, pool_size=2, image_size=32)
    images = batch(2, side=32)
    for calibrated in (False, True):
        torch._dynamo.reset()
        model = build_model("test_convnext", neck="quadratic", config=config).eval()
        if calibrated:
            model.calibrate(images)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pgd(HIDING[around](model), images, [0.2, 0.8], MSE(), eps=EPS, steps=2, restarts=1)
        assert len([w for w in said if "never calibrated" in str(w.message)]) == (not calibrated)


# Models that cannot be differentiated


class Zeroing(Convolutional):
    """A model that overwrites its input, which its convolution has saved for the backward pass."""

    def forward(self, x):
        scores = super().forward(x)
        x.zero_()
        return scores


class Replacing(nn.Module):
    """A model that overwrites an intermediate tensor that was saved for the backward pass."""

    def forward(self, x):
        features = (x - 0.5).exp()
        scores = features.square().mean((1, 2, 3))
        features[:, :, 0] = 0
        return scores


@pytest.mark.parametrize("make", [Zeroing, Replacing])
def test_a_model_that_destroys_what_autograd_saved_is_one_sentence(make):
    images, mos = batch(2), [0.2, 0.8]
    data = Images(images)
    words = "cannot be differentiated: it writes in place into a tensor that an earlier operation saved"
    for name in ("fgsm", "pgd", "apgd"):
        with pytest.raises(ValueError, match=words):
            ATTACKS[name](make(), images, mos)
    with pytest.raises(ValueError, match=words):
        Suite.extended(TINY).run(make(), data, norm="linf", eps=EPS)
    with pytest.raises(ValueError, match=words):
        audit(make(), data, eps=EPS, config=TINY, images=2)
    assert (ATTACKS["square"](make(), images, mos) - images).abs().max() <= EPS * (1 + 1e-6)
    assert len(predict(make(), images)) == 2


# Attacks that had no gradient


@pytest.mark.parametrize(("value", "kind"), [(0.0, "zero"), (math.nan, "not finite")])
def test_a_suite_says_which_figures_had_no_gradient(value, kind):
    class Masked(Linear):
        def forward(self, x):
            x = x.clone()
            if x.requires_grad:
                x.register_hook(lambda gradient: gradient * value)
            return super().forward(x)

    data = Images(batch(4))
    suite = Suite.extended(TINY)
    with pytest.warns(UserWarning, match="may overstate robustness"):
        worst = suite.run(Masked(weight() * 0.1), data, norm="linf", eps=EPS).worst
    names = {doubt.partition(":")[0] for doubt in worst["doubts"]}
    assert names == {a.name for a in suite.attacks if a.method != "square" and not a.transfer}
    assert all(
        f"100 % {'of its gradients were zero' if kind == 'zero' else kind}" in d for d in worst["doubts"]
    )
    for name in ("fgsm", "pgd", "apgd"):
        with pytest.warns(UserWarning, match="every gradient was zero or not finite"):
            ATTACKS[name](Masked(weight() * 0.1), data.images, data.mos)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = Suite([Attack("pgd", MSE())], TINY)
        assert one.run(Linear(weight() * 0.1), data, norm="linf", eps=EPS).worst["doubts"] == []


# Arguments


@pytest.mark.parametrize("name", ATTACKS)
def test_what_comes_back_requires_no_gradient(name):
    images, mos = batch(2).requires_grad_(), torch.tensor([0.2, 0.8], requires_grad=True)
    found = ATTACKS[name](Convolutional(), images, mos)
    assert not found.requires_grad
    assert torch.equal(found, ATTACKS[name](Convolutional(), images.detach(), mos.detach()))
    assert not predict(Convolutional(), images).requires_grad


def test_any_kind_of_number_is_a_number():
    model, images, mos = Convolutional(), batch(2), [0.2, 0.8]
    one, quarter = np.int64(1), np.float32(0.25)
    plain = {
        "fgsm": {"eps": 0.25},
        "pgd": {"eps": 0.25, "steps": 1, "restarts": 1, "eot": 1, "step_size": 0.25, "restart_batch": 1},
        "apgd": {"eps": 0.25, "steps": 1, "restarts": 1, "eot": 1, "restart_batch": 1},
        "square": {"eps": 0.25, "queries": 12, "area": 0.25, "eot": 1},
    }
    for name, options in plain.items():
        given = {k: quarter if v == 0.25 else np.int64(v) for k, v in options.items()}
        assert torch.equal(
            ATTACKS[name](model, images, mos, **given), ATTACKS[name](model, images, mos, **options)
        )
    fraction = pgd(model, images, mos, MSE(), eps=Fraction(1, 4), steps=1, restarts=1)
    assert torch.equal(fraction, pgd(model, images, mos, MSE(), eps=0.25, steps=1, restarts=1))
    bound = certify(model, images, eps=quarter, sigma=quarter, samples=np.int32(8), batch_size=np.int8(4))
    assert type(bound.eps) is type(bound.sigma) is float
    data = Images(batch(4))
    found = Suite([Attack("pgd", MSE())], TINY).run(
        model, data, norm="linf", eps=quarter, batch_size=np.int64(2), seed=one, keep=one, limit=np.int16(2)
    )
    assert type(found.eps) is float
    assert type(found.batch_size) is type(found.seed) is int
    checked = audit(model, data, eps=quarter, config=TINY, images=np.int64(2), seed=one)
    assert (type(checked.eps), type(checked.seed)) == (float, int)
    with pytest.raises(TypeError, match="expected an integer"):
        pgd(model, images, mos, MSE(), eps=0.1, steps=np.float64(2))
    with pytest.raises(TypeError, match="expected a number"):
        pgd(model, images, mos, MSE(), eps=np.bool_(True))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(batch(1)[0], 0.5)])


class Records(Images):
    def __getitem__(self, index: int):
        return {"image": self.images[index], "mos": self.mos[index]}


class Triples(Images):
    def __getitem__(self, index: int):
        return self.images[index], self.mos[index], "name"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda x: DataLoader(Images(x)), r"a DataLoader; expected the dataset itself \(loader\.dataset\)"),
        (lambda x: iter(Images(x)), "is a iterator; expected len"),
        (lambda _: Stream(), "is a Stream; expected len"),
        (lambda x: {"images": x, "mos": [0.5] * len(x)}, "is a dict; expected len"),
        (Records, r"dataset\[0\] is a dict; expected a pair \(image, MOS\)"),
        (Triples, r"dataset\[0\] is a tuple \(Tensor, float, str\); expected a pair"),
        (
            lambda x: [(image, "good") for image in x],
            r"dataset\[0\] is a tuple \(Tensor, str\); expected a pair",
        ),
        (lambda x: list(x), r"dataset\[0\] is a Tensor; expected a pair"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_sentence(made, said):
    for measure in (
        lambda data: Suite.paper(TINY).run(Convolutional(), data, norm="linf", eps=EPS),
        lambda data: audit(Convolutional(), data, eps=EPS, config=TINY),
    ):
        with pytest.raises(TypeError, match=said) as error:
            measure(made(batch(3)))
        assert "\n" not in str(error.value)


def test_the_command_prints_which_figures_had_no_gradient(capsys):
    figures = {"srocc": 0.9, "plcc": 0.9}
    entry = {"zero_gradients": 1.0, "nonfinite_gradients": 0.0}
    result = {
        "norm": "linf", "eps": EPS, "clean": figures, "worst": {**figures, "srocc_attack": "pgd_mse"},
        "attacks": {"pgd_mse": entry, "square_mse": dict.fromkeys(entry), "apgd_mse": dict.fromkeys(entry, 0.0)},
        "mos": [0.5, 0.6],
    }  # fmt: skip
    print_results([(Path("run/srm"), result)])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(
        "srm, linf 4/255, pgd_mse: 100 % of its gradients were zero and 0 % not finite, so"
    )
