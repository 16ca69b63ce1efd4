"""Robust no-reference image quality assessment with the Spectral Robustness Mixer."""

from .config import SRMConfig
from .model import IQAModel, build_model
from .neck import NeckOutput, SRMNeck

__all__ = ["IQAModel", "NeckOutput", "SRMConfig", "SRMNeck", "build_model"]
