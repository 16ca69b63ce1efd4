"""The bootstrap against its definition, and the charts against their data."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy.stats import spearmanr

from srm_model.reports import bootstrap
from srm_model.reports.charts import Series, line_chart, scatter, ticks
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


def test_scatter_shows_every_point_inside_or_on_an_edge():
    x, y = np.array([-5, 0.1, 0.5, 0.9, 7, np.nan]), np.linspace(0, 1, 6)
    chart = scatter(
        x, y, look=0, title="t", note="n", alt="a", x_limits=(0, 1), y_limits=(0, 1), x_label="x", y_label="y"
    )
    assert re.search(r'class="dots s0" d="([^"]*)"', chart)[1].count("M") == 3
    arrows = re.search(r'class="beyond s0" d="([^"]*)"', chart)[1]
    assert arrows.count("M") == 2
    assert "l-7 -4z" in arrows
    assert "l7 -4z" in arrows


def test_lines_break_where_a_value_is_missing():
    chart = line_chart(
        [Series("a", [1, 2, 3, 4, 5], [0.1, 0.2, math.nan, 0.4, 0.5], 0)], title="t", x_label="x", y_label="y"
    )
    path = re.search(r'class="line s0" d="([^"]*)"', chart)[1]
    assert (path.count("M"), path.count("L")) == (2, 2)
    assert chart.count('class="mark s0"') == 4


def test_higher_values_are_drawn_higher():
    chart = line_chart(
        [Series("a", [1, 2], [0.0, 1.0], 0)], title="t", x_label="x", y_label="y", y_limits=(0, 1)
    )
    (x1, y1), (x2, y2) = re.findall(
        r"[ML]([\d.]+) ([\d.]+)", re.search(r'class="line s0" d="([^"]*)"', chart)[1]
    )
    assert float(x1) < float(x2)
    assert float(y1) > float(y2)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.4, 1), (0, 0.0031), (-70, 12000), (2.5, 2.6)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    step = found[1] - found[0]
    assert float(f"{step:.2g}") == pytest.approx(step)


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
