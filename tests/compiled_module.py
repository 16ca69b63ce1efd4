"""Run tests of compiled Triton kernels in the same session as tests that use Triton's interpreter.

When Triton is imported, it decides for the whole process whether kernels are interpreted or compiled. Without a GPU,
most tests need the interpreter, but the tests in `FOLDERS` need the compiler. If pytest is given only paths in
`FOLDERS`, it runs these tests directly, without the interpreter. Otherwise each file in `FOLDERS` becomes one test,
which runs the file in a new pytest process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
FOLDERS = (TESTS / "compiled", TESTS / "bench" / "ptx")


def is_compiled(path: Path) -> bool:
    """Return whether a file or folder is in one of `FOLDERS`."""
    return any(path.is_relative_to(folder) for folder in FOLDERS)


def only_compiled(config: pytest.Config) -> bool:
    """Return whether pytest is given only paths in `FOLDERS`."""
    here = config.invocation_params.dir
    return bool(config.args) and all(is_compiled((here / a.split("::")[0]).resolve()) for a in config.args)


class CompiledModule(pytest.Module):
    """A test file that is collected as one test, which runs in another process."""

    def collect(self) -> Iterator[pytest.Item]:
        yield CompiledTests.from_parent(self, name="in_a_process_that_compiles")


class CompiledTests(pytest.Item):
    """One test that runs all tests of a file in a pytest process without TRITON_INTERPRET."""

    def runtest(self) -> None:
        hidden = ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
        env = {
            key: value
            for key, value in os.environ.items()
            if key not in hidden and not key.startswith("PYTEST_XDIST")
        }
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(self.path)],
            capture_output=True,
            text=True,
            env=env,
            cwd=self.config.rootpath,
            check=False,
        )
        if done.returncode:
            raise CompiledTestsFailedError(done.stdout[-20_000:] + done.stderr[-5_000:])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        if isinstance(excinfo.value, CompiledTestsFailedError):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"compiled: {self.path.name}"


class CompiledTestsFailedError(Exception):
    """Tests that ran in a new pytest process failed. The message is the end of that process's output."""
