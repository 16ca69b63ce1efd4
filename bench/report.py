"""Results as tables and pictures: `python -m bench.report bench/results/cpu` writes report.md and SVG files there.

Every table and picture is of one machine, one set of versions and one commit; rows of several are refused, unless
`--latest` takes those that were measured as the last one was.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import growth, occupancy, pages, plots
from bench.harness import latest, newest, one_machine, read, sentence
from bench.pages import markdown
from bench.ptx.rates import GPUS
from srm_model.files import write_text
from srm_model.profiling.counting import CONVENTION
from srm_model.profiling.stages import REST
from srm_model.profiling.tables import MEBI, cost_table, measured_table, notes, number, shares_table
from srm_model.reports.drawing import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KERNEL = ("operator", "kernel", "architecture", "case", "launch")
RTX = (86, 89, 120)
PAGE = "report.md"
Rows = list[dict[str, Any]]
Picture = tuple[str, "Figure"]  # file name and drawing


def report(folder: Path, *, last: bool = False) -> list[Path]:
    """Write the page and its pictures into `folder`; what was written. ValueError for mixed or missing rows."""
    sections: list[str] = []
    pictures: list[Picture] = []
    found = 0
    for name, keys, tell in SECTIONS:
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            continue
        rows = read(path)
        rows = newest(latest(rows) if last else rows, keys)
        try:
            about = one_machine(rows)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; --latest takes the last measurement's alone") from None
        text, drawn = tell(rows)
        measured = sentence(about) if "device" in about else f"Triton {about['triton']}"
        told = [f"{measured}.", *dict.fromkeys(row["note"] for row in rows if row.get("note"))]
        sections.append("\n\n".join([text[0], *told, text[1]]))
        pictures += drawn
        found += 1
    if not found:
        raise ValueError(
            f"{folder}: none of {', '.join(f'{name}.jsonl' for name, _, _ in SECTIONS)} is there"
        )
    title = (
        f"# Measurements: {folder.name}\n\nWritten by `python -m bench.report`; the rows are beside it.\n\n"
    )
    written = [folder / PAGE, *(folder / name for name, _ in pictures)]
    for name, picture in pictures:
        write_text(folder / name, svg(picture))
    write_text(folder / PAGE, title + "\n".join(sections))
    return written


def neck_section(rows: Rows) -> tuple[tuple[str, str], list[Picture]]:
    """Tables of cost and of measurements, stages, growth with resolution, and rooflines."""
    good = [row for row in rows if not row["error"]]
    pictures = [*_stages(good), *_against_resolution(good), *_rooflines(good)]
    parts = [CONVENTION + ".", markdown(*cost_table(rows)), markdown(*measured_table(rows))]
    parts += [markdown(*shares_table(rows))] if shares_table(rows)[1] else []
    parts += ["\n".join(f"- {note}" for note in notes(rows)) + "\n", _shown(pictures)]
    return ("## What a neck costs", "\n".join(parts)), pictures


def growth_section(rows: Rows) -> tuple[tuple[str, str], list[Picture]]:
    """Exponents, and a picture for each sweep."""
    pictures = []
    good = [row for row in rows if not row["error"]]
    for (dtype, direction), group in _grouped(good, "dtype", "direction"):
        for variable, points in _grouped(group, "variable"):
            fixed = {n: points[0][n] for n in growth.Sizes._fields if n not in _swept(variable[0])}
            pictures.append(
                (
                    f"growth-{variable[0].replace('_', '').lower()}-{dtype}-{direction}.svg",
                    plots.lines(
                        [
                            plots.Line(name[0], [(p["value"], p["typical"]) for p in line])
                            for name, line in _grouped(points, "implementation")
                        ],
                        title=f"Time against {_swept_words(variable[0])}",
                        note=f"{direction}, {dtype}, "
                        + ", ".join(f"{name}={value:,}" for name, value in fixed.items()),
                        x_label=_swept_words(variable[0]),
                        y_label="milliseconds (median)",
                        slopes=(1, 2) if variable[0] == "N" else (1,),
                    ),
                )
            )
    words = (
        "A fit of time = c·x^p to the points of each sweep, p with its standard error; the last column is the work's "
        "own growth. Fixed costs pull p below it.\n"
    )
    parts = [words, *_by_kind(good, lambda group: markdown(*growth.growth_table(group))), _failed(rows)]
    return ("## Growth", "\n".join([*parts, _shown(pictures)])), pictures


def crossover_section(rows: Rows) -> tuple[tuple[str, str], list[Picture]]:
    """Where Nyström overtakes exact attention, losses included, and the sentence for a guide."""
    pictures: list[Picture] = []

    def tell(group: Rows) -> str:
        texts = []
        first = group[0]
        for found in growth.surfaces(group):
            name = found.implementation.removeprefix("nystrom ").strip("[]")
            fixed = f"N_q={first['N_q']:,}, H={first['H']}, r={first['r']}, d={first['d']}"
            pictures.append(
                (
                    f"crossover-{name}-{first['dtype']}-{first['direction']}.svg",
                    plots.surface(
                        [f"{k:,}" for k in found.keys],
                        [f"{b}" for b in found.batches],
                        [[found.share[k, b] for b in found.batches] for k in found.keys],
                        title=f"Nyström [{name}]: time as a share of exact attention's",
                        note=f"{fixed}, {first['dtype']}, {first['direction']}; below 1 Nyström is faster, the thick "
                        "line is where both are equal",
                        row_label="N_k, keys",
                        column_label="B, batch size",
                    ),
                )
            )
            texts += [f"**{growth.guide(found)}** ({fixed}, {first['dtype']}, {first['direction']})\n"]
            texts += [markdown(*growth.crossover_table(found))]
        return "\n".join(texts)

    parts = [*_by_kind(rows, tell), _failed(rows)]
    return ("## Where Nyström overtakes exact attention", "\n".join([*parts, _shown(pictures)])), pictures


def resources_section(rows: Rows) -> tuple[tuple[str, str], list[Picture]]:
    """Every kernel as it was compiled for the RTX classes."""
    parts = [
        "Compiled without a GPU; none has run any of this. Occupancy is theoretical: the warps that registers, "
        "shared memory and blocks leave room for, as a share of those that a multiprocessor can hold. Registers and "
        "spills are a thread's, warps and shared memory a block's.\n"
    ]
    for architecture in RTX:
        cards = ", ".join(gpu.name for gpu in GPUS.values() if gpu.capability == architecture)
        chosen = [row for row in rows if row["architecture"] == architecture]
        if chosen:
            header, lines = occupancy.kernel_table(chosen)
            spilled = sum(line[header.index("spilled B")] != "0" for line in lines)
            parts.append(f"### sm_{architecture}: {cards}\n")
            parts.append(f"{spilled} of {len(lines)} kernels spill.\n")
            parts.append(markdown(header, lines))
    return ("## Kernels on RTX cards", "\n".join(parts)), []


SECTIONS: tuple[tuple[str, tuple[str, ...], Callable[[Rows], Any]], ...] = (
    ("neck", pages.NECK, neck_section),
    ("growth", pages.POINT, growth_section),
    ("crossover", pages.POINT, crossover_section),
    ("resources", KERNEL, resources_section),
)


def _stages(rows: Rows) -> list[Picture]:
    """Of each part and backbone at its largest resolution; the tables have the others."""
    pictures = []
    staged = [row for row in rows if row["stages"]]
    for key, group in _grouped(staged, "part", "backbone", "batch", "dtype"):
        part, backbone, batch, dtype = key
        resolution = max(row["resolution"] for row in group)
        group = [row for row in group if row["resolution"] == resolution]
        between = [n for row in group for n in row["stages"] if n not in ("backbone", "head", REST)]
        names = ["backbone", *dict.fromkeys(between), "head"]
        pictures.append(
            (
                _file("stages", part, backbone, resolution, batch, dtype),
                plots.stacked(
                    [plots.Bar(row["label"], _shared_out(row)) for row in group],
                    [*names, REST],
                    title=f"Where the time goes: {part}, {backbone}",
                    note=f"{resolution}×{resolution}, B={batch}, {dtype}, forward; the median, as stages share it out",
                    x_label="milliseconds",
                ),
            )
        )
    return pictures


def _shared_out(row: dict[str, Any]) -> dict[str, float]:
    """The row's time, divided as its stages divide the calls that were watched, which are others than were timed."""
    all_ = sum(row["stages"].values())
    return {name: taken / all_ * row["typical"] for name, taken in row["stages"].items()}


