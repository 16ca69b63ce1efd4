"""Define the names and attacks of the suites, for modules that must not import torch.

To add an attack to the extended suite, add a line to `BEYOND`. Objectives are listed in `attacks/objectives.py`, and
search methods in `attacks/methods.py`.
"""

from __future__ import annotations

from typing import NamedTuple


class Planned(NamedTuple):
    """An attack of a suite."""

    name: str  # name in result files
    label: str  # name in tables and figures
    objective: str  # key of `attacks.objectives.OBJECTIVES`
    method: str = "pgd"  # key of `attacks.methods.ATTACK_METHODS`
    transfer: bool = False  # whether examples are crafted on the surrogate and scored on the target


PAPER = (
    Planned("pgd_mse", "PGD, squared error", "mse"),
    Planned("pgd_drift", "PGD, score drift", "drift"),
    Planned("pgd_pair_inversion", "PGD, pair inversion", "pair_inversion"),
    Planned("transfer", "PGD, transferred", "mse", transfer=True),
)
SQUARE = Planned("square_mse", "square search, squared error", "mse", "square")
BEYOND = (
    Planned("pgd_raise", "PGD, raise the score", "raise"),
    Planned("pgd_lower", "PGD, lower the score", "lower"),
    Planned("pgd_soft_spearman", "PGD, soft Spearman", "soft_spearman"),
    Planned("apgd_mse", "APGD, squared error", "mse", "apgd"),
    Planned("apgd_pair_inversion", "APGD, pair inversion", "pair_inversion", "apgd"),
    SQUARE,
)
QUERIES = (
    SQUARE,
    Planned("square_raise", "square search, raise the score", "raise", "square"),
    Planned("square_lower", "square search, lower the score", "lower", "square"),
)
SUITES = {"paper": PAPER, "extended": PAPER + BEYOND, "queries": QUERIES}
LABELS = {attack.name: attack.label for attacks in SUITES.values() for attack in attacks}
