"""Write results as tables and pictures: `python -m bench.report bench/results/cpu` writes report.md and SVGs there.

Every table and picture shows results of one machine, one set of versions and one commit. If the rows of a
file are from different machines, versions or commits, the report fails. With `--latest`, the report uses from each
file only the rows with the same machine, versions and commit as the last row of the file.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import growth, occupancy, pages, plots
from bench.harness import parser
from bench.pages import markdown
from bench.ptx.rates import GPUS
from srm_model.files import write_text
from srm_model.profiling.counting import CONVENTION
from srm_model.profiling.machines import sentence
from srm_model.profiling.results import latest, newest, one_machine, read
from srm_model.profiling.stages import REST
from srm_model.profiling.tables import MEBI, cost_table, measured_table, notes, number, shares_table
from srm_model.reports.drawing import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KERNEL = ("operator", "kernel", "architecture", "case", "launch")
RTX = (86, 89, 120)
PAGE = "report.md"
SWEPT = {
    "N_q": "N_q, queries",
    "N_k": "N_k, keys",
    "N": "N = N_q = N_k, queries and keys",
    "r": "r, landmarks",
    "d": "d, width of a head",
    "H": "H, heads",
    "B": "B, batch size",
}
Rows = list[dict[str, Any]]
Picture = tuple[str, "Figure"]  # file name and figure
Section = tuple[str, str, list[Picture]]  # title, text and pictures


def report(folder: Path, *, last: bool = False) -> list[Path]:
    """Write `report.md` and its pictures into the folder that contains the rows.

    Args:
        folder: Folder with at least one of the files `neck.jsonl`, `growth.jsonl`, `crossover.jsonl` and
            `resources.jsonl`.
        last: Whether to use from each file only the rows with the same machine, versions and commit as the last row of
            the file.

    Returns:
        The paths of the written files, `report.md` first.

    Raises:
        ValueError: There are no rows, or the rows of a file are from different machines, versions or commits.
    """
    sections: list[str] = []
    pictures: list[Picture] = []
    for name, keys, section in SECTIONS:
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            continue
        rows = read(path)
        rows = newest(latest(rows) if last else rows, keys)
        try:
            about = one_machine(rows)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; --latest selects those of the last measurement") from None
        title, text, drawn = section(rows)
        measured = sentence(about) if "device" in about else f"Triton {about['triton']}"
        remarks = dict.fromkeys(row["note"] for row in rows if row.get("note"))
        sections.append("\n\n".join([f"## {title}", f"{measured}.", *remarks, text + _shown(drawn)]))
        pictures += drawn
    if not sections:
        names = ", ".join(f"{name}.jsonl" for name, _, _ in SECTIONS)
        raise ValueError(f"{folder}: none of {names} is there")
    title = f"# Measurements: {folder.name}\n\nWritten by `python -m bench.report` from the rows in this folder.\n"
    for name, picture in pictures:
        write_text(folder / name, svg(picture))
    write_text(folder / PAGE, "\n".join([title, *sections]))
    return [folder / PAGE, *(folder / name for name, _ in pictures)]


def neck_section(rows: Rows) -> Section:
    """Return the section on necks.

    The tables show parameters, multiply-accumulates, measured times and memory, and ratios of times. The
    pictures show the times of the stages, the growth of time and memory with the resolution, and rooflines.
    """
    good = [row for row in rows if not row["error"]]
    parts = [CONVENTION + ".", markdown(*cost_table(rows)), markdown(*measured_table(rows))]
    shares = shares_table(rows)
    if shares[1]:
        parts.append(markdown(*shares))
    parts.append("\n".join(f"- {note}" for note in notes(rows)) + "\n\n")
    pictures = [*_stages(good), *_against_resolution(good), *_rooflines(good)]
    return "What a neck costs", "\n".join(parts), pictures


def growth_section(rows: Rows) -> Section:
    """Return the section on the growth of the time with a size, such as the number of tokens.

    The section has tables of the fitted exponents, and for each sweep a picture of the time against the size.
    """
    pictures = []
    good = [row for row in rows if not row["error"]]
    for (dtype, direction, variable), points in _grouped(good, "dtype", "direction", "variable"):
        swept = ("N_q", "N_k") if variable == "N" else (variable,)
        fixed = [f"{name}={points[0][name]:,}" for name in growth.Sizes._fields if name not in swept]
        figure = plots.lines(
            [
                plots.Line(name, [(point["value"], point["typical"]) for point in line])
                for (name,), line in _grouped(points, "implementation")
            ],
            title=f"Time against {SWEPT[variable]}",
            note=", ".join([direction, dtype, *fixed]),
            x_label=SWEPT[variable],
            y_label="milliseconds (median)",
            slopes=(1, 2) if variable == "N" else (1,),
        )
        pictures.append((_file("growth", variable.replace("_", "").lower(), dtype, direction), figure))
    words = (
        "Each sweep is fitted to time = c·x^p; p is shown with its standard error. The last column is the exponent of "
        "the multiply-accumulates. Fixed costs lower p below it.\n"
    )
    tables = _by_kind(good, lambda group: markdown(*growth.growth_table(group)))
    return "Growth", "\n".join([words, *tables, _failed(rows), ""]), pictures


def crossover_section(rows: Rows) -> Section:
    """Return the section that compares the times of Nyström attention and exact attention.

    For each implementation of Nyström attention, a sentence says below which N_k exact attention is faster. A
    table and a picture show the time of Nyström attention divided by the time of exact attention, for each N_k
    and B.
    """
    pictures: list[Picture] = []

    def surfaces_of(group: Rows) -> str:
        texts = []
        first = group[0]
        fixed = f"N_q={first['N_q']:,}, H={first['H']}, r={first['r']}, d={first['d']}"
        case = f"{fixed}, {first['dtype']}, {first['direction']}"
        for found in growth.surfaces(group):
            name = found.implementation.removeprefix("nystrom ").strip("[]")
            figure = plots.surface(
                [f"{k:,}" for k in found.keys],
                [f"{b}" for b in found.batches],
                [[found.share[k, b] for b in found.batches] for k in found.keys],
                title=f"Nyström [{name}]: time as a share of exact attention's",
                note=f"{case}; below 1 Nyström is faster, the thick line is where both are equal",
                row_label="N_k, keys",
                column_label="B, batch size",
            )
            pictures.append((f"crossover-{name}-{first['dtype']}-{first['direction']}.svg", figure))
            texts += [f"**{growth.guide(found)}** ({case})\n", markdown(*growth.crossover_table(found))]
        return "\n".join(texts)

    parts = [*_by_kind(rows, surfaces_of), _failed(rows), ""]
    return "Where Nyström overtakes exact attention", "\n".join(parts), pictures


def resources_section(rows: Rows) -> Section:
    """Return a table for each RTX architecture, with every compiled kernel and its theoretical occupancy."""
    parts = [
        "Compiled without a GPU and not run on one. Theoretical occupancy is the number of warps that registers, "
        "shared memory and blocks allow, as a share of the warps that a multiprocessor can hold. Registers and "
        "spills are per thread, warps and shared memory per block.\n"
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
    return "Kernels on RTX cards", "\n".join(parts), []


SECTIONS: tuple[tuple[str, tuple[str, ...], Callable[[Rows], Section]], ...] = (
    ("neck", pages.NECK, neck_section),
    ("growth", pages.POINT, growth_section),
    ("crossover", pages.POINT, crossover_section),
    ("resources", KERNEL, resources_section),
)


def _stages(rows: Rows) -> list[Picture]:
    """Draw a picture of the stage times for each part (neck or model), backbone, batch size and dtype.

    Each picture shows the times at the largest measured resolution.
    """
    pictures = []
    staged = [row for row in rows if row["stages"]]
    for (part, backbone, batch, dtype), group in _grouped(staged, "part", "backbone", "batch", "dtype"):
        resolution = max(row["resolution"] for row in group)
        group = [row for row in group if row["resolution"] == resolution]
        between = [n for row in group for n in row["stages"] if n not in ("backbone", "head", REST)]
        figure = plots.stacked(
            [plots.Bar(row["label"], _scaled_stages(row)) for row in group],
            ["backbone", *dict.fromkeys(between), "head", REST],
            title=f"Where the time goes: {part}, {backbone}",
            note=f"{resolution}×{resolution}, B={batch}, {dtype}, forward; the median, divided like the stages' times",
            x_label="milliseconds",
        )
        pictures.append((_file("stages", part, backbone, resolution, batch, dtype), figure))
    return pictures


def _scaled_stages(row: dict[str, Any]) -> dict[str, float]:
    """Divide the time of a row among its stages, in proportion to stage times measured in separate calls."""
    total = sum(row["stages"].values())
    return {name: taken / total * row["typical"] for name, taken in row["stages"].items()}


def _against_resolution(rows: Rows) -> list[Picture]:
    """Draw time and memory over the image side, if several image sides were measured."""
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
                plots.Line(label, sorted((row["resolution"], value(row)) for row in line))
                for (label,), line in _grouped(group, "label")
            ]
            series, left_out = _of_like_size(series)
            note = f"B={batch}, {dtype}, {direction}"
            if left_out:
                note += f"; less than a tenth of these, and in the table alone: {', '.join(left_out)}"
            figure = plots.lines(
                _merged(series),
                title=f"{what.capitalize()} against resolution: {part}, {backbone}",
                note=note,
                x_label="side of the image, pixels",
                y_label=unit,
                slopes=(2,),
            )
            pictures.append((_file(what, *key), figure))
    return pictures


def _of_like_size(series: list[plots.Line]) -> tuple[list[plots.Line], list[str]]:
    """Return the lines of a plot that are large enough to be drawn together, and the names of the other lines.

    A line is large enough if its maximum is at least a tenth of the largest maximum of all lines.
    """
    tops = {line.name: max(value for _, value in line.points) for line in series}
    small = [name for name, top in tops.items() if top < max(tops.values()) / 10]
    return [line for line in series if line.name not in small], small


def _merged(series: list[plots.Line]) -> list[plots.Line]:
    """Merge lines that agree within 1 % into one line with all their names, because they would hide each other."""
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
    """Draw roofline plots: multiply-accumulates per second against multiply-accumulates per byte.

    The roof is computed from the ceilings in the rows: the highest measured bandwidth, and the highest measured
    rate of matrix products.
    """
    pictures = []
    known = [row for row in rows if row["work_macs"]]
    for key, group in _grouped(known, "part", "backbone", "batch", "dtype", "direction"):
        part, backbone, batch, dtype, direction = key
        roofs = [row["ceilings"] for row in group]
        bandwidth, rate = (max(roof[name] for roof in roofs) for name in ("bandwidth", "matrix_rate"))
        series = [
            plots.Line(
                label,
                [
                    (row["work_macs"] / row["compulsory_bytes"], row["work_macs"] / (row["typical"] * 1e-3))
                    for row in sorted(line, key=lambda row: row["resolution"])
                ],
            )
            for (label,), line in _grouped(group, "label")
        ]
        sides = ", ".join(map(str, sorted({row["resolution"] for row in group})))
        figure = plots.roofline(
            series,
            bandwidth,
            rate,
            title=f"Roofline: {part}, {backbone}, {direction}",
            note=f"B={batch}, {dtype}, {sides} px, larger ones to the right; ceilings of the same run: "
            f"{bandwidth / 1e9:.3g} GB/s, {number(rate / 1e9)} GMAC/s",
        )
        pictures.append((_file("roofline", *key), figure))
    return pictures


def _by_kind(rows: Rows, text_of: Callable[[Rows], str]) -> list[str]:
    return [
        f"### {direction}, {dtype}\n\n{text_of(group)}"
        for (dtype, direction), group in _grouped(rows, "dtype", "direction")
    ]


def _failed(rows: Rows) -> str:
    lines = []
    for row in rows:
        if row["error"]:
            sizes = ", ".join(f"{name}={row[name]:,}" for name in growth.Sizes._fields)
            lines.append(f"- not measured: {row['implementation']}, {sizes}: {row['error']}\n")
    return "".join(lines)


def _grouped(rows: Iterable[dict[str, Any]], *keys: str) -> list[tuple[tuple[Any, ...], Rows]]:
    """Group rows with the same values in the columns `keys`; the groups are in order of first appearance."""
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.items())


def _shown(pictures: Sequence[Picture]) -> str:
    return "".join(f"\n![{name.removesuffix('.svg').replace('-', ' ')}]({name})\n" for name, _ in pictures)


def _file(*parts: Any) -> str:
    return "-".join(str(part).replace("_", "-") for part in parts) + ".svg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of each folder; if a report cannot be written, print an error and return 2."""
    made = parser("report", __doc__)
    made.add_argument("folders", nargs="+", type=Path, help="bench/results/<gpu or cpu>")
    made.add_argument(
        "--latest",
        action="store_true",
        help="use only rows that were measured like the last one of each file",
    )
    made.add_argument(
        "--pages", nargs="+", type=Path, default=[], help="fill the `<!-- rows: -->` parts of these files too"
    )
    options = made.parse_args(arguments)
    try:
        if options.pages and len(options.folders) > 1:
            raise ValueError(f"--pages with {len(options.folders)} folders: expected one folder")
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
