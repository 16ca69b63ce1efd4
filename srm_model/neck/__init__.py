"""Necks between the backbone's pyramid and the regression head (docs/METHOD.md §1 to §4)."""

from __future__ import annotations

from collections.abc import Sequence

from srm_model.config import SRMConfig
from srm_model.necks import NECKS, check_neck

from .links import Link, link_name
from .plain import NeckOutput, PlainNeck
from .srm import SRMNeck


def make_neck(name: str, in_channels: Sequence[int], config: SRMConfig) -> SRMNeck | PlainNeck:
    """Create a neck by name; raise ValueError if the name is unknown.

    `in_channels` are the channels of the four maps, shallowest first.
    """
    check_neck(name)
    attention = NECKS[name].attention
    if attention is None:
        return PlainNeck(in_channels, config)
    return SRMNeck(in_channels, config, attention=attention)


__all__ = ["Link", "NeckOutput", "PlainNeck", "SRMNeck", "link_name", "make_neck"]
