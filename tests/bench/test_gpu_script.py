"""Test `bench/gpu.sh` with scripts that replace its tools.

Each part of the script, `a` and `b`, runs its steps one at a time and in order. A failed step or a missing sanitizer
does not end a part. After Ctrl-C, the output of finished and interrupted steps is kept.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="coreutils' timeout is not here")


def started(
    tmp_path: Path, part: str, python: str = "true", sanitizer: str | None = "true"
) -> subprocess.Popen[bytes]:
    """Start a part of the script. Results go to the folder `out`.

    Two scripts replace python3 and compute-sanitizer. They run the shell code in `python` and `sanitizer`; without
    `sanitizer`, compute-sanitizer is missing. Each call of the script for python3 appends its arguments to the file
    `started` when the call starts, and to the file `ended` when the call ends.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    bodies = {
        "nvidia-smi": 'echo "A  Card (80GB)"',
        "python3": f'echo "$@" >> {tmp_path}/started; echo "$@"; {python}\necho "$@" >> {tmp_path}/ended',
    }
    if sanitizer is not None:
        bodies["compute-sanitizer"] = f'echo "$@"; {sanitizer}'
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:/usr/bin:/bin", "PYTHON": str(tools / "python3")}
    # A test runner in the background ignores SIGINT, and its child processes inherit this. Restore the default.
    return subprocess.Popen(
        ["bash", str(ROOT / "bench/gpu.sh"), part, str(tmp_path / "out")],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def commands(tmp_path: Path) -> list[str]:
    """Return the commands that were started, without the `python3 -c` calls of the script itself."""
    lines = (tmp_path / "started").read_text().splitlines()
    return [line for line in lines if not line.startswith("-c ")]


def test_part_a_runs_every_kernel_and_then_the_tests_alone(tmp_path: Path):
    """The most important test files run first, then all others, each file once. Earlier output of part a is removed."""
    out = tmp_path / "out/a-card-80gb"
    out.mkdir(parents=True)
    (out / "tests.txt").write_text("of an earlier run")
    (out / "attention.txt").write_text("of part b")
    assert started(tmp_path, "a").wait(60) == 0
    verify, small, telling, rest = commands(tmp_path)
    assert verify == f"-m srm_kernels verify --quick --export {out}/verify.jsonl"
    assert small == "-m bench.small_run"
    assert all("-m pytest -m gpu -v --tb=short" in line for line in (telling, rest))
    files = [word for word in telling.split() if word.startswith("tests/")]
    assert files[0] == "tests/kernels/test_triton_on_cuda.py"
    assert all((ROOT / file).exists() for file in files)
    assert {word for word in rest.split() if "tests" in word} == {"tests", *(f"--ignore={f}" for f in files)}
    assert "earlier" not in (out / "tests.txt").read_text()
    assert telling in (out / "tests.txt").read_text()
    assert (out / "attention.txt").read_text() == "of part b"


def test_part_b_runs_benchmarks_one_at_a_time_the_most_wanted_first(tmp_path: Path):
    assert started(tmp_path, "b").wait(60) == 0
    found = commands(tmp_path)
    assert [line.split()[1] for line in found[:8]] == [
        "bench.attention", "bench.attention", *["bench.fused_neck"] * 4, "bench.conditioning", "bench.training",
    ]  # fmt: skip
    assert all("--shapes 16384 256 16384 1024" in line for line in found[:2])
    assert [line.endswith("--backward") for line in found[:2]] == [False, True]
    assert all("--backbones pvt_v2_b2" in line for line in found[2:6])
    assert {("--no-dyt" in line, "both" in line) for line in found[2:6]} == {
        (dyt, both) for dyt in (False, True) for both in (False, True)
    }
    assert len(found) == len(set(found))
    for module in ("bench.neck", "bench.growth", "bench.attacks"):
        assert any(module in line for line in found)
    ended = [line for line in (tmp_path / "ended").read_text().splitlines() if not line.startswith("-c ")]
    assert ended == found  # each command ended before the next one started
    out = tmp_path / "out/a-card-80gb"
    for tool in ("memcheck", "racecheck"):
        assert f"--tool {tool}" in (out / f"sanitizer-{tool}.txt").read_text()


@pytest.mark.parametrize("part", ["a", "b"])
def test_machine_and_commit_are_beside_the_results(tmp_path: Path, part: str):
    assert started(tmp_path, part).wait(60) == 0
    told = (tmp_path / "out/a-card-80gb/machine.txt").read_text()
    assert "A  Card (80GB)" in told
    assert "torch.__version__" in told
    assert "commit " in told


def test_a_missing_sanitizer_is_a_line_and_no_failure(tmp_path: Path):
    if shutil.which("compute-sanitizer", path="/usr/bin:/bin"):
        pytest.skip("compute-sanitizer is installed here")
    assert started(tmp_path, "b", sanitizer=None).wait(60) == 0
    told = (tmp_path / "out/a-card-80gb/sanitizer-memcheck.txt").read_text()
    assert told == "compute-sanitizer is not installed: memcheck was not run\n"


@pytest.mark.parametrize("there", [True, False])
def test_tests_run_in_several_processes_where_pytest_can(tmp_path: Path, there: bool):
    without = 'case "$*" in *xdist*) exit 1;; esac'
    assert started(tmp_path, "a", "true" if there else without).wait(60) == 0
    assert [" -n " in line for line in commands(tmp_path) if " -m gpu" in line] == [there, there]


@pytest.mark.parametrize(
    ("part", "what", "last"),
    [("a", "small_run", "--ignore="), ("a", "-m gpu", "--ignore="), ("b", "growth", "--compile")],
)
def test_a_failed_step_fails_the_part_and_the_rest_goes_on(tmp_path: Path, part: str, what: str, last: str):
    assert started(tmp_path, part, f'case "$*" in *"{what}"*) exit 3;; esac').wait(60) == 1
    assert last in commands(tmp_path)[-1]
    told = "".join(file.read_text() for file in (tmp_path / "out/a-card-80gb").glob("*.txt"))
    assert "ended with 3: " in told


def test_a_sanitizer_that_finds_something_fails_the_part(tmp_path: Path):
    assert started(tmp_path, "b", sanitizer="exit 1").wait(60) == 1


def test_another_part_is_refused(tmp_path: Path):
    script = started(tmp_path, "c")
    _, told = script.communicate(timeout=30)
    assert script.returncode == 2
    assert b"part is 'c'; expected 'a' (tests) or 'b' (benchmarks)" in told


@pytest.mark.parametrize(
    ("part", "step", "later"), [("a", "-m gpu", "--ignore="), ("b", "bench.conditioning", "bench.training")]
)
def test_ctrl_c_ends_the_step_and_keeps_what_was_written(tmp_path: Path, part: str, step: str, later: str):
    pid = tmp_path / "pid"
    # The script must send SIGINT: benchmarks then write what they have measured. SIGTERM ends Python at once.
    ending = f"echo kept > {tmp_path}/kept; kill \\$!; exit 1"
    sleeping = (
        f'case "$*" in *"{step}"*) echo a line; trap "{ending}" INT; echo $$ > {pid}; sleep 60 & wait;; esac'
    )
    script = started(tmp_path, part, sleeping)
    end = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(30) == 130
    assert later not in commands(tmp_path)[-1]
    name = "tests" if part == "a" else "conditioning"
    assert "a line" in (tmp_path / f"out/a-card-80gb/{name}.txt").read_text()
    assert (tmp_path / "kept").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
