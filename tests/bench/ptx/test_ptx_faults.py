"""Test that the emulator reports every kind of planted fault, and reports no fault in correct code."""

from __future__ import annotations

import pytest
import torch
from ptx_kernels import execute, kinds, off_by_one_kernel, planted

from bench.ptx import Unsupported, emulated_device

# %r6 is the address of the word of thread 63 - %r1 in shared memory. This thread is in the other warp.
MIRROR = "sub.s32 %r5, 63, %r1; shl.b32 %r6, %r5, 2; add.s32 %r6, %r6, %r3;\n"
# %rd3 is the address of the thread's word in global memory.
PLACE = "cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2;\n"


def found(body: str, order: str = "together") -> list[str]:
    return kinds(planted(body, order)[0])


def test_an_access_outside_a_tensor():
    x = torch.zeros(100)
    with emulated_device(89) as device:
        off_by_one_kernel[(1,)](x, 100, BLOCK=128)
    ((name, report),) = device.reports()
    assert (name, report.kind, report.count) == ("off_by_one_kernel", "out of bounds", 1)
    assert "off_by_one_kernel" not in report.source
    assert "+400 of 400 B" in str(report)
    assert x.tolist() == [1.0] * 100


@pytest.mark.parametrize("offset", [-4, 4])
def test_an_access_beside_a_tensor_in_ptx(offset):
    body = PLACE + f"ld.global.b32 %r7, [%rd3+{offset}];"
    assert found(body) == ["out of bounds"]


def test_a_misaligned_access():
    assert found(PLACE + "setp.eq.s32 %p1, %r1, 0; @%p1 ld.global.b32 %r7, [%rd3+2];") == ["misaligned"]


@pytest.mark.parametrize("access", ["ld.shared.b32 %r7, [%r4+256];", "st.shared.b32 [%r4+256], %r1;"])
def test_an_access_outside_shared_memory(access):
    assert "shared bounds" in found(access)


@pytest.mark.parametrize("order", ["together", "reversed", "forward"])
def test_a_barrier_between_write_and_read_is_correct(order):
    body = "st.shared.b32 [%r4], %r1;\n bar.sync 0;\n" + MIRROR + "ld.shared.b32 %r7, [%r6];"
    execution, out = planted(body, order)
    assert kinds(execution) == []
    assert out.tolist() == list(range(63, -1, -1))


def test_a_read_without_a_barrier_after_the_write():
    assert found("st.shared.b32 [%r4], %r1;\n" + MIRROR + "ld.shared.b32 %r7, [%r6];") == ["race"]


def test_a_race_changes_values_when_warps_run_one_after_the_other():
    body = "st.shared.b32 [%r4], %r1;\n" + MIRROR + "ld.shared.b32 %r7, [%r6];"
    execution, out = planted(body, "reversed")
    assert "uninitialised" in kinds(execution)
    assert out.tolist() != list(range(63, -1, -1))


def test_a_write_without_a_barrier_after_the_read():
    body = "st.shared.b32 [%r4], %r1;\n bar.sync 0;\n" + MIRROR + "ld.shared.b32 %r7, [%r6];\n"
    assert found(body + "st.shared.b32 [%r4], 7;") == ["race"]
    assert found(body + "bar.sync 0; st.shared.b32 [%r4], 7;") == []


def test_warps_that_write_one_place_differently():
    assert found("st.shared.b32 [%r3], %r1;") == ["race"]
    assert found("st.shared.b32 [%r3], 7;") == []


def test_an_uninitialised_read():
    assert found("ld.shared.b32 %r7, [%r4];") == ["uninitialised"]


COPY = PLACE + "cp.async.ca.shared.global [%r4], [%rd3], 4, 4;\n cp.async.commit_group;\n"
WAIT, BARRIER = "cp.async.wait_group 0;\n", "bar.sync 0;\n"
OWN, OTHER = "ld.shared.b32 %r7, [%r4];", MIRROR + "ld.shared.b32 %r7, [%r6];"


def test_a_read_of_an_asynchronous_copy_without_its_wait():
    assert "race" in found(COPY + OWN)
    assert "race" in found(COPY + "cp.async.wait_group 1;\n" + OWN)
    assert found(COPY + WAIT + OWN) == []


