"""Test the page and pictures of `bench.report`, which does not mix rows of different machines or versions."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench import pages, plots
from bench.growth import SCALES, Sizes
from bench.report import main, markdown, report
from srm_model.profiling.results import append
from srm_model.reports.drawing import svg

MACHINE = {
    "device": "Some CPU",
    "kind": "cpu",
    "driver": None,
    "capability": None,
    "threads": 1,
    "torch": "2.13.0",
    "cuda": None,
    "triton": None,
    "commit": "0123456789ab",
}
TIMES = {"p20": 1.0, "p50": 2.0, "p80": 3.0, "least": 1.0, "most": 3.0, "count": 3, "processor": None}
MEMORY = {
    "held": 1,
    "above": 2**20,
    "allocated": 2**20,
    "reserved": None,
    "resident": None,
    "resident_above": None,
}


def neck_row(neck: str = "srm", resolution: int = 64, error: str | None = None) -> dict[str, Any]:
    row = {
        "part": "neck",
        "backbone": "some_net",
        "neck": neck,
        "backend": "sdpa" if neck == "srm" else None,
        "label": "srm [sdpa]" if neck == "srm" else neck,
        "resolution": resolution,
        "batch": 1,
        "dtype": "fp32",
        "direction": "forward",
        "config": {},
        "settings": "",
        "error": error,
        "machine": MACHINE,
    }
    if error:
        return row
    return row | {
        "parameters": 1000,
        "macs": {"formula": 10**9, "fvcore": None, "torch": 10**9},
        "parts": {"align": 1, "projections": 2, "links": 3 * 10**8, "gate": 4},
        "milliseconds": TIMES,
        "typical": resolution / 32,
        "memory": MEMORY,
        "launches": None,
        "bandwidth_share": 0.5,
        "matrix_share": 0.25,
        "solve_share": 0.1,
        "ceilings": {"bandwidth": 1e10, "matrix_rate": 1e11},
        "compulsory_bytes": 10**6,
        "work_macs": 10**9,
        "stages": {"align": 0.5, "link 4→3": 1.0, "gate": 0.1, "rest": 0.4},
    }


def point_row(implementation: str, keys: int, ms: float, **more: Any) -> dict[str, Any]:
    sizes: Sizes = SCALES["tiny"].base._replace(N_k=keys)
    return {
        **sizes._asdict(),
        "dtype": "fp32",
        "direction": "forward",
        "implementation": implementation,
        "macs": keys,
        "error": None,
        "milliseconds": TIMES,
        "typical": ms,
        "memory": MEMORY,
        "machine": MACHINE,
        **more,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row in (neck_row(), neck_row("none"), neck_row(resolution=128), neck_row("none", 128)):
        append(tmp_path / "neck.jsonl", row)
    append(tmp_path / "neck.jsonl", neck_row("quadratic", 128, "out of memory: tried 9 GiB"))
    for keys in (16, 64, 256):
        for name, ms in (("exact", keys), ("nystrom [sdpa]", 64 + keys / 8)):
            append(tmp_path / "growth.jsonl", point_row(name, keys, ms, variable="N_k", value=keys))
            append(tmp_path / "crossover.jsonl", point_row(name, keys, ms))
    return tmp_path


def test_every_table_and_picture_is_written(folder: Path):
    written = report(folder)
    page = (folder / "report.md").read_text()
    assert "Some CPU, 1 thread, torch 2.13.0" in page
    assert "MAC = 1 multiply-add" in page
    assert "out of memory: tried 9 GiB" in page
    assert "| 1.00 | – | 1.00 | 0.300 |" in page  # GMAC by formula, by fvcore, by torch, and of the links
    assert "use exact attention if N_k is below about 7" in page
    assert "(slower)" in page
    assert "1.00 ± 0.00" in page  # exponent of exact attention in N_k
    kinds = {path.name.split("-")[0] for path in written if path.suffix == ".svg"}
    assert kinds == {"stages", "time", "memory", "roofline", "growth", "crossover"}
    for path in written:
        if path.suffix == ".svg":
            assert f"]({path.name})" in page
            ElementTree.parse(path)  # well formed
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["device", "torch", "driver", "commit", "triton", "threads"])
@pytest.mark.parametrize("file", ["neck", "growth", "crossover"])
def test_mixed_machines_and_versions_are_refused(
    folder: Path, file: str, name: str, capsys: pytest.CaptureFixture[str]
):
    other = copy.deepcopy(
        neck_row() if file == "neck" else point_row("exact", 512, 1.0, variable="N_k", value=512)
    )
    other["machine"][name] = "another"
    append(folder / f"{file}.jsonl", other)
    with pytest.raises(ValueError, match=f"cannot share a table: {name} "):
        report(folder)
    assert main([str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder / "report.md").exists()


def test_the_latest_measurement_alone_can_be_told(folder: Path):
    other = copy.deepcopy(neck_row("none"))
    other["machine"]["commit"] = "newer"
    append(folder / "neck.jsonl", other)
    assert main([str(folder), "--latest"]) == 0
    page = (folder / "report.md").read_text()
    assert "commit newer" in page
    assert "srm [sdpa]" not in page.split("## Growth")[0]


def test_a_neck_is_told_as_a_share_of_its_model_and_a_multiple_of_its_rival(folder: Path):
    for part, neck, milliseconds in (
        ("neck", "quadratic", 8.0),
        ("neck", "srm", 2.0),
        ("model", "quadratic", 16.0),
        ("model", "srm", 10.0),
    ):
        row = neck_row(neck) | {"part": part, "typical": milliseconds}
        append(folder / "neck.jsonl", row)
    report(folder)
    page = (folder / "report.md").read_text()
    start = "| some_net | 64 | 1 | fp32 | forward |"
    assert f"{start} srm [sdpa] | 2.00 | 0.250 | 10.0 | 0.625 | 20 |" in page
    assert f"{start} quadratic | 8.00 | 1.00 | 16.0 | 1.00 | 50 |" in page
    assert f"{start} none | 2.00 | 0.250 | – | – | – |" in page


def test_another_config_is_another_line_everywhere(folder: Path):
    other = neck_row() | {"config": {"rank": 8}, "settings": "rank=8", "label": "srm [sdpa] (rank=8)"}
    append(folder / "neck.jsonl", other | {"parameters": 777_000})
    report(folder)
    page = (folder / "report.md").read_text()
    assert "| srm (rank=8) | 64 | 0.777 |" in page
    assert "| srm | 64 | 0.00100 |" in page
    assert page.count("| srm [sdpa] (rank=8) | 64 |") == 1


def test_what_a_reader_must_know_of_a_run_is_told_once(folder: Path):
    for keys in (512, 1024):
        append(folder / "crossover.jsonl", point_row("exact", keys, 1.0, note="The machine was busy."))
    report(folder)
    assert (folder / "report.md").read_text().count("The machine was busy.") == 1


def test_a_repeated_measurement_replaces_the_earlier_one(folder: Path):
    slower = neck_row()
    slower["milliseconds"]["p50"] = 77.7
    append(folder / "neck.jsonl", slower)
    report(folder)
    page = (folder / "report.md").read_text()
    assert page.count("| 77.7 |") == 1
    rows = [line for line in page.splitlines() if "srm [sdpa]" in line and "| 64 |" in line]
    assert len(rows) == 1


def test_compiled_kernels_are_listed_by_architecture(tmp_path: Path):
    for architecture, registers, spilled in ((86, 128, 0), (89, 255, 16), (90, 77, 0), (120, 64, 0)):
        row = {"family": "neck", "operator": "neck", "kernel": "forward_kernel", "launch": 0, "warps": 4}
        row |= {"architecture": architecture, "registers": registers, "spilled": spilled, "shared": 1024}
        append(tmp_path / "resources.jsonl", row | {"case": {"rank": 64}, "machine": MACHINE})
    report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    parts = page.split("### ")
    assert [part.splitlines()[0] for part in parts[1:]] == [
        "sm_86: RTX 3090",
        "sm_89: RTX 4090",
        "sm_120: RTX 5090",
    ]
    assert "| neck | forward_kernel | 86 | 4 | 128 | 0 | 1.0 | 4 | 33 | registers | rank=64 |" in parts[1]
    assert "1 of 1 kernels spill" in parts[2]
    assert "| 77 |" not in page
    append(tmp_path / "resources.jsonl", row | {"case": {}, "machine": {**MACHINE, "triton": "3.6.0"}})
    with pytest.raises(ValueError, match="cannot share a table: triton"):
        report(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"none of neck\.jsonl, growth\.jsonl, crossover\.jsonl, resources\.jsonl"
    ):
        report(tmp_path)


def test_markdown_escapes_its_own_marks():
    assert markdown(["a", "b"], [["1|2", "3"]]) == "| a | b |\n|---|---:|\n| 1\\|2 | 3 |\n"


LABELS = {"title": "t", "note": "n", "x_label": "x", "y_label": "y"}


def test_a_line_of_slope_two_is_drawn_parallel_to_its_guide():
    axes = plots.lines([plots.Line("a", [(2, 4), (1, 1), (4, 16)])], slopes=(2,), **LABELS).axes[0]
    line, guide = axes.lines
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert line.get_xydata().tolist() == [[1, 1], [2, 4], [4, 16]]
    (x0, y0), (x1, y1) = guide.get_xy1(), guide.get_xy2()
    assert y1 / y0 == (x1 / x0) ** 2


def test_series_and_bars_can_be_told_apart_in_grey():
    many = [plots.Line(f"series {i}", [(1, i + 1), (2, i + 2)]) for i in range(8)]
    drawn = plots.lines(many, **LABELS).axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == len(many)
    names = [f"stage {i}" for i in range(8)]
    bars = plots.stacked(
        [plots.Bar("one", dict.fromkeys(names, 1.0))], names, title="t", note="n", x_label="ms"
    )
    assert len({patch.get_hatch() for patch in bars.axes[0].patches}) == len(names)


def test_stacks_look_alike_in_every_picture_and_say_their_sum():
    names = ["backbone", "align", "gate"]
    whole, part = (
        plots.stacked([plots.Bar("one", parts)], names, title="t", note="n", x_label="ms").axes[0]
        for parts in (dict.fromkeys(names, 400 / 3), {"align": 2 / 3})
    )
    assert " 400" in [text.get_text() for text in whole.texts]
    assert " 0.667" in [text.get_text() for text in part.texts]
    assert [container.get_label() for container in part.containers] == ["align"]
    assert part.patches[0].get_facecolor() == whole.patches[1].get_facecolor()
    assert part.patches[0].get_hatch() == whole.patches[1].get_hatch()
    assert [patch.get_x() for patch in whole.patches] == pytest.approx([0, 400 / 3, 800 / 3])


def test_the_border_runs_between_wins_and_losses():
    figure = plots.surface(
        ["64", "256"],
        ["1", "2"],
        [[2.0, None], [0.5, 1.2]],
        title="t",
        note="n",
        row_label="r",
        column_label="c",
    )
    edges = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    # One of the three measured cells is a win. The border has an edge above it and an edge to its right.
    assert edges == [[[-0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 1.5]]]
    assert [text.get_text() for text in figure.axes[0].texts][1:] == ["2.0", "–", "0.50", "1.2"]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def test_what_was_measured_is_on_the_axis():
    figure = plots.lines([plots.Line("a", [(side, side**2) for side in (224, 256, 384, 512)])], **LABELS)
    assert {"224", "256", "384", "512"} <= set(texts(svg(figure)))


def test_lines_that_lie_on_each_other_are_one_with_both_names(tmp_path: Path):
    """Lines that coincide are drawn once. A line far below the others would stretch the axis, so it is not drawn."""
    for side in (64, 128):
        for neck, milliseconds in (("srm", 100), ("quadratic", 100.5), ("none", 1)):
            append(tmp_path / "neck.jsonl", neck_row(neck, side) | {"typical": milliseconds * side})
    report(tmp_path)
    names = texts((tmp_path / "time-neck-some-net-1-fp32-forward.svg").read_text())
    found = [name for name in names if name in ("srm [sdpa]", "quadratic", "none")]
    assert found == ["srm [sdpa]", "quadratic"]
    assert any(name.endswith("in the table alone: none") for name in names)


def test_stages_are_drawn_at_the_largest_resolution_alone(folder: Path):
    written = {path.name for path in report(folder)}
    assert {name for name in written if name.startswith("stages")} == {"stages-neck-some-net-128-1-fp32.svg"}


def test_stages_as_drawn_add_up_to_the_time_in_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[plots.Bar] = []
    stacked = plots.stacked
    monkeypatch.setattr(plots, "stacked", lambda bars, *a, **k: drawn.extend(bars) or stacked(bars, *a, **k))
    report(folder)
    assert drawn
    for bar in drawn:
        assert sum(bar.parts.values()) == pytest.approx(128 / 32)
        assert bar.parts["link 4→3"] == pytest.approx(2 * bar.parts["align"])


def test_a_roofline_joins_the_resolutions_of_a_neck():
    series = [plots.Line("a", [(1.0, 2e9), (2.0, 3e9)]), plots.Line("b", [(1.0, 1e9), (3.0, 4e9)])]
    roof, *drawn = plots.roofline(series, 1e10, 5e10, title="t", note="n").axes[0].lines
    assert [line.get_xydata().tolist() for line in drawn] == [[[1, 2], [2, 3]], [[1, 1], [3, 4]]]
    assert roof.get_xydata().tolist() == [[0.5, 5], [5, 50], [10, 50]]


BLOCK = "before\n<!-- rows: crossover -->\nold figures\n<!-- end -->\nafter\n"


def test_pages_are_filled_from_rows(folder: Path, capsys: pytest.CaptureFixture[str]):
    page = folder / "page.md"
    page.write_text(BLOCK)
    assert main([str(folder), "--pages", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- rows: crossover -->\n| N_k | Nyström, `sdpa` |")
    assert "| 16 | 4.1 to 4.1 (slower) |" in text
    assert "if N_k is below about 7" in text
    assert "old figures" not in text
    assert text.endswith("<!-- end -->\nafter\n")
    page.write_text(BLOCK.replace("crossover", "horoscope"))
    assert main([str(folder), "--pages", str(page)]) == 2
    assert "rows: horoscope: expected one of attention" in capsys.readouterr().err
    append(folder / "crossover.jsonl", point_row("exact", 512, 1.0, machine={**MACHINE, "commit": "another"}))
    with pytest.raises(ValueError, match="cannot share a table: commit"):
        pages.filled(BLOCK, folder)


@pytest.mark.parametrize("backend", ["torch", "sdpa"])  # in earlier rows, this backend is called `sdpa`
def test_a_step_is_told_as_a_share_of_the_quadratic_necks(backend: str, tmp_path: Path):
    for neck, milliseconds in (("srm", 15.0), ("quadratic", 20.0), ("none", 5.0)):
        row = neck_row(neck) | {"part": "model", "direction": "step", "typical": milliseconds}
        row["backend"] = backend if neck == "srm" else None
        append(tmp_path / "neck.jsonl", row)
    assert "| `some_net` | 64 | 1 | 20.0 | 0.750 | 0.250 |" in pages.step(tmp_path)
