"""Objectives that attacks maximise (docs/METHOD.md §6).

An objective is any callable with three arguments of shape (B,):

- `scores`: scores of the attacked images, with gradient;
- `mos`: normalised MOS;
- `clean_scores`: scores of the clean images.

The objective returns either one loss per image, (B,), or one 0-d loss for the batch. With losses per image, the attack
keeps the best iterate of each image. With one loss for the batch, the attack keeps the best iterate of the batch.

An objective may have two attributes:

- `flat_at_clean` (default: False): True means that the gradient is zero at the clean images. FGSM then
  rejects the objective.
- `uses_clean_scores` (default: True): False means that the objective ignores `clean_scores`. The attack then
  passes NaN as `clean_scores`, so that it need not score the clean images.
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
    """A callable that maps scores, normalised MOS and clean scores, each (B,), to losses (B,) or one 0-d loss."""

    def __call__(self, scores: Tensor, mos: Tensor, clean_scores: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class MSE:
    """(f(x') − y)² per image: move the score away from the MOS."""

    name: ClassVar[str] = "mse"
    uses_clean_scores: ClassVar[bool] = False

    def __call__(self, scores: Tensor, mos: Tensor, clean_scores: Tensor) -> Tensor:
        return (scores - mos.to(scores.dtype)).square()


@dataclass(frozen=True)
class Drift:
    """(f(x') − f(x))² per image: move the score, independently of the MOS.

    The gradient is zero at the clean image x, so `fgsm` rejects this objective. `pgd` accepts it, because `pgd` starts
    at a random point near x.
    """

    name: ClassVar[str] = "drift"
    flat_at_clean: ClassVar[bool] = True

    def __call__(self, scores: Tensor, mos: Tensor, clean_scores: Tensor) -> Tensor:
        return (scores - clean_scores).square()


@dataclass(frozen=True)
class Signed:
    """sign · f(x') per image: raise or lower the score.

    With `MSE` or `Drift`, an attack may raise the scores of some images and lower the scores of others. With this
    objective, the attack tries to raise all scores if `sign` is 1, and to lower all scores if `sign` is −1.
    """

    sign: int  # +1 to raise the score, −1 to lower it

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
    """Minus the correlation between the soft ranks of the scores and the ranks of the MOS; one loss per batch.

    The soft rank of image a is ρ_a = Σ_b sigmoid((f(x'_a) − f(x'_b)) / T), where f(x'_a) is the score of the attacked
    image a. For T → 0, ρ_a converges to R_a − 1/2, where R_a is the rank of this score; the lowest score has rank 1.
    Subtracting a constant such as 1/2 from all ranks does not change a correlation, so the loss converges to −SROCC.
    The loss is in [−1, 1]. It is 0 if all MOS of the batch are equal.
    """

    temperature: float = _DEFAULTS.pair_temperature  # T

    name: ClassVar[str] = "soft_spearman"
    uses_clean_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: expected a positive number")

    def __call__(self, scores: Tensor, mos: Tensor, clean_scores: Tensor) -> Tensor:
        soft = torch.sigmoid((scores[:, None] - scores[None, :]) / self.temperature).sum(1)
        ranks = (torch.sign(mos[:, None] - mos[None, :]).sum(1)).to(scores.dtype)  # ties take their mean rank
        soft, ranks = soft - soft.mean(), ranks - ranks.mean()
        floor = torch.finfo(scores.dtype).eps
        return -(soft * ranks).sum() / (soft.square().sum() * ranks.square().sum() + floor).sqrt()


@dataclass(frozen=True)
class PairInversion:
    """Mean of log(1 + exp(−(f(x'_a) − f(x'_b)) / T)) over pairs with y_a − y_b > margin; one loss per batch.

    Maximising this loss inverts the ranking (article, eq. 32). The loss is 0 if there is no pair with
    y_a − y_b > margin.
    """

    margin: float = _DEFAULTS.pair_margin  # least difference of normalised MOS
    temperature: float = _DEFAULTS.pair_temperature  # T

    name: ClassVar[str] = "pair_inversion"
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
