"""The README's Python and the recipes run, and the tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import srm_kernels
from srm_model.cli import main
from srm_model.cli.study import read_study
from srm_model.profiling.results import one_machine, read
from srm_model.profiling.tables import MEBI, number, shares_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs" / "RECIPES.md").read_text(encoding="utf-8")
WIDEST = ["512", "1", "fp32", "forward", "srm [sdpa]"]
EXAMPLES = re.findall(r"```python\n(.*?)```", README + RECIPES, flags=re.DOTALL)


def test_readme_has_examples():
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example):
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})


def test_the_attack_recipe_is_ten_lines():
    (recipe,) = (example for example in EXAMPLES if "Suite.extended" in example)
    lines = [line for line in recipe.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 10


def test_the_study_of_the_recipe_is_one(tmp_path):
    (study,) = re.findall(r"```toml\n(.*?)```", RECIPES, flags=re.DOTALL)
    path = tmp_path / "study.toml"
    path.write_text(study, encoding="utf-8")
    assert read_study(path).title == "PVT on TID2013"


def test_every_operator_is_listed():
    assert {name for name in srm_kernels.__all__ if f"`{name}`" not in README} == set()


def test_every_listed_name_exists():
    rows = re.findall(r"^\| `(srm_model[\w.]*)` \| (.*?) \|$", README, flags=re.MULTILINE)
    assert len(rows) >= 5
    for module, names in rows:
        found = __import__(module, fromlist=["*"])
        assert [name for name in re.findall(r"`(\w+)`", names) if not hasattr(found, name)] == []


def test_every_command_is_listed_as_it_is(capsys):
    main(["--help"])
    commands = re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert "demo" in commands
    assert [name for name in commands if f"srm-iqa {name}" not in README and f"`{name}`" not in README] == []


def test_what_a_neck_costs_is_what_was_committed():
    rows = read(ROOT / "bench/results/cpu/neck.jsonl")
    one_machine(rows)
    _, shares = shares_table(rows)
    told = [line[0:1] + line[6:8] + line[8:] for line in shares if line[1:6] == WIDEST]
    assert len(told) == 4
    for backbone, *figures in told:
        assert f"| `{backbone}` | {' | '.join(figures)} |" in README
    for row in rows:
        if (row["backbone"], row["resolution"], row["direction"], row["part"]) == (
            "pvt_v2_b2",
            512,
            "forward",
            "neck",
        ):
            million, giga = row["parameters"] / 1e6, row["macs"]["formula"] / 1e9
            assert f"| `{row['neck']}` | {million:.2f} M | {number(giga, 2 if giga < 1 else 3)} |" in README
            if row["label"] in ("srm [sdpa]", "quadratic"):
                assert f"above the inputs was {row['memory']['above'] / MEBI:.0f} MiB" in README
