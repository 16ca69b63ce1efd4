"""Tests of the bootstrap against its definition, and of the charts against their data."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy.stats import spearmanr

from srm_model.metrics import plcc
from srm_model.reports import bootstrap, drawing
from srm_model.reports.charts import Fall, Series, fall_chart, line_chart, scatter
from srm_model.reports.markup import Markup, element, join
from srm_model.reports.pictures import SIDE, data_uri


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    mos = rng.uniform(size=40).round(1)  # ties
    return mos, [mos + rng.normal(0, spread, 40) for spread in (0.1, 0.4)]


def test_bootstrap_is_srocc_of_shared_resamples(scored):
    mos, scores = scored
    found = bootstrap.resampled_srocc(mos, scores)
    draws = np.random.default_rng(bootstrap.SEED).integers(40, size=(40, bootstrap.REPLICATES)).T
    for i in (0, 7, 1999):
        for values, replicates in zip(scores, found, strict=True):
            expected = spearmanr(values[draws[i]], mos[draws[i]]).statistic
            assert replicates[i] == pytest.approx(expected, abs=1e-12)


def test_bootstrap_of_plcc_has_the_same_resamples(scored):
    mos, scores = scored
    found = bootstrap.resampled_plcc(mos, scores)
    draws = np.random.default_rng(bootstrap.SEED).integers(40, size=(40, bootstrap.REPLICATES)).T
    for i in (0, 7, 1999):
        for values, replicates in zip(scores, found, strict=True):
            assert replicates[i] == pytest.approx(plcc(values[draws[i]], mos[draws[i]]), abs=1e-12)
    assert np.isnan(bootstrap.resampled_plcc(mos, [np.full(40, 0.1)])).all()


def test_bootstrap_leaves_the_global_generator_alone(scored):
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (bootstrap.resampled_srocc(*scored) for _ in range(2))
    assert np.array_equal(np.random.get_state()[1], expected)  # noqa: NPY002
    assert np.array_equal(first, second)


def test_interval_covers_the_middle_95_percent():
    low, high = bootstrap.interval(np.arange(2001.0))
    assert (low, high) == (50, 1950)


def test_interval_of_undefined_replicates_is_none():
    assert bootstrap.interval(np.full(2000, np.nan)) is None
    mos, constant = np.arange(5.0), np.zeros(5)
    assert bootstrap.interval(bootstrap.resampled_srocc(mos, [constant])[0]) is None


@pytest.fixture
def drawn(monkeypatch):
    """Collect the axes of the charts that a test draws."""
    found = []
    inline = drawing.inline
    monkeypatch.setattr(
        drawing, "inline", lambda figure, *a: found.append(figure.axes[0]) or inline(figure, *a)
    )
    return found


def test_scatter_shows_every_point_inside_or_on_an_edge(drawn):
    x, y = np.array([-5, 0.1, 0.5, 0.9, 7, np.nan]), np.linspace(0, 1, 6)
    scatter(
        x, y, look=0, title="t", note="n", alt="a", x_limits=(0, 1), y_limits=(0, 1), x_label="x", y_label="y"
    )
    dots, left, right = (line.get_xydata() for line in drawn[0].lines)
    np.testing.assert_allclose(dots[::3], np.column_stack([x, y])[1:4])
    np.testing.assert_array_equal(dots[::3], dots[1::3])
    assert (left.tolist(), right.tolist()) == ([[0, y[0]]], [[1, y[4]]])


def test_lines_break_where_a_value_is_missing(drawn):
    chart = line_chart(
        [Series("a", [1, 2, 3, 4, 5], [0.1, 0.2, math.nan, 0.4, math.inf], 0)],
        title="t",
        x_label="x",
        y_label="y",
    )
    np.testing.assert_array_equal(drawn[0].lines[0].get_ydata(), [0.1, 0.2, np.nan, 0.4, np.nan])
    assert drawn[0].get_ylim()[0] == 0
    assert 'aria-label="t. a: first 0.1, last 0.4"' in chart


def test_a_fall_has_its_values_and_intervals(drawn):
    fall = Fall("srm", 0.8, -0.3, (0.7, 0.9), None, 0)
    chart = fall_chart([("L2 1", [fall])], title="t", note="n", x_label="SROCC")
    xs = [line.get_xdata() for line in drawn[0].lines]
    assert [list(x) for x in xs[:4]] == [[0.8, -0.3], [0.7, 0.9], [0.8], [-0.3]]
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == ["L2 1", "srm"]
    assert "L2 1, srm: clean 0.80, attacked -0.30." in chart


def test_a_chart_takes_the_pages_colours_and_leaves_no_ids_of_its_own():
    chart = line_chart([Series("a", [1, 2], [0, 1], 2)], title="t", x_label="x", y_label="y")
    assert set(re.findall(r"var\((--\w+)\)", chart)) == {"--s2", "--soft", "--grid"}
    colours = set(re.findall(r"#[0-9a-f]{6}", re.sub(r'(id|href)="[^"]*"|url\([^)]*\)', "", chart)))
    assert not colours
    assert "figure_1" not in chart


def test_markup_escapes_text_and_keeps_markup():
    made = element("p", "a<b", element("b", "&"), ["x", None, 3], class_="c", hidden=None, title='"')
    assert made == '<p class="c" title="&quot;">a&lt;b<b>&amp;</b>x3</p>'
    assert join(Markup("<i>"), "<i>") == "<i>&lt;i&gt;"


def test_large_pictures_are_reduced(tmp_path):
    import base64
    import io

    from PIL import Image

    Image.new("L", (3 * SIDE, SIDE), 90).save(tmp_path / "a.png")
    shown = Image.open(io.BytesIO(base64.b64decode(data_uri(tmp_path / "a.png").partition(",")[2])))
    assert (shown.mode, shown.size) == ("RGB", (SIDE, SIDE // 3))
