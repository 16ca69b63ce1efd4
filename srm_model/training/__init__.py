"""Training and evaluation on one device (SPEC section 5; article section 3.8.3)."""

from srm_model.training.evaluation import evaluate, predict
from srm_model.training.loop import DivergenceError, train

__all__ = ["DivergenceError", "evaluate", "predict", "train"]
