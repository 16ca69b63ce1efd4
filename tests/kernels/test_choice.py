"""Tests of the implementation that `backend=None` chooses, based on the verdict of a device.

A verdict contains the results of `python -m srm_kernels verify`. In these tests, `choice.pretended` treats CPU tensors
as tensors on a verified device, and Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import srm_kernels
from srm_kernels import attention, choice, devices, dispatch, explain, verdicts
from srm_kernels.choice import BOUNDS, class_of
from srm_kernels.dispatch import choose_backend, choose_kernels
from srm_kernels.options import AttentionOptions, LandmarkOptions, SolveOptions
from srm_kernels.registration import running

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors pretend to be on the device")
KEY = verdicts.key_of("NVIDIA Pretended", (8, 9), "580.1")
FAST, SLOW = {"triton": 1.0, "reference": 2.0}, {"triton": 2.0, "reference": 1.0}


def row(operator: str, sizes: list[int], times: dict[str, float], **changes: Any) -> verdicts.Row:
    return {
        "operator": operator,
        "backend": "triton",
        "dtype": "fp32",
        "shape": "article",
        "sizes": sizes,
        "status": "right",
        "reason": None,
        "ratio": 0.5,
        "milliseconds": {"forward": times, "backward": times},
        "measured": "2025-01-02",
        **changes,
    }


@pytest.fixture
def pretended() -> Iterator[None]:
    with choice.pretended(KEY):
        yield


@pytest.fixture(autouse=True)
def fresh(pretended: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty folder for verdicts, and forget which warnings were logged.

    The fixture requests `pretended` before `monkeypatch`, so `pretended` ends after the patches of a test are undone.
    """
    monkeypatch.setenv("SRM_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "_logged", False)
    verdicts._warned.clear()


def verified(*rows: verdicts.Row, **changes: Any) -> None:
    verdicts.save(verdicts.Verdict(KEY, rows, **changes))
    choice.refresh()


def dyt_of(tokens: int, batch: int = 1, backend: str | None = None) -> choice.Explanation:
    x = torch.zeros(batch, tokens, 24)
    return explain("dyt", x, torch.ones(1), torch.ones(24), torch.zeros(24), backend=backend)


def test_classes_are_centred_on_powers_of_four():
    assert [class_of(4**power) for power in range(1, 10)] == list(range(len(BOUNDS) + 1))
    assert class_of(33) == class_of(127) == class_of(64)
    assert all(one < other for one, other in pairwise(BOUNDS))


def test_without_a_verdict_all_is_as_before_and_one_line_names_the_command(caplog):
    for tokens in (64, 65):
        found = dyt_of(tokens)
        assert (found.backend, found.origin) == ("reference", None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "python -m srm_kernels verify" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
    assert "not verified" in found.reason


def test_the_cpu_has_no_verdict_and_no_line(monkeypatch, caplog):
    verified(row("dyt", [64, 24], FAST))
    monkeypatch.setattr(choice, "_pretended", None)
    choice.refresh()
    assert dyt_of(64).backend == "reference"
    assert choose_kernels(None, torch.zeros(2), "dyt") == "reference"
    assert not caplog.records


def test_kernels_that_are_interpreted_are_taken_by_no_verdict(monkeypatch):
    """On a CUDA device, verdicts are used only if the kernels are compiled.

    In the other tests, verdicts are used although the kernels are interpreted. `choice.pretended` makes this possible,
    for CPU tensors only.
    """
    verified(row("dyt", [64, 24], FAST))
    monkeypatch.setattr(verdicts, "key_of_cuda", lambda index: KEY)
    monkeypatch.setattr(devices, "interpreting", lambda: False)
    monkeypatch.setattr(devices, "triton_missing", lambda: None)
    assert choice.ranking(0, "dyt", "", torch.float32, [3, 2]) == ["triton", "reference"]
    choice.refresh()
    monkeypatch.setattr(devices, "interpreting", lambda: True)
    assert choice.ranking(0, "dyt", "", torch.float32, [3, 2]) == []
    assert "TRITON_INTERPRET=1" in str(choice.table(0).reason)


def test_a_choice_has_the_dates_of_the_rows_that_it_follows():
    verified(
        row("dyt", [16_384, 24], FAST, shape="article"),
        row("dyt", [64, 24], SLOW, shape="small", measured="2025-06-01"),
    )
    assert [dyt_of(tokens).measured for tokens in (64, 16_384)] == ["2025-06-01", "2025-01-02"]
    assert choice.sentence(choice.table(choice.CPU)).startswith(
        "verdict of this machine, 2025-01-02 to 2025-06-01: "
    )


def test_the_fastest_that_is_right_is_taken_at_the_nearest_shapes():
    verified(
        row("dyt", [16_384, 24], FAST, shape="article"),
        row("dyt", [64, 24], SLOW, shape="small"),
    )
    assert [dyt_of(tokens).backend for tokens in (1, 64, 200, 16_384, 500_000)] == [
        *["reference"] * 3,
        *["triton"] * 2,
    ]
    found = dyt_of(20_000)
    assert (found.origin, found.measured, list(found.milliseconds)) == (
        "this machine",
        "2025-01-02",
        ["article"],
    )
    assert found.milliseconds["article"]["backward"] == FAST
    assert "fastest correct one" in str(found)


def test_the_batch_never_counts():
    verified(row("dyt", [16_384, 24], FAST), row("dyt", [64, 24], SLOW, shape="small"))
    for tokens in (64, 16_384):
        assert len({dyt_of(tokens, batch).backend for batch in (1, 2, 64, 1024)}) == 1


SIZES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "rms_scale": ((130, 24), {"y": (2, 3, 130, 24)}),
    "select_landmarks (leverage)": ((50, 9, 24), {"key": (2, 3, 50, 24), "rank": 9}),
    "select_landmarks (uniform)": ((50, 9, 24), {"key": (2, 3, 50, 24), "rank": 9, "method": "uniform"}),
    "select_landmarks (kmeans++)": ((50, 9, 24), {"key": (2, 3, 50, 24), "rank": 9, "method": "kmeans++"}),
    "ridge_leverage_scores": ((50, 24), {"key": (2, 3, 50, 24)}),
    "landmark_solve (cholesky)": ((9, 24), {"logits": (2, 9, 9), "rhs": (2, 9, 24)}),
    "landmark_solve (lu)": ((9, 24), {"logits": (2, 9, 9), "rhs": (2, 9, 24), "solver": "lu"}),
    "landmark_solve (lu, equilibrated)": (
        (9, 24),
        {"logits": (2, 9, 9), "rhs": (2, 9, 24), "solver": "lu", "equilibrate": True},
    ),
    "nystrom_attention": ((77, 50, 9, 24), {"query": (2, 3, 77, 24), "key": (2, 3, 50, 24), "rank": 9}),
    "nystrom_attention (pivoted_cholesky, svd)": (
        (77, 50, 50, 24),
        {
            "query": (2, 3, 77, 24),
            "key": (2, 3, 50, 24),
            "rank": 99,
            "method": "pivoted_cholesky",
            "solver": "svd",
        },
    ),
    "nystrom_attention (diagnostics)": (
        (77, 50, 9, 24),
        {"query": (2, 3, 77, 24), "key": (2, 3, 50, 24), "rank": 9, "diagnostics": "estimate"},
    ),
    "nystrom_attention (lu, diagnostics)": (
        (77, 50, 9, 24),
        {
            "query": (2, 3, 77, 24),
            "key": (2, 3, 50, 24),
            "rank": 9,
            "solver": "lu",
            "diagnostics": True,
        },
    ),
    "landmark_side": ((50, 9, 24), {"key": (2, 3, 50, 24), "rank": 9}),
    "adaptive_pool": ((20, 24), {"x": (2, 24, 4, 5), "size": 2}),
    "gated_fusion": ((20, 24), {"maps": (2, 3, 24, 4, 5), "logits": (2, 3), "cap": None}),
    "gate_losses": ((), {"weights": (2, 3), "entropy_floor": 0.5}),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_leave_out_batch_and_heads_and_variants_are_measured_apart(name: str):
    sizes, given = SIZES[name]
    options = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in given.items()}
    found = explain(name.split()[0], **options)
    assert (found.operator, found.sizes) == (name, sizes)
    bad = row("dyt", [1, 2], FAST)
    good = row(name, list(sizes), FAST)
    verified(bad, good)
    no_kernel = "kmeans++" in name or "equilibrated" in name
    expected = "reference" if no_kernel else "triton"
    assert explain(name.split()[0], **options).backend == expected


@pytest.mark.parametrize("diagnostics", [True, "estimate"])
def test_diagnostics_are_plain_pytorch_where_they_were_not_measured(diagnostics: bool | str):
    sizes = ["nystrom_attention", [64, 64, 9, 24]], ["landmark_solve (cholesky)", [9, 24]]
    verified(*[row(name, one, FAST) for name, one in sizes])
    q = torch.randn(1, 1, 64, 24)
    with running() as found:
        srm_kernels.nystrom_attention(q, q, q, 9, diagnostics=diagnostics)
    assert found.pop("landmark_solve") <= {"reference", "torch"}
    assert "landmark_blocks" not in found
    assert "triton" not in set().union(*found.values())
    with running() as found:
        srm_kernels.landmark_solve(torch.eye(9)[None], torch.ones(1, 9, 24), diagnostics=diagnostics)
    assert found == {"landmark_solve": {"triton"}, "landmark_diagnostics": {"reference"}}


@pytest.mark.parametrize("status", verdicts.FAULTS)
def test_what_is_wrong_at_one_shape_is_taken_at_none(status: str):
    bad = row("dyt", [64, 24], FAST, shape="odd", status=status, reason="error 3 times its bound")
    verified(row("dyt", [16_384, 24], FAST), bad)
    for tokens in (64, 16_384):
        found = dyt_of(tokens)
        assert found.backend == "reference"
        assert f"triton is {status} at odd" in found.reason


def test_other_dtypes_and_groups_that_are_not_finished_are_not_decided():
    unfinished = frozenset({("dyt", "fp32")})
    verified(row("dyt", [64, 24], FAST), unfinished=unfinished)
    assert dyt_of(64).backend == "reference"
    assert "no measurement was finished" in dyt_of(64).reason
    verified(row("dyt", [64, 24], FAST), row("rms_scale", [64, 24], FAST), unfinished=unfinished)
    assert dyt_of(64).backend == "reference"
    assert "was interrupted" in dyt_of(64).reason
    assert choice.sentence(choice.table(choice.CPU)).endswith("; 1 operators and dtypes are not finished")
    verified(row("dyt", [64, 24], FAST, dtype="bf16"))
    assert dyt_of(64).backend == "reference"
    assert "not measured in fp32" in dyt_of(64).reason


def test_what_ran_out_of_memory_is_not_taken_near_there():
    verified(
        row("dyt", [16_384, 24], {"reference": 1.0}, shape="large", status="memory", reason="out of memory"),
        row("dyt", [64, 24], FAST, shape="small"),
    )
    assert dyt_of(16_384).backend == "reference"
    assert dyt_of(64).backend == "triton"


def test_what_cannot_run_here_is_passed_over():
    verified(row("nystrom_attention", [64, 64, 9, 200], {"triton": 1.0, "torch": 2.0, "reference": 3.0}))
    q = torch.zeros(1, 1, 64, 200)
    found = explain("nystrom_attention", q, q, rank=9)
    assert found.backend == "reference", "torch was timed but has no row that says it is right"
    assert "d from 8 to 128" in found.reason
    plain = row("nystrom_attention", [64, 64, 9, 200], {}, backend="torch")
    verified(
        row("nystrom_attention", [64, 64, 9, 200], {"triton": 1.0, "torch": 2.0, "reference": 3.0}), plain
    )
    assert explain("nystrom_attention", q, q, rank=9).backend == "torch"
    assert explain("nystrom_attention", q, q, rank=9, solve_dtype="model").backend == "torch"
    narrow = {"rank": 9, "solve_dtype": "model"}
    half = q.bfloat16()
    assert explain("nystrom_attention", half, half, **narrow).backend == "reference"


def test_a_name_and_the_environment_win(monkeypatch):
    verified(row("dyt", [64, 24], FAST))
    assert dyt_of(64).backend == "triton"
    assert dyt_of(64, backend="torch").backend == "torch"
    assert "argument" in dyt_of(64, backend="torch").reason
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "reference")
    assert dyt_of(64).backend == "reference"
    assert "SRM_KERNELS_BACKEND" in dyt_of(64).reason
    assert choose_kernels(None, torch.zeros(2, 64, 24), "dyt") == "reference"
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="SRM_KERNELS_BACKEND"):
        dyt_of(64)


