"""What an attack maximises: callables `(scores, mos, clean_scores)` on one batch, docs/METHOD.md §6.

`scores` (B,) are the model's on the attacked images and carry the gradient; `mos` (B,) is the normalised human
score; `clean_scores` (B,) are the model's on the images as they were, without gradient. A result of shape (B,)
is a loss per image, and the attack keeps each image's best iterate; a 0-d result is a loss of the whole batch,
and the attack keeps the batch's best iterate. Any such callable serves as an objective. Two optional attributes
are read: `flat_at_clean` (zero gradient at the images themselves, so no FGSM) and `uses_clean_scores` (False
saves a forward pass; `clean_scores` is then NaN).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from srm_model.config import SRMConfig

_DEFAULTS = SRMConfig()


class Objective(Protocol):
    def __call__(self, scores: Tensor, mos: Tensor, clean_scores: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class MSE:
    """(f(x') − y)² per image: push the score away from the human one."""

    name: ClassVar[str] = "mse"
    batch_defined: ClassVar[bool] = False
    uses_clean_scores: ClassVar[bool] = False

    def __call__(self, scores: Tensor, mos: Tensor, clean_scores: Tensor) -> Tensor:
        return (scores - mos.to(scores.dtype)).square()


@dataclass(frozen=True)
class Drift:
    """(f(x') − f(x))² per image: move the score, whatever the human one.

    Its gradient is zero at x itself, so `fgsm` refuses it; `pgd` starts elsewhere.
    """

    name: ClassVar[str] = "drift"
    batch_defined: ClassVar[bool] = False
    flat_at_clean: ClassVar[bool] = True

    def __call__(self, scores: Tensor, mos: Tensor, clean_scores: Tensor) -> Tensor:
        return (scores - clean_scores).square()


@dataclass(frozen=True)
class Signed:
    """sign · f(x') per image: raise the score (+1) or lower it (−1), whatever the human one.

    What a cheat or a saboteur wants, and the signed form of `MSE` and of `Drift`, which take whichever side is the
    easier for each image: with one side given, all three grow with the score.
    """

    sign: int

    batch_defined: ClassVar[bool] = False
    uses_clean_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise ValueError(f"sign={self.sign!r}: expected 1 or -1")

    @property
    def name(self) -> str:
        return "raise" if self.sign > 0 else "lower"

    def __call__(self, scores: Tensor, mos: Tensor, clean_scores: Tensor) -> Tensor:
        return self.sign * scores


@dataclass(frozen=True)
class SoftSpearman:
    """Minus the correlation of soft ranks with the ranks of MOS: a list-wise attack on SROCC itself.

    The soft rank of image a is Σ_b sigmoid((f(x'_a) − f(x'_b)) / T), which tends to its rank for T → 0. One loss
    for the batch, between −1 and 1; 0 where all MOS of the batch are equal.
    """

    temperature: float = _DEFAULTS.pair_temperature

    name: ClassVar[str] = "soft_spearman"
    batch_defined: ClassVar[bool] = True
    uses_clean_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: expected a positive number")

    def __call__(self, scores: Tensor, mos: Tensor, clean_scores: Tensor) -> Tensor:
        soft = torch.sigmoid((scores[:, None] - scores[None, :]) / self.temperature).sum(1)
        ranks = (torch.sign(mos[:, None] - mos[None, :]).sum(1)).to(scores.dtype)  # ties share their mean
        soft, ranks = soft - soft.mean(), ranks - ranks.mean()
        floor = torch.finfo(scores.dtype).eps
        return -(soft * ranks).sum() / (soft.square().sum() * ranks.square().sum() + floor).sqrt()


@dataclass(frozen=True)
class PairInversion:
    """Mean over pairs with y_a − y_b > margin of log(1 + exp(−(f(x'_a) − f(x'_b)) / T)): reverse the ranking.

    One loss for the batch, article equation (32); 0 if no pair differs by more than the margin.
    """

    margin: float = _DEFAULTS.pair_margin
    temperature: float = _DEFAULTS.pair_temperature

    name: ClassVar[str] = "pair_inversion"
    batch_defined: ClassVar[bool] = True
    uses_clean_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise ValueError(f"margin={self.margin!r}: expected zero or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: expected a positive number")

    def __call__(self, scores: Tensor, mos: Tensor, clean_scores: Tensor) -> Tensor:
        ordered = mos[:, None] - mos[None, :] > self.margin  # [a, b]: a is the better image
        losses = F.softplus((scores[None, :] - scores[:, None]) / self.temperature)
        return torch.where(ordered, losses, 0).sum() / ordered.sum().clamp_min(1)


OBJECTIVES: dict[str, Callable[[SRMConfig], Objective]] = {
    "mse": lambda config: MSE(),
    "drift": lambda config: Drift(),
    "pair_inversion": lambda config: PairInversion(config.pair_margin, config.pair_temperature),
    "raise": lambda config: Signed(1),
    "lower": lambda config: Signed(-1),
    "soft_spearman": lambda config: SoftSpearman(config.pair_temperature),
}
