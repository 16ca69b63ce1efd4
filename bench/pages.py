"""Compute the benchmark tables in the pages of docs/ from the rows in a folder of results.

A table is placed between `<!-- rows: NAME -->` and `<!-- end -->`. The command
`python -m bench.report FOLDER --pages PAGE` rewrites all tables of PAGE from the rows in FOLDER. A test
checks that the tables in docs/ agree with the rows in bench/results/cpu.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import growth, opinions
from srm_model.data.distortions import DISTORTIONS
from srm_model.metrics import srocc
from srm_model.profiling.results import newest, one_machine, read
from srm_model.profiling.tables import MEBI, number, percent, shares
from srm_model.reports.text import fixed

BLOCK = re.compile(r"(<!-- rows: (.*?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
NECK = ("part", "backbone", "neck", "backend", "resolution", "batch", "dtype", "direction", "config")
POINT = ("variable", "value", *growth.Sizes._fields, "dtype", "direction", "implementation")
WIDEST = 512  # the article's resolution
Rows = list[dict[str, Any]]
HARDLY_SEEN = 0.3  # SROCC below which a page says that the checkpoint hardly sees a distortion type
PLAIN = ("torch", "sdpa")  # the backend, and its name in earlier rows


def filled(text: str, folder: Path) -> str:
    """Rewrite all tables of a page from the result rows in a folder; return the new text of the page.

    Raises:
        ValueError: The name of a table is unknown, or the rows of a table are from different machines, versions or
            commits.
    """

    def block(found: re.Match[str]) -> str:
        start, name, end = found.groups()
        if name not in BLOCKS:
            raise ValueError(f"rows: {name}: expected one of {', '.join(BLOCKS)}")
        return f"{start}{BLOCKS[name](folder).strip()}\n{end}"

    return BLOCK.sub(block, text)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Return a Markdown table; the first `words` columns are aligned to the left, the others to the right."""
    rule = "|" + "---|" * words + "---:|" * (len(header) - words)
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    first, *rest = (f"| {' | '.join(line)} |" for line in escaped)
    return "\n".join([first, rule, *rest, ""])


def rows_of(folder: Path, name: str, keys: Sequence[str]) -> Rows:
    """Return the rows of a file that have no `error`.

    Args:
        folder: Folder of results.
        name: Name of the file without its suffix.
        keys: Columns that identify a row. If several rows have the same values in these columns, the last row is used.

    Raises:
        ValueError: The rows are from different machines, versions or commits.
    """
    rows = newest(read(folder / f"{name}.jsonl"), keys)
    one_machine(rows)
    return [row for row in rows if not row["error"]]


def share(time: float, rival: float) -> str:
    """Return the ratio `time` / `rival` as text, followed by "(slower)" if the ratio is at least 1."""
    return f"{number(time / rival)}{' (slower)' if time >= rival else ''}"


def attention(folder: Path) -> str:
    """Return a table of the ratio Nyström time / exact time, for the default backend and for `reference`."""
    rows = rows_of(folder, "attention", ("N_q", "N_k", "B", "H", "r", "d", "dtype", "direction"))
    lines = []
    for row in rows:
        times = row["typical"]
        shares = (share(times[name], times["exact"]) for name in ("default", "reference"))
        lines.append([f"{row['N_q']:,}", f"{row['N_k']:,}", *shares])
    return markdown(["N_q", "N_k", "default backend", "`reference`"], lines, words=0)


def solve(folder: Path) -> str:
    """Return a sentence with the smallest and the largest ratio of solve times, `cholesky` / `svd`."""
    shares = [
        row["share_of_svd"]
        for row in read(folder / "conditioning.jsonl")
        if "share_of_svd" in row and row["solver"] == "cholesky" and row["r"] in (32, 64)
    ]
    return (
        f"The landmark solve by `cholesky` took {min(shares):.2f} to {max(shares):.2f} of the time of the article's "
        "SVD at r = 32 and 64."
    )


