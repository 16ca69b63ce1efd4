from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from attack_models import Convolutional, Linear, Noisy, OfFirstPixel, batch, weight
from hypothesis import given
from hypothesis import strategies as st

from srm_model.attacks import MSE, Drift, PairInversion, fgsm, pgd, pgd_trace
from srm_model.config import SRMConfig

quick = partial(pgd, steps=6, restarts=2)


def distance(attacked, images, norm):
    delta = (attacked.double() - images.double()).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


def rise(model, attacked, images):
    return (model(attacked) - model(images)).detach()


# Closed forms. A rise is the difference of two fp32 scores near 10. The tolerance of 1e-5 covers their rounding.


@pytest.mark.parametrize("sign", [1, -1])
def test_linf_reaches_eps_times_the_l1_norm(sign):
    w, images, eps = weight(), batch(), 4 / 255
    model = Linear(w)
    mos = model(images).detach() - sign * 100  # the error grows with sign · score
    attacked = pgd(model, images, mos, MSE(), eps=eps, steps=10, restarts=1)
    expected = sign * eps * w.abs().sum()
    assert rise(model, attacked, images) == pytest.approx(expected.expand(4), rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_l2_reaches_eps_times_the_l2_norm(sign):
    w, images, eps = weight(), batch(), 0.05
    model = Linear(w)
    mos = model(images).detach() - sign * 100
    attacked = pgd(model, images, mos, MSE(), norm="l2", eps=eps, steps=20, step_size=4 * eps, restarts=1)
    # The component orthogonal to the gradient shrinks by a factor of 5 per step. The radius has a margin of about 1e-5.
    assert rise(model, attacked, images) == pytest.approx((sign * eps * w.norm()).expand(4), rel=5e-5)


def test_drift_on_a_quadratic_goes_to_the_far_side():
    # f = (x₀ − 0.4)² at x₀ = 0.5. Within ±0.2 the score changes most at 0.7.
    model = OfFirstPixel(lambda p: (p - 0.4).square())
    images = torch.full((2, 3, 4, 4), 0.5)
    attacked = pgd(model, images, [0.5, 0.5], Drift(), eps=0.2, steps=10, restarts=5)
    assert attacked[:, 0, 0, 0] == pytest.approx(torch.full((2,), 0.7), abs=1e-6)


def test_fgsm_is_one_step():
    w, images, eps = weight(), batch(low=0, high=1), 8 / 255
    model = Linear(w)
    mos = model(images).detach() + 1  # the errors are negative, so that the score decreases
    expected = (images - eps * w.sign()).clamp(0, 1)
    assert torch.allclose(fgsm(model, images, mos, MSE(), eps=eps), expected, rtol=0, atol=1e-7)
    direction = -w / w.norm()
    step = fgsm(model, batch(), mos * 0 + 1e3, MSE(), eps=0.1, norm="l2") - batch()
    assert torch.allclose(step, (0.1 * direction).expand_as(step), rtol=0, atol=1e-6)


def test_fgsm_with_drift_is_refused():
    with pytest.raises(ValueError, match=r"Drift has zero gradient.*use pgd"):
        fgsm(Linear(weight()), batch(), [0.5] * 4, Drift(), eps=0.1)


@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.one_of(st.sampled_from([0.25 / 255, 1 / 255, 4 / 255, 1.0]), st.floats(1e-4, 1)),
    seed=st.integers(0, 10**6),
    step=st.sampled_from([None, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_result_is_in_the_ball_and_in_range(norm, eps, seed, step, dtype):
    images = batch(2, seed=seed, side=5, low=0, high=1).to(dtype)
    images[0, 0] = images[0, 0].round()  # some pixels are 0 or 1
    model = Linear(weight(seed, 5, dtype))
    mos = torch.zeros(2)
    # In fp64 the computed distance has a rounding error of a few units in the last place of 1.
    slack = 0 if dtype == torch.float32 else 1e-15
    for attacked in (
        pgd(model, images, mos, MSE(), norm=norm, eps=eps, steps=3, step_size=step, restarts=2),
        fgsm(model, images, mos, MSE(), norm=norm, eps=eps),
    ):
        assert attacked.shape == images.shape
        assert attacked.dtype == dtype
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert (distance(attacked, images, norm) <= eps + slack).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_zero_returns_the_images(norm):
    images = batch(low=0, high=1)
    model = Linear(weight())
    assert torch.equal(quick(model, images, [0.5] * 4, MSE(), norm=norm, eps=0.0), images)
    assert torch.equal(fgsm(model, images, [0.5] * 4, MSE(), norm=norm, eps=0.0), images)


# The iterate that is kept.


def test_the_best_iterate_is_kept_not_the_last():
    # A step of 0.17 is longer than half a period of the score, so that a step can jump over a maximum.
    model = OfFirstPixel(lambda p: torch.cos(20 * p))
    images = torch.full((3, 3, 2, 2), 0.5)
    trace = pgd_trace(model, images, [5.0, 5.0, 5.0], MSE(), eps=0.3, steps=9, step_size=0.17, restarts=3)
    assert trace.losses.shape == (3, 10, 3)
    assert torch.equal(trace.loss, trace.losses.flatten(0, 1).amax(0))
    torch.testing.assert_close((model(trace.images) - 5).square(), trace.loss)
    assert (trace.losses[:, -1] < trace.loss).any()  # otherwise keeping the last iterate would pass too


def test_the_start_and_the_last_iterate_count():
    rising = Linear(weight())
    images, mos = batch(), [-100.0] * 4
    trace = pgd_trace(rising, images, mos, MSE(), eps=0.1, steps=3, step_size=0.01, restarts=1)
    assert torch.equal(trace.loss, trace.losses[0, -1])

    class Wrong(Linear):  # its gradient leads downhill everywhere
        def forward(self, x):
            return 2 * super().forward(x).detach() - super().forward(x)

    trace = pgd_trace(Wrong(weight()), images, mos, MSE(), eps=0.1, steps=3, step_size=0.01, restarts=1)
    assert torch.equal(trace.loss, trace.losses[0, 0])


def test_each_image_keeps_its_own_best_but_a_batch_objective_keeps_one():
    model = OfFirstPixel(lambda p: torch.cos(20 * p))
    images = batch(6, side=2)
    mos = torch.linspace(0, 1, 6)
    arguments = {"eps": 0.2, "steps": 5, "step_size": 0.15, "restarts": 3}
    single = pgd_trace(model, images, mos, MSE(), **arguments)
    steps = single.losses.flatten(0, 1).argmax(0)
    assert len(steps.unique()) > 1
    pairs = pgd_trace(model, images, mos, PairInversion(), **arguments)
    assert pairs.losses.shape == (3, 6)
    assert pairs.loss == pairs.losses.max()
    # All returned images are from the same iterate, so that they reproduce its loss.
    again = PairInversion()(model(pairs.images), mos, mos)
    assert again == pytest.approx(pairs.loss.item(), rel=1e-6)


def test_restarts_help_on_a_function_with_many_peaks():
    # There are small peaks everywhere, and one high and narrow peak at 0.8.
    def peaks(p):
        return 0.1 * torch.cos(60 * p) + 2 * torch.exp(-(((p - 0.8) / 0.05) ** 2))

    model, images, mos = OfFirstPixel(peaks), torch.full((16, 3, 1, 1), 0.5), torch.full((16,), -1.0)
    found = {
        restarts: pgd_trace(
            model, images, mos, MSE(), eps=0.4, steps=10, step_size=0.01, restarts=restarts
        ).loss
        for restarts in (1, 10)
    }
    assert (found[10] >= found[1]).all()
    assert (found[10] > 8).float().mean() > (found[1] > 8).float().mean() + 0.3


def test_a_score_of_nan_is_the_best_an_attacker_can_do():
    model = OfFirstPixel(lambda p: torch.where(p > 0.55, math.nan, p))
    images = torch.full((3, 3, 2, 2), 0.5)
    for objective in (MSE(), PairInversion()):
        attacked = pgd(model, images, [0.0, 0.5, 1.0], objective, eps=0.1, steps=5, restarts=1)
        assert model(attacked).isnan().any()
    attacked = pgd(model, images, [0.0] * 3, MSE(), eps=0.1, steps=5, restarts=1)
    assert model(attacked).isnan().all()
    # The random start already gives NaN. The attack succeeds, because the score of the clean image is finite.
    broken_near = OfFirstPixel(lambda p: torch.where(p == 0.5, p, math.nan))
    assert broken_near(pgd(broken_near, images, [0.0] * 3, MSE(), eps=0.1, steps=2)).isnan().all()


def test_starts_are_uniform_in_the_ball():
    flat = OfFirstPixel(lambda p: 0 * p)  # the gradient is 0, so that the start is kept
    images = torch.full((4000, 3, 1, 1), 0.5)
    mos = torch.zeros(4000)
    linf = pgd(flat, images, mos, MSE(), eps=0.2, steps=1, restarts=1) - images
    # The mean and the variance of 12000 uniform draws, within five standard errors.
    assert abs(linf.mean()) < 5 * 0.2 / math.sqrt(3 * 12000)
    assert linf.var() == pytest.approx(0.2**2 / 3, rel=5 * math.sqrt(0.8 / 12000))
    l2 = (pgd(flat, images, mos, MSE(), norm="l2", eps=0.2, steps=1, restarts=1) - images).flatten(1)
    share = ((l2.norm(dim=1) / 0.2) ** 3).sort().values  # share of the volume: uniform in [0, 1]
    # Kolmogorov–Smirnov test at the 0.1 % level.
    assert (share - torch.linspace(0, 1, 4000)).abs().max() < 1.95 / math.sqrt(4000)
    assert l2.mean(0).norm() < 0.01


# Gradients.


def test_gradients_that_are_zero_or_not_finite_are_counted_and_do_no_harm():
    class Partly(Linear):
        def forward(self, x):
            scores = super().forward(x)
            broken = (x[1, 0, 0, 0] - x[1, 0, 0, 0]).sqrt()  # the value is 0, the gradient NaN
            return scores * torch.tensor([0.0, 1.0, 1.0]) + torch.stack([broken * 0, broken, broken * 0])

    images = batch(3)
    for norm in ("linf", "l2"):
        trace = pgd_trace(
            Partly(weight()), images, [-9.0] * 3, MSE(), norm=norm, eps=0.05, steps=4, restarts=2
        )
        assert trace.zero_gradients == pytest.approx(1 / 3)
        assert trace.nonfinite_gradients == pytest.approx(1 / 3)
        assert trace.images.isfinite().all()
        # The finite part of the broken image's gradient is used.
        assert trace.losses[:, -1, 1].min() > trace.losses[:, 0, 1].max()


def test_tiny_and_huge_gradients_make_full_l2_steps():
    images = batch()
    for scale in (1e-30, 1e18):
        model = Linear(weight() * scale)
        attacked = fgsm(model, images, [0.0] * 4, _Signed(), norm="l2", eps=0.1)
        assert distance(attacked, images, "l2") == pytest.approx(torch.full((4,), 0.1).double(), rel=1e-5)


class _Signed:
    def __call__(self, scores, mos, clean_scores):
        return scores


def test_a_custom_objective_gets_the_clean_scores():
    model, images = Linear(weight()), batch()
    seen = []

    def objective(scores, mos, clean_scores):
        seen.append(clean_scores.clone())
        assert not clean_scores.requires_grad
        return (scores - clean_scores).abs()

    quick(model, images, [0.5] * 4, objective, eps=0.1)
    assert all(torch.allclose(clean, model(images).detach()) for clean in seen)


def test_no_forward_pass_is_wasted():
    calls = []

    class Counting(Linear):
        def forward(self, x):
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    pgd(Counting(weight()), batch(), [0.5] * 4, MSE(), eps=0.1, steps=5, restarts=2)
    assert calls == 2 * ([True] * 5 + [False])


def test_channels_last_models_get_channels_last_images():
    layouts = []

    class Watching(Convolutional):
        def forward(self, x):
            layouts.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
            return super().forward(x)

    model = Watching()
    plain = quick(model, batch(), [0.5] * 4, MSE(), eps=0.1)
    assert not any(layouts)
    layouts.clear()
    other = quick(model.to(memory_format=torch.channels_last), batch(), [0.5] * 4, MSE(), eps=0.1)
    assert all(layouts)
    assert other.is_contiguous()
    assert torch.allclose(plain, other, atol=0.02)


@pytest.mark.parametrize("attack", [quick, fgsm])
def test_works_under_no_grad_inference_mode_and_autocast(attack):
    def objective(scores, mos, clean_scores):
        return scores * mos * clean_scores.square()  # autograd saves mos for the backward pass

    model, images, mos = Convolutional(), batch(), torch.full((4,), 0.5)
    expected = attack(model, images, mos, objective, eps=0.1)
    with torch.no_grad():
        assert torch.equal(attack(model, images, mos, objective, eps=0.1), expected)
    with torch.inference_mode():
        assert torch.equal(attack(model, images.clone(), mos.clone(), objective, eps=0.1), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attack(model, images, mos, objective, eps=0.1), expected)


def test_column_scores_are_accepted():
    class Column(Linear):
        def forward(self, x):
            return super().forward(x)[:, None]

    images, mos = batch(), [0.5] * 4
    expected = quick(Linear(weight()), images, mos, MSE(), eps=0.1)
    assert torch.equal(quick(Column(weight()), images, mos, MSE(), eps=0.1), expected)


# Seeds and EOT.


def test_the_same_seed_is_the_same_attack_whatever_the_global_state():
    model, images, mos = Convolutional(), batch(), [0.5] * 4

    def attacked(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return quick(model, images, mos, MSE(), eps=0.1, generator=generator)

    first = attacked(3)
    torch.manual_seed(99)
    assert torch.equal(attacked(3), first)
    assert not torch.equal(attacked(4), first)
    assert torch.equal(attacked(None), attacked(0))


def test_a_generator_moves_on_from_call_to_call():
    model, images, mos = Convolutional(), batch(), [0.5] * 4
    generator = torch.Generator().manual_seed(0)
    first, second = (quick(model, images, mos, MSE(), eps=0.1, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)


def test_stochastic_models_are_reproducible():
    model, images, mos = Noisy(weight(), 2.0), batch(), [-50.0] * 4
    first = quick(model, images, mos, MSE(), eps=0.1, eot=3)
    torch.manual_seed(7)
    assert torch.equal(quick(model, images, mos, MSE(), eps=0.1, eot=3), first)


def test_eot_averages_gradients_and_losses():
    w = weight()
    images, mos, eps = batch(), [-500.0] * 4, 0.05
    agreement = {}
    for eot in (1, 60):
        model = Noisy(w, spread=3.0)
        attacked = fgsm(model, images, mos, MSE(), eps=eps, eot=eot)
        assert model.passes == eot
        agreement[eot] = (((attacked - images).sign() == w.sign()).float().mean()).item()
    # One draw of w + 3z has the sign of w in 60 % of cases, and the mean of 60 draws in over 85 %.
    assert agreement[1] < 0.7
    assert agreement[60] > 0.8
    trace = pgd_trace(Noisy(w, 3.0), images, mos, MSE(), eps=eps, steps=2, restarts=1, eot=400)
    expected = (Linear(w)(trace.images) + 500).square().detach()
    # Scores near 500 have a deviation of 3‖x‖ ≈ 22: 9 % of the loss for one draw, 0.5 % for the mean of 400 draws.
    assert trace.loss == pytest.approx(expected, rel=0.02)


def test_defaults_come_from_the_config():
    config = SRMConfig()
    trace = pgd_trace(Linear(weight()), batch(1), [0.5], MSE(), eps=0.01)
    assert trace.losses.shape == (config.attack_restarts, config.attack_steps + 1, 1)


@pytest.mark.parametrize(("norm", "factor"), [("linf", 2.5), ("l2", 4.0)])
def test_default_step_sizes(norm, factor):
    arguments = {"norm": norm, "eps": 0.02, "steps": 7, "restarts": 1}
    model, images, mos = Convolutional(), batch(), [0.5] * 4
    assert torch.equal(
        pgd(model, images, mos, MSE(), **arguments),
        pgd(model, images, mos, MSE(), step_size=factor * 0.02 / 7, **arguments),
    )


# Bad input.


class TakingBatches(Linear):
    def __init__(self):
        super().__init__(weight())

    def forward(self, x):
        return super().forward(x.image)


class WithMask(Linear):
    def __init__(self):
        super().__init__(weight())

    def forward(self, x, mask=None):
        return super().forward(x * mask)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"eps": -0.1}, ValueError, "eps=-0.1: expected a finite number, zero or more"),
        ({"eps": math.nan}, ValueError, "eps=nan"),
        ({"eps": 4}, ValueError, "eps=4 for norm 'linf'"),
        ({"eps": "1"}, TypeError, "eps='1'"),
        ({"norm": "l1"}, ValueError, "norm='l1': expected one of 'linf', 'l2'"),
        ({"images": torch.rand(3, 8, 8)}, ValueError, r"shape \(3, 8, 8\)"),
        ({"images": torch.rand(4, 8, 8, 3)}, ValueError, r"expected \(B, 3, H, W\)"),
        ({"images": torch.rand(0, 3, 8, 8), "mos": []}, ValueError, "B at least 1"),
        ({"images": torch.rand(4, 3, 8, 8) + 0.5}, ValueError, r"expected values in \[0, 1\]"),
        ({"images": torch.full((4, 3, 8, 8), math.nan)}, ValueError, "images contains NaN"),
        ({"images": torch.rand(4, 3, 8, 8).half()}, TypeError, "torch.float16; expected a float32"),
        ({"images": [[0.5]]}, TypeError, "list"),
        (
            {"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)},
            TypeError,
            "torch.uint8; expected a float32",
        ),
        ({"mos": [0.5] * 3}, ValueError, r"mos has shape \(3,\) for 4 images"),
        ({"mos": [0.5, 0.5, 0.5, math.nan]}, ValueError, "not finite"),
        ({"mos": None}, TypeError, "mos is a NoneType; expected a tensor or a sequence of numbers"),
        ({"mos": ["0.5"] * 4}, TypeError, "mos is a list"),
        ({"mos": [1j] * 4}, TypeError, "mos is a list"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"steps": 2.5}, TypeError, "steps=2.5"),
        ({"restarts": 0}, ValueError, "restarts=0"),
        ({"eot": 0}, ValueError, "eot=0"),
        ({"step_size": -1.0}, ValueError, r"step_size=-1.0"),
        ({"step_size": "fast"}, TypeError, r"step_size='fast'"),
        ({"generator": 3}, TypeError, "generator is a int"),
        ({"objective": "mse"}, TypeError, r"objective is 'mse'; expected a callable .* such as MSE\(\)"),
        ({"objective": Drift}, TypeError, r"objective is the class Drift; expected a callable"),
        ({"objective": None}, TypeError, "objective is None"),
        ({"model": lambda x: x.flatten(1).sum(1)}, TypeError, "expected a torch.nn.Module"),
        ({"model": torch.nn.Identity()}, ValueError, r"shape \(4, 3, 8, 8\) for 4 images"),
        (
            {"model": torch.nn.Bilinear(3, 3, 1)},
            TypeError,
            "forward needs input1, input2; expected a module that",
        ),
        (
            {"model": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 1))},
            ValueError,
            r"the model fails on torch.float32 images of shape \(4, 3, 8, 8\): mat1 and mat2 shapes",
        ),
        (
            {"model": torch.nn.Sequential(torch.nn.Embedding(4, 1), torch.nn.Flatten())},
            ValueError,
            r"the model fails on torch.float32 images .* scalar types",
        ),
        # The model expects other inputs, which its signature does not show.
        (
            {"model": TakingBatches()},
            ValueError,
            r"the model fails on .* \(4, 3, 8, 8\): 'Tensor' object has no",
        ),
        ({"model": WithMask()}, ValueError, r"the model fails on .* \(4, 3, 8, 8\): unsupported operand"),
        ({"model": Linear(weight()).half()}, TypeError, "torch.float16 parameters"),
        ({"model": OfFirstPixel(lambda p: (p, {}))}, TypeError, "returned a tuple"),
        ({"model": OfFirstPixel(lambda p: p.detach())}, ValueError, "have no gradient"),
        (
            {"model": OfFirstPixel(lambda p: p / 0)},
            ValueError,
            "4 of 4 scores of clean images are not finite",
        ),
        (
            {
                "model": OfFirstPixel(lambda p: p * math.nan),
                "objective": PairInversion(),
                "mos": [0.0, 0.3, 0.6, 0.9],
            },
            ValueError,
            "4 of 4 scores of clean images are not finite",
        ),
        ({"objective": lambda s, y, c: s[:, None]}, ValueError, r"objective returned shape \(4, 1\)"),
        ({"objective": lambda s, y, c: 1.0}, ValueError, "objective returned a float"),
    ],
)
def test_bad_input_is_one_sentence(changes, error, words):
    arguments = {
        "model": Linear(weight()),
        "images": batch(),
        "mos": [0.5] * 4,
        "objective": MSE(),
        "eps": 0.1,
        **changes,
    }
    model, images, mos, objective = (arguments.pop(name) for name in ("model", "images", "mos", "objective"))
    with pytest.raises(error, match=words) as caught:
        pgd(model, images, mos, objective, **arguments)
    assert "\n" not in str(caught.value)
    if not changes.keys() & {"steps", "restarts", "step_size"}:
        with pytest.raises(error, match=words):
            fgsm(model, images, mos, objective, **arguments)
