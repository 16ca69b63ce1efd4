"""The README's Python runs, and its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import srm_kernels
from srm_model.cli import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_has_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example):
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})


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
