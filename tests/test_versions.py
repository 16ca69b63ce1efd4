"""Test the pins of `make test-versions`, the files of `make test-portable`, and the version in CITATION.cff."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"torch", "triton", "numpy", "torchvision"}  # packages whose versions differ between environments
FILES = {"oldest": "constraints/oldest.txt", "tested": "constraints.txt", "newest": "constraints/newest.txt"}


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), flags=re.MULTILINE))


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@pytest.mark.parametrize("file", FILES.values())
def test_an_environment_pins_what_is_its_own_and_takes_the_rest_from_one_file(file: str):
    assert pins(file).keys() == OWN
    (included,) = re.findall(r"^--constraint (.*)$", (ROOT / file).read_text(), flags=re.MULTILINE)
    assert (ROOT / file).parent / included == ROOT / "constraints/common.txt"
    assert not OWN & pins("constraints/common.txt").keys()


def test_the_oldest_is_the_oldest_that_the_package_accepts():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["triton"]]
    least = dict(entry.split(">=") for entry in wanted)
    for name in ("torch", "triton"):
        versions = [number(pins(file)[name]) for file in FILES.values()]
        assert versions == sorted(set(versions))
        assert versions[0][:2] == number(least[name])


def test_the_citation_has_the_version_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert cited == [project["version"]]
    assert version(project["name"]) == project["version"]


def test_the_portable_files_are_there():
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (files,) = re.findall(r"^PORTABLE := (.*)$", text, flags=re.MULTILINE)
    for place in files.split():
        file, _, name = place.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()
    assert "make test-portable" in (ROOT / ".ci/run").read_text()
