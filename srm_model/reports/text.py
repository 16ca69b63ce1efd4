"""Numbers, budgets and names as people write them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from srm_model.norms import NORMS
from srm_model.suites import LABELS

MINUS, DASH = "−", "—"


def fixed(value: float, digits: int = 3) -> str:
    """A number with a true minus sign; a dash for NaN."""
    return f"{value:.{digits}f}".replace("-", MINUS) if math.isfinite(value) else DASH


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", MINUS) if math.isfinite(value) else DASH


def bold(text: str) -> str:
    """As Markdown has it; pages make it an element."""
    return f"**{text}**"


def significant(value: float) -> str:
    return f"{value:.3g}".replace("-", MINUS)


def spread(values: Sequence[float]) -> str:
    """One value as it is; several as their median, and their range where it shows."""
    middle, low, high = map(significant, (float(np.median(values)), min(values), max(values)))
    return middle if low == high else f"{middle} [{low} … {high}]"


def drop(clean: float, attacked: float) -> str:
    """Clean less attacked, and its share of clean where that is above 0."""
    if not math.isfinite(clean - attacked):
        return DASH
    share = f" ({100 * (clean - attacked) / clean:.0f} %)".replace("-", MINUS) if clean > 0 else ""
    return fixed(clean - attacked) + share


def model_text(neck: str, variant: str) -> str:
    """Neck and variant, each word of them once: "full" says nothing, "baseline" no more than `none`."""
    if variant == "full":
        return neck
    return f"{neck}, {variant.removeprefix('baseline, ').removeprefix(f'{neck}, ')}"


def budget_text(budget: tuple[str, float]) -> str:
    """Norm and ε, also of a norm that is not known here."""
    norm, eps = budget
    return NORMS[norm].text(eps) if norm in NORMS else f"{norm} ε = {eps:.4g}"


def attack_text(name: str) -> str:
    return LABELS.get(name, name)


def listing(items: Iterable[Any]) -> str:
    """a, b and c."""
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
    """A configuration value."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(
            "→".join(map(str, item)) if isinstance(item, list | tuple) else setting(item) for item in value
        )
    return "none" if value is None else str(value)