def _against_resolution(rows: Rows) -> list[Picture]:
    pictures = []
    for key, group in _grouped(rows, "part", "backbone", "batch", "dtype", "direction"):
        part, backbone, batch, dtype, direction = key
        if len({row["resolution"] for row in group}) < 2:
            continue
        for what, unit, value in (
            ("time", "milliseconds (median)", lambda row: row["typical"]),
            ("memory", "peak above inputs, MiB", lambda row: row["memory"]["above"] / MEBI),
        ):
            series = [
                plots.Line(label[0], sorted((row["resolution"], value(row)) for row in line))
                for label, line in _grouped(group, "label")
            ]
            series, left_out = _of_like_size(series)
            note = f"B={batch}, {dtype}, {direction}"
            if left_out:
                note += f"; less than a tenth of these, and in the table alone: {', '.join(left_out)}"
            pictures.append(
                (
                    _file(what, *key),
                    plots.lines(
                        _merged(series),
                        title=f"{what.capitalize()} against resolution: {part}, {backbone}",
                        note=note,
                        x_label="side of the image, pixels",
                        y_label=unit,
                        slopes=(2,),
                    ),
                )
            )
    return pictures


def _of_like_size(series: list[plots.Line]) -> tuple[list[plots.Line], list[str]]:
    """Without lines that stay under a tenth of the largest, which would press the others together; and their names."""
    tops = {line.name: max(value for _, value in line.points) for line in series}
    small = [name for name, top in tops.items() if top < max(tops.values()) / 10]
    return [line for line in series if line.name not in small], small


