"""Tests of `srm-iqa profile` at a tiny size: every flag, and sweeps in which some cases cannot run."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from srm_kernels import backends, choice
from srm_kernels.registration import running
from srm_model import SRMConfig
from srm_model.cli import main
from srm_model.profiling import Case, Effort, Subject, Sweep, article_cases, cases
from srm_model.profiling import sweep as sweep_module
from srm_model.profiling.ceilings import Ceilings
from srm_model.profiling.memory import timeline
from srm_model.profiling.results import append, latest, newest, one_machine, read
from srm_model.profiling.stages import REST, stage_times
from srm_model.profiling.tables import number, shares_table

TINY = ["--set=channels=16", "--set=heads=2", "--set=rank=4", "--set=pool_size=2", "--device", "cpu"]
QUICK = [
    "--backbone",
    "test_convnext",
    "--repeats",
    "3",
    "--warmup",
    "1",
    "--seconds",
    "1",
    "--small-ceilings",
]
CONFIG = SRMConfig(channels=16, heads=2, rank=4, pool_size=2)
CPU = torch.device("cpu")


def profile(out: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main(["profile", *QUICK, *TINY, "--no-progress", "--out", str(out), *arguments]) == 0
    return read(out / "cpu" / "neck.jsonl")


def test_every_direction_and_neck(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    directions, necks = ["forward", "backward", "step"], ["srm", "quadratic", "none"]
    rows = profile(tmp_path, "--resolution", "32", "--direction", *directions, "--backend", "torch")
    assert [(row["direction"], row["neck"]) for row in rows] == list(itertools.product(directions, necks))
    for row in rows:
        assert row["error"] is None
        assert 0 < row["milliseconds"]["p20"] <= row["milliseconds"]["p50"] <= row["milliseconds"]["p80"]
        assert row["milliseconds"]["count"] == 3
        assert row["memory"]["above"] > 0
        assert row["memory"]["allocated"] == row["memory"]["above"] + row["memory"]["held"]
        assert row["bandwidth_share"] > 0
        assert row["launches"] is None
        assert row["config"] == {"channels": 16, "heads": 2, "rank": 4, "pool_size": 2}
        assert row["label"].endswith("(channels=16, heads=2, rank=4, pool_size=2)")
        assert (row["solve_share"] is None) == (row["neck"] != "srm")
        assert (row["stages"] is None) == (row["direction"] != "forward")
    by = {(row["direction"], row["neck"]): row for row in rows}
    for neck in necks:
        forward, backward, step = (by[direction, neck] for direction in directions)
        assert forward["macs"] == backward["macs"] == step["macs"]
        assert forward["work_macs"] < backward["work_macs"] == step["work_macs"]
        # AdamW's moments are two more copies of every parameter.
        weights = 4 * forward["parameters"]
        assert 2 * weights <= step["memory"]["held"] - backward["memory"]["held"] < 2 * weights + 4096
    printed = capsys.readouterr().out
    assert "MAC = 1 multiply-add" in printed
    assert "not measured" in printed
    assert "GMAC formula" in printed


def test_json_has_the_measured_rows_and_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = profile(tmp_path, "--resolution", "32", "--backend", "torch", "--json")
    shown = capsys.readouterr()
    found = [json.loads(line) for line in shown.out.splitlines()]
    assert shown.err == f"rows: {tmp_path / 'cpu' / 'neck.jsonl'}\n"
    assert [row for row in found if row["table"] == "cases"] == [{"table": "cases", **row} for row in rows]
    compared = [row for row in found if row["table"] == "shares"]
    by = {row["label"]: row["typical"] for row in rows}
    quadratic = next(label for label in by if label.startswith("quadratic"))
    assert [row["neck"] for row in compared] == [label for label in by if label != quadratic]
    for row in compared:
        assert row["neck_ms"] == by[row["neck"]]
        assert row["neck_of_quadratic"] == by[row["neck"]] / by[quadratic]
        assert (row["resolution"], row["model_ms"], row["neck_share"]) == (32, None, None)
    table = shares_table(rows)[1]
    assert [line[5] for line in table] == [row["neck"] for row in compared]
    assert [line[-4:] for line in table] == [
        [number(row["neck_of_quadratic"]), "–", "–", "–"] for row in compared
    ]


def test_other_dtypes_batches_and_backends(tmp_path: Path):
    common = ["--part", "model", "--resolution", "32", "--dtype", "bf16", "--neck", "srm", "--set=heads=1"]
    rows = profile(tmp_path, *common, "--batch", "1", "2", "--backend", "reference", "torch")
    if backends()["triton"].available:
        rows = profile(tmp_path, *common, "--backend", "triton")  # appended; slow in the interpreter
        assert {row["backend"] for row in rows} == {"reference", "torch", "triton"}
    assert all(row["error"] is None for row in rows)
    steps = ["sources", "key sides", "query sides", "merge"]
    for row in rows:
        assert list(row["stages"]) == ["backbone", *steps, "gate", "head", REST]
        assert min(row["stages"].values()) >= 0
    one, two = (next(row for row in rows if row["batch"] == batch) for batch in (1, 2))
    assert one["macs"] == two["macs"]
    assert two["work_macs"] == 2 * one["work_macs"]


def test_the_backend_none_follows_the_verdict_and_the_kernels_are_those_of_the_timed_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found: list[dict[str, Any]] = []
    plain = choice.ran
    monkeypatch.setattr(
        choice, "ran", lambda device, named, ran: found.append(dict(ran)) or plain(device, named, ran)
    )
    (row,) = profile(tmp_path, "--resolution", "32", "--neck", "srm", "--backend", "none")
    assert (row["error"], row["backend"], row["label"].split(" (")[0]) == (None, None, "srm [default]")
    assert "CUDA devices only" in row["kernels"]
    assert f"kernels: {row['kernels']}" in capsys.readouterr().out
    subject = Subject(
        Case("neck", "test_convnext", "srm", None, 32, 1, "fp32", "forward"), CONFIG, torch.device("cpu")
    )
    with running() as called:
        subject.call()
    assert found == [called]
    assert "rms_scale" not in called, "which the calibration runs"


def test_every_flag_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """All flags are accepted together. The test fails if the help lists a flag that the test does not use."""
    (tmp_path / "config.json").write_text(json.dumps({"rank": 8, "gain_cap": 2.0}))
    sizes = ["--resolution", "32", "--batch", "2", "--dtype", "fp16", "--direction", "step"]
    which = ["--article", "--part", "model", "--neck", "srm", "--backend", "torch", *sizes]
    more = ["--traceback", "--json", "--trace", "--memory", "--config", str(tmp_path / "config.json")]
    given = [*which, *more]
    (row,) = {row["part"]: row for row in profile(tmp_path, *given)}.values()
    assert row["error"] is None
    found = (row["part"], row["neck"], row["backend"], row["resolution"], row["batch"], row["dtype"])
    assert (*found, row["direction"]) == ("model", "srm", "torch", 32, 2, "fp16", "step")
    assert row["config"] == {"channels": 16, "heads": 2, "rank": 4, "pool_size": 2, "gain_cap": 2.0}
    name = "model-test_convnext-srm-torch-32-2-fp16-step.json"
    assert all((tmp_path / "cpu" / f"{kind}-{name}").is_file() for kind in ("trace", "memory"))
    capsys.readouterr()
    main(["profile", "--help"])
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help"}
    used = {word.split("=")[0] for word in [*QUICK, *TINY, "--no-progress", "--out", *given]}
    assert known == {word for word in used if word.startswith("--")}


def test_the_articles_rows_and_traces(tmp_path: Path):
    rows = profile(
        tmp_path,
        *[
            "--article",
            "--resolution",
            "32",
            "--backend",
            "torch",
            "--neck",
            "srm",
            "--trace",
            "--memory",
        ],
    )
    found = [(row["part"], row["neck"], row["batch"], row["dtype"], row["direction"]) for row in rows]
    assert found == [
        ("neck", "srm", 1, "bf16", "forward"),
        ("model", "srm", 4, "bf16", "step"),
    ]
    name = "neck-test_convnext-srm-torch-32-1-bf16-forward"
    events = json.loads((tmp_path / "cpu" / f"trace-{name}.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"sources", "key_sides", "query_sides", "merge", "gate"} <= names
    lines = (tmp_path / "cpu" / f"trace-{name}.txt").read_text().splitlines()
    assert len(lines) == 12  # a heading, ten operators and the total
    assert any("srm::pooled_links" in line for line in lines)
    assert not any("sides" in line for line in lines)
    shares = [float(line.split()[1].rstrip("%")) for line in lines[1:-1]]
    assert shares == sorted(shares, reverse=True)
    memory = json.loads((tmp_path / "cpu" / f"memory-{name}.json").read_text())
    assert memory["peak"]["bytes"] == max(value for _, value in memory["points"])
    # The same call is measured twice, and its allocations are deterministic.
    assert memory["peak"]["bytes"] == rows[0]["memory"]["above"]
    assert {"query_sides", "gate"} <= {r["name"] for r in memory["ranges"]}
    whole = "trace-model-test_convnext-srm-torch-32-4-bf16-step.json"
    names = {e.get("name") for e in json.loads((tmp_path / "cpu" / whole).read_text())["traceEvents"]}
    assert {"backbone", "neck.query_sides", "head"} <= names


def test_links_in_the_pooled_form_have_stages_and_ranges_of_their_steps(tmp_path: Path):
    """In the pooled form, each step runs for all links together, so that the stages are the steps.

    The quadratic neck calls its links one by one, so that each link is a stage.
    """
    steps = ["sources", "key sides", "query sides", "merge"]
    rows = profile(
        tmp_path, "--resolution", "32", "--neck", "srm", "quadratic", "--backend", "reference", "--trace"
    )
    assert [row["error"] for row in rows] == [None, None]
    pooled, called = (row["stages"] for row in rows)
    assert list(pooled) == [*steps, "gate", REST]
    assert min(pooled[name] for name in steps) > 0
    assert list(called) == ["align", "link 4→3", "link 4→2", "link 4→1", "gate", REST]
    for neck, names in (
        ("srm", {"sources", "key_sides", "query_sides", "merge", "gate"}),
        ("quadratic", {"links.4to3", "links.4to1.query", "align.0", "gate"}),
    ):
        (trace,) = (tmp_path / "cpu").glob(f"trace-neck-*-{neck}-*.json")
        events = json.loads(trace.read_text())["traceEvents"]
        assert {e["name"] for e in events if e.get("cat") == "user_annotation"} >= names
    subject = Subject(
        Case("neck", "test_convnext", "srm", "reference", 32, 1, "fp32", "forward"), CONFIG, CPU
    )
    stage_times(subject.module, subject.call, CPU, Effort(1, 1, 1.0))
    assert not any(part._forward_hooks for part in subject.module.modules())  # no hooks are left


def test_without_narrowing_the_article_means_512_pixels():
    found = article_cases(necks=["quadratic"], backbones=["pvt_v2_b2"])
    assert found == [
        Case("neck", "pvt_v2_b2", "quadratic", None, 512, 1, "bf16", "forward"),
        Case("model", "pvt_v2_b2", "quadratic", None, 512, 4, "bf16", "step"),
    ]


def test_what_cannot_run_is_a_row_and_the_sweep_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    honest = Subject._forward

    def starved(self: Subject) -> object:
        if self.case.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(self)

    monkeypatch.setattr(Subject, "_forward", starved)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = profile(
        tmp_path,
        *["--backbone", "test_convent", "test_convnext", "--neck", "srm", "--backend", "torch", "triton"],
        *["--resolution", "32", "--batch", "2", "1"],
    )
    assert [(row["backbone"], row["batch"], row["backend"]) for row in rows] == [
        (backbone, batch, backend)
        for backbone in ("test_convent", "test_convnext")
        for batch in (2, 1)
        for backend in ("torch", "triton")
    ]
    assert all("expected the name of a timm model" in row["error"] for row in rows[:4])
    assert rows[4]["error"].startswith("out of memory: CUDA out of memory")
    assert "backend 'triton' cannot run" in rows[5]["error"]
    assert rows[6]["error"] is None
    assert "cannot run" in rows[7]["error"]
    assert capsys.readouterr().out.count("not measured: ") == 7


def test_nothing_measured_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["profile", *QUICK, *TINY, "--no-progress", "--out", str(tmp_path)]
    assert main([*arguments, "--backbone", "no_such_model"]) == 2
    assert "no_such_model" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    honest = sweep_module.peak
    calls = itertools.count()

    def interrupted(*args: Any, **more: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return honest(*args, **more)

    monkeypatch.setattr(sweep_module, "peak", interrupted)
    arguments = ["profile", *QUICK, *TINY, "--resolution", "32", "--no-progress", "--out", str(tmp_path)]
    assert main([*arguments, "--backend", "torch"]) == 130
    assert [row["neck"] for row in read(tmp_path / "cpu" / "neck.jsonl")] == ["srm", "quadratic"]
    captured = capsys.readouterr()
    assert "interrupted; finished results are kept" in captured.err
    assert "srm [torch]" in captured.out


def test_bad_arguments_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, sentence in [
        (["--resolution", "0"], "0 is less than 1"),
        (["--seconds", "-1"], "-1 is not a finite number above 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--set", "rank=0"], "config rank=0"),
        (["--warmup", "-1"], "-1 is less than 0"),
    ]:
        assert main(["profile", *arguments, "--device", "cpu", "--out", str(tmp_path)]) == 2
        assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_training_step_moves_the_parameters():
    """The timed step updates the parameters, and its gradients reach the pyramid."""
    subject = Subject(Case("neck", "test_convnext", "srm", "torch", 32, 2, "fp32", "step"), CONFIG, CPU)
    before = [parameter.detach().clone() for parameter in subject.module.parameters()]
    reached = set()
    for index, features in enumerate(subject.inputs[0]):
        features.register_post_accumulate_grad_hook(lambda _, index=index: reached.add(index))
    subject.call()
    moved = [bool((a != b).any()) for a, b in zip(before, subject.module.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    assert reached >= {2, 3}


@pytest.mark.parametrize("direction", ["backward", "step"])
def test_gradients_are_a_part_of_every_peak(direction: str):
    """The peak of every call includes the gradients.

    If the gradients of one call were kept, the next call would not allocate them, and its peak would be lower.
    """
    subject = Subject(Case("neck", "test_convnext", "none", None, 32, 1, "fp32", direction), CONFIG, CPU)
    gradients = 4 * sum(parameter.numel() for parameter in subject.module.parameters())
    subject.call()  # the first call of a step creates the optimiser state
    peaks = [max(total for _, total in timeline(subject.call)) for _ in range(3)]
    assert min(peaks) >= gradients
    assert len(set(peaks)) == 1


def test_counts_are_made_once_for_all_backends(monkeypatch: pytest.MonkeyPatch):
    made = []
    honest = sweep_module.make_module
    monkeypatch.setattr(sweep_module, "make_module", lambda *args: made.append(1) or honest(*args))
    sweep = Sweep(CPU, CONFIG, Effort(1, 3, 1.0), small=True)
    wanted = cases(
        backbones=["test_convnext"], necks=["srm"], backend_names=["torch", "reference"], resolutions=[32]
    )
    rows = list(sweep.rows(wanted))
    assert [row["error"] for row in rows] == [None, None]
    assert len(made) == 1


def test_a_ceiling_is_the_best_that_was_seen(monkeypatch: pytest.MonkeyPatch):
    seen = iter([Ceilings(5.0, 1.0), Ceilings(3.0, 2.0), Ceilings(4.0, 1.5)])
    monkeypatch.setattr(sweep_module, "ceilings", lambda *_, **__: next(seen))
    sweep = Sweep(CPU, CONFIG)
    assert [sweep._roof("fp32") for _ in range(3)] == [(5.0, 1.0), (5.0, 2.0), (5.0, 2.0)]


def row_of(commit: str, **more: Any) -> dict[str, Any]:
    about = {"device": "a card", "torch": "2.13.0", "commit": commit, **more}
    return {"machine": about}


def test_rows_of_mixed_machines_or_versions_are_refused():
    assert one_machine([row_of("a"), row_of("a")])["device"] == "a card"
    with pytest.raises(ValueError, match=r"cannot share a table: commit \(a, b\) differ"):
        one_machine([row_of("a"), row_of("b")])
    with pytest.raises(ValueError, match="torch"):
        one_machine([row_of("a"), row_of("a", torch="2.11.0")])
    with pytest.raises(ValueError, match="does not say which machine"):
        one_machine([{}])
    with pytest.raises(ValueError, match="no rows"):
        one_machine([])


def test_the_last_run_and_the_last_measurement_count():
    rows = [{**row_of("a"), "n": 1}, {**row_of("b"), "n": 1, "v": 1}, {**row_of("b"), "n": 2}]
    rows.append({**row_of("b"), "n": 1, "v": 2})
    assert [row["n"] for row in latest(rows)] == [1, 2, 1]
    assert [row.get("v") for row in newest(latest(rows), ["n"])] == [2, None]
    assert latest([]) == []


def test_a_torn_line_costs_itself_alone(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    append(path, {"n": 1, "x": float("nan")})
    with path.open("a") as file:
        file.write('{"n": 2, "x"')
    append(path, {"n": 3})
    assert read(path) == [{"n": 1, "x": None}, {"n": 3}]
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "absent.jsonl")
