"""Test `bench.attacks`, and that the overheads of PGD in the committed rows are within the limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import attacks

COMMITTED = sorted((Path(__file__).parents[2] / "bench/results/cpu").glob("attacks-*.jsonl"))
PGD = {
    f"pgd {objective} {norm}" for objective in ("mse", "drift", "pair_inversion") for norm in ("linf", "l2")
}


class Counted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.passes = []

    def forward(self, images):
        self.passes.append(torch.is_grad_enabled() and images.requires_grad)
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("name", sorted(attacks.plans(torch.rand(2, 3, 4, 4), torch.rand(2), 3)))
def test_bare_passes_are_those_of_the_attack(name):
    images = torch.rand(2, 3, 4, 4)
    plan = attacks.plans(images, torch.tensor([0.0, 1.0]), 3)[name]
    attacked, plain = Counted(), Counted()
    plan.attack(attacked, lambda: None)
    attacks.bare(plain, images, forward=plan.forward, backward=plan.backward)(lambda: None)
    assert sorted(attacked.passes) == sorted(plain.passes)


def test_the_least_time_is_that_of_each_part():
    calls = [attacks.Timed(9.0, [1.0, 4.0, 2.0]), attacks.Timed(9.0, [3.0, 1.0, 2.5])]
    assert attacks.least(calls) == 1 + 1 + 2
    parts = attacks.timed(lambda tick: [tick(), sum(range(10**6)), tick()], torch.device("cpu")).parts
    assert len(parts) == 3
    assert parts[1] > max(parts[0], parts[2])


def test_it_writes_rows_with_the_machine(tmp_path, capsys):
    chosen = ["--image-size", "32", "--batch", "2", "--steps", "2", "--repeats", "2", "--device", "cpu"]
    chosen += ["--necks", "srm", "none", "--attacks", "pgd", "--backends", "torch", "reference"]
    attacks.main([*chosen, "--out", str(tmp_path / "rows.jsonl")])
    header, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert {"device", "torch", "commit", "threads", "steps"} <= set(header)
    assert {row["attack"] for row in rows} >= PGD
    assert {(row["neck"], row["backend"]) for row in rows} == {
        ("srm", "torch"),
        ("srm", "reference"),
        ("none", None),
    }
    assert all(row["images_steps_per_second"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def committed(path: Path) -> dict[tuple[str, ...], dict[str, dict[str, Any]]]:
    """Return the rows of a file in nested dictionaries, by (backbone, image size, neck, backend) and then by attack."""
    header, *rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert not header["commit"].endswith("+")
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        subject = tuple(row[name] for name in ("backbone", "image_size", "neck", "backend"))
        found.setdefault(subject, {})[row["attack"]] = row
    return found


def test_every_form_of_pgd_was_measured_on_several_models():
    whole = {
        subject[0] for path in COMMITTED for subject, rows in committed(path).items() if rows.keys() >= PGD
    }
    assert len(whole) > 1


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_committed_rows_keep_the_limit(path):
    for subject, rows in committed(path).items():
        measured = rows.keys() & PGD
        assert measured
        assert all(rows[name]["overhead"] <= attacks.LIMITS["cpu"] for name in measured), subject
