"""Test `python -m srm_kernels verify`: cases, correctness, timing, resumed runs, child processes and tables."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import srm_kernels
from srm_kernels import __main__ as program
from srm_kernels import devices, verdicts
from srm_kernels.choice import Answer, Question
from srm_kernels.verify import child, command, measure, table, target, workers
from srm_kernels.verify.cases import FAMILY, NAMES, OPERATORS, QUICK, SHAPES, Case, cases
from srm_kernels.verify.target import CannotRunError, CudaDevice, Device, cuda_missing, open_device

KEY = verdicts.key_of("NVIDIA Pretended", (8, 9), "580.1")


class Pretended(Device):
    """The CPU as a device, with plain PyTorch instead of kernels."""

    key = KEY
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.found: list[str] = []
        self.refused: list[str] = []

    def times(self, steps: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
        for step in steps.values():
            step()
        return dict.fromkeys(steps, seconds)

    def probe(self) -> None:
        pass

    def reports(self) -> list[str]:
        found, self.found = self.found, []
        return found

    def refusals(self) -> list[str]:
        refused, self.refused = self.refused, []
        return refused


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SRM_KERNELS_CACHE", str(tmp_path / "kept"))
    monkeypatch.delenv("SRM_KERNELS_BACKEND", raising=False)
    return tmp_path / "kept"


# Cases


def test_every_operator_with_kernels_is_verified():
    public = {name: getattr(srm_kernels, name) for name in srm_kernels.__all__}
    functions = {name: f for name, f in public.items() if inspect.isfunction(f)}
    asked = {name for name, f in functions.items() if "backend" in inspect.signature(f).parameters}
    assert asked - set(NAMES) == {"full_attention", "serves_pooled_links"}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.label)
def test_all_calls_of_a_case_run_under_its_verdict(operator: Any):
    for shape in FAMILY:
        case = Case(operator, "fp32", shape)
        for call in case.calls:
            with pytest.raises(Answer) as answer:
                call(*case.inputs("meta"), backend=Question("reference"))
            assert answer.value.explanation.operator == operator.label


def test_cases_are_what_explain_names_and_sizes_need_no_numbers():
    for case in cases(shapes=tuple(SHAPES), dtypes=("fp32",)):
        sizes = measure.sizes_of(case)
        assert all(isinstance(size, int) for size in sizes)
    assert len({(case.operator.label, case.dtype, case.shape) for case in cases()}) == len(list(cases()))
    assert len(list(cases(shapes=QUICK))) < len(list(cases(shapes=FAMILY)))
    assert {case.operator.variant for case in cases(("landmark_solve",))} >= {"cholesky", "lu"}
    assert [case.operator.label for case in cases(("landmark_solve (lu)",), ("fp32",), ("odd",))] == [
        "landmark_solve (lu)"
    ]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.label)
def test_every_case_has_results_and_batch_axes_that_fit(operator: Any):
    """A sample gives the same results alone and in a batch. The calls run the reference instead of kernels."""
    case = Case(operator, "fp32", "tiny")
    inputs = case.inputs()
    axes = operator.inputs[: len(inputs)]
    assert len(axes) == len(inputs)
    call = lambda *x: case.judged(*x, backend="reference")  # noqa: E731
    whole = measure.results(call, inputs)
    assert len(whole.outputs) == len(operator.outputs or whole.outputs)
    if operator.outputs is None:
        return
    sample = [x if axis is None else x.narrow(axis, 1, 1) for x, axis in zip(inputs, axes, strict=True)]
    alone = measure.results(call, sample, alone=measure.Alone(case.sizes.batch, operator.outputs))
    for one, many, axis in zip(alone.outputs, whole.outputs, operator.outputs, strict=True):
        if axis is not None:
            torch.testing.assert_close(one, many.narrow(axis, 1, 1))
    for i, gradient in whole.gradients.items():
        if axes[i] is not None:
            torch.testing.assert_close(
                alone.gradients[i], gradient.narrow(axes[i], 1, 1), atol=1e-4, rtol=1e-3
            )


# Correctness


def plain_case(change: Callable[[Any], Any] = lambda x: x, name: str = "dyt") -> Case:
    """Return a case whose "triton" backend runs the reference and applies `change` to the result."""
    operator, *_ = [one for one in OPERATORS if one.name == name]

    def call(s: Any) -> Callable[..., Any]:
        real = operator.call(s)

        def either(*x: Tensor, backend: str) -> Any:
            found = real(*x, backend="reference")
            return found if backend == "reference" else change(found)

        return either

    fields = {name: getattr(operator, name) for name in operator.__dataclass_fields__}
    return Case(type(operator)(**fields | {"call": call}), "fp32", "tiny")


def raising(error: Exception) -> Callable[[Any], Any]:
    def change(found: Any) -> Any:
        raise error

    return change


class _Drifting:
    """Change the last bit of the result in every second call."""

    calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 2**-23 * (self.calls % 2))


class OutOfResources(Exception):  # noqa: N818 - Triton's name
    pass


FAULTS = {
    "nothing": (lambda x: x, "right", None),
    "a constant": (lambda x: 1.001 * x, "wrong", "times the bound"),
    "NaN": (lambda x: x / 0 * 0, "wrong", "inf times the bound"),
    "bits": (_Drifting(), "wrong", "two runs"),
    "the batch": (lambda x: x * (1 + 2**-23 * (len(x) > 1)), "wrong", "alone"),
    "an error": (raising(RuntimeError("CUDA error: misaligned address\nmore")), "error", "misaligned"),
    "an error without words": (raising(ValueError()), "error", "no message"),
    "no kernel": (raising(NotImplementedError("its kernels take less")), "unsupported", "take less"),
    "memory": (raising(torch.OutOfMemoryError("out of memory")), "memory", "out of memory"),
    "memory in Triton's words": (
        raising(RuntimeError("Triton Error [CUDA]: out of memory")),
        "memory",
        "CUDA",
    ),
    "memory of a library": (
        raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")),
        "memory",
        "CUBLAS",
    ),
    "memory of the host": (raising(MemoryError()), "memory", "MemoryError"),
    "shared memory": (raising(OutOfResources("out of resource: shared memory")), "refused", "shared"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_found_and_named(name: str):
    change, status, words = FAULTS[name]
    found = measure.judged(plain_case(change), "triton", Pretended())
    assert found["status"] == status
    assert (found["reason"] is None) == (words is None)
    assert words is None or words in found["reason"]
    assert "\n" not in str(found["reason"])
    json.dumps(found, allow_nan=False)


def test_a_statistic_that_is_accurate_by_luck_is_judged_by_other_inputs_too():
    """With an input of ones, plain PyTorch in bf16 is exact by chance, so the bound is too small.

    With other inputs, plain PyTorch shows its typical error.
    """

    def call(x: Tensor) -> Tensor:
        return (x if x.dtype == torch.float64 else x.bfloat16().to(x.dtype)).sum(0)

    def others(seed: int) -> list[Tensor]:
        return [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))]

    inputs = [torch.ones(6, 4)]
    for error, right in ((0.004, True), (0.04, False)):
        found = measure.Found([call(inputs[0]) + error], measure.results(call, inputs).gradients)
        assert measure.ratios(found, call, inputs)["output 0"] > 1
        assert (measure.ratios(found, call, inputs, redrawn=others)["output 0"] <= 1) == right


def test_pytorchs_own_products_are_not_asked_for_the_same_bits():
    assert measure.judged(plain_case(_Drifting()), "torch", Pretended())["status"] == "right"


@pytest.mark.parametrize(("kind", "status"), [("found", "wrong"), ("refused", "wrong")])
def test_what_the_device_reports_counts(kind: str, status: str):
    device = Pretended()
    getattr(device, kind).append("a race")
    found = measure.judged(plain_case(), "triton", device)
    assert (found["status"], found["reason"]) == (status, "a race")
    assert measure.judged(plain_case(), "triton", device)["status"] == "right"


def test_landmarks_are_judged_as_sets():
    wrong = plain_case(lambda x: x.flip(0), "select_landmarks")
    assert measure.judged(wrong, "triton", Pretended())["status"] == "wrong"
    twice = plain_case(lambda x: x * 0, "select_landmarks")
    assert "inf" in measure.judged(twice, "triton", Pretended())["reason"]
    other_order = plain_case(lambda x: x.flip(-1), "select_landmarks")
    assert measure.judged(other_order, "triton", Pretended())["status"] == "right"


# Timing


def test_every_implementation_is_timed_in_both_directions():
    names = ("reference", "triton", "eager")
    times = measure.timed(plain_case(), names, Pretended(), 0.5)["milliseconds"]
    assert times == dict.fromkeys(("forward", "backward"), dict.fromkeys(names, 0.5))
    only = measure.timed(plain_case(name="select_landmarks"), names, Pretended(), 0.5)["milliseconds"]
    assert set(only) == {"forward"}
    with pytest.raises(RuntimeError):
        measure.timed(plain_case(raising(RuntimeError("broken"))), names, Pretended(), 0.5)
    case = plain_case(raising(RuntimeError("broken")))
    assert measure.timed(case, ["reference"], Pretended(), 0.5)["milliseconds"]["forward"] == {
        "reference": 0.5
    }


def test_eager_runs_the_reference_without_operators():
    seen: list[str] = []

    class Recording(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    case = plain_case()
    for direction in ("forward", "backward"):
        step = measure._step(case.call, case.inputs(), "reference", direction)
        with Recording():
            step()
        assert any("srm" in name for name in seen)
        seen.clear()
        with Recording():
            measure._step(case.call, case.inputs(), "eager", direction)()
        assert seen
        assert not any("srm" in name for name in seen)
        seen.clear()


def test_the_reference_is_compiled_with_its_gradients(monkeypatch):
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda graph: compiled.append(graph) or graph)
    case = plain_case()
    step = measure._step(case.call, case.inputs(), "compiled", "backward")
    plain = measure._step(case.call, case.inputs(), "reference", "backward")()
    for one, other in zip(step(), plain, strict=True):
        torch.testing.assert_close(one, other)
    assert "srm" not in compiled[0].code


class _Event:
    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _Event.clock

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


def test_a_cuda_device_is_timed_by_events_in_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(verdicts, "key_of_cuda", lambda index: KEY)
    order: list[str] = []

    def step(name: str, durations: list[float]) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            _Event.clock += durations[len(order) % len(durations)]

        return run

    device = CudaDevice(0)
    steps = {"one": step("one", [5.0]), "two": step("two", [1.0, 1.0, 40.0])}
    found = device.times(steps, 0.1)
    assert found["one"] == 5.0
    assert found["two"] in (1.0, 40.0)
    assert order[:6] == ["one"] * 3 + ["two"] * 3
    rest = order[6:]
    assert rest == ["one", "two"] * (len(rest) // 2)
    assert target.FEWEST <= len(rest) // 2 - 1 <= target.MOST


# Devices that cannot run kernels


def test_each_reason_for_not_running_is_named(monkeypatch, capsys):
    monkeypatch.setattr(devices, "triton_missing", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(cuda_missing())
    assert command.main([]) == 2
    assert "built without CUDA" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    old = "The NVIDIA driver on your system is too old (found version 11040)."

    def init() -> None:
        raise RuntimeError(old)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert old in str(cuda_missing())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    for name, words in (
        ("cuda", "NVIDIA Old has compute capability 7.5; the kernels need 8.0"),
        ("cuda:3", "the number of CUDA devices is 1"),
        ("cuda:x", "expected cuda or cuda:NUMBER"),
        ("cpu", "expected a CUDA device"),
        ("nowhere:device", "no such device"),
        ("json:device", "no such device"),
        ("json:loads", "no such device"),
        ("os:getcwd", "returned a str; expected a Device"),
        (":x", "no such device"),
        ("cuda:-1", "expected cuda or cuda:NUMBER"),
    ):
        with pytest.raises(CannotRunError, match=words):
            open_device(name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(devices, "interpreting", lambda: True)
    with pytest.raises(CannotRunError, match="TRITON_INTERPRET"):
        open_device("cuda")
    monkeypatch.setattr(devices, "interpreting", lambda: False)
    assert open_device("cuda").key.device == "NVIDIA Old"
    monkeypatch.setattr(devices, "triton_missing", lambda: "Triton is not installed")
    with pytest.raises(CannotRunError, match="Triton is not installed"):
        open_device("cuda")


# The command, with prepared answers instead of child processes


class Answers:
    """Replace the child processes: record each request and return a prepared answer."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, answer: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer = answer
        monkeypatch.setattr(command, "open_device", lambda name: Pretended())
        monkeypatch.setattr(command, "ask_all", self._all)
        monkeypatch.setattr(command, "Worker", lambda device: self)

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        self.asked.append(request)
        return self.answer(request)

    def alone(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        return self.ask(request | {"alone": True}, seconds)

    def _all(self, device: str, requests: Any, count: int, seconds: float, done: Any) -> None:
        for number, request in enumerate(requests):
            done(number, self.ask(request, seconds))

    def close(self) -> None:
        pass


TIMES = {"triton": 1.0, "reference": 2.0, "eager": 4.0}


def fine(request: dict[str, Any]) -> dict[str, Any]:
    if request["part"] == "right":
        return {"status": "right", "reason": None, "ratio": 0.25}
    times = {name: TIMES[name] for name in request["backends"]}
    return {"milliseconds": {"forward": times, "backward": times}}


ONLY = ["--only", "dyt", "rms_scale", "--dtypes", "bf16", "fp32", "--quick"]


def kept() -> verdicts.Verdict:
    verdict, reason = verdicts.load(KEY)
    assert verdict is not None, reason
    return verdict


def test_an_interrupted_run_is_resumed_and_decides_nothing_before(monkeypatch, capsys):
    stop_at = 3

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["part"] == "fast" and request["dtype"] == "fp32":
            raise KeyboardInterrupt
        if request["part"] == "right" and len(answers.asked) > stop_at:
            raise KeyboardInterrupt
        return fine(request)

    answers = Answers(monkeypatch, answer)
    assert command.main(ONLY) == 130
    assert len(kept().rows) == stop_at
    assert kept().unfinished == {(name, dtype) for name in ("dyt", "rms_scale") for dtype in ("bf16", "fp32")}
    stop_at = 100
    answers.asked.clear()
    assert command.main(ONLY) == 130
    assert len([one for one in answers.asked if one["part"] == "right"]) == 8 - 3
    # Only rms_scale in bf16 is finished.
    assert ("rms_scale", "bf16") not in kept().unfinished
    assert ("dyt", "bf16") in kept().unfinished
    answers.answer = fine
    answers.asked.clear()
    assert command.main(ONLY) == 0
    assert {one["part"] for one in answers.asked} == {"fast"}
    assert kept().unfinished == frozenset()
    assert len(kept().rows) == 8
    answers.asked.clear()
    assert command.main(ONLY) == 0
    assert answers.asked == []
    assert command.main([*ONLY, "--again"]) == 0
    assert len(answers.asked) == 16
    assert "interrupted" in capsys.readouterr().err


def test_a_stale_verdict_is_said_and_measured_anew(monkeypatch, capsys):
    old = verdicts.Verdict(KEY._replace(torch="1.0"))
    verdicts.save(old)
    Answers(monkeypatch, fine)
    assert command.main(ONLY) == 0
    assert "torch was 1.0" in capsys.readouterr().out
    assert len(kept().rows) == 8


@pytest.mark.parametrize("wide", ["small", "large"])
def test_a_narrower_run_after_an_interrupted_one_finishes_what_it_measures(wide: str, monkeypatch, capsys):
    def interrupted(request: dict[str, Any]) -> dict[str, Any]:
        if request["part"] == "fast" and request["operator"] == "rms_scale" and request["shape"] == wide:
            raise KeyboardInterrupt
        return fine(request)

    full = ["--only", "dyt", "rms_scale", "--dtypes", "fp32"]
    answers = Answers(monkeypatch, interrupted)
    assert command.main(full) == 130
    answers.answer = fine
    assert command.main([*full, "--quick", "--only", "dyt"]) == 0
    assert kept().unfinished == {("rms_scale", "fp32")}
    assert "Not finished" in (out := capsys.readouterr().out)
    assert "measures the rest: rms_scale in fp32\n" in out
    assert command.main([*full, "--quick"]) == 0
    assert "Not finished" not in capsys.readouterr().out
    assert kept().unfinished == frozenset()
    assert all(verdicts.is_done(row) for row in kept().rows)
    answers.asked.clear()
    assert command.main(full) == 0
    assert {one["shape"] for one in answers.asked} >= {wide}
    assert len(kept().rows) == 2 * len(FAMILY)


@pytest.mark.parametrize("status", ["error", "wrong"])
def test_a_fault_at_another_shape_counts_and_is_tried_again(status: str, monkeypatch, capsys):
    """A full run finds a fault at shape "large" and is interrupted. A quick run, which omits this shape, follows.

    The quick run still reports the fault. It runs the case again if the status is "error", but not if it is "wrong".
    """

    def interrupted(request: dict[str, Any]) -> dict[str, Any]:
        if request["part"] == "right" and (request["operator"], request["shape"]) == ("dyt", "large"):
            return {"status": status, "reason": "out of luck", "ratio": None}
        if request["part"] == "fast":
            raise KeyboardInterrupt
        return fine(request)

    full = ["--only", "dyt", "rms_scale", "--dtypes", "fp32"]
    answers = Answers(monkeypatch, interrupted)
    assert command.main(full) == 130
    answers.answer = lambda request: interrupted(request) if request["part"] == "right" else fine(request)
    capsys.readouterr()
    answers.asked.clear()
    assert command.main([*full, "--quick"]) == 1
    assert "dyt [triton] fp32 large: out of luck" in (out := capsys.readouterr().out)
    assert ("dyt fp32 large" in out) == (status == "error")
    asked = [one["shape"] for one in answers.asked if one["part"] == "right"]
    assert set(asked) == ({"large"} if status == "error" else set())
    assert command.main([*full, "--quick", "--only", "rms_scale"]) == 0, "of another operator"
    answers.answer = fine
    assert command.main([*full, "--quick", *(["--again"] if status == "wrong" else [])]) == 0
    assert not verdicts.faults(kept().rows)
    assert kept().unfinished == frozenset()


def test_an_older_row_keeps_its_date(monkeypatch):
    Answers(monkeypatch, fine)
    assert command.main(ONLY) == 0
    aged = [row | {"measured": "2020-01-01"} for row in kept().rows]
    aged[0] = aged[0] | {"milliseconds": {}}  # timed by the next run
    verdicts.save(verdicts.Verdict(KEY, tuple(aged)))
    assert command.main([*ONLY, "--only", "dyt", "rms_scale", "tau_loss"]) == 0
    dates = {verdicts.identity(row): row["measured"] for row in kept().rows}
    assert {dates.pop(verdicts.identity(row)) for row in aged[1:]} == {"2020-01-01"}
    assert {name for name, *_ in dates} == {aged[0]["operator"], "tau_loss"}
    assert min(dates.values()) > "2025"


HANG = {"status": "timeout", "reason": "no answer within 3 s"}


def test_what_goes_wrong_while_it_is_timed_is_a_row(monkeypatch, capsys):
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        hangs = request["part"] == "fast" and request["operator"] == "dyt" and "triton" in request["backends"]
        return HANG if hangs else fine(request)

    Answers(monkeypatch, answer)
    assert command.main(ONLY) == 1
    assert {row["status"] for row in kept().rows if row["operator"] == "dyt"} == {"timeout"}
    out = capsys.readouterr().out
    assert "while it was timed: no answer within 3 s" in out
    assert "4 of 8 cases are not right" in out


@pytest.mark.parametrize("name", ["reference", "eager", "compiled"])
def test_a_yardstick_that_fails_is_named_and_no_fault_of_the_kernel(name: str, monkeypatch, capsys):
    monkeypatch.setitem(TIMES, "compiled", 0.5)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return HANG if request["part"] == "fast" and name in request["backends"] else fine(request)

    answers = Answers(monkeypatch, answer)
    assert command.main([*ONLY, "--compile"]) == 0
    assert f"{name} was not timed: no answer within 3 s" in capsys.readouterr().out
    for row in kept().rows:
        assert row["status"] == "right"
        assert set(row["milliseconds"]["backward"]) == TIMES.keys() - {name}
    assert all(len(one["backends"]) == 1 for one in answers.asked if one.get("alone"))


@pytest.mark.parametrize("status", verdicts.PASSING)
def test_what_may_be_the_environments_fault_is_tried_again_alone(status: str, monkeypatch):
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        crowded = request["part"] == "right" and not request.get("alone")
        return {"status": status, "reason": "a reason", "ratio": None} if crowded else fine(request)

    Answers(monkeypatch, answer)
    assert command.main([*ONLY, "--jobs", "1"]) == 0
    assert {row["status"] for row in kept().rows} == {"right"}


@pytest.mark.parametrize("status", [*verdicts.PASSING, "wrong", "refused", "unsupported"])
def test_the_next_run_asks_again_what_may_have_been_the_environments_fault(status: str, monkeypatch):
    answers = Answers(monkeypatch, lambda request: {"status": status, "reason": "a reason", "ratio": None})
    command.main(ONLY)
    assert {row["status"] for row in kept().rows} == {status}
    answers.asked.clear()
    answers.answer = fine
    command.main(ONLY)
    again = status in verdicts.PASSING
    assert len([one for one in answers.asked if one["part"] == "right"]) == (8 if again else 0)
    assert {row["status"] for row in kept().rows} == {"right" if again else status}


def test_where_no_kernel_can_run_an_earlier_verdict_stays_whole(monkeypatch, capsys):
    answers = Answers(monkeypatch, fine)
    assert command.main(ONLY) == 0
    before = kept()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        raise CannotRunError("no trivial Triton kernel can run: Failed to find C compiler")

    answers.answer = answer
    assert command.main([*ONLY, "--again"]) == 2
    assert "Failed to find C compiler" in capsys.readouterr().err
    assert kept() == before


def test_rows_as_json_are_those_of_the_export(tmp_path: Path, monkeypatch, capsys):
    Answers(monkeypatch, fine)
    path = tmp_path / "rows.jsonl"
    assert command.main([*ONLY, "--json", "--export", str(path)]) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert len(rows) == len(kept().rows) > 0
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]
    assert f"wrote {path}" in shown.err
    assert "Speedup over" in shown.err