@pytest.mark.parametrize("name", ["driver", "torch", "triton", "sources"])
def test_a_verdict_of_something_else_is_not_followed_and_says_so(name: str, caplog):
    verified(row("dyt", [64, 24], FAST))
    with choice.pretended(KEY._replace(**{name: "another"})):
        found = dyt_of(64)
        assert found.backend == "reference"
        assert f"{name} was" in found.reason
        assert f"{name} was" in caplog.text


def test_a_shipped_verdict_is_followed_and_marked(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(verdicts, "SHIPPED", tmp_path / "shipped")
    verdicts.export(verdicts.Verdict(KEY, (row("dyt", [64, 24], FAST),)), tmp_path / "shipped/card.jsonl")
    choice.refresh()
    assert (dyt_of(64).backend, dyt_of(64).origin) == ("triton", "shipped")
    assert "shipped" in dyt_of(64).reason
    verified(row("dyt", [64, 24], SLOW))
    assert (dyt_of(64).backend, dyt_of(64).origin) == ("reference", "this machine")


@pytest.mark.parametrize("shipping", [False, True])
def test_a_file_that_cannot_be_used_is_one_line_in_the_log(
    shipping: bool, tmp_path: Path, monkeypatch, caplog
):
    monkeypatch.setattr(verdicts, "SHIPPED", tmp_path / "shipped")
    if shipping:
        verdicts.export(verdicts.Verdict(KEY, (row("dyt", [64, 24], FAST),)), verdicts.SHIPPED / "card.jsonl")
    verdicts.path_of(KEY).mkdir(parents=True)
    for _ in range(2):
        choice.refresh()
        assert dyt_of(64).backend == ("triton" if shipping else "reference")
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"{verdicts.path_of(KEY)} is ignored: it is not a regular file" in said
    assert ("shipped with the package" in said) == shipping


@pytest.mark.parametrize("status", ["right", "wrong", "refused", "error"])
@pytest.mark.parametrize("changed", ["driver", "torch", "sources"])
def test_a_stale_verdict_is_said_and_what_it_found_wrong_is_not_lost(
    status: str, changed: str, tmp_path: Path, monkeypatch, caplog
):
    """A stale verdict is replaced by the shipped verdict, which holds for all drivers and patch versions.

    The statuses "wrong" and "refused" of the stale verdict still count, unless the kernel sources changed.
    """
    monkeypatch.setattr(verdicts, "SHIPPED", tmp_path / "shipped")
    rows = row("dyt", [64, 24], FAST), row("rms_scale", [64, 24], FAST)
    verdicts.export(verdicts.Verdict(KEY, rows), verdicts.SHIPPED / "card.jsonl")
    own = rows[0] | {"status": status, "reason": "off by 7 times the bound"}
    old = KEY._replace(**{changed: f"{KEY.torch}.9" if changed == "torch" else "another"})
    verdicts.save(verdicts.Verdict(old, (own, rows[1])))
    choice.refresh()
    counts = status in ("wrong", "refused") and changed != "sources"
    assert dyt_of(64).backend == ("reference" if counts else "triton")
    assert ("off by 7 times" in dyt_of(64).reason) == counts
    assert explain("rms_scale", torch.zeros(1, 1, 64, 24)).backend == "triton"
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"{changed} was {getattr(old, changed)}" in said
    assert "shipped with the package" in said
    assert ("faults on this machine (dyt)" in said) == counts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every call of the DyT kernel adds its number of tokens."""
    from srm_kernels.scale import kernels

    made: list[int] = []
    plain = kernels.dyt

    def counting(x: Tensor, *parameters: Tensor) -> Tensor:
        made.append(x.shape[1])
        return plain(x, *parameters)

    monkeypatch.setattr(kernels, "dyt", counting)
    return made


def squash(x: Tensor) -> Tensor:
    C = x.shape[-1]
    return srm_kernels.dyt(x, x.new_ones(1), x.new_ones(C), x.new_zeros(C))


def test_calls_run_what_explain_says(calls: list[int]):
    verified(row("dyt", [1_024, 24], FAST), row("dyt", [4, 24], SLOW, shape="small"))
    for tokens in (4, 700, 4, 700):
        squash(torch.zeros(1, tokens, 24))
    assert calls == [700, 700]


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compiled_code_chooses_as_eager_code_does(dynamic: bool | None, calls: list[int]):
    verified(row("dyt", [1_024, 24], FAST), row("dyt", [4, 24], SLOW, shape="small"))
    torch._dynamo.reset()
    compiled = torch.compile(squash, backend="eager", fullgraph=True, dynamic=dynamic)
    for tokens in (4, 700, 5, 701, 702):
        assert torch.equal(compiled(torch.zeros(1, tokens, 24)), torch.zeros(1, tokens, 24))
    assert calls == [700, 701, 702]


def test_a_traced_program_of_any_size_guards_its_class_and_not_its_size(calls: list[int]):
    verified(row("dyt", [1_024, 24], FAST), row("dyt", [4, 24], SLOW, shape="small"))
    torch._dynamo.reset()
    compiled = torch.compile(squash, backend="eager", fullgraph=True, dynamic=True)
    compiled(torch.zeros(1, 700, 24))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (600, 701, 2_000):
            compiled(torch.zeros(1, tokens, 24))
    assert calls == [700, 600, 701, 2_000]


class _Squash(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return squash(x)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_is_plain_pytorch_of_any_size(strict: bool, calls: list[int]):
    verified(row("dyt", [1_024, 24], FAST))
    squash(torch.zeros(1, 700, 24))
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    x = torch.zeros(1, 700, 24)
    program = torch.export.export(_Squash(), (x,), dynamic_shapes=({1: tokens},), strict=strict)
    program.module()(torch.zeros(1, 5, 24))
    assert calls == [700]
    assert "reference)" in str(program.graph)


def test_function_transforms_are_plain_pytorch(calls: list[int]):
    verified(row("dyt", [1_024, 24], FAST))
    x = torch.ones(3, 1, 700, 24)
    torch.func.vmap(squash)(x)
    torch.func.grad(lambda y: squash(y).sum())(x[0])
    torch.func.jvp(squash, (x[0],), (x[0],))
    assert calls == []


def test_pooled_links_are_served_where_what_they_take_serves_them():
    verified(row("pooled_links", [32], FAST))
    maps = torch.zeros(1, 8, 4, 4)
    assert srm_kernels.serves_pooled_links(maps, 32, 64, [64], 8)
    assert not srm_kernels.serves_pooled_links(maps, 32, 64, [64], 33)
    assert srm_kernels.serves_pooled_links(maps, 32, 64, [64], 33, backend="reference")
    verified(row("pooled_links", [32], SLOW))
    assert srm_kernels.serves_pooled_links(maps, 32, 64, [64], 33)


def test_pooled_links_are_served_only_in_the_shared_memory_of_the_device(monkeypatch: pytest.MonkeyPatch):
    """With 99 KiB of shared memory, the kernels of pooled links support d and r up to 64.

    If d or r is larger, `serves_pooled_links` returns False, and the neck computes its links one by one.
    """
    verified(row("pooled_links", [32], FAST))
    maps = torch.zeros(1, 8, 4, 4)
    assert srm_kernels.serves_pooled_links(maps, 32, 100, [256], 8)
    monkeypatch.setattr("srm_kernels.neck.roomy", lambda tensor, kibibytes=160: kibibytes <= 99)
    assert not srm_kernels.serves_pooled_links(maps, 32, 100, [256], 8)
    assert srm_kernels.serves_pooled_links(maps, 32, 100, [49], 8)  # with 49 keys, r is 49


def test_explain_refuses_what_is_no_operator():
    with pytest.raises(ValueError, match=r"operator='fuses'.*nystrom_attention"):
        explain("fuses", torch.zeros(1))
    with pytest.raises(ValueError, match="expected"):
        explain("backends")
    with pytest.raises(TypeError):
        explain("dyt", torch.zeros(1), width=3)
    assert explain("full_attention", *[torch.zeros(1, 1, 4, 8)] * 3).backend == "torch"


@pytest.mark.parametrize("where", ["decided", "undecided", "the CPU"])
def test_a_choice_that_was_made_before_executes_few_instructions(where: str, monkeypatch):
    """A cached choice executes fewer than 250 bytecode instructions.

    With Python 3.11, the cached choices of this test execute 121 to 180 instructions. Choices that are not cached
    execute 302 to 1,873 instructions, and more if the verdict has not been read before.
    """
    verified(
        *[row("rms_scale", [130, 24], FAST), row("landmark_solve (svd)", [9, 24], FAST)][
            : 2 * (where == "decided")
        ]
    )
    if where == "the CPU":
        monkeypatch.setattr(choice, "_pretended", None)
    x, rhs = torch.zeros(2, 3, 130, 24), torch.zeros(2, 9, 24)

    def by_kernels() -> str:
        return choose_kernels(None, x, "rms_scale", sizes=lambda: (x.shape[2], x.shape[3]), call=(x.shape,))

    def by_backend() -> str:
        return choose_backend(
            None, ("torch", "reference", "triton"), "landmark_solve", lambda name: None,
            tensor=rhs, sizes=lambda: (rhs.shape[-2], rhs.shape[-1]), variant="svd", call=(rhs.shape,),
        )  # fmt: skip

    query, key = torch.zeros(2, 3, 77, 24), torch.zeros(2, 3, 50, 24)
    options = AttentionOptions(LandmarkOptions(9), SolveOptions(), 0.2, "keys")

    def of_attention() -> str:
        return attention._choose_backend(None, query, key, None, options)

    of_attention()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "choose_backend", None)  # a cached choice does not call it
        assert of_attention() in ("torch", "reference")
    assert (by_kernels(), by_backend()) == (("triton",) * 2 if where == "decided" else ("reference", "torch"))

    assert max(map(_bytecodes, (by_kernels, by_backend, of_attention))) < 250


def _bytecodes(call: Any) -> int:
    """Count the bytecode instructions that a call executes."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_a_choice_is_kept_for_a_device_and_not_for_tensors_without_numbers():
    verified(row("rms_scale", [130, 24], FAST))
    for device in ("cpu", "meta"):
        x = torch.zeros(2, 3, 130, 24, device=device)
        choose_kernels(None, x, "rms_scale", sizes=lambda: (130, 24), call=(x.shape,))
    assert len(choice._cache) == 1


@pytest.mark.parametrize("rows", [[], [row("rms_scale", [130, 24], FAST)]])
def test_a_call_is_decided_once(rows: list[verdicts.Row], monkeypatch):
    verified(*rows)
    asked: list[str] = []
    plain = choice.ranking
    monkeypatch.setattr(choice, "ranking", lambda *a: asked.append(a[1]) or plain(*a))
    for _ in range(3):
        srm_kernels.rms_scale(torch.ones(2, 3, 130, 24))
    assert asked == ["rms_scale"]


def test_many_shapes_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(choice, "MOST_CACHED", 8)
    verified(row("rms_scale", [130, 24], FAST))
    for tokens in range(1, 40):
        srm_kernels.rms_scale(torch.ones(1, 1, tokens, 8), backend=None)
    assert len(choice._cache) <= 8


def test_the_variable_is_read_where_it_is_set_later(monkeypatch):
    assert dispatch.named_by_environment() is None
    monkeypatch.setenv("SRM_KERNELS_BACKEND", "torch")
    assert dispatch.named_by_environment() == "torch"
    monkeypatch.setattr(dispatch, "_variables", None)
    assert dispatch.named_by_environment() == "torch"
