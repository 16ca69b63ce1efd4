"""Robust no-reference image quality assessment with the Spectral Robustness Mixer.

Public names are imported on first use, so that `srm-iqa --help` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SRMConfig
    from .model import IQAModel, build_model, load_model
    from .neck import NeckOutput, SRMNeck

__all__ = ["IQAModel", "NeckOutput", "SRMConfig", "SRMNeck", "build_model", "load_model"]

_HOMES = {"SRMConfig": "config", "NeckOutput": "neck", "SRMNeck": "neck"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'model')}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
