"""Build HTML and SVG from elements. All text that is not `Markup` is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TypeAlias

VOID = {"br", "circle", "img", "line", "meta", "path", "rect"}


class Markup(str):
    """HTML text that is already escaped."""

    __slots__ = ()


Child: TypeAlias = "str | int | Sequence[Child] | None"


def join(*children: Child) -> Markup:
    """Concatenate children. Text is escaped, None is omitted, and lists are flattened."""
    return Markup("".join(_render(child) for child in children))


def element(tag: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Return an element.

    In attribute names, "_" at the end is removed, and every other "_" becomes "-". For example, `class_` becomes class,
    and `stroke_width` becomes stroke-width. An attribute is omitted if its value is None or False. If the value is
    True, only the name is written.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in VOID and not children:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def _render(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, list | tuple):
        return join(*child)
    return escape(str(child))
