"""Ten checks that tell a hard model from a masked one (article section 3.8.4; Athalye 2018, Carlini 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srm_model.attacks.auto import apgd_trace
from srm_model.attacks.gradient import PGDTrace, default_step_size, pgd_trace
from srm_model.attacks.guard import as_found, check_model, gradient_of, predict, scores_of, seeded, to_model
from srm_model.attacks.objectives import PairInversion, Signed
from srm_model.attacks.problem import NoGradientError
from srm_model.attacks.square import square_trace
from srm_model.attacks.suite import Attack, Dataset, Job
from srm_model.config import SRMConfig
from srm_model.metrics import GRADIENTS_ALLOWED, srocc
from srm_model.modules import is_stochastic, unwrapped
from srm_model.norms import norm_of

# Where a check's figure passes. Set with honest and masked models in view (tests), and the same for every model.
FALL_ALLOWED = 0.05  # of the loss's whole rise, over the steps
EPS_FALL_ALLOWED = 0.01  # of the largest rise, from one budget to the next
RESTART_GAIN_ALLOWED = 0.25
DERIVATIVE_ERROR_ALLOWED = 0.2
SCORE_TOLERANCE = 1e-3  # of the spread of clean scores: what rounding may do, and randomness may not

_EPS_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_DIRECTIONS = 8
_WIDTHS = (4, 32, 256)  # of the differences: the budget over these
_REPLICATES = 2000
_PASSES = 16  # over the same images, to see two that differ


@dataclass(frozen=True)
class Check:
    """One question put to the model."""

    name: str
    title: str
    passed: bool | None  # None: could not be asked, and `figure` says why
    figure: str  # what was measured, in words
    meaning: str  # what failing means
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit:
    """The checks of one model at one norm and budget; `passed` where none failed."""

    model: str
    norm: str
    eps: float  # as asked for; "l2" budgets are stated at 512×512
    radius: float
    images: int
    steps: int
    restarts: int
    queries: int
    seed: int
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    @property
    def failed(self) -> list[str]:
        return [check.name for check in self.checks if check.passed is False]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
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
    progress: Callable[[str], object] | None = None,
) -> Audit:
    """Ask whether attacks measure this model's robustness, or only fail to find its weakness.

    model: any module that `pgd` accepts. dataset, norm, eps: as in `Suite.run`; only `images` of the set are used,
    evenly spaced. surrogate: another model for the transfer check, which is left out without one.
    config: steps, restarts, queries and batch size of the attacks. progress: called with each check's title.

    The white-box attack is PGD that raises, and PGD that lowers, each image's score; "reach" is how far it gets, in
    units of the score, the mean of both over the images. Checks and where they pass:

    - steps: the reach at a fixed step size and start grows with the steps; it never falls back by more than 5 % of
      its whole rise. Of a random model the reach is an estimate that differs from step to step by its draws alone, so
      there the attack runs with common random numbers: the passes of every step draw what those of the first drew.
      Then the curve is a function's, with no noise of its own, and is held to the same 5 %.
    - eps: the reach grows from a quarter to four times the budget; it never falls by more than 1 % of the largest.
    - gradients: at most 1 % of the gradients are zero everywhere, and none has a NaN or infinite element.
    - restarts: the best of all restarts reaches at most 25 % further than one does on average; of a random model with
      common random numbers too, as the best of many noisy figures is that of the luckiest draws.
    - derivative: along 8 random sign directions, gradients and central differences agree within 20 % (relative, over
      all images and directions) at one of the widths ε/4, ε/32, ε/256; a random model's within one draw.
    - transfer, black_box: an attack crafted on the surrogate, and one that only asks for scores, reach no further than
      the best white-box attack (PGD or APGD): the lower end of the 95 % bootstrap interval of the mean difference over
      the images is not above 0.
    - unbounded: with a budget that allows any image, PGD on pair inversion turns the ranking round (SROCC below 0);
      not asked of a model whose ranking is inverted before.
    - randomness: 16 passes over the same images give the same scores, but for 0.1 % of their spread; a model with a
      true `stochastic` attribute has declared its randomness, and is attacked with EOT.
    - batch: scores of images alone and in their batch agree as well; cannot be asked of a random model.

    The model is left as found. A model or images that no attack accepts are a ValueError or TypeError as in `pgd`.
    """
    check_model(model)
    config = config or SRMConfig()
    subject = _Subject(model, surrogate, dataset, norm, eps, config, images, seed)
    checks = []
    for make in _CHECKS:
        if progress is not None:
            progress(make.__name__.removeprefix("_").replace("_", " "))
        checks.append(make(subject))
    return Audit(
        model=type(unwrapped(model)).__qualname__,
        norm=norm,
        eps=subject.eps,
        radius=subject.radius,
        images=len(subject.clean),
        steps=config.attack_steps,
        restarts=config.attack_restarts,
        queries=config.attack_queries,
        seed=subject.seed,
        checks=checks,
    )


class _Subject:
    """The model, its images, and attacks on all of them."""

    def __init__(
        self,
        model: nn.Module,
        surrogate: nn.Module | None,
        dataset: Dataset,
        norm: str,
        eps: float,
        config: SRMConfig,
        images: int,
        seed: int,
    ) -> None:
        self.model, self.surrogate, self.norm, self.config = model, surrogate, norm, config
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
            raise ValueError("eps=0: an audit needs a budget to attack with")
        self.eps, self.seed, self.radius = job.eps, job.seed, job.radius
        self.batches = [job.load(number) for number in range(len(job.batches))]
        self.eot = job.samples(model)
        self.declared = is_stochastic(model)
        self.clean = torch.cat([predict(model, x, samples=self.eot).double().cpu() for x, _ in self.batches])
        self.mos = torch.cat([mos for _, mos in self.batches])
        broken = int((~self.clean.isfinite()).sum())
        if broken:
            raise ValueError(
                f"{broken} of {len(self.clean)} scores of clean images are not finite: a model that is broken already "
                "cannot be audited"
            )
        spread = float(self.clean.std()) if len(self.clean) > 1 else 0.0
        self.tolerance = SCORE_TOLERANCE * (spread if spread > 0 else 1.0)
        self._cache: dict[str, Any] = {}

    @property
    def largest(self) -> float:
        """A radius within which every image lies."""
        return norm_of(self.norm).diameter(self.batches[0][0][0])

    def generator(self, number: int) -> torch.Generator:
        entropy = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(entropy >> np.uint64(1)))

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
        """An attack on a batch that raises or lowers its scores; `number` sets its random numbers apart."""
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
        """`attack(batch, sign)` for both signs over all batches."""
        return [(sign, [attack(batch, sign) for batch in range(len(self.batches))]) for sign in (1, -1)]

    def white_box(self) -> list[tuple[int, list[PGDTrace]]]:
        """PGD with all restarts, run once and looked at by several checks."""
        if "white_box" not in self._cache:
            self._cache["white_box"] = self.both_ways(self.pgd)
        found: list[tuple[int, list[PGDTrace]]] = self._cache["white_box"]
        return found

    def reach(self, found: list[tuple[int, list[PGDTrace]]]) -> Tensor:
        """How far each image's score was moved, (images,): the mean of up and down."""
        ways = [
            torch.cat([trace.loss.double().cpu() for trace in traces]) - sign * self.clean
            for sign, traces in found
        ]
        return torch.stack(ways).mean(0)

    def iterates(self) -> Tensor:
        """The white-box reach at every iterate, (restarts, steps + 1, images); of a random model with common draws."""
        if "iterates" not in self._cache:
            found = self.white_box()
            if self.declared:
                same = _SameDraws(self.model, self.eot)
                found = self.both_ways(lambda batch, sign: self.pgd(batch, sign, model=same))
            ways = [
                torch.cat([trace.losses.double().cpu() for trace in traces], 2) - sign * self.clean
                for sign, traces in found
            ]
            self._cache["iterates"] = torch.stack(ways).mean(0)
        iterates: Tensor = self._cache["iterates"]
        return iterates

    def best_white_box(self) -> Tensor:
        """The further of PGD and APGD, image by image."""
        if "best" not in self._cache:

            def tuned(batch: int, sign: int) -> PGDTrace:
                steps = self.config.attack_steps
                return self.attack(apgd_trace, batch, sign, number=1000, steps=steps, restarts=1)

            self._cache["best"] = torch.maximum(
                self.reach(self.white_box()), self.reach(self.both_ways(tuned))
            )
        best: Tensor = self._cache["best"]
        return best