def _merged(series: list[plots.Line]) -> list[plots.Line]:
    """Lines that lie on each other, to 1 %, as one that has all of their names: of two only the upper one is seen."""
    found: list[plots.Line] = []
    for line in series:
        for place, other in enumerate(found):
            pairs = list(itertools.zip_longest(line.points, other.points, fillvalue=(0, 0)))
            if all(a[0] == b[0] and abs(a[1] - b[1]) <= 0.01 * b[1] for a, b in pairs):
                found[place] = plots.Line(f"{other.name}\n{line.name}", other.points)
                break
        else:
            found.append(line)
    return found


def _rooflines(rows: Rows) -> list[Picture]:
    pictures = []
    known = [row for row in rows if row["work_macs"]]
    for key, group in _grouped(known, "part", "backbone", "batch", "dtype", "direction"):
        part, backbone, batch, dtype, direction = key
        roofs = [row["ceilings"] for row in group]
        bandwidth, rate = (max(roof[name] for roof in roofs) for name in ("bandwidth", "matrix_rate"))
        series = [
            plots.Line(
                label[0],
                [
                    (row["work_macs"] / row["compulsory_bytes"], row["work_macs"] / (row["typical"] * 1e-3))
                    for row in sorted(line, key=lambda row: row["resolution"])
                ],
            )
            for label, line in _grouped(group, "label")
        ]
        sides = sorted({row["resolution"] for row in group})
        pictures.append(
            (
                _file("roofline", *key),
                plots.roofline(
                    series,
                    bandwidth,
                    rate,
                    title=f"Roofline: {part}, {backbone}, {direction}",
                    note=f"B={batch}, {dtype}, {', '.join(map(str, sides))} px, larger ones to the right; ceilings "
                    f"of the same run: {bandwidth / 1e9:.3g} GB/s, {number(rate / 1e9)} GMAC/s",
                ),
            )
        )
    return pictures


def _by_kind(rows: Rows, tell: Callable[[Rows], str]) -> list[str]:
    return [
        f"### {direction}, {dtype}\n\n{tell(group)}"
        for (dtype, direction), group in _grouped(rows, "dtype", "direction")
    ]


def _failed(rows: Rows) -> str:
    lines = [
        f"- not measured: {row['implementation']}, "
        + ", ".join(f"{name}={row[name]:,}" for name in growth.Sizes._fields)
        + f": {row['error']}"
        for row in rows
        if row["error"]
    ]
    return "\n".join([*lines, ""]) if lines else ""


def _grouped(rows: Iterable[dict[str, Any]], *keys: str) -> list[tuple[tuple[Any, ...], Rows]]:
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.items())


def _swept(variable: str) -> tuple[str, ...]:
    return ("N_q", "N_k") if variable == "N" else (variable,)


def _swept_words(variable: str) -> str:
    return {
        "N_q": "N_q, queries",
        "N_k": "N_k, keys",
        "N": "N = N_q = N_k, queries and keys",
        "r": "r, landmarks",
        "d": "d, width of a head",
        "H": "H, heads",
        "B": "B, batch size",
    }[variable]


def _shown(pictures: Sequence[Picture]) -> str:
    return "".join(f"\n![{name.removesuffix('.svg').replace('-', ' ')}]({name})\n" for name, _ in pictures)


def _file(*parts: Any) -> str:
    return "-".join(str(part).replace("_", "-") for part in itertools.chain(parts)) + ".svg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a folder's report; 2 with one sentence where it cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, help="bench/results/<gpu or cpu>")
    parser.add_argument(
        "--latest", action="store_true", help="only rows measured as the last one of each file was"
    )
    parser.add_argument(
        "--pages",
        nargs="+",
        type=Path,
        default=[],
        help="also fill these files' `<!-- rows: -->` parts (one folder)",
    )
    options = parser.parse_args(arguments)
    try:
        if options.pages and len(options.folders) > 1:
            raise ValueError("--pages are filled from one folder")
        for folder in options.folders:
            for path in report(folder, last=options.latest):
                print(path)
        for page in options.pages:
            write_text(page, pages.filled(page.read_text("utf-8"), folder))
            print(page)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
