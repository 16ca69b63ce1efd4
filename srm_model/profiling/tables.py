"""Make tables of strings from the rows that `sweep.py` has measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

MEBI = 2**20
Table = tuple[list[str], list[list[str]]]


def cost_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Return the table of parameters and of multiply-accumulates, which are counted in three ways.

    The column "of it links" has the MACs of the attention of all links and heads (the entry "links" of `neck_macs`).
    """
    seen: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        if row["error"]:
            continue
        macs = row["macs"]
        seen.setdefault(
            (row["part"], row["backbone"], row["neck"], row["settings"], row["resolution"]),
            [
                row["part"],
                row["backbone"],
                f"{row['neck']} ({row['settings']})" if row["settings"] else row["neck"],
                str(row["resolution"]),
                number(row["parameters"] / 1e6, 3),
                *(number(macs[name] / 1e9 if macs[name] is not None else None, 3) for name in macs),
                number(row["parts"]["links"] / 1e9),
            ],
        )
    header = ["part", "backbone", "neck", "px", "parameters, M", "GMAC formula", "GMAC fvcore", "GMAC torch"]
    header.append("of it links")
    return header, list(seen.values())


def measured_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Return the table of times in ms, memory in MiB and shares in percent.

    The row of a failed case has an error message instead of times, memory and shares.
    """
    header = (
        "part,backbone,neck,px,B,dtype,direction,p20,p50,p80,processor,above inputs,peak,reserved,resident,launches,"
        "bandwidth %,matrix %,solve %"
    ).split(",")
    lines = []
    for row in rows:
        line = [row["part"], row["backbone"], row["label"], str(row["resolution"]), str(row["batch"])]
        line += [row["dtype"], row["direction"]]
        if row["error"]:
            lines.append([*line, row["error"], *[""] * (len(header) - len(line) - 1)])
            continue
        times, memory = row["milliseconds"], row["memory"]
        line += [number(times[name]) for name in ("p20", "p50", "p80", "processor")]
        line += [mebibytes(memory[name]) for name in ("above", "allocated", "reserved", "resident")]
        line.append("–" if row["launches"] is None else str(row["launches"]))
        line += [percent(row[name]) for name in ("bandwidth_share", "matrix_share", "solve_share")]
        lines.append(line)
    return header, lines


def shares(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows that compare the times of necks, and the times of models with these necks.

    Times are `Times.typical`, in ms. The row of a neck has three ratios:

    - the time of the neck, divided by the time of the neck `quadratic`;
    - the time of the model with this neck, divided by the time of the model with the neck `quadratic`;
    - the time of the neck, divided by the time of the model with this neck.

    A time is None if it was not measured. A ratio is None if one of its two times was not measured. A neck without any
    of the three ratios has no row. For the neck `quadratic`, the first two ratios compare the neck with itself and are
    always 1, so they do not count: `quadratic` has a row only if its third ratio is known.
    """
    keys = ("backbone", "settings", "resolution", "batch", "dtype", "direction")
    groups: dict[tuple[Any, ...], dict[tuple[str, str], float]] = {}
    for row in rows:
        if not row["error"]:
            taken = groups.setdefault(tuple(row[key] for key in keys), {})
            taken[row["part"], row["label"]] = row["typical"]
    found = []
    for shape, taken in groups.items():
        settings = shape[keys.index("settings")]
        rival = f"quadratic ({settings})" if settings else "quadratic"
        for label in dict.fromkeys(label for _, label in taken):
            line: dict[str, Any] = {**dict(zip(keys, shape, strict=True)), "neck": label}
            for part in ("neck", "model"):
                own, other = taken.get((part, label)), taken.get((part, rival))
                line[f"{part}_ms"] = own
                line[f"{part}_of_quadratic"] = own / other if own and other else None
            neck, model = taken.get(("neck", label)), taken.get(("model", label))
            line["neck_share"] = neck / model if neck and model else None
            ratios = [line["neck_of_quadratic"], line["model_of_quadratic"]]
            if (label != rival and ratios != [None, None]) or line["neck_share"] is not None:
                found.append(line)
    return found


def shares_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Return the table of `shares`."""
    header = ["backbone", "px", "B", "dtype", "direction", "neck", "neck, ms", "of quadratic"]
    header += ["model, ms", "of quadratic", "neck's share %"]
    words = ("backbone", "resolution", "batch", "dtype", "direction", "neck")
    figures = ("neck_ms", "neck_of_quadratic", "model_ms", "model_of_quadratic")
    lines = [
        [
            *(str(line[key]) for key in words),
            *(number(line[key]) for key in figures),
            percent(line["neck_share"]),
        ]
        for line in shares(rows)
    ]
    return header, lines


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return notes on how to read the tables, and on what cannot be measured on this device."""
    good = [row for row in rows if not row["error"]]
    found = [
        "times in ms (20th, 50th and 80th percentile), memory in MiB; `above inputs` is the peak minus the memory held "
        "before the call (parameters, inputs, optimiser state)",
        "backward is forward and backward; step adds clipping and AdamW; loading of data is not included",
        "bandwidth %: bytes that must move at least once, per second, relative to a large copy; matrix %: "
        "multiply-accumulates per second, including the backward pass, relative to a large matrix product. The copy "
        "and the product are the fastest of this run. Bandwidth above 100 % comes from the cache; a matrix rate above "
        "100 % means that the machine was busier when the product was measured",
        "cases are measured one after the other; to compare two that are close, use bench.growth or bench.compare, "
        "which alternate between them",
        "solve %: time of the landmark solves alone, on systems of these shapes; a fused kernel may hide it",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in good):
        roofs = [row["ceilings"] for row in good if row["dtype"] == dtype]
        roof = {name: max(found[name] for found in roofs) for name in roofs[0]}
        found.append(
            f"ceilings, {dtype}: {roof['bandwidth'] / 1e9:.1f} GB/s, {roof['matrix_rate'] / 1e12:.3g} TMAC/s"
        )
    if any(row.get("tf32") and row["dtype"] == "fp32" for row in good):
        allowed = next(row["tf32"] for row in good if row.get("tf32"))
        found.append(
            f"TF32 allowed for fp32: in products {allowed['matmul']}, in convolutions {allowed['convolution']}"
        )
    if any(row["machine"]["kind"] != "cuda" for row in rows):
        found.append(
            "on a CPU, times are wall-clock time, and `processor` is the process's CPU time over all threads; if it is "
            "much less, other processes used the machine. With one thread, figures, shares and ratios use CPU time. "
            "Memory is that of torch's allocator; `resident` is the process's peak including libraries, on Linux only; "
            "reserved memory and launches do not exist on a CPU and are not measured"
        )
    if good and all(row["macs"]["fvcore"] is None for row in good):
        found.append("fvcore is not installed, so its count is missing")
    return found


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits. None and NaN become –.

    A number with more than `digits` digits before the decimal point is rounded to an integer instead.
    """
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if round(abs(value)) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def mebibytes(value: float | None) -> str:
    """Format bytes as MiB."""
    return number(None if value is None else value / MEBI)


def percent(value: float | None) -> str:
    """Format a share as percent."""
    return number(None if value is None else 100 * value, 2)