class _SameDraws(nn.Module):
    """A random model that draws the same in every `passes`-th pass: the mean of so many is a plain function."""

    def __init__(self, model: nn.Module, passes: int) -> None:
        super().__init__()
        self.model, self.passes, self.calls = model, passes, 0
        self.generators = [
            value
            for module in model.modules()
            for value in vars(module).values()
            if isinstance(value, torch.Generator)
        ]

    def forward(self, images: Tensor) -> Tensor:
        seed = self.calls % self.passes
        self.calls += 1
        for generator in self.generators:  # put back when the attack is over
            generator.manual_seed(seed)
        with seeded(images.device, seed):
            scores: Tensor = self.model(images)
        return scores


def _without_gradient(check: Callable[[_Subject], Check]) -> Callable[[_Subject], Check]:
    """A model that autograd cannot see through fails the check of its gradients; the others cannot be asked."""

    def asked(subject: _Subject) -> Check:
        try:
            return check(subject)
        except NoGradientError as error:
            name, title, meaning = _TEXTS[check.__name__]
            if check.__name__ == "_gradients":
                return Check(name, title, False, str(error), meaning)
            return Check(name, title, None, f"could not be asked: {error}", meaning)

    asked.__name__ = check.__name__
    return asked


def _verdict(key: str, passed: bool | None, figure: str, **data: Any) -> Check:
    name, title, meaning = _TEXTS[key]
    return Check(name, title, passed, figure, meaning, data)


