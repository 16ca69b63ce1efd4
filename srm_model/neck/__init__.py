"""Necks between a backbone's pyramid and a regression head (SPEC 1 to 4, article 3.2 to 3.6)."""

from .links import Link, link_name
from .plain import NeckOutput, PlainNeck
from .srm import SRMNeck

__all__ = ["Link", "NeckOutput", "PlainNeck", "SRMNeck", "link_name"]
