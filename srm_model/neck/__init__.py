"""Necks between a backbone's pyramid and a regression head (docs/METHOD.md §1 to 4, article 3.2 to 3.6)."""

from __future__ import annotations

from collections.abc import Sequence

from srm_model.config import SRMConfig
from srm_model.necks import NECKS, check_neck

from .links import Link, link_name
from .plain import NeckOutput, PlainNeck
from .srm import SRMNeck


def make_neck(name: str, in_channels: Sequence[int], config: SRMConfig) -> SRMNeck | PlainNeck:
    """The neck of a name for maps of these channels, shallowest first."""
    check_neck(name)
    attention = NECKS[name].attention
    return (
        PlainNeck(in_channels, config)
        if attention is None
        else SRMNeck(in_channels, config, attention=attention)
    )


__all__ = ["Link", "NeckOutput", "PlainNeck", "SRMNeck", "link_name", "make_neck"]