@_without_gradient
def _steps(subject: _Subject) -> Check:
    curve = subject.iterates().mean((0, 2)).numpy()
    rise = float(curve.max() - curve[0])
    fall = float((np.maximum.accumulate(curve) - curve).max())
    data = {"x": list(range(len(curve))), "y": curve.tolist()}
    if not rise > subject.tolerance:
        figure = f"the score moves by {curve.max():.3g}, no further than at the random start ({curve[0]:.3g})"
        return _verdict("_steps", False, figure, **data)
    figure = (
        f"from {curve[0]:.3g} to {curve[-1]:.3g} in {len(curve) - 1} steps; "
        f"falls back by {100 * fall / rise:.1f} % of its rise"
    )
    return _verdict("_steps", fall <= FALL_ALLOWED * rise, figure, **data)


@_without_gradient
def _eps(subject: _Subject) -> Check:
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
        f"falls by {fall:.2g} at most from one to the next"
    )
    passed = fall <= EPS_FALL_ALLOWED * max(curve) and grown > subject.tolerance
    return _verdict("_eps", passed, figure, x=factors, y=curve)


@_without_gradient
def _gradients(subject: _Subject) -> Check:
    traces = [trace for _, found in subject.white_box() for trace in found]
    weights = [trace.losses.shape[-1] for trace in traces]
    zero = float(np.average([trace.zero_gradients for trace in traces], weights=weights))
    broken = float(np.average([trace.nonfinite_gradients for trace in traces], weights=weights))
    figure = f"{100 * zero:.2f} % zero everywhere, {100 * broken:.2f} % with an element that is not finite"
    passed = zero <= GRADIENTS_ALLOWED and broken == 0
    return _verdict("_gradients", passed, figure, zero=zero, nonfinite=broken)


@_without_gradient
def _restarts(subject: _Subject) -> Check:
    best = subject.iterates().amax(1)  # of each restart: (restarts, images)
    if len(best) < 2:
        return _verdict("_restarts", None, "not asked: it takes two restarts or more")
    top, mean = float(best.amax(0).mean()), float(best.mean())
    if not mean > subject.tolerance:
        figure = f"one start moves the score by {mean:.2g} on average, the best of {len(best)} by {top:.2g}"
        return _verdict("_restarts", False, figure, gain=None)
    gain = (top - mean) / mean
    figure = f"the best of {len(best)} reaches {100 * gain:.1f} % further than one on average"
    return _verdict("_restarts", gain <= RESTART_GAIN_ALLOWED, figure, gain=gain)