def test_a_read_of_an_asynchronous_copy_of_another_warp():
    assert "race" in found(COPY + WAIT + OTHER)
    assert found(COPY + WAIT + BARRIER + OTHER) == []


def test_an_asynchronous_copy_over_what_is_read():
    first = "st.shared.b32 [%r4], %r1;\n bar.sync 0;\n" + OTHER
    assert "race" in found(first + COPY + WAIT)
    assert found(first + BARRIER + COPY + WAIT) == []


def test_a_barrier_in_divergent_code():
    body = "setp.lt.s32 %p1, %r1, 16;\n @%p1 bra $skip;\n bar.sync 0;\n $skip:\n mov.b32 %r7, %r1;"
    assert found(body) == ["barrier"]
    assert found(body.replace("16", "0")) == []


def test_a_barrier_that_one_warp_skips_when_warps_run_one_after_the_other():
    body = "setp.lt.s32 %p1, %r1, 32;\n @%p1 bra $skip;\n bar.sync 0;\n $skip:\n mov.b32 %r7, %r1;"
    assert found(body) == ["barrier"]
    with pytest.raises(RuntimeError, match="barrier"):
        planted(body, "reversed")


def test_a_trap():
    assert found("setp.eq.s32 %p1, %r1, 3; @%p1 trap;") == ["trap"]


MIRROR_GLOBAL = PLACE + "sub.s32 %r5, 252, %r2; cvt.u64.u32 %rd2, %r5; add.s64 %rd2, %rd1, %rd2;\n"
LOAD, STORE = "ld.global.b32 %r6, [%rd2];\n", "st.global.b32 [%rd3], %r1;\n"
SAME = "ld.global.b32 %r7, [%rd3]; st.global.b32 [%rd3], %r7;\n"
END = "ld.global.b32 %r7, [%rd3];"  # the last instruction stores this value to the same word


@pytest.mark.parametrize("order", ["together", "reversed"])
@pytest.mark.parametrize(
    ("body", "races"),
    [
        (LOAD + STORE, True),  # a thread overwrites a word that another thread loads
        (LOAD + BARRIER + STORE, False),
        (STORE + LOAD, True),
        (STORE + BARRIER + LOAD, False),
        (END + STORE, False),  # each thread uses its own word
        (LOAD + SAME, False),  # the stored value does not change the word
        ("st.global.b32 [%rd1], %r1; bar.sync 0;", True),  # all threads store to one word
    ],
)
def test_races_in_global_memory(body, races, order):
    assert set(found(MIRROR_GLOBAL + body + END, order)) == ({"global race"} if races else set())


def test_lanes_whose_copies_of_a_sum_differ():
    """Two lanes compute the same sum of two squares, but round it differently.

    Each lane computes fma(x, x, shfl(x·x)): the square of the other lane is rounded before the sum, and the lane's own
    square is not.
    """
    body = (
        "cvt.rn.f32.u32 %r5, %r1; mul.f32 %r5, %r5, 0f3DCCCCCD; mul.f32 %r6, %r5, %r5;"
        "shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1; fma.rn.f32 %r7, %r5, %r5, %r7;"
        "and.b32 %r6, %r4, -8; st.shared.b32 [%r6], %r7;"
    )
    assert found(body) == ["copies"]


# A (16, 16) and B (16, 8) are fp16 matrices of ones, except that rows 8 to 15 of the third column of A are 2.
MMA = """
    and.b32 %r5, %r1, 3;
    mov.b32 %r8, 0x3c003c00; mov.b32 %r9, 0x3c003c00; mov.b32 %r10, 0x3c003c00; mov.b32 %r11, 0x3c003c00;
    setp.eq.s32 %p1, %r5, 1;
    @%p1 mov.b32 %r9, 0x3c004000;
    mov.b32 %r12, 0; mov.b32 %r13, 0; mov.b32 %r14, 0; mov.b32 %r15, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
        {%r12, %r13, %r14, %r15}, {FRAGMENT}, {%r8, %r8}, {%r12, %r13, %r14, %r15};
"""


def rows_of_a_product(fragment: str, result: str) -> list[float]:
    body = MMA.replace("FRAGMENT", fragment) + f"mov.b32 %r7, {result};"
    execution, out = planted(body)
    assert kinds(execution) == []
    return out.view("float32")[:32:4].tolist()


