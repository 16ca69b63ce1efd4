"""Attacks on image quality models: objectives, gradient and query attacks, suites, audits (docs/METHOD.md §6)."""

from srm_model.attacks.apgd import apgd, apgd_trace
from srm_model.attacks.audit import Audit, Check, audit
from srm_model.attacks.certify import Certificate, certify
from srm_model.attacks.examples import save_examples
from srm_model.attacks.gradient import PGDTrace, fgsm, pgd, pgd_trace
from srm_model.attacks.objectives import (
    MSE,
    Drift,
    Objective,
    PairInversion,
    Signed,
    SoftSpearman,
)
from srm_model.attacks.square import square, square_trace
from srm_model.attacks.studies import sweep_eps, sweep_steps, transfer
from srm_model.attacks.suite import Attack, Example, Suite, SuiteResult

__all__ = [
    "MSE",
    "Attack",
    "Audit",
    "Certificate",
    "Check",
    "Drift",
    "Example",
    "Objective",
    "PGDTrace",
    "PairInversion",
    "Signed",
    "SoftSpearman",
    "Suite",
    "SuiteResult",
    "apgd",
    "apgd_trace",
    "audit",
    "certify",
    "fgsm",
    "pgd",
    "pgd_trace",
    "save_examples",
    "square",
    "square_trace",
    "sweep_eps",
    "sweep_steps",
    "transfer",
]
