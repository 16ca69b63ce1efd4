"""Tables of docs/ that are made of rows, so that no figure there is without one.

Such a part stands between `<!-- rows: NAME -->` and `<!-- end -->`. `python -m bench.report FOLDER --pages PAGE` writes
it anew, and a test compares the pages with the rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import growth
from bench.harness import newest, one_machine, read
from srm_model.profiling.tables import MEBI, number, shares_table

BLOCK = re.compile(r"(<!-- rows: (.*?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
NECK = ("part", "backbone", "neck", "backend", "resolution", "batch", "dtype", "direction", "config")
POINT = ("variable", "value", *growth.Sizes._fields, "dtype", "direction", "implementation")
WIDEST = 512  # the article's resolution
Rows = list[dict[str, Any]]
PLAIN = ("torch", "sdpa")  # the backend, and its name in earlier rows


def filled(text: str, folder: Path) -> str:
    """`text` with every block made of the folder's rows. ValueError for a block that is not known."""

    def block(found: re.Match[str]) -> str:
        start, name, end = found.groups()
        if name not in BLOCKS:
            raise ValueError(f"rows: {name}: expected one of {', '.join(BLOCKS)}")
        return f"{start}{BLOCKS[name](folder).strip()}\n{end}"

    return BLOCK.sub(block, text)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A Markdown table, its first columns to the left."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    rule = "|" + "---|" * words + "---:|" * (len(header) - words)
    return "\n".join(
        [f"| {' | '.join(escaped[0])} |", rule, *(f"| {' | '.join(line)} |" for line in escaped[1:]), ""]
    )


def rows_of(folder: Path, name: str, keys: Sequence[str]) -> Rows:
    """Rows of one measurement that could run; ValueError where several are mixed."""
    rows = newest(read(folder / f"{name}.jsonl"), keys)
    one_machine(rows)
    return [row for row in rows if not row["error"]]


def share(ours: float, rival: float) -> str:
    """A time as a share of the rival's, a loss marked."""
    return f"{number(ours / rival)}{' (slower)' if ours >= rival else ''}"


def attention(folder: Path) -> str:
    """Nyström by each backend as a share of exact attention."""
    rows = rows_of(folder, "attention", ("N_q", "N_k", "B", "H", "r", "d", "dtype", "direction"))
    lines = [
        [
            f"{row['N_q']:,}",
            f"{row['N_k']:,}",
            *(share(row["typical"][name], row["typical"]["exact"]) for name in ("default", "reference")),
        ]
        for row in rows
    ]
    return markdown(["N_q", "N_k", "default backend", "`reference`"], lines, words=0)


def solve(folder: Path) -> str:
    """Cholesky against the SVD."""
    rows = [row for row in read(folder / "conditioning.jsonl") if "share_of_svd" in row]
    chosen = [row for row in rows if row["solver"] == "cholesky" and row["r"] in (32, 64)]
    low, high = (pick(row["share_of_svd"] for row in chosen) for pick in (min, max))
    return (
        f"The landmark solve by `cholesky` took {low:.2f} to {high:.2f} of the time of the article's SVD at "
        "r = 32 and 64."
    )


def cost(folder: Path) -> str:
    """Parameters, multiply-accumulates and peak memory of one backbone's necks at the article's resolution."""
    rows = [
        row
        for row in rows_of(folder, "neck", NECK)
        if (row["part"], row["backbone"], row["resolution"]) == ("neck", "pvt_v2_b2", WIDEST)
        and (row["batch"], row["dtype"], row["direction"], row["settings"]) == (1, "fp32", "forward", "")
        and row["backend"] in (*PLAIN, None)
    ]
    lines = [
        [
            f"`{row['neck']}`",
            f"{row['parameters'] / 1e6:.2f} M",
            number(row["macs"]["formula"] / 1e9),
            number(row["parts"]["links"] / 1e9) if row["parts"]["links"] else "–",
            f"{row['memory']['above'] / MEBI:.1f}",
        ]
        for row in rows
    ]
    header = ["neck", "parameters", "GMAC", "of it links (equation 30)", "peak MiB above inputs"]
    return markdown(header, lines)


def time(folder: Path) -> str:
    """What `srm` takes of the quadratic neck's time, at every resolution, and its share of the model."""
    lines = [
        [f"`{backbone}`", *shape[:1], *cells]
        for (backbone, *shape), cells in _shares(folder, "forward")
        if "–" not in cells
    ]
    header = ["backbone", "side, px", "neck `srm`, ms", "of `quadratic`'s", "model, ms", "of `quadratic`'s"]
    return markdown([*header, "the neck's share, %"], lines)


def backward(folder: Path) -> str:
    """The same of the neck alone, forward and backward."""
    found = [(int(shape[0]), cells) for (_, *shape), cells in _shares(folder, "backward")]
    lines = []
    for side in sorted({side for side, _ in found}):
        values = [float(cells[1]) for other, cells in found if other == side]
        lines.append([str(side), f"{min(values):.2f} to {max(values):.2f}"])
    header = ["side, px", "`srm`, forward and backward, of `quadratic`'s time"]
    return markdown(header, lines, words=0)


def step(folder: Path) -> str:
    """Training steps of whole models."""
    rows = [
        row
        for row in rows_of(folder, "neck", NECK)
        if (row["part"], row["direction"], row["dtype"], row["settings"]) == ("model", "step", "fp32", "")
        and row["backend"] in (*PLAIN, None)
    ]
    taken: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        taken.setdefault((row["backbone"], row["resolution"], row["batch"]), {})[row["neck"]] = row["typical"]
    lines = [
        [
            f"`{backbone}`",
            str(side),
            str(batch),
            number(times["quadratic"]),
            *(number(times[neck] / times["quadratic"]) for neck in ("srm", "none")),
        ]
        for (backbone, side, batch), times in taken.items()
    ]
    header = ["backbone", "side, px", "B", "`quadratic`, ms", "`srm`, of it", "`none`, of it"]
    return markdown(header, lines)


def grown(folder: Path) -> str:
    """Exponents with both numbers of tokens growing together, and over each alone."""
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
    """Shares by N_k over all batch sizes, losses included, and from which N_k on Nyström wins."""
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
    header = ["N_k", *(_plain(surface.implementation) for surface in surfaces)]
    guides = [
        f"- {growth.guide(surface).replace(surface.implementation, _plain(surface.implementation))}"
        for surface in surfaces
    ]
    return "\n".join([markdown(header, lines, words=0), *guides])


def _shares(folder: Path, direction: str) -> Iterable[tuple[list[str], list[str]]]:
    """(backbone, px, …) and the figures of `srm` by its fastest backend here, fp32, one image."""
    _, lines = shares_table(rows_of(folder, "neck", NECK))
    for line in sorted(lines, key=lambda line: (line[0], int(line[1]))):
        if line[2:6] in [["1", "fp32", direction, f"srm [{name}]"] for name in PLAIN]:
            yield line[:3], line[6:]


def _plain(implementation: str) -> str:
    """A name of bench.growth as a reader of the page knows it."""
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
}
