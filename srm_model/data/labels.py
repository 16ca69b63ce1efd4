"""Labels of synthesised sets: a full-reference metric of piq on a documented scale, not the opinion of people."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from srm_model.data.images import Pixels
from srm_model.modules import make_torchvision_importable

LABEL_RANGE = (0.0, 9.0)  # TID2013's


class Scale(NamedTuple):
    """label = 9·(1 − √((1 − metric) / worst)), at least 0; 9 for an image equal to its reference.

    The metrics crowd near 1, where most distorted photographs lie; the square root spreads them without changing
    their order. `worst` is 1 minus a value that next to no image of TID2013's five levels falls below.
    """

    worst: float

    def __call__(self, metric: npt.NDArray) -> npt.NDArray[np.float64]:
        low, high = LABEL_RANGE
        loss = np.clip(1 - np.asarray(metric, np.float64), 0, self.worst)
        return low + (high - low) * (1 - np.sqrt(loss / self.worst))

    def formula(self, metric: str) -> str:
        return f"9 * (1 - sqrt((1 - {metric}) / {self.worst:g})), at least 0"


METRICS = {"vsi": Scale(0.3), "fsim": Scale(0.6), "ssim": Scale(1.0), "haarpsi": Scale(0.8)}
"""piq's functions of these names, all 1 for equal images."""


def metric_labels(metric: str, distorted: list[Pixels], reference: Pixels) -> list[float]:
    """Labels of distorted images against their common reference, (H, W, 3) uint8 each; five decimals, on 0 to 9."""
    function = getattr(import_piq(), metric)
    with torch.no_grad():
        values = function(
            _batch(distorted), _batch([reference] * len(distorted)), data_range=1.0, reduction="none"
        )
    return [round(float(label), 5) for label in METRICS[metric](values.double().numpy())]


def _batch(images: list[Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255)


def import_piq() -> ModuleType:
    """piq; where it is not installed a ValueError says how to get it."""
    make_torchvision_importable()
    try:
        import piq
    except ImportError as error:
        raise ValueError(
            f"labels by a metric need the package piq ({error}); pip install 'srm-iqa[demo]'"
        ) from None
    return piq
