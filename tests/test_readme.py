"""Test that README.md and docs/ list all operators, commands and tables, and that relative links of all pages work.

`test_pages.py` runs the code blocks.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import srm_kernels
from bench import pages
from srm_model.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
API = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs" / "RECIPES.md").read_text(encoding="utf-8")


def test_the_attack_recipe_is_ten_lines():
    examples = re.findall(r"```python\n(.*?)```", RECIPES, flags=re.DOTALL)
    (recipe,) = (example for example in examples if "Suite.extended" in example)
    lines = [line for line in recipe.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 10


def test_every_operator_is_listed():
    assert {name for name in srm_kernels.__all__ if f"`{name}`" not in API} == set()


def test_every_listed_name_exists():
    rows = re.findall(r"^\| `(srm_model[\w.]*)` \| (.*?) \|$", API, flags=re.MULTILINE)
    assert len(rows) >= 5
    for module, names in rows:
        found = __import__(module, fromlist=["*"])
        assert [name for name in re.findall(r"`(\w+)`", names) if not hasattr(found, name)] == []


def test_every_command_is_listed_as_it_is(capsys):
    main(["--help"])
    commands = re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert "demo" in commands
    assert [name for name in commands if f"srm-iqa {name}" not in README and f"`{name}`" not in README] == []


MEASURED = ("docs/BENCHMARKS.md", "docs/DATASETS.md", "docs/TRAINING.md")


@pytest.mark.parametrize("page", MEASURED)
def test_measured_figures_are_those_of_the_rows(page: str):
    """Check that the tables of a page match the stored results.

    To update the tables, run
    `python -m bench.report bench/results/cpu --pages docs/BENCHMARKS.md docs/DATASETS.md docs/TRAINING.md`.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- rows: " in text
    assert pages.filled(text, ROOT / "bench/results/cpu") == text


def test_every_measured_table_is_reported():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in MEASURED)
    assert [name for name in pages.BLOCKS if f"<!-- rows: {name} -->" not in text] == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160


FOLDERS = ("bench", "csrc", "docs", "experiments", "srm_kernels", "srm_model", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link
