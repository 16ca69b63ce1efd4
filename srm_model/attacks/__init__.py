"""Attacks on models of image quality: objectives, FGSM, PGD and fixed suites of them (SPEC section 6)."""

from srm_model.attacks.examples import save_examples
from srm_model.attacks.gradient import PGDTrace, fgsm, pgd, pgd_trace
from srm_model.attacks.objectives import MSE, Drift, Objective, PairInversion, Signed, SoftSpearman
from srm_model.attacks.suite import Attack, Example, Suite, SuiteResult

__all__ = [
    "MSE",
    "Attack",
    "Drift",
    "Example",
    "Objective",
    "PGDTrace",
    "PairInversion",
    "Signed",
    "SoftSpearman",
    "Suite",
    "SuiteResult",
    "fgsm",
    "pgd",
    "pgd_trace",
    "save_examples",
]
