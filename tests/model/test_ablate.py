"""Tests of a study, from its file to its tables and figures. A second call runs only what is missing."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from srm_model import SRMConfig, build_model
from srm_model.checkpoint import read_card
from srm_model.cli import main
from srm_model.cli.options import named_folders
from srm_model.data.synthesize import synthesize
from srm_model.files import claimed, read_json, write_json
from srm_model.necks import NECKS
from srm_model.reports import write_study
from srm_model.reports.records import Records, StudyResults, over_seeds
from srm_model.reports.study_figures import _BUILDERS
from srm_model.reports.study_tables import markdown, tables
from srm_model.reports.text import model_text, signed
from srm_model.study.context import Context
from srm_model.study.file import ABLATIONS, DEFENCES, FULL, Model, Study, read_study, slug
from srm_model.study.jobs import Job, jobs
from srm_model.study.measuring import swapped
from srm_model.study.sharing import CLAIMS, claim_of, share

STUDY = """
title = "A small study"
backbones = ["test_convnext"]
necks = ["none", "srm"]
seeds = [0, 1]
sweep = true
audit = 2
audit_seeds = [1]
audit_swaps = ["no links"]

[data]
noise = "set"

[config]
channels = 16
heads = 2
rank = 4
pool_size = 2
image_size = 32
batch_size = 8
epochs = 1
attack_steps = 2
attack_restarts = 1
attack_sweep_steps = [1, 2]
landmarks = "leverage"

[attacks]
linf = ["4/255"]
images = 4

[swaps]
"as trained" = {}
"no links" = { beta = 0 }

[[ablations]]
rows = ["uniform landmarks", "baseline, gradient-norm training"]

[[ablations]]
seeds = [1]
audit = true
l2 = [10]

[ablations.overrides]
"no key norm" = { qk_norm = "both" }

[[stronger]]
models = ["srm", "no key norm"]
linf = ["4/255"]
config = { attack_steps = 4, attack_restarts = 2 }
"""


BASELINE = "baseline, gradient-norm training"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with a dataset and a study file."""
    folder = tmp_path_factory.mktemp("study")
    photographs = folder / "photographs"
    photographs.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photographs / f"{number}.png")
    synthesize(
        folder / "set", photographs=photographs, types=(1, 8), levels=(1, 3, 5), metric="ssim", progress=False
    )
    (folder / "study.toml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def out(place: Path) -> Path:
    """Run the study: interrupt it twice, then finish it."""
    out = place / "out"
    arguments = ["ablate", str(place / "study.toml"), "--out", str(out), "--device", "cpu", "--no-progress"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srm_model.study.jobs.sweep_jobs", _interrupt)
        assert main(arguments) == 130  # while the jobs are listed, before any measurement
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srm_model.study.measuring.diagnosed", _interrupt)
        assert main(arguments) == 130
    assert [line["kind"] for line in Records(out).lines] == ["clean"] * 2
    assert main(arguments) == 0
    return out


def _interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_every_result_is_a_line_with_all_that_it_depends_on(out: Path):
    lines = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    counts: dict[str, int] = {}
    for line in lines:
        counts[line["kind"]] = counts.get(line["kind"], 0) + 1
    # Where the counts come from:
    # - clean: two necks and two variants on two seeds, and one variant on one seed
    # - diagnostics: every clean model with an SRM neck
    # - attack: one budget for each clean model; for the full neck, also the L2 budget of the last variant, on two seeds
    # - swap: two swaps on two seeds
    # - audit: both necks, one swap and one variant, on one seed
    # - stronger: two models, on the one seed that both have
    # - sweep: two necks on two seeds
    # - transfer: one pair of models for each seed
    assert counts == {
        "clean": 9,
        "diagnostics": 5,
        "attack": 11,
        "swap": 4,
        "audit": 4,
        "stronger": 2,
        "sweep": 4,
        "transfer": 2,
    }
    for line in lines:
        assert {"identity", "values", "seconds", "created", "device", "versions", "commit"} <= line.keys()
        assert line["versions"]["torch"]
        assert SRMConfig.from_dict(line["identity"]["config"]).rank == 4
    attack = next(line for line in lines if line["kind"] == "attack")
    assert (attack["identity"]["norm"], attack["identity"]["eps"], attack["values"]["images"]) == (
        "linf",
        4 / 255,
        4,
    )
    assert set(attack["values"]["attacks"]) == {"pgd_mse", "pgd_drift", "pgd_pair_inversion", "transfer"}
    seeds = {
        (line["identity"]["seed"], line["identity"]["config"]["seed"])
        for line in lines
        if line["kind"] == "clean"
    }
    assert seeds == {(0, 0), (1, 1)}


def test_overrides_reach_the_trained_models(out: Path):
    variants = {
        line["identity"]["variant"]: read_json(out / line["values"]["folder"] / "config.json")
        for line in Records(out).of("clean")
    }
    assert variants["uniform landmarks"]["config"]["landmarks"] == "uniform"
    assert variants["no key norm"]["config"]["qk_norm"] == "both"
    regularised = variants["baseline, gradient-norm training"]
    assert (regularised["neck"], regularised["config"]["weight_gradient"]) == ("none", 1e-3)
    assert variants["full"]["config"]["landmarks"] == "leverage"


def test_a_group_of_ablations_has_its_own_seeds_and_budgets(out: Path):
    found = [
        (line["identity"]["seed"], line["identity"]["norm"], line["identity"]["eps"])
        for line in Records(out).of("attack")
        if line["identity"]["variant"] == "no key norm"
    ]
    assert found == [(1, "l2", 10.0)]


def test_swaps_change_trained_weights_model_and_nothing_else(out: Path):
    lines = Records(out).of("swap")
    same = [line["values"] for line in lines if line["identity"]["swap"] == "as trained"]
    without = [line["values"] for line in lines if line["identity"]["swap"] == "no links"]
    assert [values["moved"]["maximum"] for values in same] == [0.0, 0.0]
    assert all(values["moved"]["maximum"] > 1e-4 for values in without)
    assert all(values["srocc"] == values["trained_srocc"] for values in same)


def test_without_links_nothing_of_the_attention_arrives():
    """With beta = 0, Nyström and quadratic attention give the same maps.

    The tolerance is 8 fp32 eps, relative to the largest entry. With beta = 1, the maps differ by more than 10 times
    the tolerance.
    """
    torch.manual_seed(0)
    config = SRMConfig(channels=16, heads=2, rank=4, pool_size=2, image_size=32)
    model = build_model("test_convnext", config=config)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.calibrate(images)

    def difference(changes: dict[str, Any]) -> float:
        with torch.no_grad():
            maps = model.pyramid(images)
            nystrom, quadratic = (
                swapped(model, {**changes, "neck": neck}).neck(maps, return_pyramid=True).pyramid
                for neck in ("srm", "quadratic")
            )
        return max(
            float((x - y).abs().max() / y.abs().max()) for x, y in zip(nystrom, quadratic, strict=True)
        )

    bound = 8 * torch.finfo(torch.float32).eps
    assert difference({"beta": 0}) <= bound
    assert difference({"beta": 1}) > 10 * bound


def test_a_studys_folder_is_evaluated_whole(out: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(out), "--device", "cpu", "--no-progress"]) == 0
    shown = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[1:] if line}
    recorded = {
        line["values"]["folder"].removeprefix("runs/"): f"{line['values']['srocc']:.3f}".replace("-", "−")
        for line in Records(out).of("clean")
    }
    assert {name: value.replace("-", "−") for name, value in shown.items() if "/" in name} == recorded


