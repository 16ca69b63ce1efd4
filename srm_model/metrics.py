"""Compute SROCC and PLCC, and fit the five-parameter logistic map from scores to MOS (docs/METHOD.md §5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

GRADIENTS_ALLOWED = 0.01  # share of zero gradients up to which the result of a gradient attack is trusted

Beta = tuple[float, float, float, float, float]
FloatArray = NDArray[np.float64]
Values = ArrayLike | torch.Tensor


def srocc(scores: Values, mos: Values) -> float:
    """Compute Spearman's rank-order correlation. Equal values get the mean of their ranks.

    Args:
        scores: Predicted scores, (N,): a tensor on any device and of any dtype, an array or a list.
        mos: Mean opinion scores, (N,).

    Returns:
        The correlation. It is NaN if the scores or the MOS are constant, or if a score is not finite.

    Raises:
        TypeError: An argument does not hold real numbers.
        ValueError: There are fewer than two items, the lengths differ, or a MOS is not finite.
    """
    x, y = _pair(scores, mos)
    return _pearson(_ranks(x), _ranks(y)) if np.isfinite(x).all() else math.nan


def plcc(scores: Values, mos: Values) -> float:
    """Compute Pearson's linear correlation, without a logistic map. Arguments, result and errors are as in `srocc`.

    Publications usually apply a logistic map to the scores before they compute PLCC. To do the same, call
    ``plcc(LogisticMap.fit(val_scores, val_mos)(scores), mos)``.
    """
    x, y = _pair(scores, mos)
    return _pearson(x, y) if np.isfinite(x).all() else math.nan


@dataclass(frozen=True)
class LogisticMap:
    """f(q) = β₁(½ − 1/(1 + exp(β₂(q − β₃)))) + β₄ q + β₅, with q = (score − center) / scale.

    Source: docs/METHOD.md §5 and article, eq. 31. Fit the map once per model, on the scores of the clean validation
    set. Use this map for the clean and for the attacked test set. A new fit on attacked scores would hide part of the
    damage.

    The map need not be monotone: if β₄ and β₁β₂ have opposite signs and abs(β₄) < abs(β₁β₂)/4, f has two turning
    points. Far from the fitted scores, f approaches one of the lines β₄ q + β₅ ± β₁/2. PLCC is computed on f(q), but
    SROCC is computed on the raw scores. The two metrics can therefore disagree about which of two attacks is stronger.
    """

    beta: Beta  # β₁ to β₅
    center: float  # mean of the fitted scores
    scale: float  # standard deviation of the fitted scores
    converged: bool = True  # whether the fit converged; otherwise f is a straight line
    reason: str = ""  # why the fit fell back to a straight line; empty if it converged

    @classmethod
    def fit(cls, scores: Values, mos: Values) -> LogisticMap:
        """Fit by least squares (Levenberg-Marquardt), starting at β = (range of MOS, 1, 0, 0, mean of MOS).

        In three cases, the result is the least-squares line instead of the fitted logistic map: there are fewer than
        five items, the fit does not converge, or the line has a smaller error than the fitted map. If all scores are
        equal, the result is a constant map to the mean of the MOS. In all four cases, `converged` is False and
        `reason` names the case.

        Args:
            scores: Predicted scores, (N,).
            mos: Mean opinion scores, (N,).

        Raises:
            TypeError: An argument does not hold real numbers.
            ValueError: There are fewer than two items, the lengths differ, or a value is not finite.
        """
        x, y = _pair(scores, mos)
        bad = np.count_nonzero(~np.isfinite(x))
        if bad:
            raise ValueError(f"{bad} of {x.size} scores are not finite; a logistic map needs finite scores")
        center, scale = float(x.mean()), float(x.std())
        if x.min() == x.max() or scale == 0:
            return cls((0, 0, 0, 0, float(y.mean())), center, 1.0, False, "the scores are constant")
        q = (x - center) / scale
        slope = float(q @ (y - y.mean()) / (q @ q))
        line = (0.0, 0.0, 0.0, slope, float(y.mean()))
        beta, reason = _fit_logistic(q, y, error_of_line=float(np.sum((_logistic(q, line) - y) ** 2)))
        return cls(line if beta is None else beta, center, scale, beta is not None, reason)

    def __call__(self, scores: Values) -> FloatArray:
        """Map scores of any shape to the scale of the MOS, in float64. NaN stays NaN."""
        return _logistic((_array("scores", scores) - self.center) / self.scale, self.beta)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "beta": list(self.beta)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LogisticMap:
        """Create a map from the result of `to_dict`.

        Raises:
            ValueError: An entry is missing or unknown, `beta` is not five finite numbers, `center` is not a finite
                number, or `scale` is not a finite number above 0.
        """
        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            raise ValueError(
                f"a logistic map has the keys {', '.join(sorted(expected))}; got {', '.join(sorted(values)) or 'none'}"
            )
        try:
            numbers = [float(value) for value in (*values["beta"], values["center"], values["scale"])]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != 7 or not all(map(math.isfinite, numbers)) or numbers[-1] <= 0:
            raise ValueError(
                "a logistic map needs five finite numbers in 'beta', a finite 'center' and a positive 'scale'; "
                f"got beta={values['beta']!r}, center={values['center']!r}, scale={values['scale']!r}"
            )
        b1, b2, b3, b4, b5, center, scale = numbers
        return cls((b1, b2, b3, b4, b5), center, scale, bool(values["converged"]), str(values["reason"]))


def _fit_logistic(q: FloatArray, y: FloatArray, *, error_of_line: float) -> tuple[Beta | None, str]:
    if q.size < 5:
        return None, f"five parameters need at least 5 items, got {q.size}"
    from scipy.optimize import least_squares  # imported here because the import takes 0.5 s

    def jacobian(beta: FloatArray) -> FloatArray:
        b1, b2, b3, _, _ = beta
        half = 0.5 * np.tanh(0.5 * b2 * (q - b3))
        slope = b1 * (0.25 - half**2)  # slope of the sigmoid with respect to its argument β2(q − β3)
        return np.stack([half, slope * (q - b3), -slope * b2, q, np.ones_like(q)], axis=1)

    start = np.array([np.ptp(y), 1.0, 0.0, 0.0, y.mean()])
    with np.errstate(all="ignore"):
        found = least_squares(
            lambda beta: _logistic(q, tuple(beta)) - y,
            start,
            jac=jacobian,
            method="lm",
            max_nfev=20_000,  # nearly linear data need many evaluations; about 0.1 s on average
        )
    if not found.success or not np.isfinite(found.x).all():
        return None, f"the logistic fit did not converge ({found.message.strip()})"
    # Every line is a logistic map with β₁ = 0. A fit with an error above `error_of_line` has therefore ended in a local
    # minimum. The terms with 1e-9 and 1e-18 allow for rounding.
    if 2 * found.cost > error_of_line * (1 + 1e-9) + 1e-18 * float(y @ y):
        return None, "the logistic fit ended in a local minimum worse than a straight line"
    b1, b2, b3, b4, b5 = (float(value) for value in found.x)
    return (b1, b2, b3, b4, b5), ""


def _logistic(q: FloatArray, beta: tuple[float, ...]) -> FloatArray:
    b1, b2, b3, b4, b5 = beta
    # ½ − 1/(1 + exp(z)) = ½ tanh(z/2), which cannot overflow.
    return b1 * 0.5 * np.tanh(0.5 * b2 * (q - b3)) + b4 * q + b5


def _pearson(x: FloatArray, y: FloatArray) -> float:
    if x.min() == x.max() or y.min() == y.max():
        return math.nan
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # prevents overflow below
    x, y = x - x.mean(), y - y.mean()
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return float(np.clip(x @ y / norms, -1.0, 1.0)) if norms > 0 else math.nan


def _ranks(values: FloatArray) -> FloatArray:
    """Return ranks from 1. Equal values get the mean of their ranks."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[group]