@_without_gradient
def _derivative(subject: _Subject) -> Check:
    """⟨∇f, d⟩ against (f(x + hd) − f(x − hd)) / 2h, where both points are images.

    A true gradient agrees once h is small enough for the score to be straight and large enough for fp32; a false one
    agrees at no h. So the best of three widths counts.
    """
    largest = subject.radius / subject.largest  # of a pixel, along signs
    widths = [min(largest / share, 0.25) for share in _WIDTHS]
    said: list[Tensor] = []
    seen: list[list[Tensor]] = [[] for _ in widths]
    for number, (images, _) in enumerate(subject.batches):
        inner = to_model(subject.model, images.clamp(widths[0], 1 - widths[0]))
        generator = subject.generator(2000 + number)
        seed = int(torch.randint(2**62, (), generator=generator))
        with as_found(subject.model, inner, seed=seed):
            gradient = _score_gradient(subject.model, inner)
        for _ in range(_DIRECTIONS):
            signs = 2 * torch.randint(2, inner.shape, generator=generator) - 1
            direction = signs.to(inner.device, inner.dtype)
            said.append((gradient * direction).double().sum((1, 2, 3)).cpu())
            for h, found in zip(widths, seen, strict=True):
                # One seed for all passes: of a random model, the gradient is that of the draw it was taken in.
                ahead = predict(subject.model, inner + h * direction, seed=seed).double()
                behind = predict(subject.model, inner - h * direction, seed=seed).double()
                found.append(((ahead - behind) / (2 * h)).cpu())
    gradients = torch.cat(said)
    errors = []
    for found in seen:
        differences = torch.cat(found)
        size = max(float(gradients.norm()), float(differences.norm()))
        errors.append(float((gradients - differences).norm()) / size if size > 0 else math.inf)
    error = min(errors)
    if math.isinf(error):
        figure = "both are zero: the score does not depend on the images as far as can be seen"
        return _verdict("_derivative", False, figure, error=None)
    figure = (
        f"gradients and central differences disagree by {100 * error:.1f} % over {len(gradients)} directions"
    )
    passed = error <= DERIVATIVE_ERROR_ALLOWED
    return _verdict("_derivative", passed, figure, error=error, widths=widths, errors=errors)


def _score_gradient(model: nn.Module, images: Tensor) -> Tensor:
    x = images.clone().requires_grad_()
    scores = scores_of(model, x)
    if not scores.requires_grad:
        raise NoGradientError(
            "the model's scores carry no gradient to the images: a gradient attack needs a differentiable model"
        )
    gradient = gradient_of(scores, x)
    return torch.zeros_like(x) if gradient is None else gradient


@_without_gradient
def _transfer(subject: _Subject) -> Check:
    surrogate = subject.surrogate
    if surrogate is None:
        return _verdict("_transfer", None, "not asked: no surrogate was given")

    def scored(batch: int, sign: int) -> PGDTrace:
        trace = subject.pgd(batch, sign, model=surrogate, restarts=1)
        scores = predict(subject.model, trace.images, samples=subject.eot)
        return trace._replace(loss=sign * scores)

    return _against_white_box("_transfer", subject, subject.reach(subject.both_ways(scored)))


@_without_gradient
def _black_box(subject: _Subject) -> Check:
    def search(batch: int, sign: int) -> PGDTrace:
        queries, area = subject.config.attack_queries, subject.config.attack_square_area
        return subject.attack(square_trace, batch, sign, number=3000, queries=queries, area=area)

    return _against_white_box("_black_box", subject, subject.reach(subject.both_ways(search)))


def _against_white_box(key: str, subject: _Subject, other: Tensor) -> Check:
    white = subject.best_white_box()
    difference = (other - white).numpy()
    draws = np.random.default_rng(0).integers(len(difference), size=(_REPLICATES, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), (0.025, 0.975))
    figure = (
        f"moves the score by {float(other.mean()):.3g}, white-box by {float(white.mean()):.3g}; "
        f"difference {low:+.2g} to {high:+.2g} (95 %)"
    )
    # Rounding may make a tie a difference; a NaN is never a pass.
    passed = bool(low <= subject.tolerance)
    return _verdict(
        key, passed, figure, other=float(other.mean()), white=float(white.mean()), interval=[low, high]
    )


@_without_gradient
def _unbounded(subject: _Subject) -> Check:
    pairs = PairInversion(margin=0.0, temperature=subject.config.pair_temperature)
    attacked = []
    for number, (images, mos) in enumerate(subject.batches):
        trace = pgd_trace(
            subject.model,
            images,
            mos,
            pairs,
            norm=subject.norm,
            eps=subject.largest,
            steps=subject.config.attack_steps,
            restarts=1,
            eot=subject.eot,
            generator=subject.generator(4000 + number),
        )
        attacked.append(predict(subject.model, trace.images, samples=subject.eot).double().cpu())
    scores = torch.cat(attacked)
    if not scores.isfinite().all():
        return _verdict("_unbounded", True, "the scores are no longer finite", srocc=None)
    before, after = srocc(subject.clean, subject.mos), srocc(scores, subject.mos)
    figure = f"SROCC {before:.2f} clean, {after:.2f} with any image allowed"
    # A ranking that was inverted before the attack says nothing of it.
    return _verdict("_unbounded", None if before < 0 else after < 0, figure, clean=before, srocc=after)


