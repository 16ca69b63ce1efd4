"""Ten checks for masked gradients (docs/METHOD.md §6; Athalye et al., ICML 2018; Carlini et al., 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srm_model.attacks.apgd import apgd_trace
from srm_model.attacks.gradient import PGDTrace, default_step_size, pgd_trace
from srm_model.attacks.guard import (
    NoGradientError,
    as_found,
    check_finite,
    derived_seed,
    differentiable,
    generators_of,
    gradient_of,
    predict,
    scores_of,
    seeded,
    to_model,
)
from srm_model.attacks.objectives import PairInversion, Signed
from srm_model.attacks.problem import differentiable_scores
from srm_model.attacks.square import square_trace
from srm_model.attacks.suite import Attack, Dataset, Job
from srm_model.config import SRMConfig
from srm_model.metrics import GRADIENTS_ALLOWED, srocc
from srm_model.modules import is_stochastic, unwrapped
from srm_model.norms import norm_of

# Tolerances of the checks, the same for every model. Tests run the checks on models with and without masked gradients.
FALL_ALLOWED = 0.05  # largest fall of the reach over the steps, as a share of the total rise of the reach
EPS_FALL_ALLOWED = 0.01  # largest fall of the reach between adjacent budgets, as a share of the largest reach
RESTART_GAIN_ALLOWED = 0.25
DERIVATIVE_ERROR_ALLOWED = 0.2
SCORE_TOLERANCE = 1e-3  # largest difference of scores, as a share of the spread of clean scores

_EPS_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_DIRECTIONS = 8
_WIDTHS = (4, 32, 256, 2048)  # divisors of the budget that give the widths of central differences
_REPLICATES = 2000
_PASSES = 16  # passes over the same images, to detect randomness


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    title: str  # what a sound model satisfies
    passed: bool | None  # None if the check could not run
    figure: str  # text that says what was measured, or why the check could not run
    meaning: str  # what a failure means
    data: dict[str, Any] = field(default_factory=dict)  # the measured values, as JSON values


@dataclass(frozen=True)
class Audit:
    """Checks of one model at one norm and budget."""

    model: str  # name of the model's class
    norm: str
    eps: float  # the given budget; "l2" budgets are stated at 512×512
    radius: float
    images: int
    steps: int  # steps of PGD and APGD
    restarts: int  # restarts of PGD
    queries: int  # queries per image of the square attack
    seed: int
    has_gradient: bool  # whether autograd can differentiate the scores
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.checks if check.passed is False]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `passed` as JSON values."""
        return {**vars(self), "passed": self.passed, "checks": [dict(vars(check)) for check in self.checks]}