def cost(folder: Path) -> str:
    """Return a table of parameters, MACs and peak memory of the necks of `pvt_v2_b2` at the article's resolution."""
    lines = []
    for row in rows_of(folder, "neck", NECK):
        subject = (row["part"], row["backbone"], row["resolution"])
        case = (row["batch"], row["dtype"], row["direction"], row["settings"])
        if subject != ("neck", "pvt_v2_b2", WIDEST) or case != (1, "fp32", "forward", ""):
            continue
        if row["backend"] not in (*PLAIN, None):
            continue
        links = row["parts"]["links"]
        macs = [number(row["macs"]["formula"] / 1e9), number(links / 1e9) if links else "–"]
        memory = f"{row['memory']['above'] / MEBI:.1f}"
        lines.append([f"`{row['neck']}`", f"{row['parameters'] / 1e6:.2f} M", *macs, memory])
    header = ["neck", "parameters", "GMAC", "GMAC of the links", "peak MiB above inputs"]
    return markdown(header, lines)


def time(folder: Path) -> str:
    """Return a table of forward times of the `srm` neck and of the whole model, in ms and relative to `quadratic`."""
    lines = [
        [f"`{backbone}`", side, *cells]
        for backbone, side, cells in _shares(folder, "forward")
        if "–" not in cells
    ]
    header = [
        "backbone",
        "side, px",
        "neck `srm`, ms",
        "neck, srm / quadratic",
        "model `srm`, ms",
        "model, srm / quadratic",
    ]
    return markdown([*header, "the neck's share, %"], lines)


def backward(folder: Path) -> str:
    """Return a table of the ratio `srm` time / `quadratic` time for one forward and backward pass of the neck."""
    values: dict[int, list[float]] = {}
    for _, side, cells in _shares(folder, "backward"):
        values.setdefault(int(side), []).append(float(cells[1]))
    lines = [[str(side), f"{min(found):.2f} to {max(found):.2f}"] for side, found in sorted(values.items())]
    header = ["side, px", "forward and backward of the neck, srm / quadratic (time)"]
    return markdown(header, lines, words=0)