def _srm(out: Path, seed: int) -> Path:
    return out / "runs" / "noise" / "test_convnext" / f"seed{seed}" / "srm"


def test_audits_are_of_the_seeds_variants_and_swaps_that_were_asked_for(out: Path):
    lines = Records(out).of("audit")
    audited = [line["identity"] for line in lines]
    assert [(which["neck"], which["seed"], which["variant"], which.get("swap")) for which in audited] == [
        ("none", 1, FULL, None),
        ("srm", 1, FULL, None),
        ("srm", 1, FULL, "no links"),
        ("srm", 1, "no key norm", None),
    ]
    trained, without = (line["values"]["checks"] for line in lines[1:3])
    assert [c["name"] for c in trained] == [c["name"] for c in without]
    assert [c["figure"] for c in trained] != [c["figure"] for c in without]
    for line in lines:
        assert len(line["values"]["checks"]) == 10
        assert line["values"]["passed"] == (not line["values"]["failed"])


def test_trained_models_are_attacked_again_by_a_stronger_attack(out: Path):
    lines = Records(out).of("stronger")
    found = [[line["identity"][key] for key in ("variant", "seed", "suite", "attack")] for line in lines]
    changes = {"attack_steps": 4, "attack_restarts": 2}
    assert found == [[FULL, 1, "paper", changes], ["no key norm", 1, "paper", changes]]
    attacks = _srm(out, 1) / "attacks"
    again = read_json(attacks / "paper-attack-steps-4-attack-restarts-2" / "linf-0.0156863.json")
    own = read_json(attacks / "linf-0.0156863.json")
    assert [(stored["steps"], stored["restarts"]) for stored in (own, again)] == [(2, 1), (4, 2)]
    assert lines[0]["values"]["worst"] == again["worst"] != own["worst"]
    # More steps and restarts find a larger loss.
    assert np.mean(again["attacks"]["pgd_mse"]["loss"]) > np.mean(own["attacks"]["pgd_mse"]["loss"])
    assert main(["report", str(out), "--table", "15"]) == 0
    rows = [
        [cell.strip() for cell in text.split("|")[3:-1]]
        for text in (out / "tables" / "table-15.md").read_text().splitlines()
        if "4 steps, 2 restarts" in text
    ]
    assert [row[0] for row in rows] == ["srm", "srm, no key norm"]
    shown = [f"{stored['worst']['srocc']:.3f}".replace("-", "−") for stored in (own, again)]
    assert rows[0][-2:] == shown
    assert rows[1][-2] == "—"  # this variant was not attacked at that budget before


def test_a_scheduler_lists_jobs_and_does_one(
    place: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def ablate(folder: Path, *options: str) -> tuple[int, list[str], str]:
        arguments = ["ablate", str(place / "study.toml"), "--out", str(folder), "--device", "cpu"]
        code = main([*arguments, "--no-progress", *options])
        shown = capsys.readouterr()
        return code, shown.out.splitlines(), shown.err

    code, names, _ = ablate(tmp_path / "new", "--list")
    assert code == 0
    assert not (tmp_path / "new").exists()
    assert names == ablate(out, "--list")[1]  # the list does not depend on which jobs are done
    assert len(set(names)) == len(names) == 41
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)
    trained, diagnosed = (
        "train-srm-on-test-convnext-noise-seed-0",
        "diagnose-srm-on-test-convnext-noise-seed-0",
    )
    assert {trained, diagnosed} <= set(names)
    new = tmp_path / "new"
    code, shown, told = ablate(new, "--job", diagnosed)
    assert (code, shown) == (2, [])
    assert told == f"srm-iqa ablate: job '{diagnosed}': needs {trained}; run that first\n"
    for expected in ("done", "done already"):
        assert ablate(new, "--job", trained)[:2] == (0, [f"{trained}: {expected}"])
        assert [line["kind"] for line in Records(new).lines] == ["clean"]
    with claimed_elsewhere(new, diagnosed, place):
        code, shown, told = ablate(new, "--job", diagnosed)
        assert (code, shown) == (2, [])
        assert "another process on this machine is doing it" in told
    assert ablate(new, "--job", diagnosed)[:2] == (0, [f"{diagnosed}: done"])
    own, first = (
        next(
            line["values"]
            for line in Records(folder).of("diagnostics")
            if (line["identity"]["variant"], line["identity"]["seed"]) == (FULL, 0)
        )
        for folder in (new, out)
    )
    assert own == first
    assert len(read_json(new / "run.json")["command"]) == 1  # all jobs of a job array share one command
    code, shown, told = ablate(new, "--job", "train-nothing")
    assert (code, shown) == (2, [])
    assert told == (
        "srm-iqa ablate: job 'train-nothing': not in the study; expected a name that --list prints\n"
    )