def audit(
    model: nn.Module,
    dataset: Dataset,
    *,
    norm: str = "linf",
    eps: float = 4 / 255,
    surrogate: nn.Module | None = None,
    config: SRMConfig | None = None,
    images: int = 16,
    seed: int = 0,
    expect_gradient: bool = True,
    progress: Callable[[str], object] | None = None,
) -> Audit:
    """Check whether attacks measure this model's robustness, or only fail to find its weakness.

    Each attack runs twice on each image: once to raise the score and once to lower it. The "reach" on an
    image is the change of its score in the wanted direction, averaged over the two runs. The "reach" of an
    attack is the mean over all images. A check passes if its condition holds:

    - steps: The reach of PGD grows with the number of steps, at a fixed step size and start. It never falls by more
      than 5 % of its total rise.
    - eps: The reach of PGD grows from a quarter of the budget to four times the budget. From one budget to the next, it
      never falls by more than 1 % of the largest reach.
    - gradients: At most 1 % of the gradients are zero everywhere, and no gradient has a NaN or infinite element.
    - restarts: The reach of the best restart of PGD is at most 1.25 times the average reach of the restarts.
    - derivative: Gradients agree with central differences along 8 random directions, whose elements are ±1. Each
      difference is computed with four step sizes, which change an image by ε/4, ε/32, ε/256 and ε/2048 in the given
      norm. For at least one step size, the relative error over all images and directions is at most 20 %.
    - transfer: A transfer attack is not stronger than the white-box attacks. For each image, the larger of
      the reaches of PGD and APGD is subtracted from the reach of the transfer attack. The check fails if the 95 %
      bootstrap interval of the mean difference lies entirely above 0.1 % of the spread of clean scores, which is a
      tolerance for rounding errors.
    - black_box: The condition of "transfer", but for the square attack, which uses only scores.
    - unbounded: PGD maximises the objective `pair_inversion`, with a radius that allows any image. This attack inverts
      the ranking (SROCC below 0), or makes a score NaN or infinite. If the clean ranking is already inverted and no
      score becomes NaN or infinite, the check has no result.
    - randomness: The scores of an image in 16 passes agree within 0.1 % of the spread of clean scores. The
      check also passes if the model declares its randomness by the attribute `stochastic`.
    - batch: The scores of an image alone and in a batch agree within 0.1 % of the spread of clean scores. The check
      does not run for a stochastic model.

    If the model is stochastic, the checks "steps" and "restarts" use the same random numbers in every step. The check
    "derivative" uses the same random numbers for the gradient and for the central differences.

    If the scores have no gradient, the check "gradients" fails. If `expect_gradient` is false, it does not run.
    The checks "steps", "eps", "restarts", "derivative" and "transfer" do not run. The check "black_box" reports the
    reach of the square attack without a verdict, because there is no white-box attack to compare with. The check
    "unbounded" uses the square attack instead of PGD. It passes if the attack lowers SROCC, makes all scores equal, or
    makes a score NaN or infinite. It has no result if the model fails on an attacked image. The other two checks are
    unchanged.

    The call does not change the state of the model.

    Args:
        model: Any module that `pgd` accepts.
        dataset: Dataset of pairs (image, normalised MOS), as in `Suite.run`.
        norm: A key of `norms.NORMS`, such as "linf".
        eps: Budget ε, above 0. An "l2" budget is stated for 512×512 pixels, as in `Suite.run`.
        surrogate: Another model. The check "transfer" runs only with a surrogate.
        config: Steps, restarts, queries and batch size of the attacks. Default: `SRMConfig()`.
        images: Number of images to use, evenly spaced over the dataset.
        seed: Seed of the attacks.
        expect_gradient: Whether the model is meant to be differentiable. Pass False for a model that cannot be, such as
            a metric computed with NumPy. If autograd can differentiate the scores, this argument has no effect.
        progress: Called with the name of each check before it runs.

    Returns:
        The results of all checks.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or a clean score is not finite.
    """
    config = config or SRMConfig()
    job = Job(
        config=config,
        model=model,
        surrogate=surrogate,
        attacks=(Attack("pgd", Signed(1)),),
        numbers={"pgd": 1},
        dataset=dataset,
        norm=norm,
        eps=eps,
        batch_size=config.attack_batch_size,
        seed=seed,
        limit=images,
    )
    if eps == 0:
        raise ValueError("eps=0: expected a budget above 0")
    subject = _Subject(job, expect_gradient=expect_gradient)
    checks = []
    for name, check in _CHECKS.items():
        if progress is not None:
            progress(name.replace("_", " "))
        checks.append(check(subject))
    return Audit(
        model=type(unwrapped(model)).__qualname__,
        norm=norm,
        eps=job.eps,
        radius=job.radius,
        images=len(subject.clean),
        steps=config.attack_steps,
        restarts=config.attack_restarts,
        queries=config.attack_queries,
        seed=job.seed,
        has_gradient=subject.has_gradient,
        checks=checks,
    )


