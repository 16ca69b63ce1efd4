"""Tests of the report of a run folder: its values, its warnings, and hostile, missing and broken files."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from srm_model.files import read_json, write_json
from srm_model.reports import bootstrap, write_report
from srm_model.reports.style import STYLE

LINF = "linf-0.00392157"  # 1/255
NOTICE = "The labels come from the metric"


@pytest.fixture(autouse=True)
def _few_replicates(monkeypatch):
    monkeypatch.setattr(bootstrap, "REPLICATES", 200)


def shown(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def edit(path, **changes):
    write_json(path, read_json(path) | changes)


def test_tables_hold_the_figures_of_the_files(run_folder, page):
    folder = run_folder()
    found = page(write_report(folder))
    necks = {neck: read_json(folder / neck / "attacks" / f"{LINF}.json") for neck in ("srm", "none")}
    summary = found.rows("SROCC drop")
    for neck, attacked in necks.items():
        clean, worst = attacked["clean"], attacked["worst"]
        tested = read_json(folder / neck / "evaluation.json")
        assert [neck, shown(tested["srocc"]), shown(tested["plcc"]), "", ""] in summary
        drops = [clean[key] - worst[key] for key in ("srocc", "plcc")]
        share = [
            f"{shown(drop)} ({100 * drop / clean[key]:.0f} %)"
            for drop, key in zip(drops, ("srocc", "plcc"), strict=True)
        ]
        assert [neck, shown(worst["srocc"]), shown(worst["plcc"]), *share] in summary
    every = {row[0]: row[1:] for row in found.rows("srm SROCC")}
    titles = {
        "PGD, squared error": "pgd_mse",
        "PGD, transferred": "transfer",
        "PGD, pair inversion": "pgd_pair_inversion",
    }
    for title, name in titles.items():
        assert every[title] == [
            shown(necks[n]["attacks"][name][k]) for n in ("srm", "none") for k in ("srocc", "plcc")
        ]
    assert every["clean"] == [shown(necks[n]["clean"][k]) for n in ("srm", "none") for k in ("srocc", "plcc")]
    assert every["worst"] == [shown(necks[n]["worst"][k]) for n in ("srm", "none") for k in ("srocc", "plcc")]


def test_budgets_are_told_apart_and_in_order(run_folder, page):
    budgets = (("l2", 2.5), ("linf", 4 / 255), ("linf", 0.25 / 255))
    found = page(write_report(run_folder(budgets=budgets)))
    groups = [row[0] for row in found.rows("srm SROCC") if len(row) == 1]
    assert groups == [
        "L∞ ε = 0.25/255, 48 images",
        "L∞ ε = 4/255, 48 images",
        "L2 ε = 2.5 at 512², 48 images",
    ]


def test_metric_labels_are_said_to_be_no_peoples(run_folder, page):
    found = page(write_report(run_folder(labels="metric:vsi")))
    assert f"{NOTICE} VSI, not from people." in found.text
    assert "agreement with VSI, not with human judgement" in found.text
    assert "label (VSI)" in found.text


def test_peoples_labels_get_no_such_notice(run_folder, page):
    found = page(write_report(run_folder(labels="mos")))
    assert NOTICE not in found.text
    assert "VSI" not in found.text
    assert "label (mean opinion)" in found.text


@pytest.mark.parametrize("said_in", ["run.json", "evaluation.json", "config.json"])
def test_one_file_that_names_a_metric_is_enough(run_folder, page, said_in):
    folder = run_folder(labels="mos", necks=("srm",))
    if said_in == "run.json":
        edit(folder / "run.json", dataset={"labels": "metric:fsim"})
    elif said_in == "evaluation.json":
        edit(folder / "srm" / "evaluation.json", labels="metric:fsim")
    else:
        edit(folder / "srm" / "config.json", card={"dataset": {"labels": "metric:fsim"}})
    assert f"{NOTICE} FSIM, not from people." in page(write_report(folder)).text


def test_page_loads_nothing(run_folder, page):
    path = write_report(run_folder())
    found = page(path)
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in found.elements)
    loaded = [a[key] for _, a in found.elements for key in ("src", "href", "srcset", "data") if key in a]
    assert loaded
    assert all(address.startswith("data:image/png;base64,") for address in loaded)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r'xlink:href="(?!#)', text)
    assert "@import" not in text


def test_a_demos_page_is_light(run_folder):
    noise = run_folder(
        budgets=(("linf", 1 / 255), ("linf", 4 / 255)), count=400, attacked=64, examples=3, side=160
    )
    assert write_report(noise).stat().st_size < 3_000_000


def test_every_picture_and_chart_has_a_description(run_folder, page):
    found = page(write_report(run_folder()))
    pictures = [a for tag, a in found.elements if tag == "img"]
    assert len(pictures) == 2 * 5  # 2 images, each with a clean picture and two pictures per neck
    assert all(a["alt"] for a in pictures)
    assert all(a.get("aria-label") or a.get("aria-hidden") for tag, a in found.elements if tag == "svg")


def test_text_from_files_is_escaped(run_folder, page):
    hostile = '</title></code><script>alert(1)</script><img src=x onerror="a()">&amp;'
    folder = run_folder()
    edit(
        folder / "run.json",
        title=hostile,
        command=[hostile],
        created=hostile,
        dataset={hostile: hostile, "name": hostile, "labels": "metric:" + hostile},
        versions={hostile: hostile},
    )
    path = folder / "srm" / "attacks" / f"{LINF}.json"
    attacked = read_json(path)
    attacked["attacks"][hostile] = attacked["attacks"].pop("pgd_mse")
    attacked["worst"]["srocc_attack"] = hostile
    write_json(path, attacked | {"incomplete": [hostile]})
    kept = read_json(folder / "srm" / "attacks" / LINF / "examples.json")
    write_json(
        folder / "srm" / "attacks" / LINF / "examples.json",
        [row | {"name": hostile, "attack": hostile} for row in kept],
    )
    history = folder / "srm" / "history.jsonl"
    rows = [json.loads(line) | {"diagnostics": {hostile: 1.0}} for line in history.read_text().splitlines()]
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = page(write_report(folder))
    assert "script" not in [tag for tag, _ in found.elements]
    assert not any("onerror" in attributes for _, attributes in found.elements)
    assert found.text.count("<script>alert(1)</script>") > 8
    assert "&amp;" in found.text


def test_pictures_from_outside_the_run_are_not_shown(run_folder, page, tmp_path):
    folder = run_folder(examples=1)
    kept = folder / "srm" / "attacks" / LINF
    shutil.copy(kept / "00-pgd_mse-clean.png", tmp_path / "secret.png")
    row = read_json(kept / "examples.json")[0]
    write_json(kept / "examples.json", [row | {"clean": "../../../../secret.png"}])
    found = page(write_report(folder))
    assert "picture not found" in found.text
    assert sum(tag == "img" for tag, _ in found.elements) == 4


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (["srm/attacks", "none/attacks"], "No attack was run"),
        (["srm/history.jsonl", "none/history.jsonl"], "No training history was found."),
        (["srm/evaluation.json", "none/evaluation.json"], "No test scores were found"),
        (["srm/config.json", "none/config.json"], "No configuration was found."),
        (["run.json"], "The run did not record its command."),
        (["srm", "none"], "No trained neck was found in this run."),
        (["srm/attacks/linf-0.00392157", "none/attacks/linf-0.00392157"], "The attacks kept no pictures."),
        (["none"], "The neck srm was trained"),
    ],
)
def test_missing_parts_are_said(run_folder, page, removed, said):
    folder = run_folder()
    assert said not in page(write_report(folder)).text
    for name in removed:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in page(write_report(folder)).text


def test_undefined_correlations_are_dashes(run_folder, page):
    folder = run_folder(necks=("srm",))
    path = folder / "srm" / "attacks" / f"{LINF}.json"
    attacked = read_json(path)
    attacked["attacks"]["pgd_mse"] = {"srocc": None, "plcc": None, "scores": [None] * len(attacked["mos"])}
    attacked["worst"] = {"srocc": None, "plcc": None, "srocc_attack": "pgd_mse", "plcc_attack": "pgd_mse"}
    write_json(path, attacked)
    found = page(write_report(folder))
    assert ["worst", "—", "—"] in found.rows("srm SROCC")
    assert ["srm", "—", "—", "—", "—"] in found.rows("SROCC drop")
    assert "nan" not in found.text.lower().split()


def test_a_weaker_attack_than_the_protocols_is_said_to_be(run_folder, page):
    folder = run_folder(necks=("srm",))
    said = "these attacks are weaker"
    assert said in page(write_report(folder)).text
    for weaker in ({"steps": 10, "restarts": 5}, {"steps": 40, "restarts": 1}):
        edit(folder / "srm" / "attacks" / f"{LINF}.json", **weaker)
        assert said in page(write_report(folder)).text
    edit(folder / "srm" / "attacks" / f"{LINF}.json", steps=40, restarts=5)
    found = page(write_report(folder))
    assert said not in found.text
    assert "40 steps with 5 random starts" in found.text


def test_difference_between_necks_is_read_by_its_interval(run_folder, page):
    folder = run_folder(budgets=())
    rows = {row[0]: row[1:] for row in page(write_report(folder)).rows("Difference in SROCC")}
    value, between, reading = rows["srm − none, clean, whole test set"]
    scores = [read_json(folder / neck / "evaluation.json")["srocc"] for neck in ("srm", "none")]
    assert value == f"{scores[0] - scores[1]:+.3f}".replace("-", "−")
    low, high = (float(end.replace("−", "-")) for end in between.split(" to "))
    assert low < scores[0] - scores[1] < high
    assert (low <= 0 <= high) == (reading == "within noise: contains 0")

    mos = read_json(folder / "srm" / "evaluation.json")["mos"]
    edit(folder / "srm" / "evaluation.json", scores=[-label for label in mos], srocc=-1.0)
    rows = {row[0]: row[1:] for row in page(write_report(folder)).rows("Difference in SROCC")}
    assert rows["srm − none, clean, whole test set"][2] == "excludes 0, for these images and trainings"


def test_necks_on_different_images_get_no_interval(run_folder, page):
    folder = run_folder(budgets=())
    names = read_json(folder / "srm" / "evaluation.json")["names"]
    edit(folder / "srm" / "evaluation.json", names=names[::-1])
    rows = page(write_report(folder)).rows("Difference in SROCC")
    assert rows[1][2:] == ["—", "no interval: different images"]


def test_settings_that_differ_are_listed(run_folder, page):
    found = page(write_report(run_folder(budgets=(), necks=("srm",))))
    changed, every = (table for table in found.tables if table[0][0] == "Setting")
    assert ["lr_neck", "0.001", "0.0002"] in changed
    assert "rank" not in [row[0] for row in changed]
    assert ["rank", "64", "64"] in every
    assert ["links", "4→3, 4→2, 4→1", "4→3, 4→2, 4→1"] in every


def test_diagnostics_are_gathered_over_links(run_folder, page):
    folder = run_folder(budgets=(), necks=("srm",))
    rows = {row[0]: row[1:] for row in page(write_report(folder)).rows("Quantity")}
    assert rows["κ, condition number of the regularised landmark matrix"][:2] == ["21", "24"]
    assert rows["size of the neck's update relative to the map it is added to"][0] == "0.4 [0.3 … 0.5]"
    logged = [json.loads(line) for line in (folder / "srm" / "history.jsonl").read_text().splitlines()]
    tau = sorted(t for link in logged[-1]["diagnostics"]["links"].values() for t in link["tau"])
    low, high = rows["τ, learned rescaler of the attention output"][1].split("[")[1].strip("]").split(" … ")
    assert (low, high) == (f"{tau[0]:.3g}", f"{tau[-1]:.3g}")


def test_photographs_are_credited(run_folder, page):
    folder = run_folder(necks=("srm",))
    edit(
        folder / "run.json",
        dataset={"name": "synthesised", "root": str(folder / "data"), "labels": "metric:vsi"},
    )
    assert "Photographs of" not in page(write_report(folder)).text
    rows = [{"file": "china.jpg", "source": "scikit-learn 1.9", "licence": "A. Person, CC BY 2.0"}]
    write_json(folder / "data" / "references.json", rows)
    credit = "Photographs of the dataset: china.jpg of scikit-learn 1.9 (A. Person, CC BY 2.0)."
    assert credit in page(write_report(folder)).text


def test_a_map_that_turns_round_is_said_to(run_folder, page):
    folder = run_folder(budgets=(), necks=("srm",))
    assert "is not monotonic" not in page(write_report(folder)).text
    path = folder / "srm" / "evaluation.json"
    logistic = read_json(path)["logistic"]
    edit(path, logistic=logistic | {"beta": [2.0, 5.0, 0.0, -0.5, 0.5]})
    assert "is not monotonic" in page(write_report(folder)).text


def test_one_epoch_is_enough(run_folder, page):
    folder = run_folder(budgets=(), necks=("srm",))
    history = folder / "srm" / "history.jsonl"
    history.write_text(history.read_text().splitlines()[0] + "\n")
    found = page(write_report(folder))
    assert "for 1 epoch on" in found.text
    assert ["γ, factor of the gain cap", "1"] in found.rows("Quantity")


def test_loss_parts_are_named_with_their_weights(run_folder, page):
    found = page(write_report(run_folder(budgets=(), necks=("srm",))))
    assert "0.01 × τ loss" in found.text
    assert "0.1 × gate entropy" in found.text
    chart = next(
        a["aria-label"] for _, a in found.elements if a.get("aria-label", "").startswith("Parts of the loss")
    )
    assert "0.01 × τ loss: first 0.009, last 0.00225" in chart


def test_every_loss_part_of_a_training_with_defences_has_a_styled_legend_entry(run_folder, page):
    folder = run_folder(budgets=(), necks=("srm",))
    config = json.loads((folder / "srm" / "config.json").read_text())
    config["config"] |= {"weight_gradient": 0.001, "weight_consistency": 2.0, "adversarial_eps": 0.01}
    (folder / "srm" / "config.json").write_text(json.dumps(config))
    history = folder / "srm" / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    more = {"loss_gradient": 5.0, "loss_consistency": 0.25}
    history.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    found = page(write_report(folder))
    figures = re.findall(r"<figure.*?</figure>", (folder / "report.html").read_text(), re.DOTALL)
    (chart,) = (figure for figure in figures if "Parts of the loss, srm" in figure)
    assert "0.001 × gradient norm: first 0.005" in found.text + chart
    assert "2 × squared change of the score under attack: first 0.5" in chart
    looks = re.findall(r'class="swatch (s\d)"', chart)
    assert len(looks) == len(set(looks)) == 6
    assert all(f".{name} {{ color" in STYLE for name in looks)


def test_report_goes_where_the_caller_asks(run_folder, tmp_path):
    folder = run_folder(budgets=(), necks=("none",))
    assert write_report(folder) == folder / "report.html"
    elsewhere = tmp_path / "made" / "page.html"
    assert write_report(folder, elsewhere) == elsewhere
    assert elsewhere.read_bytes() == (folder / "report.html").read_bytes()


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(ValueError, match="no such folder; expected the folder of a run"):
        write_report(tmp_path / "absent")
    with pytest.raises(ValueError, match="not a run folder; expected run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("run.json", "{", "run.json: not readable as JSON"),
        ("run.json", "[]", "run.json: expected an object, got list"),
        ("srm/history.jsonl", '{"epoch": 0}\n{"ep', "history.jsonl: line 2 is not a JSON object"),
        ("srm/config.json", '{"format": "other"}', "config.json: not a checkpoint of this program"),
        ("srm/evaluation.json", "{}", "evaluation.json: has no key 'mos'"),
        (
            "srm/evaluation.json",
            '{"srocc": 1, "plcc": 1, "mos": [1, 2], "names": ["a"], "scores": [1, 2]}',
            "expected 2 names",
        ),
        ("srm/evaluation.json", '{"mos": "high"}', "expected a list, got str"),
        (f"srm/attacks/{LINF}.json", '{"mos": []}', f"{LINF}.json: has no key 'worst'"),
        (f"srm/attacks/{LINF}/examples.json", "[1]", "examples.json: expected an object, got int"),
        (f"srm/attacks/{LINF}/00-pgd_mse-clean.png", "not a picture", "clean.png: not readable as an image"),
    ],
)
def test_broken_files_are_named_in_one_sentence(run_folder, name, content, complaint):
    folder = run_folder(necks=("srm",))
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=complaint) as raised:
        write_report(folder)
    assert "\n" not in str(raised.value)
    assert not (folder / "report.html").exists()


def test_figures_of_attacks_without_gradients_are_marked_as_no_evidence(run_folder, page):
    folder = run_folder()
    path = folder / "srm" / "attacks" / f"{LINF}.json"
    attacked = read_json(path)["attacks"]
    said = "100 % of its gradients were zero and 2 % not finite, so its result may overstate robustness"
    assert "may overstate robustness" not in write_report(folder).read_text(encoding="utf-8")
    edit(
        path,
        attacks=attacked
        | {"pgd_mse": attacked["pgd_mse"] | {"zero_gradients": 1.0, "nonfinite_gradients": 0.02}},
    )
    text = write_report(folder).read_text(encoding="utf-8")
    assert text.count(said) == 1
    assert "srm, L∞ ε = 1/255, pgd_mse: " + said in text
