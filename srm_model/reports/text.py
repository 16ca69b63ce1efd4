"""Format numbers, budgets and names for readers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from srm_model.attack_suites import LABELS
from srm_model.norms import NORMS

MINUS, DASH = "−", "—"


def fixed(value: float, digits: int = 3) -> str:
    """Format a number with `digits` decimals and "−" for minus; return a dash if the number is not finite."""
    return f"{value:.{digits}f}".replace("-", MINUS) if math.isfinite(value) else DASH


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", MINUS) if math.isfinite(value) else DASH


def bold(text: str) -> str:
    """Mark text as bold in Markdown."""
    return f"**{text}**"


def significant(value: float) -> str:
    return f"{value:.3g}".replace("-", MINUS)


def spread(values: Sequence[float]) -> str:
    """Format the median of values. Add the range if the lowest and the highest value differ after rounding."""
    middle, low, high = map(significant, (float(np.median(values)), min(values), max(values)))
    return middle if low == high else f"{middle} [{low} … {high}]"


def drop(clean: float, attacked: float) -> str:
    """Format the drop clean − attacked. If the clean value is above 0, add the drop in percent of the clean value."""
    if not math.isfinite(clean - attacked):
        return DASH
    share = f" ({100 * (clean - attacked) / clean:.0f} %)".replace("-", MINUS) if clean > 0 else ""
    return fixed(clean - attacked) + share


def model_text(neck: str, variant: str) -> str:
    """Return the name of a model: its neck, then its variant unless the variant is "full".

    If the variant starts with "baseline, " or with the name of the neck and a comma, this part of the variant is
    omitted.
    """
    if variant == "full":
        return neck
    return f"{neck}, {variant.removeprefix('baseline, ').removeprefix(f'{neck}, ')}"


def budget_text(budget: tuple[str, float]) -> str:
    """Format norm and ε. The norm may be unknown."""
    norm, eps = budget
    return NORMS[norm].text(eps) if norm in NORMS else f"{norm} ε = {eps:.4g}"


def attack_text(name: str) -> str:
    return LABELS.get(name, name)


def listing(items: Iterable[Any]) -> str:
    """Join items as in "a, b and c"."""
    texts = [str(item) for item in items]
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def setting(value: Any) -> str:
    """Format a value of the configuration."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(
            "→".join(map(str, item)) if isinstance(item, list | tuple) else setting(item) for item in value
        )
    return "none" if value is None else str(value)