class _Subject:
    """The audited model, the images, and attacks on all these images.

    Results that several checks use are cached.
    """

    def __init__(self, job: Job, *, expect_gradient: bool) -> None:
        self.expect_gradient = expect_gradient
        self.model, self.surrogate, self.norm, self.config = job.model, job.surrogate, job.norm, job.config
        self.seed, self.radius = job.seed, job.radius
        self.batches = [job.load(number) for number in range(len(job.batches))]
        self.eot = job.samples(self.model)
        self.declared = is_stochastic(self.model)
        self.clean = torch.cat(
            [predict(self.model, x, samples=self.eot).double().cpu() for x, _ in self.batches]
        )
        check_finite(self.clean)
        self.mos = torch.cat([mos for _, mos in self.batches])
        spread = float(self.clean.std()) if len(self.clean) > 1 else 0.0
        self.tolerance = SCORE_TOLERANCE * (spread if spread > 0 else 1.0)
        self.has_gradient = differentiable(self.model, job.first)

    @property
    def largest(self) -> float:
        """A radius that allows any image."""
        return norm_of(self.norm).diameter(self.batches[0][0][0])

    def generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, number))

    def attack(
        self,
        trace: Callable[..., PGDTrace],
        batch: int,
        sign: int,
        *,
        number: int = 0,
        model: nn.Module | None = None,
        **changes: Any,
    ) -> PGDTrace:
        """Raise (`sign` = 1) or lower (`sign` = −1) the scores of a batch. `number` is part of the seed."""
        settings: dict[str, Any] = {"norm": self.norm, "eps": self.radius, "eot": self.eot, **changes}
        generator = self.generator(number + 2 * batch + (sign > 0))
        subject = self.model if model is None else model
        return trace(subject, *self.batches[batch], Signed(sign), generator=generator, **settings)

    def pgd(self, batch: int, sign: int, **changes: Any) -> PGDTrace:
        settings: dict[str, Any] = {
            "eps": self.radius,
            "steps": self.config.attack_steps,
            "restarts": self.config.attack_restarts,
            "restart_batch": self.config.attack_restart_batch,
            **changes,
        }
        step_size = default_step_size(self.norm, settings["eps"], settings["steps"], self.config)
        return self.attack(pgd_trace, batch, sign, step_size=step_size, **settings)

    def both_ways(self, attack: Callable[[int, int], PGDTrace]) -> list[tuple[int, list[PGDTrace]]]:
        """Run `attack(batch, sign)` for both signs and all batches."""
        return [(sign, [attack(batch, sign) for batch in range(len(self.batches))]) for sign in (1, -1)]

    @cached_property
    def white_box(self) -> list[tuple[int, list[PGDTrace]]]:
        """The result of PGD with all restarts."""
        return self.both_ways(self.pgd)

    def reach(self, found: list[tuple[int, list[PGDTrace]]]) -> Tensor:
        """Return the reach on each image (see `audit`), (images,)."""
        ways = [
            torch.cat([trace.loss.double().cpu() for trace in traces]) - sign * self.clean
            for sign, traces in found
        ]
        return torch.stack(ways).mean(0)

    @cached_property
    def iterates(self) -> Tensor:
        """Reach of PGD at every iterate, (restarts, steps + 1, images).

        A stochastic model uses the same random numbers in every step.
        """
        found = self.white_box
        if self.declared:
            same = _SameDraws(self.model, self.eot)
            found = self.both_ways(lambda batch, sign: self.pgd(batch, sign, model=same))
        ways = [
            torch.cat([trace.losses.double().cpu() for trace in traces], 2) - sign * self.clean
            for sign, traces in found
        ]
        return torch.stack(ways).mean(0)

    @cached_property
    def variation(self) -> float:
        """The largest difference between the scores of one image in several passes."""
        differences = []
        for images, _ in self.batches:
            x = to_model(self.model, images)
            with as_found(self.model, x, seed=0), torch.no_grad():
                # Two passes are not enough: a model that draws from few values may draw the same value twice.
                scores = torch.stack([scores_of(self.model, x) for _ in range(_PASSES)])
            differences.append(float((scores - scores[0]).abs().max()))
        return _largest(differences)

    @cached_property
    def best_white_box(self) -> Tensor:
        """Return the larger of the reaches of PGD and APGD on each image (see `audit`), (images,)."""

        def tuned(batch: int, sign: int) -> PGDTrace:
            steps = self.config.attack_steps
            return self.attack(apgd_trace, batch, sign, number=1000, steps=steps, restarts=1)

        return torch.maximum(self.reach(self.white_box), self.reach(self.both_ways(tuned)))


class _SameDraws(nn.Module):
    """Make a stochastic model repeat its random numbers: forward pass i + `passes` uses the numbers of forward pass i.

    If `passes` is the number of EOT passes per step, every step of an attack uses the same random numbers.
    """

    def __init__(self, model: nn.Module, passes: int) -> None:
        super().__init__()
        self.model, self.passes, self.calls = model, passes, 0
        self.generators = generators_of(model)

    def forward(self, images: Tensor) -> Tensor:
        seed = self.calls % self.passes
        self.calls += 1
        for generator in self.generators:  # the attack restores the state of the generators
            generator.manual_seed(seed)
        with seeded(images.device, seed):
            scores: Tensor = self.model(images)
        return scores


Finding = tuple[bool | None, str, dict[str, Any]]  # passed, figure and data of a `Check`
_CHECKS: dict[str, Callable[[_Subject], Check]] = {}


