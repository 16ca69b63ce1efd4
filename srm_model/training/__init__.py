"""Train and evaluate models, in one or several processes (docs/METHOD.md §5)."""

from srm_model.training.evaluation import evaluate, predict
from srm_model.training.faults import DivergenceError, Preempted, WorkerError
from srm_model.training.loop import train

__all__ = ["DivergenceError", "Preempted", "WorkerError", "evaluate", "predict", "train"]
