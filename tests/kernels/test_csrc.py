"""Tests of how setup.py builds csrc.

The library loads, a missing compiler is reported in one line, and a rebuild replaces the file. test_cpu_core.py and
test_tiled_links.py test what the library computes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

LOADING = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x, served = torch.ones(1, 3, 2), torch.zeros(1, dtype=torch.bool)
torch.ops.srm_cpu.symmetric_solve(torch.zeros(1, 3, 3), x, served, 0.5)
assert served and torch.allclose(x, torch.tensor(1 / (1 + 0.5 / 3)))
"""


def test_the_library_builds_and_this_torch_loads_it(build, tmp_path):
    """A new process loads the library and calls its operator."""
    if shutil.which(build.CXX) is None or build.torch_folder() is None:
        pytest.skip("no C++ compiler, or no headers of torch")
    library = tmp_path / "library.so"
    build.build_library(library, build.torch_folder())
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "path", "reason"),
    [
        ({"SRM_BUILD_EXT": "0"}, None, "SRM_BUILD_EXT=0"),
        ({}, "/nowhere", "on PATH"),
        ({"SRM_BUILD_EXT": "1"}, "/nowhere", "on PATH"),
    ],
)
def test_an_install_without_a_compiler_says_so_in_one_line(
    build, monkeypatch, capsys, environment, path, reason
):
    monkeypatch.delenv("SRM_BUILD_EXT", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    if environment.get("SRM_BUILD_EXT") == "1":
        with pytest.raises(SystemExit, match=reason):
            build.extensions()
        return
    assert build.extensions() == []
    told = capsys.readouterr().err
    assert reason in told
    assert "the C++ library is not built" in told
    assert told.count("\n") == 1


def test_a_library_that_is_built_again_leaves_the_loaded_one_as_it_was(build, monkeypatch, tmp_path):
    """A rebuild replaces the file and does not overwrite it, because a process that loaded it still reads from it."""
    from setuptools import Distribution, Extension

    target = tmp_path / "srm_kernels" / "_cpu.so"
    built = tmp_path / "build" / "srm_kernels" / "_cpu.so"
    for path, content in ((target, b"old"), (built, b"new")):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    command = build.BuildLibrary(Distribution())
    command.build_lib, command.extensions = str(tmp_path / "build"), [Extension("srm_kernels._cpu", [])]
    with target.open("rb") as loaded:
        command.copy_extensions_to_source()
        assert loaded.read() == b"old"
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]