def _check(
    title: str, meaning: str
) -> Callable[[Callable[[_Subject], Finding]], Callable[[_Subject], Check]]:
    """Register a function `_name` as the check `name`.

    If the scores have no gradient, checks that need gradients cannot run. The check "gradients" then fails, unless the
    model is not meant to have gradients.
    """

    def register(find: Callable[[_Subject], Finding]) -> Callable[[_Subject], Check]:
        name = find.__name__.removeprefix("_")

        def check(subject: _Subject) -> Check:
            data: dict[str, Any] = {}
            try:
                passed, figure, data = find(subject)
            except NoGradientError as error:
                passed, figure = None, "not checked: the scores have no gradient"
                if name == "gradients" and subject.expect_gradient:
                    passed, figure = False, str(error)
            return Check(name, title, passed, figure, meaning, data)

        _CHECKS[name] = check
        return check

    return register


@_check(
    "Loss grows with the steps",
    "More steps should never make an attack weaker. If they do, the gradients mislead the attack, and high robustness "
    "only shows that this attack fails on this model.",
)
def _steps(subject: _Subject) -> Finding:
    curve = subject.iterates.mean((0, 2)).numpy()
    rise = float(curve.max() - curve[0])
    fall = float((np.maximum.accumulate(curve) - curve).max())
    data = {"x": list(range(len(curve))), "y": curve.tolist()}
    if not rise > subject.tolerance:
        figure = f"the score moves by {curve.max():.3g}, no further than at the random start ({curve[0]:.3g})"
        return False, figure, data
    figure = (
        f"from {curve[0]:.3g} to {curve[-1]:.3g} in {len(curve) - 1} steps; "
        f"falls back by {100 * fall / rise:.1f} % of its rise"
    )
    return fall <= FALL_ALLOWED * rise, figure, data


@_check(
    "Loss grows with ε",
    "A larger budget contains the smaller ones. If it gains nothing, the attack makes no progress; the model is not "
    "necessarily robust.",
)
def _eps(subject: _Subject) -> Finding:
    factors = [factor for factor in _EPS_FACTORS if factor * subject.radius <= subject.largest]
    curve = []
    for factor in factors:
        eps = factor * subject.radius

        def at(batch: int, sign: int, eps: float = eps) -> PGDTrace:
            return subject.pgd(batch, sign, eps=eps, restarts=1)

        curve.append(float(subject.reach(subject.both_ways(at)).mean()))
    fall = max(0.0, *(before - after for before, after in pairwise(curve)))
    grown = curve[-1] - curve[0]
    figure = (
        f"from {curve[0]:.3g} at {factors[0]:g} ε to {curve[-1]:.3g} at {factors[-1]:g} ε; "
        f"falls by at most {fall:.2g} from one budget to the next"
    )
    passed = fall <= EPS_FALL_ALLOWED * max(curve) and grown > subject.tolerance
    return passed, figure, {"x": factors, "y": curve}


@_check(
    "Gradients exist",
    "A gradient attack makes no progress where the gradient is zero or not finite. Saturated outputs, rounding and "
    "detached parts cause this. None of them stops an attacker who does not use gradients.",
)
def _gradients(subject: _Subject) -> Finding:
    traces = [trace for _, found in subject.white_box for trace in found]
    weights = [trace.losses.shape[-1] for trace in traces]
    zero = float(np.average([trace.zero_gradients for trace in traces], weights=weights))
    broken = float(np.average([trace.nonfinite_gradients for trace in traces], weights=weights))
    figure = f"{100 * zero:.2f} % zero everywhere, {100 * broken:.2f} % with an element that is not finite"
    passed = zero <= GRADIENTS_ALLOWED and broken == 0
    return passed, figure, {"zero": zero, "nonfinite": broken}


@_check(
    "Restarts gain little",
    "If another start gets much further, the loss surface is so uneven that more restarts would find more. The result "
    "then overstates the robustness.",
)
def _restarts(subject: _Subject) -> Finding:
    best = subject.iterates.amax(1)  # (restarts, images)
    if len(best) < 2:
        return None, "not checked: this needs two restarts or more", {}
    top, mean = float(best.amax(0).mean()), float(best.mean())
    if not mean > subject.tolerance:
        figure = f"one start moves the score by {mean:.2g} on average, the best of {len(best)} by {top:.2g}"
        return False, figure, {"gain": None}
    gain = (top - mean) / mean
    figure = f"the best of {len(best)} reaches {100 * gain:.1f} % further than one on average"
    return gain <= RESTART_GAIN_ALLOWED, figure, {"gain": gain}


