"""Test `python -m srm_kernels verify` on an emulated device.

Correct kernels pass and are used from then on. Kernels with planted faults are reported and never used.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.ptx import emulated_device
from bench.ptx.verify import sm_89
from srm_kernels import choice, dyt, explain, verdicts
from srm_kernels.verify import workers
from srm_kernels.verify.command import main

SM_89 = "bench.ptx.verify:sm_89"
KEY = sm_89().key


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SRM_KERNELS_CACHE", str(tmp_path / "kept"))
    verdicts._warned.clear()
    return tmp_path / "kept"


def verify(*arguments: str, device: str = SM_89) -> int:
    return main(["--device", device, "--dtypes", "fp32", "--jobs", "1", *arguments])


def statuses() -> dict[str, str]:
    verdict, _ = verdicts.load(KEY)
    assert verdict is not None
    return {row["operator"]: row["status"] for row in verdict.rows}


def test_right_kernels_pass_and_are_taken_from_then_on(folder: Path, tmp_path: Path, capsys):
    exported = tmp_path / "results/verify.jsonl"
    assert verify("--only", "dyt", "gate_losses", "--export", str(exported)) == 0
    assert statuses() == {"dyt": "right", "gate_losses": "right"}
    out = capsys.readouterr().out
    assert "Emulated sm_89, compute capability 8.9" in out
    assert "3.00×" in out
    assert str(folder) in out
    x, weight = torch.randn(3, 20, 16), torch.ones(16)
    with emulated_device(89) as device, choice.pretended(KEY):
        call = (x, torch.ones(1), weight, weight)
        assert explain("dyt", *call).backend == "triton"
        dyt(*call)
        assert [launch.name for launch in device.launches] == ["dyt_kernel"]
        assert explain("rms_scale", torch.zeros(1, 1, 4, 8)).backend == "reference"
    # A second run measures nothing and prints the reason.
    assert verify("--only", "dyt", "gate_losses") == 0
    assert "2 of 2 cases are in the stored verdict" in capsys.readouterr().out
    # The exported file is also a valid shipped verdict.
    rows = [json.loads(line) for line in exported.read_text().splitlines()]
    assert [row["operator"] for row in rows] == ["dyt", "gate_losses"]
    shipped = verdicts.shipped(KEY, exported.parent)
    assert shipped is not None
    assert len(shipped.rows) == 2


FAULTS = {
    "dyt": ("wrong", "times the bound"),
    "rms_scale": ("wrong", "two runs give different bits"),
    "tau_loss": ("refused", "shared memory"),
    "gated_fusion": ("wrong", "race"),
    "biased_gelu": ("error", "illegal memory access"),
    "gate_logits": ("crashed", "SIGABRT"),
    "adaptive_pool": ("timeout", "no answer within"),
    "gate_losses": ("right", ""),
}


def test_every_planted_fault_has_its_row_and_is_never_taken(capsys):
    assert verify("--only", *FAULTS, "--limit", "45", device="planted:faulty") == 1
    verdict, _ = verdicts.load(KEY)
    assert verdict is not None
    found = {row["operator"]: (row["status"], row["reason"] or "") for row in verdict.rows}
    assert {name: status for name, (status, _) in found.items()} == {n: s for n, (s, _) in FAULTS.items()}
    out = capsys.readouterr().out
    for name, (status, words) in FAULTS.items():
        assert words in found[name][1]
        assert f"{name:36}  fp32   tiny      {status}" in out
    assert "7 of 8 cases are not right" in out
    assert verdict.unfinished == frozenset()
    maps, C = torch.zeros(2, 3, 4, 2, 2), torch.ones(4)
    calls = {
        "dyt": (torch.zeros(1, 20, 4), torch.ones(1), C, C),
        "rms_scale": (torch.zeros(1, 1, 4, 8),),
        "gated_fusion": (maps, torch.zeros(2, 3)),
        "biased_gelu": ([maps[:, 0]], [C]),
        "gate_logits": ([maps[:, 0]], [C], [(C[None], C[:1])]),
        "adaptive_pool": (maps[:, 0], 2),
    }
    with emulated_device(89), choice.pretended(KEY):
        for name, call in calls.items():
            options = {"cap": None} if name == "gated_fusion" else {}
            said = explain(name, *call, **options)
            assert said.backend == "reference"
            assert FAULTS[name][0] in said.reason
        assert explain("tau_loss", [C], [C], reference=1.0).backend == "reference"
        assert explain("gate_losses", torch.zeros(2, 3), entropy_floor=0.5).backend == "triton"


def test_errors_of_the_compiler_and_of_memory_are_rows_too(capsys):
    assert verify("--only", "dyt", "gated_fusion", device="planted:erring") == 1
    assert statuses() == {"dyt": "memory", "gated_fusion": "error"}
    out = capsys.readouterr().out
    assert "PassManager::run failed" in out
    assert "1 of 2 cases are not right" in out


def test_where_no_kernel_can_run_nothing_is_measured(folder: Path, capsys):
    assert verify("--only", "gate_losses", device="planted:unable") == 2
    assert (
        "no trivial Triton kernel can run: RuntimeError: Failed to find C compiler" in capsys.readouterr().err
    )
    assert verdicts.load(KEY)[0] is None


def test_a_yardstick_that_fails_is_no_fault_of_the_kernel(capsys):
    assert verify("--only", "gate_losses", device="planted:yardstick") == 0
    assert "eager was not timed: the process ended with SIGABRT" in capsys.readouterr().out
    verdict, _ = verdicts.load(KEY)
    assert verdict is not None
    assert [set(row["milliseconds"]["forward"]) for row in verdict.rows] == [{"reference", "triton"}]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are listed in /proc")
def test_a_signal_ends_the_command_and_a_hung_child(tmp_path: Path):
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-m", "srm_kernels", "verify", "--device", "planted:faulty", "--only", "adaptive_pool"],
        cwd=root, env=os.environ | {"PYTHONPATH": f"{root}:{Path(__file__).parent}"}, stderr=subprocess.PIPE,
    )  # fmt: skip
    threads = Path(f"/proc/{parent.pid}/task")
    deadline, found = time.monotonic() + 60, ""
    while not found and time.monotonic() < deadline:
        found = " ".join((thread / "children").read_text() for thread in threads.iterdir())
        time.sleep(0.2)
    time.sleep(1)
    parent.terminate()
    assert b"the next run resumes from here" in parent.communicate(timeout=60)[1]
    assert parent.returncode == 128 + signal.SIGTERM
    assert found
    assert not any(Path(f"/proc/{pid}").exists() for pid in found.split()), "ended, and waited for"


def test_a_folder_that_cannot_be_written_costs_a_warning_and_nothing_else(monkeypatch, capsys, caplog):
    monkeypatch.delenv("SRM_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc")
    workers._triton_cache.cache_clear()
    assert verify("--only", "gate_losses") == 0
    assert len(caplog.records) == 1
    assert "could not be saved" in caplog.text
    assert "Saved in" not in capsys.readouterr().out
    workers._triton_cache.cache_clear()


def test_two_processes_do_not_measure_one_device_at_once(capsys):
    with verdicts.held(KEY):
        assert verify("--only", "gate_losses") == 2
    assert "another process is measuring Emulated sm_89" in capsys.readouterr().err


def test_everything_that_can_be_timed_has_a_pretended_time():
    names = (*verdicts.IMPLEMENTATIONS, "eager", "compiled")
    assert sm_89().times(dict.fromkeys(names, lambda: None), 1.0).keys() == set(names)


def test_the_command_line_gives_the_exit_code():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "srm_kernels", "verify", "--device", SM_89, "--only", "tau_loss", "--quick"],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tau_loss" in done.stdout
