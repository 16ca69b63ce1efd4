from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from srm_model.reports import write_audit


def document(**changes: Any) -> dict[str, Any]:
    def check(name: str, passed: bool | None, **data: Any) -> dict[str, Any]:
        return {
            "name": name,
            "title": f"Title of {name}",
            "passed": passed,
            "figure": f"figure <of> {name}",
            "meaning": f"Meaning of {name}.",
            "data": data,
        }

    return {
        "model": "Net",
        "norm": "linf",
        "eps": 4 / 255,
        "radius": 4 / 255,
        "images": 12,
        "steps": 10,
        "restarts": 3,
        "queries": 1500,
        "seed": 0,
        "checks": [
            check("steps", True, x=[0, 1, 2], y=[0.0, 0.2, None]),
            check("eps", False, x=[0.5, 1.0], y=[0.1, 0.1]),
            check("transfer", None),
        ],
        **changes,
    }


def page(tmp_path: Path, **changes: Any) -> str:
    path = write_audit(document(**changes), tmp_path / "audit.html")
    return path.read_text(encoding="utf-8")


def test_the_page_has_every_check_its_verdict_and_what_failing_means(tmp_path: Path):
    text = page(tmp_path, title="Audit <of> srm", dataset="TID2013, test split")
    assert "Audit &lt;of&gt; srm" in text
    for name, verdict in (("steps", "passed"), ("eps", "failed"), ("transfer", "not run")):
        cells = re.search(rf"Title of {name}</th>(.*?)</tr>", text)
        assert cells is not None
        assert f">{verdict}<" in cells[1]
        assert f"figure &lt;of&gt; {name}" in cells[1]
        assert f"Meaning of {name}." in cells[1]
    assert "1 check failed." in text
    assert "Not true of this model: title of eps." in text
    assert "L∞ ε = 4/255" in text
    assert text.count("<svg") == 2
    assert "http://" not in text
    assert "<script" not in text


def test_a_pass_says_what_was_left_open(tmp_path: Path):
    checks = document()["checks"]
    checks[1]["passed"] = True
    text = page(tmp_path, checks=checks)
    assert "No check failed." in text
    assert "All 2 checks that could be run passed" in text
    assert "Not run: title of transfer." in text
    assert "Bounds by median smoothing" not in text


@pytest.mark.parametrize("failed", [False, True])
def test_a_model_without_gradient_gets_a_headline_of_its_own(tmp_path: Path, failed: bool):
    checks = document()["checks"]
    checks[1]["passed"] = not failed
    text = page(tmp_path, checks=checks, has_gradient=False)
    assert "<strong>The scores have no gradient.</strong> This is not evidence of robustness" in text
    assert "Not run: title of transfer." in text
    assert ("Not true of this model: title of eps." in text) is failed
    assert ("The other 2 checks passed." in text) is not failed
    assert "No check failed" not in text


def test_certificates(tmp_path: Path):
    entry = {
        "stated": 0.3,
        "eps": 0.15,
        "sigma": 0.25,
        "samples": 1000,
        "confidence": 0.999,
        "median": [0.5, 0.6, 0.7],
        "lower": [0.4, None, 0.5],
        "upper": [0.6, 0.7, 0.9],
        "ordered": 1 / 3,
    }
    text = page(tmp_path, certificates=[entry])
    row = re.search(r"L2 ε = 0.3 at 512²(.*?)</tr>", text)
    assert row is not None
    assert re.findall(r'<td class="n">(.*?)</td>', row[1]) == ["2 of 3", "0.400", "33 %"]
    assert "a different and slower model" in text


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_curve_where_nothing_was_measured(tmp_path: Path, norm: str):
    checks = [{**check, "data": {}} for check in document()["checks"]]
    assert "there are no curves" in page(tmp_path, checks=checks, norm=norm)
