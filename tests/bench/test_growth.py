"""Test `bench.growth`: exponents of known power laws, crossover points, and the command at a tiny size."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import growth
from bench.growth import EXACT, Sizes, Surface, crossing, fits, guide, main, power_law, surfaces
from srm_model.profiling.results import read

BASE = Sizes(1, 8, 4096, 1024, 64, 32)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, -0.5])
def test_a_power_law_is_found_without_error(exponent: float):
    x = [1, 2, 4, 8, 30]
    fit = power_law(x, [7 * value**exponent for value in x])
    assert fit.exponent == pytest.approx(exponent, abs=1e-12)
    assert fit.error == pytest.approx(0, abs=1e-12)


def test_the_standard_error_is_that_of_least_squares():
    x, y = [1, 10, 100, 1000], [1.0, 20.0, 90.0, 1100.0]
    scipy = pytest.importorskip("scipy.stats")
    expected = scipy.linregress([math.log(v) for v in x], [math.log(v) for v in y])
    fit = power_law(x, y)
    assert (fit.exponent, fit.error) == pytest.approx((expected.slope, expected.stderr))
    assert math.isnan(power_law(x[:2], y[:2]).error)
    for bad in ([1.0], [1.0, 0.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="at least two pairs"):
            power_law(x[: len(bad)], bad)


def test_the_work_itself_grows_as_the_article_says():
    """By the article's eq. 30, the work of Nyström attention is linear in N_q, in N_k, and in N = N_q = N_k.

    The work of exact attention is linear in N_q and in N_k, but quadratic in N.
    """
    large = {
        "N_q": (1 << 20, 1 << 22, 1 << 24),
        "N_k": (1 << 20, 1 << 22, 1 << 24),
        "N": (1 << 16, 1 << 18, 1 << 20),
    }
    for variable, values in large.items():
        for name, expected in ((EXACT, 2.0 if variable == "N" else 1.0), ("nystrom [torch]", 1.0)):
            work = [growth.macs(growth.at(BASE, variable, value), name) for value in values]
            # At these sizes, the constant part of eq. 30 is less than 1 % of the work.
            assert power_law(values, work).exponent == pytest.approx(expected, abs=0.01), (variable, name)
    assert growth.macs(BASE._replace(N_k=16), "nystrom [torch]") == growth.macs(
        BASE._replace(N_k=16, r=16), "nystrom [torch]"
    )


def surface(share: dict[tuple[int, int], float | None]) -> Surface:
    return Surface(sorted({k for k, _ in share}), sorted({b for _, b in share}), share, "nystrom [x]")


def test_a_crossing_is_interpolated_between_loss_and_win():
    found = surface(
        {(100, 1): 2.0, (400, 1): 0.5, (100, 2): 0.9, (400, 2): 0.3, (100, 4): 3.0, (400, 4): 1.2}
    )
    assert crossing(found, 1) == pytest.approx(200)  # the middle on a logarithmic scale
    assert crossing(found, 2) == 100
    assert crossing(found, 4) is None
    said = guide(found)
    assert (
        "use exact attention if N_k is below about 100 to 200. The limit depends on the batch size." in said
    )
    assert "At some batch sizes, exact attention was always faster." in said


def test_a_win_before_a_loss_is_no_crossing():
    found = surface({(100, 1): 0.9, (200, 1): 1.1, (400, 1): 0.8, (800, 1): None})
    assert 200 < crossing(found, 1) < 400


def test_the_guide_claims_no_more_than_was_measured():
    assert "exact attention was faster up to N_k = 400" in guide(surface({(100, 1): 2.0, (400, 1): 1.5}))
    assert "every point measured, N_k = 100" in guide(surface({(100, 1): 0.2, (400, 1): 0.1}))


def rows_of(seconds: Any) -> list[dict[str, Any]]:
    return [
        {
            "variable": "N_k",
            "value": keys,
            **BASE._replace(N_k=keys)._asdict(),
            "implementation": name,
            "milliseconds": {"p50": 1.0},  # disturbed by other processes; `typical` is used
            "typical": seconds(name, keys),
            "memory": {"above": keys},
            "macs": keys,
            "error": None,
        }
        for name, keys in itertools.product((EXACT, "nystrom [x]"), (128, 256, 512))
    ]


def test_rows_become_exponents_and_surfaces():
    rows = rows_of(lambda name, keys: keys**2 if name == EXACT else 200 * keys)
    found = {fit["implementation"]: fit for fit in fits(rows)}
    assert found[EXACT]["time"].exponent == pytest.approx(2)
    assert found["nystrom [x]"]["time"].exponent == pytest.approx(1)
    assert found["nystrom [x]"]["memory"].exponent == pytest.approx(1)
    (one,) = surfaces(rows)
    assert one.share == {(128, 1): 200 / 128, (256, 1): 200 / 256, (512, 1): 200 / 512}
    assert crossing(one, 1) == pytest.approx(200)
    _, lines = growth.crossover_table(one)
    assert "slower" in lines[0][1]
    assert "slower" not in lines[2][1]


QUICK = ["--scale", "tiny", "--device", "cpu", "--seconds", "0.05", "--warmup", "1", "--repeats", "3"]


def test_the_command_measures_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [
        *QUICK,
        "--out",
        str(tmp_path),
        "--variables",
        "N_q",
        "--backends",
        "torch",
        "--note",
        "a look",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "time ∝ x^p" in printed
    assert "B = 2" in printed
    grown, crossed = (read(tmp_path / "cpu" / f"{name}.jsonl") for name in ("growth", "crossover"))
    names = [EXACT, "nystrom [torch]"]
    assert [(row["value"], row["implementation"]) for row in grown] == list(
        itertools.product((32, 64, 128), names)
    )
    assert {(row["N_k"], row["B"]) for row in crossed} == set(itertools.product((16, 64), (1, 2)))
    for row in (*grown, *crossed):
        assert row["error"] is None
        assert row["typical"] > 0
        assert row["note"] == "a look"
        assert row["memory"]["above"] > 0
        assert row["machine"]["torch"] == torch.__version__


def test_what_cannot_run_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def starved(*args: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(growth, "full_attention", starved)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = [*QUICK, "--out", str(tmp_path), "--what", "crossover", "--backends", "torch", "triton"]
    assert main([*arguments, "--direction", "backward", "--dtype", "bf16"]) == 0
    rows = read(tmp_path / "cpu" / "crossover.jsonl")
    told = {row["implementation"]: row["error"] for row in rows}
    assert told[EXACT].startswith("out of memory")
    assert told["nystrom [torch]"] is None
    assert "cannot run" in told["nystrom [triton]"]
    assert all(share is None for found in surfaces(rows) for share in found.share.values())


def test_what_fails_only_while_it_is_timed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    honest, count = growth.peak, itertools.count()

    def failing(*args: Any) -> Any:
        if next(count) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(*args)

    monkeypatch.setattr(growth, "peak", failing)
    arguments = [
        *QUICK,
        "--out",
        str(tmp_path),
        "--what",
        "growth",
        "--variables",
        "B",
        "--backends",
        "torch",
    ]
    assert main(arguments) == 0
    errors = [row["error"] for row in read(tmp_path / "cpu" / "growth.jsonl")]
    assert errors[0] is None
    assert all(error.startswith("out of memory") for error in errors[1:])


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    honest, count = growth.measured, itertools.count()

    def interrupted(*args: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(growth, "measured", interrupted)
    assert main([*QUICK, "--out", str(tmp_path), "--backends", "torch"]) == 130
    found = [row["variable"] for row in read(tmp_path / "cpu" / "growth.jsonl")]
    assert found == ["N_q"] * 6 + ["N_k"] * 6


def test_an_unknown_sweep_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="expected some of N_q"):
        main([*QUICK, "--out", str(tmp_path), "--variables", "N_z"])