def _pair(scores: Values, mos: Values) -> tuple[FloatArray, FloatArray]:
    x, y = _array("scores", scores), _array("mos", mos)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"scores has shape {x.shape} and mos has shape {y.shape}; expected two 1-D sequences of equal length"
        )
    if x.size < 2:
        raise ValueError(f"a correlation needs at least 2 items, got {x.size}")
    if not np.isfinite(y).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(y))} of {y.size} mos values are not finite")
    return x, y


def _array(name: str, values: Values) -> FloatArray:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} is a {type(values).__name__}; expected real numbers in a tensor, array or list"
        ) from None


def doubts(attacks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a warning for each attack in which over 1 % of the gradients are zero, or any gradient is not finite.

    Where the gradient is zero or not finite, a gradient attack makes no progress. The result of the attack may then
    overstate the robustness of the model.

    Args:
        attacks: Dict from the name of each attack to its entry, as in `SuiteResult.attacks`. An entry has the shares of
            gradients that are zero (`zero_gradients`) or not finite (`nonfinite_gradients`). A share that is missing,
            None or NaN is ignored.
    """
    found = []
    for name, entry in attacks.items():
        zero, broken = (entry.get(f"{kind}_gradients") or 0.0 for kind in ("zero", "nonfinite"))
        if zero > GRADIENTS_ALLOWED or broken > 0:
            shares = f"{100 * zero:.3g} % of its gradients were zero and {100 * broken:.3g} % not finite"
            found.append(f"{name}: {shares}, so its result may overstate robustness")
    return found