def step(folder: Path) -> str:
    """Return a table of the times of training steps of whole models."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows_of(folder, "neck", NECK):
        case = (row["part"], row["direction"], row["dtype"], row["settings"])
        if case == ("model", "step", "fp32", "") and row["backend"] in (*PLAIN, None):
            subject = times.setdefault((row["backbone"], row["resolution"], row["batch"]), {})
            subject[row["neck"]] = row["typical"]
    lines = []
    for (backbone, side, batch), taken in times.items():
        rival = taken["quadratic"]
        shares = [number(taken[neck] / rival) for neck in ("srm", "none")]
        lines.append([f"`{backbone}`", str(side), str(batch), number(rival), *shares])
    header = ["backbone", "side, px", "B", "`quadratic`, ms", "srm / quadratic", "none / quadratic"]
    return markdown(header, lines)


def grown(folder: Path) -> str:
    """Return a table of the exponents p in time ∝ x^p, where x is N_q, N_k or N (N = N_q = N_k)."""
    fits = growth.fits(rows_of(folder, "growth", POINT))
    lines = [
        [
            _plain(fit["implementation"]),
            fit["variable"],
            f"{fit['from']:,} to {fit['to']:,}",
            str(fit["time"]),
        ]
        for fit in fits
        if fit["variable"] in ("N", "N_q", "N_k")
    ]
    header = ["attention", "what grows (N is N_q = N_k)", "from … to", "time ∝ x^p, p"]
    return markdown(header, sorted(lines, key=lambda line: line[1]), words=2)


def crossover(folder: Path) -> str:
    """Return a table of the ratio Nyström time / exact time, and the N_k below which exact attention is faster.

    The table has a row for each N_k and a column for each implementation of Nyström attention. Each cell shows the
    smallest and the largest ratio among the measured batch sizes. Below the table, each
    implementation has a sentence with the N_k below which exact attention is faster.
    """
    surfaces = growth.surfaces(rows_of(folder, "crossover", POINT))
    lines = []
    for keys in surfaces[0].keys:
        cells = []
        for surface in surfaces:
            known = [s for s in (surface.share[keys, b] for b in surface.batches) if s is not None]
            low, high = min(known), max(known)
            mark = " (slower)" if low >= 1 else ""
            cells.append(f"{number(low, 2)} to {number(high, 2)}{mark}")
        lines.append([f"{keys:,}", *cells])
    names = {surface.implementation: _plain(surface.implementation) for surface in surfaces}
    guides = [
        f"- {growth.guide(surface).replace(surface.implementation, names[surface.implementation])}"
        for surface in surfaces
    ]
    return "\n".join([markdown(["N_k", *names.values()], lines, words=0), *guides])


def types(folder: Path) -> str:
    """Return a table of the SROCC with the opinions for each distortion type, and what the checkpoint hardly sees.

    The metrics of `bench.opinions` have their SROCC on all photographs. The checkpoint of the package, and a predictor
    that knows only the level, have their SROCC on the test images of the checkpoint. The list below the table has the
    types for which the SROCC of the checkpoint is below `HARDLY_SEEN` or undefined.
    """
    rows = read(folder / "opinions.jsonl")
    scored = {row["type"]: row for row in read(folder / opinions.CHECKPOINT_ROWS)}
    lines, hardly = [], []
    for kind in sorted({row["type"] for row in rows}):
        own = [row for row in rows if row["type"] == kind]
        cells = [fixed(opinions.correlation(own, metric)) for metric in opinions.METRICS]
        if (found := scored.get(kind)) is None:
            lines.append([str(kind), DISTORTIONS[kind].name, *cells, "—", "—"])
            continue
        level, checkpoint = (
            srocc(scores, found["mos"])
            for scores in (opinions.level_means(own, found["names"]), found["scores"])
        )
        lines.append([str(kind), DISTORTIONS[kind].name, *cells, fixed(level), fixed(checkpoint)])
        if not checkpoint >= HARDLY_SEEN:
            low, high = fixed(min(found["scores"])), fixed(max(found["scores"]))
            about = f"SROCC {fixed(checkpoint)}, scores from {low} to {high}"
            hardly.append(f"- type {kind} ({DISTORTIONS[kind].name}): {about}")
    header = ["type", "distortion", "VSI", "FSIM", "SSIM", "level alone", "checkpoint"]
    (digest,) = {row["checkpoint"] for row in scored.values()}
    if hardly:
        types = "this type" if len(hardly) == 1 else "these types"
        seen = [f"It hardly sees {types} (SROCC below {HARDLY_SEEN}):", "", *hardly]
    else:
        seen = [f"Its SROCC is at least {HARDLY_SEEN} for each type."]
    about = f"The SHA-256 of the checkpoint's weights begins with {digest[:12]}."
    return "\n".join([markdown(header, lines, words=2), about, *seen])


def _shares(folder: Path, direction: str) -> Iterable[tuple[str, str, list[str]]]:
    """Yield (backbone, image side, table cells) for `srm` with the backend `torch`, in fp32 and for one image."""
    lines = shares(rows_of(folder, "neck", NECK))
    for line in sorted(lines, key=lambda line: (line["backbone"], line["resolution"])):
        case = (line["batch"], line["dtype"], line["direction"], line["neck"])
        if case in [(1, "fp32", direction, f"srm [{name}]") for name in PLAIN]:
            times = ("neck_ms", "neck_of_quadratic", "model_ms", "model_of_quadratic")
            cells = [number(line[key]) for key in times]
            yield line["backbone"], str(line["resolution"]), [*cells, percent(line["neck_share"])]


def _plain(implementation: str) -> str:
    """Return the name that pages show for an implementation of bench.growth."""
    name = implementation.removeprefix("nystrom ").strip("[]")
    return "exact" if name == growth.EXACT else f"Nyström, `{name}`"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "attention": attention,
    "solve": solve,
    "cost": cost,
    "time": time,
    "backward": backward,
    "step": step,
    "growth": grown,
    "crossover": crossover,
    "types": types,
}
