"""The search methods of attacks.

To add a method, add an entry to `ATTACK_METHODS`. To use the method, give the key of the entry as the
`method` of an attack in `srm_model/attack_suites.py`. The losses that a method can maximise are in
`objectives.py`.
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
        trace: Function that searches for adversarial images and returns a `PGDTrace`. Its positional arguments
            are a model, images, MOS and an objective. Its keyword arguments are `norm`, `eps`, `eot`, `generator`
            and `on_step`, as in `pgd_trace`, and the keys of `settings`.
        settings: Further keyword arguments of `trace`: a mapping from the name of each argument to the name of
            the `SRMConfig` field that contains the value of the argument. The names of these fields start with
            `attack_`. A run can be resumed only if these fields have the same values as before.
        work: Function that maps a config, the number of passes per score and an objective to the number of
            calls of `on_step` for one batch.
        step_size: Whether `trace` also takes the argument `step_size`, the step size of docs/METHOD.md §6.
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
