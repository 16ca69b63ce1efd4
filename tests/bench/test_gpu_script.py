"""`bench/gpu.sh` against stand-ins for the tools: every step runs, and Ctrl-C ends it and keeps what was written."""

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


def started(tmp_path: Path, python: str) -> subprocess.Popen[bytes]:
    """The script with a `python3` of these shell commands; its results go to `out`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in (
        ("nvidia-smi", "echo A Card"),
        ("compute-sanitizer", 'echo "$@"'),
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
    assert started(tmp_path, "true").wait(60) == 0
    out = tmp_path / "out/a-card"
    for name, command in {
        "tests": "-m pytest -m gpu tests",
        "operators": "-m pytest bench --benchmark-only",
        "neck": "-m bench.neck --device cuda --article",
        "growth": "-m bench.growth",
        "attention": "-m bench.attention --device cuda --dtype bfloat16 --seconds 1 --out ",
        "attacks": "--necks srm quadratic none --backends triton reference",
    }.items():
        assert command in (out / f"{name}.txt").read_text()


def test_attention_is_timed_at_every_shape_that_has_an_aim(tmp_path: Path):
    """Forward and backward, at both ranks of the article; beside torch.compile too."""
    assert started(tmp_path, "true").wait(60) == 0
    ran = (tmp_path / "out/a-card/attention.txt").read_text().splitlines()
    for direction in ("", " --backward"):
        for shape in ("--rank 64 --batch 8", "--rank 32 --batch 8", "--batch 1 ", "--batch 32 "):
            assert [x for x in ran if shape in x and x.endswith(f"--shapes 16384 256{direction}")], shape
        for rank in (64, 32):
            large = f"--shapes 65536 1024 262144 4096{direction}"
            assert [x for x in ran if f"--rank {rank} " in x and x.endswith(large) and "--compile" not in x]
    assert [x for x in ran if "--compile" in x]
    assert [x for x in ran if "--crossover" in x]
    assert all("--dtype bfloat16" in x for x in ran)


def test_the_fused_neck_is_timed_in_both_directions_with_dyt_and_without(tmp_path: Path):
    """In bf16 at B = 8, every backbone and side: where it has an aim."""
    assert started(tmp_path, "true").wait(60) == 0
    printed = (tmp_path / "out/a-card/fused_neck.txt").read_text().splitlines()
    ran = [x for x in printed if x.startswith("-m bench.fused_neck --device cuda --dtype bf16 --batches 8 ")]
    assert [x.partition("/out ")[2] for x in ran] == [
        "",
        "--no-dyt",
        "--direction both",
        "--direction both --no-dyt",
    ]


def test_a_failed_step_fails_the_whole_and_the_rest_goes_on(tmp_path: Path):
    assert started(tmp_path, 'case "$*" in *gpu*) exit 3;; esac').wait(60) == 3
    assert "bench.growth" in (tmp_path / "out/a-card/growth.txt").read_text()


def test_ctrl_c_ends_the_step_and_keeps_what_was_written(tmp_path: Path):
    pid = tmp_path / "pid"
    # Python ends at TERM without a word; at INT, benchmarks write what they have.
    ending = f"echo kept > {tmp_path}/kept; kill $!; exit 1"
    sleeping = f'case "$*" in *conditioning*) trap "{ending}" INT; echo $$ > {pid}; sleep 60 & wait;; esac'
    script = started(tmp_path, sleeping)
    end = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(30) == 130
    out = tmp_path / "out/a-card"
    assert "-m pytest -m gpu tests" in (out / "tests.txt").read_text()
    assert not (out / "neck.txt").exists()
    assert (tmp_path / "kept").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