@contextmanager
def claimed_elsewhere(folder: Path, name: str, place: Path) -> Iterator[None]:
    """Hold the claim on the job of this name in another process."""
    study = read_study(place / "study.toml")
    job = next(job for job in jobs(Context(study, folder, torch.device("cpu"))) if job.name == name)
    context = multiprocessing.get_context("fork")
    holding = context.Event()

    def hold() -> None:
        with claimed(folder / CLAIMS, claim_of(job)):
            holding.set()
            time.sleep(60)

    worker = context.Process(target=hold)
    worker.start()
    assert holding.wait(30)
    yield
    worker.kill()
    worker.join()


def test_jobs_of_one_name_are_refused(place: Path):
    text = (place / "study.toml").read_text().replace('noise = "set"', 'noise = "set"\n"Noise!" = "set"')
    (place / "twice.toml").write_text(text)
    study = read_study(place / "twice.toml")
    with pytest.raises(ValueError, match="have the same name train-none-on-test-convnext-noise-seed-0"):
        jobs(Context(study, place / "nowhere", torch.device("cpu"), progress=False))


def test_the_summary_is_also_json(place: Path, out: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["ablate", str(place / "study.toml"), "--out", str(out), "--device", "cpu", "--no-progress"]
    assert main(arguments) == 0
    text = capsys.readouterr().out.splitlines()
    assert main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert shown.err.splitlines() == text[-1:]
    assert [line.split() for line in text[:-1]] == [
        ["results", "lines"],
        *([row["results"], str(row["lines"])] for row in rows),
    ]
    assert main([*arguments, "--json", "--list"]) == 2
    assert "--json was given with --list, --dry-run or --job, which print no table" in capsys.readouterr().err


def test_every_model_is_attacked_and_audited_with_its_surrogate(place: Path, out: Path):
    for model in read_study(place / "study.toml").models():
        other = NECKS[model.neck].surrogate
        trained = out / "runs" / model.data / model.backbone / f"seed{model.seed}" / other
        attacks = [read_json(path) for path in (out / model.folder / "attacks").rglob("l*.json")]
        assert attacks
        for found in attacks:
            assert found["settings"]["surrogate"] == read_card(trained)["sha256"]
    for line in Records(out).of("audit"):
        checks = {check["name"]: check["passed"] for check in line["values"]["checks"]}
        assert checks["transfer"] is not None, line["identity"]


def test_a_study_without_the_surrogate_leaves_out_the_transfer_attack(place: Path, tmp_path: Path):
    values = tomllib.loads(STUDY)
    study = {key: values[key] for key in ("backbones", "data", "config", "attacks")} | {
        "necks": ["srm"],
        "seeds": [0],
    }
    write_json(place / "alone.json", study)
    assert (
        main(
            ["ablate", str(place / "alone.json"), "--out", str(tmp_path), "--device", "cpu", "--no-progress"]
        )
        == 0
    )
    (attack,) = Records(tmp_path).of("attack")
    assert attack["values"]["incomplete"] == ["transfer"]


def test_weights_that_are_gone_are_trained_again_where_something_needs_them(
    place: Path, out: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["ablate", str(place / "study.toml"), "--out", str(out), "--device", "cpu", "--no-progress"]
    path = out / "results.jsonl"
    lines = path.read_text().splitlines()
    digest = read_json(_srm(out, 0) / "config.json")["sha256"]
    shutil.rmtree(_srm(out, 0))
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == "0 of 41 results are missing\n"
    lost = next(
        text
        for text in lines
        if json.loads(text)["kind"] == "diagnostics" and json.loads(text)["identity"]["seed"] == 0
    )
    path.write_text("\n".join(text for text in lines if text != lost) + "\n")
    assert main([*arguments, "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [text.split()[0] for text in listed] == ["train", "diagnose", "2"]
    assert main(arguments) == 0
    assert read_json(_srm(out, 0) / "config.json")["sha256"] == digest
    again = path.read_text().splitlines()
    assert len(again) == len(lines)
    measured = json.loads(again[-1])
    assert (measured["kind"], measured["values"]) == ("diagnostics", json.loads(lost)["values"])


def test_weights_that_were_lost_and_come_out_otherwise_are_not_taken_for_the_old_ones(
    place: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    path = copy / "results.jsonl"
    lines = path.read_text().splitlines()
    digest = read_json(_srm(copy, 0) / "config.json")["sha256"]
    left = [text for text in lines if not (_srm_of_seed_0(text) and '"kind": "diagnostics"' in text)]
    assert len(left) == len(lines) - 1
    path.write_text("\n".join(text.replace(digest, "0" * 64) for text in left) + "\n")
    shutil.rmtree(_srm(copy, 0))
    arguments = ["ablate", str(place / "study.toml"), "--out", str(copy), "--device", "cpu", "--no-progress"]
    for _ in range(2):  # the second call finds the new weights and must refuse them too
        assert main(arguments) == 2
        assert (
            "its weights were lost, and a repeated training gave different weights" in capsys.readouterr().err
        )
        assert len(path.read_text().splitlines()) == len(left)


def _srm_of_seed_0(text: str) -> bool:
    identity = json.loads(text)["identity"]
    return (identity.get("neck"), identity.get("variant"), identity.get("seed")) == ("srm", FULL, 0)


def test_results_of_another_set_are_not_added_to(
    place: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = tmp_path / "out"
    copy.mkdir()
    shutil.copy(out / "results.jsonl", copy)
    shutil.copytree(place / "set", tmp_path / "set")
    labels = tmp_path / "set" / "mos_with_names.txt"
    first, *rest = labels.read_text().splitlines()
    labels.write_text("\n".join([f"1.5 {first.split()[1]}", *rest]) + "\n")
    study = shutil.copy(place / "study.toml", tmp_path)
    assert main(["ablate", str(study), "--out", str(copy), "--device", "cpu", "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert "its results were measured on another version of the dataset noise (fingerprint " in told
    assert (copy / "results.jsonl").read_text() == (out / "results.jsonl").read_text()


@pytest.mark.forks
def test_processes_share_the_jobs_and_do_each_once(tmp_path: Path):
    models = [Model("d", "b", "srm", FULL, seed, SRMConfig(seed=seed)) for seed in range(3)]

    def job(kind: str, model: Model, *needs: Model) -> Job:
        def measure() -> dict[str, Any]:
            time.sleep(0.1)
            (tmp_path / model.folder).mkdir(parents=True, exist_ok=True)
            write_json(tmp_path / model.folder / "config.json", {"sha256": "0"})
            return {"process": os.getpid(), "sha256": "0"}

        return Job(kind, {"kind": kind, "seed": model.seed}, f"{kind} {model.seed}", measure, (model, *needs))

    listed = [job("clean", model) for model in models]
    listed += [job(kind, model, models[0]) for kind in ("a", "b", "c") for model in models]
    context = multiprocessing.get_context("fork")
    study = Study("", {}, (), (), (), SRMConfig())
    shared = Context(study, tmp_path, torch.device("cpu"), progress=False)
    workers = [context.Process(target=share, args=(listed, shared)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    lines = Records(tmp_path).lines
    assert sorted((line["kind"], line["identity"]["seed"]) for line in lines) == sorted(
        (job.kind, job.identity["seed"]) for job in listed
    )
    assert len({line["values"]["process"] for line in lines}) == 2
    kinds = [(line["kind"], line["identity"]["seed"]) for line in lines]
    for kind, seed in kinds:
        if kind != "clean":
            assert kinds.index(("clean", seed)) < kinds.index((kind, seed))
            assert kinds.index(("clean", 0)) < kinds.index((kind, seed))


@pytest.mark.forks
def test_a_claim_ends_with_its_process(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    holding = context.Event()

    def hold() -> None:
        with claimed(tmp_path / "lock", "job") as mine:
            assert mine
            holding.set()
            time.sleep(60)

    worker = context.Process(target=hold)
    worker.start()
    assert holding.wait(30)
    with claimed(tmp_path / "lock", "job") as mine:
        assert not mine
    with claimed(tmp_path / "lock", "another") as mine:
        assert mine
    worker.kill()
    worker.join()
    with claimed(tmp_path / "lock", "job") as mine:
        assert mine


def test_a_protocol_takes_the_place_of_the_files_keys_for_its_sets(tmp_path: Path):
    path = tmp_path / "study.json"
    values = {
        "data": {"a": "x"},
        "backbones": ["b"],
        "config": {"rank": 8},
        "audit": 3,
        "protocols": {"article": {"for": ["c", "d"], "backbones": ["e", "f"], "config": {}}},
    }
    path.write_text(json.dumps(values))
    own = read_study(path)
    assert (own.data, own.backbones, own.config.rank) == ({"a": str(tmp_path / "x")}, ("b",), 8)
    article = read_study(path, {"c": "here/c", "d": "/there/d"})
    assert article.data == {"c": "here/c", "d": "/there/d"}  # relative to the working directory
    assert (article.backbones, article.config.rank, article.audit) == (("e", "f"), SRMConfig().rank, 3)
    other = read_study(path, {"z": "z"})
    assert (other.data, other.backbones, other.config.rank) == ({"z": "z"}, ("b",), 8)
    with pytest.raises(ValueError, match="the datasets c, z are under different protocols"):
        read_study(path, {"c": "c", "z": "z"})
    with pytest.raises(ValueError, match="--data c: expected NAME=FOLDER"):
        named_folders(["c"])


def test_the_robustness_study_is_valid_under_both_protocols():
    path = EXPERIMENTS / "robustness.toml"
    own = read_study(path)
    assert own.necks == ("none", "quadratic", "srm")
    assert own.budgets == tuple(
        [("linf", n / 255) for n in (0.5, 1.0, 2.0, 4.0)] + [("l2", eps) for eps in (1.25, 2.5, 5.0, 10.0)]
    )
    article = read_study(path, {"tid2013": "t", "koniq10k": "k"})
    assert article.config == SRMConfig(landmarks="leverage")
    assert article.suite == "paper"
    assert list(article.ablations) == [name for name in ABLATIONS if name != "leverage landmarks"]


EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_the_experiments_tables_are_those_of_their_rows():
    folder = EXPERIMENTS / "robustness"
    for table in tables(StudyResults.read(folder)):
        assert (folder / "tables" / f"table-{table.number:02d}.md").read_text() == markdown(table)
    declared = json.loads(json.dumps(read_study(EXPERIMENTS / "robustness.toml").to_dict()))
    stored = read_json(folder / "study.json")
    # A config field that was added after the study was stored has its default value.
    stored["config"] = {**json.loads(json.dumps(SRMConfig().to_dict())), **stored["config"]}
    assert {**declared, "data": None} == {**stored, "data": None}  # only the data folders may differ


NECKS_COMPARED = (  # label on the pages, neck, variant
    ("`none`", "none", FULL),
    ("`quadratic`", "quadratic", FULL),
    ("`srm`", "srm", FULL),
    ("`none`, adversarial", "none", "baseline, adversarial training"),
    ("`quadratic`, adversarial", "quadratic", "quadratic, adversarial training"),
    ("`srm`, adversarial", "srm", "adversarial training"),
)


def lines_of(
    records: Records, kind: str, neck: str, variant: str, budget: tuple[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the results of this kind for a model, at one budget or, if `budget` is None, at all budgets."""
    return [
        line
        for line in records.of(kind)
        if (line["identity"]["neck"], line["identity"]["variant"]) == (neck, variant)
        and budget in (None, (line["identity"].get("norm"), line["identity"].get("eps")))
    ]


def test_the_experiments_page_has_the_figures_of_its_rows():
    """The page has the mean and standard deviation of the SROCC over three seeds, for clean images and every budget.

    For most models, the summary table repeats the first three of these columns. Another table has the SROCC of each
    seed of the adversarially trained models, at the first two budgets.
    """
    records = Records(EXPERIMENTS / "robustness")
    page = (EXPERIMENTS / "robustness" / "README.md").read_text()
    budgets = read_study(EXPERIMENTS / "robustness.toml").budgets
    for label, neck, variant in (
        *NECKS_COMPARED,
        ("`none`, gradient-norm", "none", "baseline, gradient-norm training"),
        ("`srm`, gradient-norm", "srm", "gradient-norm training"),
        ("five links, adversarial", "srm", "five links, adversarial training"),
        ("no links, adversarial", "srm", "no links, adversarial training"),
        ("no links, deepest stage alone, adversarial", "srm", "deepest stage alone, adversarial training"),
    ):
        cells = []
        for norm, eps in ((None, None), *budgets):
            kind = "clean" if norm is None else "attack"
            lines = lines_of(records, kind, neck, variant, None if norm is None else (norm, eps))
            assert len(lines) == 3 or (norm is not None and not lines)
            cells.append(over_seeds(lines, *(("srocc",) if norm is None else ("worst", "srocc"))))
        assert f"| {label} | {' | '.join(cells)} |" in page
        summary = f"| {label} | {' | '.join(cells[:3])} |\n"
        assert summary in page or label in (
            "five links, adversarial",
            "`none`, gradient-norm",
            "`srm`, gradient-norm",
        )
        if label.endswith(", adversarial"):
            by_seed = [
                over_seeds([line], "worst", "srocc")
                for norm, eps in budgets[:2]
                for line in sorted(
                    lines_of(records, "attack", neck, variant, (norm, eps)),
                    key=lambda line: line["identity"]["seed"],
                )
            ]
            assert len(by_seed) == 6
            assert f"| {label.removesuffix(', adversarial')} | {' | '.join(by_seed)} |\n" in page


def test_the_page_on_opinions_has_the_figures_of_its_rows():
    """Compare three tables of the page with the results: the first table, the audits, and the one of `bench.blind`."""
    records = Records(EXPERIMENTS / "opinions")
    page = (EXPERIMENTS / "README.md").read_text()
    study = read_study(EXPERIMENTS / "opinions.toml")
    for label, neck, variant in NECKS_COMPARED:
        for clean in lines_of(records, "clean", neck, variant):
            seed = clean["identity"]["seed"]
            attacked = [
                line
                for line in lines_of(records, "attack", neck, variant)
                if line["identity"]["seed"] == seed
            ]
            cells = [
                over_seeds([clean], "srocc"),
                over_seeds(attacked[:1], "clean", "srocc") if attacked else "—",
            ]
            for norm, eps in study.budgets:
                assert norm == "linf"
                found = [line for line in attacked if line["identity"]["eps"] == eps]
                cells.append(over_seeds(found, "worst", "srocc") if found else "—")
            assert f"| {label} | {seed} | {' | '.join(cells)} |\n" in page
    words = " ".join(page.split())
    variants = {neck: variant for label, neck, variant in NECKS_COMPARED if "adversarial" in label}
    worst = {
        neck: np.array(
            [
                line["values"]["worst"]["srocc"]
                for line in lines_of(records, "attack", neck, variant, ("linf", 1 / 255))
            ]
        )
        for neck, variant in variants.items()
    }
    for other in ("none", "quadratic"):
        difference = worst["srm"] - worst[other]
        assert len(difference) == 3
        first, second, third = difference
        low, high = stats.t.interval(0.95, 2, difference.mean(), difference.std(ddof=1) / 3**0.5)
        assert f"is {first:.2f}, {second:.2f} and {third:.2f} " in words
        interval = f"its 95 % t interval is {low:.2f} to {high:.2f}:".replace("-", "−")
        assert f"is {difference.mean():.2f}, and {interval}" in words
    for line in records.of("audit"):
        failed = ", ".join(line["values"]["failed"]) or "none"
        (check,) = (found for found in line["values"]["checks"] if found["name"] == "derivative")
        assert f" | {100 * check['data']['error']:.1f} | {failed} |\n" in page
    labels = {"srm": "`srm` (checkpoint of the package)", "none": "`none`"}
    compared = (EXPERIMENTS / "checkpoint" / "blind.txt").read_text().splitlines()[3:-1]
    assert len(compared) == 6
    for text in compared:
        name, clean, _, *attacked, _ = re.split(r" {2,}", text)
        line = f"| {labels.get(name, name)} | {' | '.join([clean, *attacked])} |\n".replace("[-", "[−")
        assert line in page


def test_a_second_call_repeats_nothing_and_a_lost_line_is_measured_again(
    place: Path, out: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["ablate", str(place / "study.toml"), "--out", str(out), "--device", "cpu", "--no-progress"]
    path = out / "results.jsonl"
    before = path.read_text()
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == "0 of 41 results are missing\n"
    lines = before.splitlines()
    lost = next(i for i, text in enumerate(lines) if json.loads(text)["kind"] == "sweep")
    # drop one line and append a truncated one
    path.write_text("\n".join([*lines[:lost], *lines[lost + 1 :], lines[0][:50]]) + "\n")
    assert main([*arguments, "--dry-run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2
    assert listed[0].startswith("sweep steps of none on test_convnext, noise, seed 0")
    assert main(arguments) == 0
    again = {json.dumps([line["identity"], line["values"]], sort_keys=True) for line in Records(out).lines}
    first = {
        json.dumps([line["identity"], line["values"]], sort_keys=True) for line in map(json.loads, lines)
    }
    assert again == first


def test_all_tables_are_made_and_their_figures_are_the_lines(out: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(out)]) == 0
    capsys.readouterr()
    page = (out / "report.html").read_text()
    for number in (1, 2, *range(5, 16)):
        text = (out / "tables" / f"table-{number:02d}.md").read_text()
        assert text.startswith(f"### Table {number}. ")
        assert "No results yet" not in text
        assert f"Table {number}. " in page
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1
        assert len(rows) >= 3
    clean = [line["values"] for line in Records(out).of("clean") if line["identity"]["variant"] == "full"]
    mine = [line for line in (out / "tables" / "table-06.md").read_text().splitlines() if "| srm |" in line]
    values = [
        line["values"]["srocc"]
        for line in Records(out).of("clean")
        if (line["identity"]["neck"], line["identity"]["variant"]) == ("srm", "full")
    ]
    mean, spread = np.mean(values), np.std(values, ddof=1)
    expected = f"{mean:.3f} ± {spread:.3f}".replace("-", "−")
    assert f"| {expected} |" in mine[0]
    assert len(clean) == 4
    ablations = (out / "tables" / "table-11.md").read_text()
    cells = {
        row[1].strip("*"): row
        for line in ablations.splitlines()
        if len(row := [cell.strip() for cell in line.split("|")]) > 2
    }
    assert list(cells) == ["Variant", ":---", "full SRM", "uniform landmarks", BASELINE, "no key norm"]
    # The full neck is also attacked at the budget that only one variant has.
    attacked = ["worst SROCC, L∞ ε = 4/255", "Δ", "worst SROCC, L2 ε = 10 at 512²", "Δ"]
    assert cells["Variant"][2:-1] == ["seeds", "clean SROCC", "Δ", *attacked]
    assert [cells[name][2].strip("*") for name in list(cells)[2:]] == ["2", "2", "2", "1"]
    assert cells["no key norm"][5:7] == ["—", "—"]
    assert cells["uniform landmarks"][7:9] == ["—", "—"]
    assert "—" not in cells["no key norm"][7:9]
    assert all(cell in ("—", f"**{cell.strip('*')}**") for cell in cells["full SRM"][1:-1])
    for column in range(3, 9):
        values = {
            name: float(re.split(" ±", row[column].strip("*"))[0].replace("−", "-"))
            for name, row in list(cells.items())[2:]
            if row[column] != "—"
        }
        highest = {name for name, value in values.items() if value == max(values.values())}
        marked = {name for name in values if cells[name][column].startswith("**")}
        assert marked - {"full SRM"} <= highest
        assert marked & highest
    assert "<strong>full SRM</strong>" in page
    # One variant has only one seed. Its difference is relative to the full neck with the same seed.
    srocc = {
        (line["identity"]["variant"], line["identity"]["seed"]): line["values"]["srocc"]
        for line in Records(out).of("clean")
        if line["identity"]["neck"] == "srm"
    }
    assert srocc["full", 0] != srocc["full", 1]
    assert cells["no key norm"][4].strip("*") == signed(srocc["no key norm", 1] - srocc["full", 1])
    assert main(["report", str(out), "--table", "8"]) == 0
    assert "| noise | test_convnext | srm | L∞ ε = 4/255 |" in capsys.readouterr().out


def test_tables_of_a_study_are_also_json(out: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(out), "--table", "8", "11", "--json"]) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    budgets = [row["budget"] for row in rows if row["table"] == 8 and row["neck"] == "srm"]
    assert "L∞ ε = 4/255" in budgets
    (row,) = (row for row in rows if row.get("Variant") == "no key norm")
    (line,) = (
        line for line in (out / "tables" / "table-11.md").read_text().splitlines() if "no key norm" in line
    )
    assert list(row.values()) == [11, *(cell.strip(" *") for cell in line.split("|")[1:-1])]
    assert list(row)[:5] == ["table", "Variant", "seeds", "clean SROCC", "clean SROCC, Δ"]
    assert "### Table 8." in shown.err
    assert main(["report", str(out), "--json"]) == 2
    assert "--json was given without --table" in capsys.readouterr().err


def test_a_line_from_before_a_config_field_existed_is_still_found(tmp_path: Path):
    records = Records(tmp_path)
    config = SRMConfig(rank=5).to_dict()
    older = {key: value for key, value in config.items() if key != "smoothing_sigma"}
    records.add({"kind": "clean", "identity": {"seed": 0, "config": older}, "values": {}})
    assert Records(tmp_path).find("clean", {"seed": 0, "config": config}) is not None
    assert Records(tmp_path).find("clean", {"seed": 0, "config": {**config, "smoothing_sigma": 0.5}}) is None
    assert Records(tmp_path).find("clean", {"seed": 0, "config": {**config, "rank": 6}}) is None


def test_tables_are_in_the_studys_order_whatever_was_done_first(out: Path, tmp_path: Path):
    shutil.copy(out / "study.json", tmp_path)
    lines = (out / "results.jsonl").read_text().splitlines()
    made = []
    for order in (lines, lines[::-1]):
        (tmp_path / "results.jsonl").write_text("\n".join(order) + "\n")
        made.append([table.rows for table in write_study(tmp_path, table_numbers=(1, 6, 7, 8, 11, 12))[0]])
    assert made[0] == made[1]


def test_a_table_without_results_says_what_it_needs(tmp_path: Path, place: Path):
    study = read_study(place / "study.toml")
    (tmp_path / "study.json").write_text(json.dumps({**study.to_dict(), "ablations": {}}))
    made, written = write_study(tmp_path, table_numbers=(1, 2, *range(5, 15)))
    empty = {table.number for table in made if not table.rows}
    assert empty == {1, 2, 6, 7, 8, 10, 11, 12, 13, 14}
    assert all("No results yet: this table needs" in table.note for table in made if table.number in empty)
    assert len(written) == 24


def test_figures_are_drawn_as_vectors_and_pixels(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(out / "results.jsonl", tmp_path)
    shutil.copy(out / "study.json", tmp_path)
    out = tmp_path
    study = Records(out)  # figure 6 needs a second budget, which the study lacks
    for line in study.of("attack"):
        study.add({**line, "identity": {**line["identity"], "eps": 2 * line["identity"]["eps"]}})
    assert main(["report", str(out), "--figure", "3", "4", "5", "6"]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.split()]
    assert names == [f"figure-{number}.{suffix}" for number in (3, 4, 5, 6) for suffix in ("svg", "png")]
    for number in (3, 4, 5, 6):
        with Image.open(out / "figures" / f"figure-{number}.png") as picture:
            assert picture.width > 1000
        drawing = (out / "figures" / f"figure-{number}.svg").read_text()
        assert ("test_convnext" in drawing) == (number < 6)  # figure 6 labels models by neck and variant only
    for label in ("PGD steps", "worst SROCC over the suite"):
        assert label in drawing + (out / "figures" / "figure-5.svg").read_text()
    assert ">uniform landmarks<" not in drawing
    assert "srm, uniform landmarks" in drawing
    before = (out / "figures" / "figure-5.svg").read_bytes()
    assert main(["report", str(out), "--figure", "5"]) == 0
    assert (out / "figures" / "figure-5.svg").read_bytes() == before


def test_twenty_series_are_told_apart_without_colour(out: Path, tmp_path: Path):
    from matplotlib.figure import Figure

    shutil.copy(out / "study.json", tmp_path)
    records = Records(tmp_path)
    for line in Records(out).lines:
        for number in range(20):
            identity = {**line["identity"], "backbone": f"b{number}"}
            if line["kind"] == "attack":  # two L∞ budgets; two L2 budgets for the last two backbones only
                for norm, eps in (("linf", 0.1), ("linf", 0.2), ("l2", 1.0), ("l2", 2.0)):
                    if identity["variant"] == FULL and (norm == "linf" or number > 17):
                        records.add({**line, "identity": {**identity, "norm": norm, "eps": eps}})
            elif line["kind"] in ("diagnostics", "sweep") and line["identity"]["neck"] == "srm":
                records.add({**line, "identity": identity})
    results = StudyResults.read(tmp_path)
    for number, series in ((3, 20), (4, 20), (5, 20), (6, 40)):
        figure = Figure()
        assert _BUILDERS[number](results, figure)
        looks: dict[str, set[Any]] = {}
        for axis in figure.axes:
            for shown, label in zip(*axis.get_legend_handles_labels(), strict=True):
                line = getattr(shown, "lines", [shown])[0]
                looks.setdefault(label, set()).add((line.get_linestyle(), line.get_marker()))
        assert len(looks) == series == len(figure.legends[0].get_texts())
        assert all(len(look) == 1 for look in looks.values())  # the same in every panel
        # There are 36 combinations of line style and marker, so 40 series must share some.
        assert len({look for found in looks.values() for look in found}) == min(series, 36)


@pytest.mark.parametrize("seeds", [(0, 1), (0,)])
def test_the_figure_of_budgets_is_of_the_models_with_the_most_seeds(
    out: Path, tmp_path: Path, seeds: tuple[int, ...]
):
    from matplotlib.figure import Figure

    shutil.copy(out / "study.json", tmp_path)
    records = Records(tmp_path)
    for line in Records(out).of("attack"):
        identity = line["identity"]
        if identity["norm"] == "linf" and identity["seed"] in (
            seeds if identity["variant"] == FULL else (0,)
        ):
            for eps in (0.1, 0.2):
                records.add({**line, "identity": {**identity, "eps": eps}})
    figure = Figure()
    assert _BUILDERS[6](StudyResults.read(tmp_path), figure)
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    ablated = {"srm, uniform landmarks", "none, gradient-norm training"}
    assert shown == {"none", "srm"} | (ablated if len(seeds) == 1 else set())
    assert figure.axes[0].get_ylabel().endswith(", 2 seeds") == (len(seeds) == 2)


def test_what_is_not_there_is_a_sentence(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, words in (
        (["--table", "3"], "table 3: expected one of 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"),
        (["--figure", "2"], "figure 2: expected one of 3, 4, 5, 6"),
    ):
        assert main(["report", str(out), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--table", "1"]) == 2
    assert "has no study.json" in capsys.readouterr().err


def test_a_model_is_named_by_each_word_once():
    assert model_text("srm", "full") == "srm"
    assert model_text("none", "baseline, adversarial training") == "none, adversarial training"
    assert model_text("quadratic", "quadratic, adversarial training") == "quadratic, adversarial training"
    assert model_text("srm", "no links") == "srm, no links"


def test_mean_and_deviation_over_seeds():
    lines = [{"values": {"x": value}} for value in (0.1, 0.2, 0.6)]
    assert over_seeds(lines, "x") == "0.300 ± 0.265"
    assert over_seeds(lines[:1], "x") == "0.100"
    assert over_seeds([*lines, {"values": {"x": None}}], "x") == "— ± —"


def test_all_ablations_of_the_article_are_named_and_valid(tmp_path: Path):
    path = tmp_path / "study.json"
    values = {"data": {"a": "x"}, "backbones": ["b"], "ablations": {"rows": "all"}, "config": {"rank": 16}}
    path.write_text(json.dumps(values))
    study = read_study(path)
    assert list(study.ablations) == [name for name in ABLATIONS if name != "uniform landmarks"]
    assert study.ablations["a quarter of the landmarks"] == {"rank": 4}
    assert {study.config.replace(**changes) for changes in study.ablations.values()}
    assert len({slug(name) for name in [*ABLATIONS, *DEFENCES]}) == len(ABLATIONS) + len(DEFENCES)
    assert all(re.fullmatch(r"[a-z0-9-]+", slug(name)) for name in ABLATIONS)
    assert study.data == {"a": str(tmp_path / "x")}
    assert study.budgets == (("linf", 1 / 255), ("linf", 4 / 255), ("l2", 2.5), ("l2", 10.0))
    assert study.audit_seeds == study.seeds[:1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"date": 1}, "unknown key date"),
        ({"data": {}}, "data is missing or empty"),
        ({"backbones": "b"}, "backbones is 'b': expected list"),
        ({"necks": ["other"]}, "necks is"),
        ({"seeds": [-1]}, "seeds is"),
        ({"config": {"ranks": 1}}, "unknown config key ranks"),
        ({"attacks": {"linf": ["a"]}}, "budget 'a': expected a number or a fraction"),
        ({"attacks": {"l3": [1]}}, "unknown key of attacks l3"),
        ({"attacks": {"suite": "all"}}, "suite is 'all'"),
        ({"audit": True}, "audit is True: expected int"),
        ({"audit_swaps": ["no links"]}, "audit_swaps has no links: expected names of swaps"),
        ({"audit_seeds": 1}, "audit_seeds is 1: expected list"),
        (
            {"seeds": [1, 2], "audit_seeds": [1, 3]},
            "audit_seeds is [1, 3]: expected some of the seeds, [1, 2]",
        ),
        ({"ablations": {"audit": 1}}, "audit of ablations is 1: expected true or false"),
        ({"swaps": {"s": {"neck": "none"}}}, "swap 's': neck 'none' is not one of srm, quadratic"),
        ({"swaps": {"s": {"beta": "x"}}}, "beta 'x': expected a number"),
        ({"swaps": {"s": {"rank": 0}}}, "rank=0"),
        (
            {
                "protocols": {"p": {"backbones": ["b"]}},
            },
            "protocol 'p': expected a table with the key `for`",
        ),
        ({"protocols": {"p": {"for": ["c"], "date": 1}}}, "unknown key date"),
        ({"ablations": [1]}, "ablations has 1: expected a table"),
        ({"ablations": {"rows": ["no neck"]}}, "ablation 'no neck': expected 'all' or some of"),
        ({"ablations": {"overrides": {"full": {}}}}, "expected a name other than 'full'"),
        ({"ablations": {"overrides": {"a": {"rank": 0}}}}, "rank=0"),
        ({"ablations": {"overrides": {"a": {"neck": "x"}}}}, "neck 'x' is not one of"),
        ({"stronger": [1]}, "stronger has 1: expected a table"),
        ({"stronger": [{"models": ["full"]}]}, "models of stronger is ['full']: expected some of none, srm"),
        (
            {"stronger": [{"models": ["srm"], "seeds": [3], "linf": [0], "suite": "extended"}]},
            "seeds of stronger is [3]: expected some of the seeds that all its models have, [0, 1, 2]",
        ),
        (
            {"stronger": [{"models": ["srm"], "suite": "extended"}]},
            "stronger has no budget: expected linf or l2",
        ),
        (
            {"stronger": [{"models": ["srm"], "linf": [0]}]},
            "stronger changes nothing: expected another suite",
        ),
        (
            {"stronger": [{"models": ["srm"], "linf": [0], "config": {"rank": 2}}]},
            "unknown attack setting rank; expected some of attack_",
        ),
        ({"stronger": [{"models": ["srm"], "linf": [0], "config": {"attack_steps": 0}}]}, "attack_steps=0"),
        ({"transfer": [["b", "c"]]}, "expected two of the study's backbones"),
        # Errors that would otherwise be found only after training.
        ({"backbones": ["b", "b"]}, "backbones is ['b', 'b']: expected distinct strings"),
        ({"backbones": [1]}, "backbones is [1]: expected distinct strings"),
        ({"data": {"a": 3}}, "data has a = 3: expected a name and a folder"),
        ({"seeds": [0, 0]}, "seeds is [0, 0]: expected distinct integers"),
        ({"seeds": [True]}, "seeds is [True]: expected distinct integers"),
        ({"ablations": {"seeds": 1}}, "seeds is 1: expected list"),
        ({"attacks": {"linf": [4]}}, "eps=4.0 for norm 'linf': expected at most 1"),
        ({"attacks": {"l2": [-1]}}, "eps=-1.0: expected a finite number, zero or more"),
        ({"attacks": {"linf": "4/255"}}, "linf is '4/255': expected list"),
        ({"attacks": {"images": "all"}}, "images is 'all': expected a whole number of 2 or more"),
        ({"attacks": {"images": 1}}, "images is 1: expected a whole number of 2 or more"),
        ({"audit": -3}, "audit is -3: expected a whole number of 2 or more, or 0"),
        (
            {"ablations": {"overrides": {"r 2": {"rank": 2}, "r-2": {"rank": 3}}}},
            "ablations 'r 2' and 'r-2' have the same folder r-2; rename one",
        ),
    ],
)
def test_a_study_that_does_not_fit_is_one_sentence(tmp_path: Path, change: dict[str, Any], words: str):
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"data": {"a": "x"}, "backbones": ["b"], **change}))
    with pytest.raises((ValueError, TypeError), match=re.escape(words)) as caught:
        read_study(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_backbone_that_is_not_there_is_reported_before_training(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = (place / "study.toml").read_text().replace('"test_convnext"', '"test_convnxt"')
    (tmp_path / "study.toml").write_text(text)
    assert main(["ablate", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert "backbone 'test_convnxt': expected the name of a timm model" in capsys.readouterr().err


def test_broken_files_are_one_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a\.toml: no such file"):
        read_study(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("a = [")
    with pytest.raises(ValueError, match=r"a\.toml: not readable as TOML"):
        read_study(tmp_path / "a.toml")


def test_a_neck_without_links_is_trained_and_attacked_and_has_nothing_to_diagnose(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = (
        (place / "study.toml")
        .read_text()
        .replace('"no key norm" = { qk_norm = "both" }', '"none" = { links = [] }')
        .replace('models = ["srm", "no key norm"]', 'models = ["srm"]')
    )
    (place / "links.toml").write_text(text)
    assert (
        main(["ablate", str(place / "links.toml"), "--out", str(tmp_path), "--dry-run", "--device", "cpu"])
        == 0
    )
    asked = [line for line in capsys.readouterr().out.splitlines() if ", none, seed 1" in line]
    assert [line.split()[0] for line in asked] == ["train", "attack", "audit"]