def test_a_wrong_fragment_of_a_product_changes_its_values():
    right = "%r8, %r9, %r10, %r11"  # %r9 has rows 8 to 15 of the first 8 columns
    assert rows_of_a_product(right, "%r12") == [16.0] * 8
    assert rows_of_a_product(right, "%r14") == [17.0] * 8
    swapped = "%r9, %r8, %r10, %r11"
    assert rows_of_a_product(swapped, "%r12") == [17.0] * 8
    assert rows_of_a_product(swapped, "%r14") == [16.0] * 8


WGMMA = """
.version 8.4
.target sm_90a
.address_size 64
.visible .entry planted(.param .u64 .ptr .global .align 1 planted_param_0)
.reqntid 128
{
    .reg .pred %p<2>;
    .reg .b32 %r<16>;
    .reg .b64 %rd<6>;
    .shared .align 128 .b8 memory[3072];
    ld.param.b64 %rd1, [planted_param_0];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    mov.b32 %r3, memory;
    add.s32 %r3, %r3, %r2;
    mov.b32 %r10, 0x3f803f80;
    st.shared.b32 [%r3], %r10; st.shared.b32 [%r3+512], %r10; st.shared.b32 [%r3+1024], %r10;
    st.shared.b32 [%r3+1536], %r10; st.shared.b32 [%r3+2048], %r10;
    mov.b64 %rd4, 0x0000001000080000; mov.b64 %rd5, 0x0000001000080080;
    mov.b32 %r4, 0f00000000; mov.b32 %r5, %r4; mov.b32 %r6, %r4; mov.b32 %r7, %r4;
"""
STEPS = {
    "proxy": "fence.proxy.async.shared::cta;\n",
    "barrier": "bar.sync 0;\n",
    "fence": "wgmma.fence.sync.aligned;\n",
    "multiply": "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    " {%r4,%r5,%r6,%r7}, %rd4, %rd5, 1, 1, 1, 0, 0;\n",
    "commit": "wgmma.commit_group.sync.aligned;\n",
    "wait": "wgmma.wait_group.sync.aligned 0;\n",
    "wait1": "wgmma.wait_group.sync.aligned 1;\n",
    "add": "add.f32 %r4, %r4, %r4;\n",
    "overwrite": "st.shared.b32 [%r3], %r1;\n",
}
RESULT = "cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r4; ret; }"


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        ("proxy barrier fence multiply commit wait", None),
        ("barrier proxy fence multiply commit wait", None),
        ("proxy fence multiply commit wait", "race"),
        ("barrier fence multiply commit wait", "proxy"),
        ("proxy barrier fence multiply commit", "wgmma registers"),
        ("proxy barrier fence multiply wait", "wgmma registers"),
        ("proxy barrier fence multiply commit wait1", "wgmma registers"),
        ("proxy barrier add multiply commit wait", "wgmma registers"),
        ("proxy barrier add fence multiply commit wait", None),
        ("proxy barrier fence multiply commit barrier overwrite wait", "race"),
        ("proxy barrier fence multiply commit wait overwrite", "race"),
        ("proxy barrier fence multiply commit wait barrier overwrite", None),
    ],
)
def test_faults_around_wgmma(steps, kind):
    text = WGMMA + "".join(STEPS[step] for step in steps.split()) + RESULT
    for order in ("together", "reversed"):
        if order == "reversed" and kind is not None:
            continue
        out = torch.zeros(128)
        execution = execute(text, out, warps=4, shared=3072, order=order)
        assert kinds(execution) == ([kind] if kind else [])
        assert out.tolist() == [16.0] * 128


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %r7, %r1;",
        "add.rz.f32 %r7, %r1, %r1;",
        "mbarrier.init.shared::cta.b64 [%r4], 1;",
        "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r4], [%rd1, {%r1}], [%r4];",
        "cvt.rn.satfinite.e4m3x2.f32 %r7, %r1, %r1;",
        "ld.b32 %r7, [%rd1];",
    ],
)
def test_what_is_not_modelled_is_an_error_with_the_instruction(instruction):
    with pytest.raises(Unsupported, match=instruction.split()[0].replace(".", r"\.")):
        planted(instruction)
