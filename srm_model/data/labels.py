"""Label synthesised datasets by a full-reference metric of the package piq.

`Scale` maps the metric value of an image to a label from 0 to 9. The labels are computed, so they are not people's
opinions.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from srm_model.data.images import Pixels
from srm_model.modules import make_torchvision_importable

LABEL_RANGE = (0.0, 9.0)  # the range of TID2013


class Scale(NamedTuple):
    """Map the value of a metric to a label: max(0, 9·(1 − √((1 − value) / worst))). An undistorted image gets 9.

    For most distorted photographs, the value of the metric is close to 1, so 1 − value is close to 0. The square root
    of 1 − value spreads these small numbers apart and keeps their order. A value of 1 − `worst` or less gets the label
    0. Almost no image that is distorted at one of TID2013's five levels has a value below 1 − `worst`, so almost no
    label is clipped.
    """

    worst: float

    def __call__(self, metric: npt.NDArray) -> npt.NDArray[np.float64]:
        low, high = LABEL_RANGE
        loss = np.clip(1 - np.asarray(metric, np.float64), 0, self.worst)
        return low + (high - low) * (1 - np.sqrt(loss / self.worst))

    def formula(self, metric: str) -> str:
        return f"9 * (1 - sqrt((1 - {metric}) / {self.worst:g})), at least 0"


METRICS = {"vsi": Scale(0.3), "fsim": Scale(0.6), "ssim": Scale(1.0), "haarpsi": Scale(0.8)}
"""Metrics by the name of their function in piq. All are 1 for equal images."""


def metric_labels(metric: str, distorted: list[Pixels], reference: Pixels) -> list[float]:
    """Label distorted images by a metric.

    Args:
        metric: Name in `METRICS`.
        distorted: Images, (H, W, 3) uint8 each.
        reference: The undistorted original of all these images, (H, W, 3) uint8.

    Returns:
        A label from 0 to 9 for each image, rounded to five decimals.
    """
    function = getattr(import_piq(), metric)
    with torch.no_grad():
        values = function(
            _batch(distorted), _batch([reference] * len(distorted)), data_range=1.0, reduction="none"
        )
    return [round(float(label), 5) for label in METRICS[metric](values.double().numpy())]


def _batch(images: list[Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255)


def import_piq() -> ModuleType:
    """Import piq; raise ValueError with the install command if it is missing."""
    make_torchvision_importable()
    try:
        import piq
    except ImportError as error:
        raise ValueError(
            f"labels by a metric need the package piq ({error}); run pip install 'srm-iqa[demo]'"
        ) from None
    return piq
