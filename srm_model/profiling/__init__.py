"""Measure parameters, multiply-accumulates, time and memory of necks and models."""

from srm_model.profiling.machines import folder_name, machine
from srm_model.profiling.subjects import Case, Subject
from srm_model.profiling.sweep import Sweep, article_cases, cases
from srm_model.profiling.timing import Effort, Times, measure, measure_together

__all__ = [
    "Case",
    "Effort",
    "Subject",
    "Sweep",
    "Times",
    "article_cases",
    "cases",
    "folder_name",
    "machine",
    "measure",
    "measure_together",
]
