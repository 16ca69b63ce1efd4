"""Necks between a backbone's pyramid and a regression head (SPEC 1 to 4, article 3.2 to 3.6)."""

from .diagnosis import Measured, attending, measure, quantiles
from .gate import Gate
from .links import DyT, Link, link_name
from .mixing import Mixer
from .output import NeckOutput
from .plain import PlainNeck
from .srm import SRMNeck

__all__ = [
    "DyT",
    "Gate",
    "Link",
    "Measured",
    "Mixer",
    "NeckOutput",
    "PlainNeck",
    "SRMNeck",
    "attending",
    "link_name",
    "measure",
    "quantiles",
]
