"""Test that the package and Triton use the emulated device as a GPU, and that `emulated_device` undoes its changes."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from ptx_kernels import add_kernel, faults, large_kernel, softmax_kernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.harness import write_lines
from bench.ptx import emulated_device, matrix
from bench.ptx.__main__ import main as ptx_command
from srm_kernels import backends, rms_scale
from srm_kernels.devices import launch_device, roomy
from srm_model.profiling.results import read

FACTOR = tl.constexpr(2.0)


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, FACTOR * tl.load(x_ptr + i, mask=i < n), mask=i < n - 1)


def test_the_package_launches_on_cpu_tensors_only_inside():
    y = torch.randn(3, 2, 130, 24)
    with emulated_device(89) as device:
        assert backends()["triton"].available
        found = rms_scale(y, backend="triton")
    assert [launch.name for launch in device.launches] != []
    assert faults(device) == []
    for one, other in zip(found, rms_scale(y, backend="reference"), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    if not torch.cuda.is_available():
        assert not backends()["triton"].available
        with pytest.raises(NotImplementedError, match="triton"):
            rms_scale(y, backend="triton")


@pytest.mark.parametrize(
    ("architecture", "capability", "kibibytes"), [(80, (8, 0), 163), (86, (8, 6), 99), (120, (12, 0), 99)]
)
def test_the_package_sees_the_capability_and_the_shared_memory(architecture, capability, kibibytes):
    tensor = torch.zeros(1)
    with emulated_device(architecture):
        assert launch_device(tensor).capability == capability
        assert roomy(tensor, kibibytes)
        assert not roomy(tensor, kibibytes + 1)


def test_everything_is_restored_after_an_error():
    before = JITFunction.run, driver._active, torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), emulated_device(90, poison=True):
        raise ZeroDivisionError
    assert before == (JITFunction.run, driver._active, torch.are_deterministic_algorithms_enabled())
    assert launch_device(torch.zeros(1)).capability == (8, 9)


def test_poison_shows_what_a_kernel_does_not_write():
    x = torch.ones(64)
    with emulated_device(89, poison=True):
        y, index = torch.empty_like(x), torch.empty(3, dtype=torch.int64)
        scale_kernel[(1,)](x, y, 64, BLOCK=64)
    assert y[:63].tolist() == [2.0] * 63
    assert math.isnan(y[63])
    assert (index > 2**40).all()


def test_a_changed_global_is_refused_as_by_triton():
    x = torch.ones(64)
    with emulated_device(89) as device:
        scale_kernel[(1,)](x, x, 64, BLOCK=64)
        globals()["FACTOR"] = tl.constexpr(3.0)
        try:
            with pytest.raises(RuntimeError, match="FACTOR has changed"):
                scale_kernel[(1,)](x, x, 64, BLOCK=64)
        finally:
            globals()["FACTOR"] = tl.constexpr(2.0)
    assert len(device.launches) == 1
    (refusal,) = device.refusals
    assert "scale_kernel" in refusal


def test_too_much_shared_memory_is_refused_as_by_a_gpu():
    a, b, c = (torch.zeros(128, 128) for _ in range(3))
    with (
        emulated_device(86) as device,
        pytest.raises(RuntimeError, match=r"131072 B of shared memory.*101376 B"),
    ):
        large_kernel[(1,)](a, b, c, SIZE=128, num_warps=8)
    assert len(device.refusals) == 1
    assert device.launches == []


def test_launches_may_be_skipped_kept_and_run_in_part():
    x, y = torch.randn(4, 1000), torch.zeros(4, 1000)
    z = torch.zeros(1000)
    with emulated_device(89, names={"softmax_kernel"}, blocks=lambda name, grid: [1, 2], keep=True) as device:
        add_kernel[(4,)](x, x, z, 1000, BLOCK=256)
        softmax_kernel[(4,)](x, y, 1000, BLOCK=1024)
    (launch,) = device.launches
    assert (launch.name, launch.grid, launch.warps) == ("softmax_kernel", (4,), 4)
    assert launch.tensors[1] is y
    assert launch.tensor_bytes == 2 * 4 * 1000 * 4
    assert z.abs().max() == 0
    assert torch.allclose(y[1:3], x.softmax(1)[1:3], rtol=1e-5, atol=0)
    assert y[0].abs().max() == y[3].abs().max() == 0


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), emulated_device(89):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [({"architecture": 75}, "expected one of 80"), ({"order": "random"}, "expected one of tog")],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message), emulated_device(**options):
        pass


def test_the_digest_of_code_ignores_comments_and_debug_information():
    code = "\t.loc\t1 {line} 3\n$L__tmp{line}:\n\tadd.s32 \t%r1, %r2, {value};  // f.py:{line}\n"
    tail = '\t.file\t1 "/{line}/f.py"\n\t.section\t.debug_info\n\t{{\n.b32 {line}\n\t}}\n'
    one, moved, other = (
        matrix._normalised((".version 8.7\n.target sm_89\n" + code + tail).format(line=line, value=value))
        for line, value in ((7, 1), (9, 1), (7, 2))
    )
    assert one == moved != other
    assert one.strip() == "add.s32 \t%r1, %r2, 1;"


def test_a_resumed_matrix_keeps_the_rows_whose_code_is_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "matrix.jsonl"
    command = ["--matrix", "--only", "biased_gelu", "--dtypes", "fp32", "--out", str(path)]
    assert ptx_command([*command, "--architectures", "89"]) == 0
    (first,) = read(path)
    other = {**first, "architecture": 90, "code": "other"}
    stale = {**first, "case": "a case of an earlier version"}
    write_lines(path, [other, stale, first])
    judged = []
    judge = matrix.judge
    monkeypatch.setattr(matrix, "judge", lambda run: judged.append(run.architecture) or judge(run))
    monkeypatch.setattr(matrix, "code_of", lambda run: first["code"] if run.architecture == 89 else "new")
    assert ptx_command([*command, "--architectures", "89", "90", "--resume"]) == 0
    kept, again = read(path)
    assert (kept, judged, again["architecture"]) == (first, [90], 90)
    assert again["code"] != "other"
    monkeypatch.setattr(matrix, "code_of", lambda run: first["code"])
    assert ptx_command([*command, "--architectures", "89", "80", "--resume"]) == 0
    assert [(row["architecture"], row.get("same_code_as")) for row in read(path)] == [
        (89, None),
        (90, None),
        (80, 89),
    ]
    assert judged == [90]
