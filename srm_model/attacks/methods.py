"""The search methods of attacks. To add a method, add an entry of `ATTACK_METHODS`, and name it in a suite.

Suites are in `srm_model/attack_suites.py`. The loss that a method maximises is in `objectives.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from srm_model.attacks.apgd import apgd_trace
from srm_model.attacks.gradient import PGDTrace, pgd_trace
from srm_model.attacks.objectives import Objective
from srm_model.attacks.square import square_trace
from srm_model.config import SRMConfig


class AttackMethod(NamedTuple):
    """A search method.

    Attributes:
        trace: Function that searches and returns a `PGDTrace`. Its arguments are a model, images, MOS and an objective.
            Its keyword arguments are `norm`, `eps`, `eot`, `generator` and `on_step`, as in `pgd_trace`, and the keys
            of `settings`.
        settings: Further keyword arguments of `trace`, each with the field of `SRMConfig` that gives its value. The
            fields start with `attack_`. A run cannot be resumed with other values of these fields.
        work: (config, passes per score, objective) → number of calls of `on_step` for one batch.
        step_size: Whether `trace` also takes `step_size`, the step size of docs/METHOD.md §6.
    """

    trace: Callable[..., PGDTrace]
    settings: Mapping[str, str]
    work: Callable[[SRMConfig, int, Objective], int]
    step_size: bool = False

    def arguments(self, config: SRMConfig) -> dict[str, Any]:
        """Return the keyword arguments of `settings`."""
        return {argument: getattr(config, field) for argument, field in self.settings.items()}


def _steps(config: SRMConfig, passes: int, objective: Objective) -> int:
    return config.attack_restarts * config.attack_steps


def _queries(config: SRMConfig, passes: int, objective: Objective) -> int:
    return config.attack_queries // passes - bool(getattr(objective, "uses_clean_scores", True))


_CLIMB = {"steps": "attack_steps", "restarts": "attack_restarts", "restart_batch": "attack_restart_batch"}
ATTACK_METHODS = {
    "pgd": AttackMethod(pgd_trace, _CLIMB, _steps, step_size=True),
    "apgd": AttackMethod(apgd_trace, _CLIMB, _steps),
    "square": AttackMethod(
        square_trace, {"queries": "attack_queries", "area": "attack_square_area"}, _queries
    ),
}
