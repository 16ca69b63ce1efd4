"""Test that each code block of a page runs as written, in its own process. Blocks tagged `slow` are only parsed."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from srm_model.cli.parser import make_parser
from srm_model.study.file import read_study

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "csrc", "docs", "experiments", "srm_kernels", "srm_model", "tests")
PAGES = [
    str(path.relative_to(ROOT))
    for path in sorted(
        [*ROOT.glob("*.md"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.md"))]
    )
]
LANGUAGES = {"python", "sh", "toml", "text"}  # `text` is the output of a command, or a diagram
# Number of blocks tagged `slow`. They install packages, run the test suite, or train or measure for minutes. All other
# blocks run.
SLOW = {
    "README.md": 2,
    "docs/DATASETS.md": 1,
    "docs/GUIDE.md": 1,
    "CONTRIBUTING.md": 1,
    "experiments/README.md": 3,
    "experiments/other-models/README.md": 1,
    "experiments/robustness/README.md": 1,
    "docs/RECIPES.md": 6,
    "docs/TRAINING.md": 3,
    "docs/OTHER_MODELS.md": 2,
    "docs/VERIFY.md": 1,
}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    slow: bool
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^( *)(`{3,}|~{3,})[ ]*(.*)\n([\s\S]*?)^\1\2[ ]*$", text, flags=re.MULTILINE)
    blocks = []
    for match in found:
        language, _, tags = match[3].strip().partition(" ")
        line = text[: match.start()].count("\n") + 1
        blocks.append(Block(page, line, language, "slow" in tags.split(), match[4]))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
RUNNING = [block for block in BLOCKS if block.language in ("python", "sh") and not block.slow]


def test_every_block_is_known_and_what_is_slow_is_counted():
    assert {block.place: block.language for block in BLOCKS if block.language not in LANGUAGES} == {}
    assert Counter(block.page for block in BLOCKS if block.slow) == SLOW
    assert {block.language for block in BLOCKS if block.slow} == {"sh", "python"}
    assert len([block for block in RUNNING if block.language == "python"]) >= 9


@pytest.mark.parametrize("block", RUNNING, ids=lambda block: block.place)
def test_a_block_runs_as_written(block: Block, tmp_path: Path):
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = given | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    # Pages of bench/ need a checkout, because the folder `bench` is not installed.
    folder = ROOT if block.page.startswith("bench/") and block.language == "python" else tmp_path
    command = [sys.executable, "-"] if block.language == "python" else ["bash", "-eu"]
    done = subprocess.run(
        command, input=block.text, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def commands_of(block: Block) -> list[list[str]]:
    """Return the words of each command without output redirection. Each command of a pipe is a separate entry."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        for _, words in itertools.groupby(shlex.split(line, comments=True), lambda word: word == "|"):
            commands.append(list(itertools.takewhile(lambda word: word != ">", words)))
    return [words[words[0] == "parallel" :] for words in commands if words != ["|"]]


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.slow and b.language == "python"], ids=lambda b: b.place
)
def test_a_slow_python_block_is_valid_python(block: Block):
    compile(block.text, block.place, "exec")


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_of_a_shell_block_exist_and_take_these_options(block: Block):
    targets = set(
        re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[0].split()
    )
    for words in commands_of(block):
        if "srm_model" in words:  # torchrun [options] -m srm_model
            words = ["srm-iqa", *words[words.index("srm_model") + 1 :]]
        if words[0] == "srm-iqa":
            make_parser().parse_args(words[1:])
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets
        elif words[:2] == ["bash", ".ci/run"]:
            assert (ROOT / ".ci/run").is_file()
        elif "-m" in words:
            assert find_spec(words[words.index("-m") + 1]) is not None
        else:
            assert words[0] in (".", "pip", "cd", "git", "find", "grep")


def test_studies_are_studies(tmp_path: Path):
    studies = [block for block in BLOCKS if block.language == "toml"]
    assert studies
    for number, block in enumerate(studies):
        path = tmp_path / f"{number}.toml"
        path.write_text(block.text, encoding="utf-8")
        assert read_study(path).title