@_check(
    "Gradients are those of the score",
    "If autograd and differences of scores disagree, the gradient is not that of the score: part of it is detached, "
    "rounded or replaced, and it misleads gradient attacks.",
)
def _derivative(subject: _Subject) -> Finding:
    """Compare ⟨∇f, d⟩ with the central difference (f(x + hd) − f(x − hd)) / 2h for random directions d.

    The elements of d are ±1. x is clipped so that x + hd and x − hd are in [0, 1]. A correct gradient agrees with the
    central difference if h is small enough for the score to be almost linear, and large enough for the rounding errors
    of fp32 to be small. A wrong gradient agrees at no h. Therefore the check compares the gradient and the central
    difference at four values of h, and uses the value at which they agree best.

    The smallest h separates kinks from jumps. A network with ReLU6 has many kinks, at which its slope changes. The
    smaller h is, the fewer kinks lie between x − hd and x + hd, so the error falls. If the score jumps, fewer jumps lie
    between the two points too, but the central difference divides each jump by 2h, so the error does not fall.
    """
    largest = subject.radius / subject.largest  # change of a pixel along a sign direction
    widths = [min(largest / share, 0.25) for share in _WIDTHS]
    slopes: list[Tensor] = []
    measured: list[list[Tensor]] = [[] for _ in widths]
    for number, (images, _) in enumerate(subject.batches):
        inner = to_model(subject.model, images.clamp(widths[0], 1 - widths[0]))
        generator = subject.generator(2000 + number)
        seed = int(torch.randint(2**62, (), generator=generator))
        with as_found(subject.model, inner, seed=seed):
            gradient = _score_gradient(subject.model, inner)
        for _ in range(_DIRECTIONS):
            signs = 2 * torch.randint(2, inner.shape, generator=generator) - 1
            direction = signs.to(inner.device, inner.dtype)
            slopes.append((gradient * direction).double().sum((1, 2, 3)).cpu())
            for h, found in zip(widths, measured, strict=True):
                # Use the seed of the gradient, because the gradient of a stochastic model is for one random draw.
                ahead = predict(subject.model, inner + h * direction, seed=seed).double()
                behind = predict(subject.model, inner - h * direction, seed=seed).double()
                found.append(((ahead - behind) / (2 * h)).cpu())
    gradients = torch.cat(slopes)
    errors = []
    for found in measured:
        differences = torch.cat(found)
        size = max(float(gradients.norm()), float(differences.norm()))
        errors.append(float((gradients - differences).norm()) / size if size > 0 else math.inf)
    error = min(errors)
    if math.isinf(error):
        figure = "both are zero: the score does not seem to depend on the images"
        return False, figure, {"error": None}
    figure = (
        f"gradients and central differences disagree by {100 * error:.1f} % over {len(gradients)} directions"
    )
    data = {"error": error, "widths": widths, "errors": errors}
    return error <= DERIVATIVE_ERROR_ALLOWED, figure, data


def _score_gradient(model: nn.Module, images: Tensor) -> Tensor:
    x = images.clone().requires_grad_()
    gradient = gradient_of(differentiable_scores(model, x), x)
    return torch.zeros_like(x) if gradient is None else gradient


@_check(
    "Transfer is no better than white-box",
    "An attacker who knows the model can do everything that an attacker who knows only another model can. If the "
    "transfer attack gets further, the model's gradients mislead the white-box attack.",
)
def _transfer(subject: _Subject) -> Finding:
    surrogate = subject.surrogate
    if surrogate is None:
        return None, "not checked: no surrogate was given", {}

    def scored(batch: int, sign: int) -> PGDTrace:
        trace = subject.pgd(batch, sign, model=surrogate, restarts=1)
        scores = predict(subject.model, trace.images, samples=subject.eot)
        return trace._replace(loss=sign * scores)

    return _against_white_box(subject, subject.reach(subject.both_ways(scored)))


@_check(
    "Black-box is no better than white-box",
    "An attack without gradients can only beat one with gradients if the gradients mislead.",
)
def _black_box(subject: _Subject) -> Finding:
    queries, area = subject.config.attack_queries, subject.config.attack_square_area

    def search(batch: int, sign: int) -> PGDTrace:
        return subject.attack(square_trace, batch, sign, number=3000, queries=queries, area=area)

    found = subject.reach(subject.both_ways(search))
    if not subject.has_gradient:
        reach = float(found.mean())
        figure = (
            f"not checked: the scores have no gradient, so there is no white-box attack; {queries:,} queries move the "
            f"score by {reach:.3g}"
        )
        return None, figure, {"other": reach}
    return _against_white_box(subject, found)


