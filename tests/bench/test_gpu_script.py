"""`bench/gpu.sh` against stand-ins for the tools: every step runs, first side by side and briefly, then alone and in
full, and Ctrl-C ends it and keeps what was written."""

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


def started(tmp_path: Path, python: str, sanitizer: str = "true") -> subprocess.Popen[bytes]:
    """The script with a `python3` of these shell commands; its results go to `out`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in (
        ("nvidia-smi", "echo A Card"),
        ("compute-sanitizer", f'echo "$@"; {sanitizer}'),
        ("python3", f'echo "$@"; {python}'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python3")}
    # A test runner started in the background ignores SIGINT, and what it starts would too.
    return subprocess.Popen(
        ["bash", str(ROOT / "bench/gpu.sh"), str(tmp_path / "out")],
        env=env,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_every_step_writes_its_file(tmp_path: Path):
    """Anew: what an earlier run printed is gone."""
    out = tmp_path / "out/a-card"
    out.mkdir(parents=True)
    for name in ("tests", "sanitizer-memcheck", "sanitizer-racecheck", "attention", "training"):
        (out / f"{name}.txt").write_text("of an earlier run")
    assert started(tmp_path, "true").wait(60) == 0
    assert not [file for file in out.glob("*.txt") if "earlier" in file.read_text()]
    for name, command in {
        "tests": "-m pytest -m gpu tests",
        "operators": "-m pytest bench --benchmark-only",
        "neck": "-m bench.neck --device cuda --article",
        "growth": "-m bench.growth",
        "attention": "-m bench.attention --device cuda --dtype bfloat16 --seconds 1 --out ",
        "attacks": "--necks srm quadratic none --backends triton reference",
        "sanitizer-memcheck": "--tool memcheck",
        "sanitizer-racecheck": "--tool racecheck",
    }.items():
        assert command in (out / f"{name}.txt").read_text()


@pytest.mark.parametrize("there", [True, False])
def test_tests_run_side_by_side_where_pytest_can(tmp_path: Path, there: bool):
    without = 'case "$*" in *xdist*) exit 1;; esac'
    assert started(tmp_path, "true" if there else without).wait(60) == 0
    told = (tmp_path / "out/a-card/tests.txt").read_text().splitlines()[1]
    assert told.startswith("-m pytest -m gpu tests -n " if there else "-m pytest -m gpu tests -rf")


def test_every_benchmark_is_rehearsed_where_its_results_do_not_count(tmp_path: Path):
    """The same commands with options that make them brief, and that send results to a folder that is gone after."""
    assert started(tmp_path, "true").wait(60) == 0
    out = tmp_path / "out/a-card"
    counted = [
        line
        for file in out.glob("*.txt")
        if file.stem not in ("machine", "tests") and "sanitizer" not in file.stem
        for line in file.read_text().splitlines()[1::2]
    ]
    assert len(counted) > 20
    rehearsed = []
    for file in (out / "rehearsal").iterdir():
        line = file.read_text().splitlines()[1]
        rehearsed.append(max((full for full in counted if line.startswith(f"{full} --")), key=len))
        folder = Path(line.split()[-1])
        assert not folder.is_relative_to(tmp_path)
        assert not folder.exists()
    assert sorted(rehearsed) == sorted(counted)


@pytest.mark.parametrize(("what", "code"), [("-m gpu", 3), ("growth", 3), ("small_run", 1)])
def test_a_failed_step_fails_the_whole_and_the_rest_goes_on(tmp_path: Path, what: str, code: int):
    failing = f'case "$*" in *"{what}"*) exit 3;; esac'
    assert started(tmp_path, failing, sanitizer=failing).wait(60) == code
    assert "--compile" in (tmp_path / "out/a-card/attention.txt").read_text()


@pytest.mark.parametrize("command", ["*conditioning*--repeats*", "*a-card/conditioning.jsonl"])
def test_ctrl_c_ends_the_step_and_keeps_what_was_written(tmp_path: Path, command: str):
    """In the rehearsal, and in the step that counts, whose command ends with the file of its results."""
    pid = tmp_path / "pid"
    # Python ends at TERM without a word; at INT, benchmarks write what they have.
    ending = f"echo kept > {tmp_path}/kept; kill \\$!; exit 1"
    sleeping = f'case "$*" in {command}) trap "{ending}" INT; echo $$ > {pid}; sleep 60 & wait;; esac'
    script = started(tmp_path, sleeping)
    end = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(30) == 130
    assert "-m pytest -m gpu tests" in (tmp_path / "out/a-card/tests.txt").read_text()
    assert not (tmp_path / "out/a-card/growth.txt").exists()
    assert (tmp_path / "kept").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