@pytest.fixture
def handler(number: signal.Signals, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Set a signal's handler before the command runs. Under nohup, the tests would otherwise ignore SIGHUP."""
    before = signal.signal(number, request.param)
    yield request.param
    signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("handler", [signal.SIG_DFL], indirect=True)
def test_signals_interrupt_as_ctrl_c_does(number: signal.Signals, handler: Any, monkeypatch, capsys):
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        os.kill(os.getpid(), number)
        return fine(request)

    Answers(monkeypatch, answer)
    assert command.main(ONLY) == 128 + number
    assert "the next run resumes from here" in capsys.readouterr().err
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("handler", [signal.SIG_IGN], indirect=True)
def test_a_signal_that_nohup_ignores_stays_ignored(number: signal.Signals, handler: Any):
    with command._interrupting(number):
        assert signal.getsignal(number) is handler


def test_reasons_are_one_printable_line():
    assert command._short("one\ntwo\x1b[2J \udc80 three") == "one two [2J   three"


def test_an_output_of_few_characters_gets_others_in_their_place(folder: Path):
    code = "from srm_kernels.verify import table; table.tolerate(); print('2.00' + chr(215) + chr(0xdc80))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "2.00??\n"


def test_what_is_not_supported_or_lacks_memory_is_no_fault(monkeypatch, capsys):
    statuses = {"dyt": "unsupported", "rms_scale": "memory"}
    Answers(
        monkeypatch, lambda r: {"status": statuses[r["operator"]], "reason": "a reason " * 100, "ratio": None}
    )
    assert command.main([*ONLY, "--jobs", "1"]) == 0
    assert max(len(row["reason"]) for row in kept().rows) == command.LONGEST
    shown = capsys.readouterr().out
    assert "not supported" in shown
    assert "out of memory" in shown
    assert "right" not in shown.rpartition("fp32")[2]


def test_wrong_options_are_one_sentence(monkeypatch, capsys):
    Answers(monkeypatch, fine)
    assert command.main(["--only", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert command.main(["--only", "landmark_solve", "--dtypes", "bf16"]) == 2
    assert "select no case" in capsys.readouterr().err


# Tables


def test_the_summary_has_geometric_means_and_the_worst_status(monkeypatch, capsys):
    row = {
        "operator": "dyt",
        "backend": "triton",
        "dtype": "bf16",
        "shape": "odd",
        "sizes": [1],
        "status": "right",
        "reason": None,
        "ratio": 0.5,
        "milliseconds": {"forward": {"triton": 1.0, "reference": 8.0, "eager": 4.0}},
    }
    rows = [row, row | {"shape": "small", "milliseconds": {"forward": {"triton": 1.0, "reference": 1.0}}}]
    text = "\n".join(table.summary(rows))
    assert "right, 2.00× / –" in text
    assert "4.00×" in table.result(rows[0])
    assert "wrong" in "\n".join(table.summary([*rows, row | {"shape": "large", "status": "wrong"}]))
    assert table.left(2, 10, 4.0) == "2/10, about 16 s left"
    assert table.left(0, 10, 4.0) == "0/10"


# Child processes


def test_a_child_answers_until_an_error(monkeypatch, tmp_path):
    case = plain_case(raising(RuntimeError("broken")))
    fine_case = plain_case()
    given = iter([fine_case, case, fine_case])
    monkeypatch.setattr(child, "case_of", lambda *names: next(given))
    request = {"part": "right", "backends": ["triton"], "operator": "dyt", "dtype": "fp32", "shape": "tiny"}
    with (tmp_path / "answers").open("w") as answers:
        child.serve(Pretended(), iter([json.dumps(request)] * 3), answers)  # type: ignore[arg-type]
    found = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert [one.get("status") for one in found] == [None, "right", "error"]


SLEEPER = "import sys, time; print('{\"ready\": true}', flush=True); sys.stdin.readline(); "


@pytest.fixture
def child_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], workers.Worker]:
    """Return a function that makes a worker whose child process runs the given code."""
    started = subprocess.Popen

    def worker(code: str) -> workers.Worker:
        monkeypatch.setattr(
            workers.subprocess, "Popen", lambda _, **options: started([sys.executable, "-c", code], **options)
        )
        return workers.Worker("cuda")

    return worker


def test_a_child_that_hangs_is_ended_with_those_it_started(child_code, tmp_path):
    beside = tmp_path / "pid"
    code = (
        SLEEPER + f"import subprocess; p = subprocess.Popen(['sleep', '100']); "
        f"open({str(beside)!r}, 'w').write(str(p.pid)); time.sleep(100)"
    )
    worker = child_code(code)
    assert worker.ask({}, 1.5) == {"status": "timeout", "reason": "no answer within 1.5 s"}
    command = Path(f"/proc/{beside.read_text()}/cmdline")
    deadline = time.monotonic() + 20  # /proc lists a killed process until the kernel removes it
    while runs(command) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(command)


def runs(command: Path) -> bool:
    """Return whether a process is alive, from its file /proc/PID/cmdline.

    The file of a dead process does not exist, and the file of a zombie is empty.
    """
    try:
        return bool(command.read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "SIGABRT"),
        ("import os; sys.stderr.write('a\\nlast words\\n'); os._exit(3)", "exit code 3: last words"),
    ],
)
def test_a_child_that_dies_says_how(code: str, words: str, child_code):
    found = child_code(SLEEPER + code).ask({}, 20)
    assert found["status"] == "crashed"
    assert words in found["reason"]