def _against_white_box(subject: _Subject, other: Tensor) -> Finding:
    white = subject.best_white_box
    difference = (other - white).numpy()
    draws = np.random.default_rng(0).integers(len(difference), size=(_REPLICATES, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), (0.025, 0.975))
    figure = (
        f"moves the score by {float(other.mean()):.3g}, white-box by {float(white.mean()):.3g}; "
        f"difference {low:+.2g} to {high:+.2g} (95 %)"
    )
    data = {"other": float(other.mean()), "white": float(white.mean()), "interval": [low, high]}
    # The tolerance allows for rounding; NaN does not pass.
    return bool(low <= subject.tolerance), figure, data


@_check(
    "An unbounded ε breaks the model",
    "If any image is allowed, any ranking can be reached on any model. An attack that does not reach it has failed, "
    "and its results at smaller budgets show nothing.",
)
def _unbounded(subject: _Subject) -> Finding:
    try:
        scores = _unbounded_scores(subject)
    except ValueError as error:
        if subject.has_gradient:
            raise
        return None, f"not checked: with any image allowed, {error}", {}
    if not scores.isfinite().all():
        return True, "the scores are no longer finite", {"srocc": None}
    before, after = srocc(subject.clean, subject.mos), srocc(scores, subject.mos)
    figure = f"SROCC {before:.2f} clean, {after:.2f} with any image allowed"
    passed = after < 0
    if not subject.has_gradient:
        # A random search that starts on a plateau of the score cannot order the images, so a lower SROCC is enough.
        passed = not after >= before
        if math.isnan(after):
            figure = f"SROCC {before:.2f} clean; all scores are equal with any image allowed"
        figure += f", by {subject.config.attack_queries:,} queries"
    return None if before < 0 else passed, figure, {"clean": before, "srocc": after}


def _unbounded_scores(subject: _Subject) -> Tensor:
    """Return the scores of images after an attack whose radius allows any image, (images,)."""
    pairs = PairInversion(margin=0.0, temperature=subject.config.pair_temperature)
    config = subject.config
    attack: Callable[..., PGDTrace] = partial(pgd_trace, steps=config.attack_steps, restarts=1)
    if not subject.has_gradient:
        attack = partial(square_trace, queries=config.attack_queries, area=config.attack_square_area)
    settings: dict[str, Any] = {"norm": subject.norm, "eps": subject.largest, "eot": subject.eot}
    attacked = []
    for number, (images, mos) in enumerate(subject.batches):
        generator = subject.generator(4000 + number)
        trace = attack(subject.model, images, mos, pairs, generator=generator, **settings)
        attacked.append(predict(subject.model, trace.images, samples=subject.eot).double().cpu())
    return torch.cat(attacked)


@_check(
    "No undeclared randomness",
    "A stochastic model must be attacked with the mean over many draws (EOT); otherwise the attack follows noise. "
    "Declare the randomness by an attribute `stochastic` that is true.",
)
def _randomness(subject: _Subject) -> Finding:
    largest = subject.variation
    figure = f"{_PASSES} passes over the same images differ by at most {largest:.2g}"
    if subject.declared:
        return True, f"{figure}; the model declares it, and EOT is used", {"largest": largest}
    return largest <= subject.tolerance, figure, {"largest": largest}


@_check(
    "Scores do not depend on the batch",
    "If an image's score depends on its batch, an attack on one image changes the others, results depend on the order "
    "of the data, and an image has no single score.",
)
def _batch(subject: _Subject) -> Finding:
    if subject.declared or not subject.variation <= subject.tolerance:
        return None, "not checked: the model is stochastic", {}
    differences = []
    for images, _ in subject.batches:
        together = predict(subject.model, images)
        alone = torch.cat([predict(subject.model, image[None]) for image in images])
        mixed = predict(subject.model, torch.cat([images, images.flip(3)]))[: len(images)]
        differences += [float((together - alone).abs().max()), float((together - mixed).abs().max())]
    largest = _largest(differences)
    figure = f"scores alone and in a batch differ by at most {largest:.2g}"
    return largest <= subject.tolerance, figure, {"largest": largest}


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)