def _randomness(subject: _Subject) -> Check:
    differences = []
    for images, _ in subject.batches:
        x = to_model(subject.model, images)
        with as_found(subject.model, x, seed=0), torch.no_grad():
            # A model that draws among few things draws the same twice in a row now and then.
            scores = torch.stack([scores_of(subject.model, x) for _ in range(_PASSES)])
        differences.append(float((scores - scores[0]).abs().max()))
    largest = _largest(differences)
    figure = f"{_PASSES} passes over the same images differ by {largest:.2g} at most"
    passed = largest <= subject.tolerance
    if subject.declared:
        return _verdict("_randomness", True, f"{figure}; the model says so, and EOT is used", largest=largest)
    return _verdict("_randomness", passed, figure, largest=largest)


def _batch(subject: _Subject) -> Check:
    if subject.declared or _randomness(subject).passed is False:
        return _verdict("_batch", None, "not asked: the model is random")
    differences = []
    for images, _ in subject.batches:
        together = predict(subject.model, images)
        alone = torch.cat([predict(subject.model, image[None]) for image in images])
        mixed = predict(subject.model, torch.cat([images, images.flip(3)]))[: len(images)]
        differences += [float((together - alone).abs().max()), float((together - mixed).abs().max())]
    largest = _largest(differences)
    figure = f"scores alone and in a batch differ by {largest:.2g} at most"
    return _verdict("_batch", largest <= subject.tolerance, figure, largest=largest)


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


_TEXTS = {
    "_steps": (
        "steps",
        "Loss grows with the steps",
        "More steps should never help an attacker less. Where they do, the gradients lead nowhere, and a robust "
        "figure says only that this attack does not work on this model.",
    ),
    "_eps": (
        "eps",
        "Loss grows with ε",
        "A larger budget contains the smaller ones. Where it gains nothing, the attack is stuck; the model need not be "
        "strong.",
    ),
    "_gradients": (
        "gradients",
        "Gradients exist",
        "Where the gradient is zero or not a number, a gradient attack stands still wherever it starts. Saturated "
        "outputs, rounding and detached parts do this; none of them stops an attacker who goes without gradients.",
    ),
    "_restarts": (
        "restarts",
        "Restarts gain little",
        "A loss surface on which another start gets much further is so rugged that more restarts would find more: "
        "the figure at hand overstates the robustness.",
    ),
    "_derivative": (
        "derivative",
        "Gradients are those of the score",
        "Where autograd and plain differences of scores disagree, the gradient is not the score's own: part of it "
        "is detached, rounded away or replaced, and attacks by gradient are led astray.",
    ),
    "_transfer": (
        "transfer",
        "Transfer is no better than white-box",
        "An attacker who sees the model can do all that one who sees only another model can. Where the transferred "
        "attack gets further, the white-box attack is broken by the model's gradients.",
    ),
    "_black_box": (
        "black_box",
        "Asking for scores is no better than white-box",
        "An attack that uses no gradient cannot beat one that does unless the gradients mislead.",
    ),
    "_unbounded": (
        "unbounded",
        "An unbounded ε breaks the model",
        "With any image allowed, any ranking can be had from any model. An attack that cannot do it has failed, "
        "and says nothing at smaller budgets either.",
    ),
    "_randomness": (
        "randomness",
        "No undeclared randomness",
        "A model that draws at random must be attacked with the mean over many draws (EOT), or the attack chases "
        "noise. Declare it by an attribute `stochastic` that is true.",
    ),
    "_batch": (
        "batch",
        "Scores do not depend on the batch",
        "Where an image's score depends on its neighbours, an attack on one changes the others, results depend on "
        "the order of the data, and the same picture has no one score.",
    ),
}
_CHECKS: tuple[Callable[[_Subject], Check], ...] = (
    _steps,
    _eps,
    _gradients,
    _restarts,
    _derivative,
    _transfer,
    _black_box,
    _unbounded,
    _randomness,
    _batch,
)