def test_where_no_child_can_start_the_command_cannot_run(child_code, monkeypatch, tmp_path):
    count = tmp_path / "count"
    code = f"import sys; open({str(count)!r}, 'a').write('x'); "
    with pytest.raises(CannotRunError, match=r"no trivial Triton kernel can run: .*no device"):
        child_code(code + "sys.exit('no device')").ask({}, 20)
    assert count.read_text() == "xx"
    with pytest.raises(CannotRunError, match="no C compiler"):
        child_code('print(\'{"status": "error", "reason": "no C compiler"}\')').ask({}, 20)
    monkeypatch.setattr(workers, "START_SECONDS", 0.5)
    with pytest.raises(CannotRunError, match="not ready"):
        child_code("import time; time.sleep(50)").ask({}, 20)


def test_a_request_that_is_asked_alone_has_a_process_of_its_own(child_code):
    code = "import json, os, sys; print('{\"ready\": true}', flush=True)\n"
    code += "for line in sys.stdin: print(json.dumps({'pid': os.getpid()}), flush=True)"
    worker = child_code(code)
    found = [worker.ask({}, 20)["pid"], worker.alone({}, 20)["pid"], worker.ask({}, 20)["pid"]]
    worker.close()
    assert len(set(found)) == 3


def test_a_child_that_cannot_launch_a_trivial_kernel_says_so(tmp_path, monkeypatch):
    def probe(self: Device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(Pretended, "probe", probe)
    with (tmp_path / "answers").open("w") as answers:
        child.serve(Pretended(), iter(["{}"]), answers)  # type: ignore[arg-type]
    (line,) = (tmp_path / "answers").read_text().splitlines()
    assert json.loads(line) == {"status": "error", "reason": "RuntimeError: Failed to find C compiler"}


PARENT = """
import sys
from srm_kernels.verify import workers
start = workers.subprocess.Popen
workers.subprocess.Popen = lambda command, **options: start([sys.executable, "-c", {child!r}], **options)
workers.ask_all("cuda", [{{}}] * 2, 2, 100, print)
"""
HUNG = """
import os, sys, time
from pathlib import Path
from srm_kernels.verify import child
def open_device(name):
    Path({folder!r}, str(os.getpid())).touch()
    time.sleep(100)
child.open_device = open_device
child.main("cuda")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not end a child with its parent")
def test_a_hung_child_ends_with_its_parent(tmp_path):
    hung = HUNG.format(folder=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(child=hung)])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    children = [Path(f"/proc/{path.name}/cmdline") for path in tmp_path.iterdir()]
    assert len(children) == 2
    while any(map(runs, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, children))


def test_requests_are_shared_by_workers_and_an_error_of_the_parent_ends_all(child_code):
    echo = "import sys; print('{\"ready\": true}', flush=True)\nfor line in sys.stdin: print(line, end='', flush=True)"
    child_code(echo)
    found: dict[int, Any] = {}
    workers.ask_all("cuda", [{"number": i} for i in range(7)], 3, 20, lambda i, a: found.update({i: a}))
    assert found == {i: {"number": i} for i in range(7)}

    def failing(number: int, answer: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.ask_all("cuda", [{}] * 7, 2, 20, failing)


# python -m srm_kernels


def test_without_a_command_backends_are_a_table(capsys):
    assert program.main([]) == 0
    out = capsys.readouterr().out
    for name, status in srm_kernels.backends().items():
        assert name in out
        assert status.reason in out


def test_env_says_what_a_report_needs(capsys):
    assert program.main(["env"]) == 0
    out = capsys.readouterr().out
    for word in (
        torch.__version__,
        verdicts.sources_digest(),
        "driver",
        "triton",
        str(verdicts.cache_folder()),
    ):
        assert word in out


def test_other_commands_are_refused(capsys):
    assert program.main(["measure"]) == 2
    assert "usage" in capsys.readouterr().err
    assert program.main(["--help"]) == 0
    assert "verify" in capsys.readouterr().out
    assert program.main(["verify", "--help"]) == 0
    assert "--quick" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--jobs", "-1"], ["--jobs", "0"], ["--limit", "nan"], ["--limit", "-1"]])
def test_numbers_that_would_measure_nothing_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert command.main([*words]) == 2
    assert "expected a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "file/rows.jsonl"])
def test_a_place_that_cannot_hold_the_rows_is_refused_before_anything_is_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "Run", None)
    words = ["--device", "bench.ptx.verify:sm_89", "--export", str(tmp_path / name)]
    assert command.main(words) == 2
    assert "expected the path of a file" in capsys.readouterr().err
