from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from srm_model.data import SPLITS, describe, open_dataset
from srm_model.data import synthesize as module
from srm_model.data.labels import METRICS, import_piq, metric_labels
from srm_model.data.photographs import Frame, from_folder, from_packages
from srm_model.data.synthesize import synthesize

SMALL = {"image_size": 64, "types": [10, 1, 17], "levels": [1, 5], "metric": "ssim", "progress": False}
NAMES = [
    f"i{ref:02}_{kind:02}_{level}.bmp" for ref in range(1, 5) for kind in (1, 10, 17) for level in (1, 5)
]


@pytest.fixture
def folder(tmp_path, photograph) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i, name in enumerate(("d.png", "B.jpg", "a.bmp", "c.webp")):
        Image.fromarray(photograph(70 + i, seed=i)).save(folder / name)
    (folder / "notes.txt").write_text("not a photograph")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "inner").mkdir()
    return folder


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_the_layout_is_tid2013s(tmp_path, folder):
    root = synthesize(tmp_path / "set", photographs=folder, **SMALL)
    assert root == tmp_path / "set"
    assert sorted(p.name for p in (root / "distorted_images").iterdir()) == NAMES
    assert sorted(p.name for p in (root / "reference_images").iterdir()) == [
        f"I0{i}.BMP" for i in range(1, 5)
    ]
    lines = (root / "mos_with_names.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines] == NAMES
    assert sorted(p.name for p in root.iterdir()) == [
        "distorted_images", "labels.json", "mos_with_names.txt", "reference_images", "references.json",
    ]  # fmt: skip
    origin = json.loads((root / "references.json").read_text())
    assert [(entry["reference"], entry["file"]) for entry in origin] == [
        ("I01.BMP", "a.bmp"), ("I02.BMP", "B.jpg"), ("I03.BMP", "c.webp"), ("I04.BMP", "d.png"),
    ]  # fmt: skip
    reference = Image.open(root / "reference_images" / "I04.BMP")
    assert (reference.size, reference.mode) == ((64, 64), "RGB")


def test_labels_are_the_metrics_and_say_so(tmp_path, folder):
    root = synthesize(tmp_path / "set", photographs=folder, **SMALL)
    said = json.loads((root / "labels.json").read_text())
    assert "not the opinions of people" in said["note"]
    assert said["map"] == "9 * (1 - sqrt((1 - ssim) / 1)), at least 0"
    piq = import_piq()
    for split in SPLITS:
        part = open_dataset(root, split, image_size=64, train=False)
        assert part.labels == "metric:ssim"
        for i, name in enumerate(part.names):
            distorted = part[i][0][None]
            reference = np.array(Image.open(root / "reference_images" / f"I{name[1:3]}.BMP"))
            ssim = float(piq.ssim(distorted, distorted.new_tensor(reference / 255).permute(2, 0, 1)[None]))
            assert part.mos[i] == pytest.approx(1 - (1 - ssim) ** 0.5, abs=1e-5)
    assert describe(root)["labels"] == "metric:ssim"


@pytest.mark.parametrize("metric", METRICS)
def test_scales_are_monotone_and_end_at_nine(metric, photograph):
    scale = METRICS[metric]
    labels = scale(np.linspace(1 - scale.worst, 1, 50))
    assert (labels[0], labels[-1]) == (0, 9)
    assert (np.diff(labels) > 0).all()
    assert scale(np.array([-1.0, 1.0 + 1e-7])).tolist() == [0, 9]
    photo = photograph()
    noisy = np.clip(photo + 40 * np.random.default_rng(0).standard_normal(photo.shape), 0, 255).astype(
        np.uint8
    )
    same, changed = metric_labels(metric, [photo, noisy], photo)
    assert same == pytest.approx(9, abs=0.01)
    assert 0.5 < changed < 7


def test_the_same_seed_gives_the_same_bytes(tmp_path, folder):
    first = contents(synthesize(tmp_path / "a", photographs=folder, **SMALL))
    assert contents(synthesize(tmp_path / "b", photographs=folder, **SMALL)) == first
    other = contents(synthesize(tmp_path / "c", photographs=folder, **SMALL, seed=1))
    differ = {name for name in first if "distorted" in name and first[name] != other[name]}
    assert differ == {
        f"distorted_images/{name}" for name in NAMES if "_01_" in name
    }  # JPEG and contrast changes are not random
    part = contents(synthesize(tmp_path / "d", photographs=folder, **(SMALL | {"types": [1], "levels": [5]})))
    # an image does not depend on which other images are generated
    assert all(part[name] == first[name] for name in part if "images" in name)


def test_given_labels_are_kept_to_the_last_digit(tmp_path, folder):
    """Labels given in a file are written unchanged, even if the metric on this machine differs in the last digits."""
    first = synthesize(tmp_path / "a", photographs=folder, **SMALL)
    lines = (first / "mos_with_names.txt").read_text().splitlines()
    label, name = lines[0].split()
    given = tmp_path / "given.txt"
    wanted = "\n".join([f"{float(label) - 4e-5:.5f} {name}", *lines[1:]])
    given.write_text(wanted)  # no newline at the end, as some editors leave it
    again = synthesize(tmp_path / "b", photographs=folder, labels=given, **SMALL)
    assert (again / "mos_with_names.txt").read_text() == f"{wanted}\n"
    assert describe(again)["fingerprint"] != describe(first)["fingerprint"]
    synthesize(tmp_path / "b", photographs=folder, labels=given, **SMALL)  # already complete
    with pytest.raises(ValueError, match="holds a set with labels"):
        synthesize(tmp_path / "b", photographs=folder, labels=first / "mos_with_names.txt", **SMALL)
    (again / "mos_with_names.txt").unlink()  # incomplete: the missing labels would come from the metric
    with pytest.raises(ValueError, match="holds a set with labels"):
        synthesize(tmp_path / "b", photographs=folder, **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: lines[1:],
            f"labels of {len(NAMES) - 1} images; {len(NAMES) - 1} of these are among the",
        ),
        (
            lambda lines: ["one i01_01_1.bmp", *lines[1:]],
            "line 1: 'one i01_01_1.bmp': expected a label and the name",
        ),
        (lambda lines: [*lines, lines[0]], f"line {len(NAMES) + 1}: '.*': expected a label and the name"),
        (lambda lines: [f"{float(lines[0][:7]) - 0.01:.5f}{lines[0][7:]}", *lines[1:]], "the metric gives"),
    ],
)
def test_labels_of_another_set_are_refused(tmp_path, folder, change, message):
    first = synthesize(tmp_path / "a", photographs=folder, **SMALL)
    given = tmp_path / "given.txt"
    given.write_text("\n".join(change((first / "mos_with_names.txt").read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "b", photographs=folder, labels=given, **SMALL)
    assert not (tmp_path / "b" / "mos_with_names.txt").exists()


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, folder, monkeypatch):
    expected = contents(synthesize(tmp_path / "whole", photographs=folder, **SMALL))
    calls = []

    def interrupted(out, task, *rest):
        calls.append(task)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return distort(out, task, *rest)

    distort = module._distort
    monkeypatch.setattr(module, "_distort", interrupted)
    root = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        synthesize(root, photographs=folder, **SMALL)
    assert not (root / "mos_with_names.txt").exists()
    with pytest.raises(ValueError, match="an unfinished dataset"):
        open_dataset(root, "train")
    # SIGKILL, unlike SIGINT, can leave a temporary file and an incomplete line.
    (root / "distorted_images" / ".i04_17_5.abc.partial.bmp").write_bytes(b"half")
    with (root / "mos_with_names.txt.partial").open("a") as journal:
        journal.write("4.123")
    calls[:] = calls[:3]
    with pytest.raises(KeyboardInterrupt):
        synthesize(root, photographs=folder, **SMALL)
    journal = (root / "mos_with_names.txt.partial").read_text()
    assert "4.123\n" not in journal
    assert all(len(line.split()) == 2 and len(line.split()[0]) == 7 for line in journal.splitlines()), journal
    done = {path: path.stat().st_mtime_ns for path in (root / "distorted_images").glob("i*.bmp")}
    assert 2 <= len(done) < len(NAMES)

    redone = []
    monkeypatch.setattr(
        module, "_distort", lambda out, task, *rest: redone.append(task) or distort(out, task, *rest)
    )
    synthesize(root, photographs=folder, **SMALL)
    assert contents(root) == expected
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert len(redone) < 12
    redone.clear()
    synthesize(root, photographs=folder, **SMALL)
    assert redone == []


def test_images_without_a_label_are_labelled_not_made_again(tmp_path, folder):
    root = synthesize(tmp_path / "set", photographs=folder, **SMALL)
    expected = contents(root)
    (
        root / "mos_with_names.txt"
    ).unlink()  # as if the process was killed before the first line of the journal
    before = {path: path.stat().st_mtime_ns for path in (root / "distorted_images").iterdir()}
    synthesize(root, photographs=folder, **SMALL)
    assert contents(root) == expected
    assert {path: path.stat().st_mtime_ns for path in (root / "distorted_images").iterdir()} == before


def test_a_lost_image_is_made_again(tmp_path, folder):
    root = synthesize(tmp_path / "set", photographs=folder, **SMALL)
    expected = contents(root)
    (root / "distorted_images" / NAMES[7]).unlink()
    synthesize(root, photographs=folder, **SMALL)
    assert contents(root) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "holds a set with seed 0 instead of 3; give another folder"),
        ({"image_size": 65, "levels": [1]}, r"image_size 64 instead of 65, levels \[1, 5\] instead of \[1\]"),
        ({"metric": "vsi"}, "metric ssim instead of vsi"),
        ({"photographs": None}, "other photographs"),
    ],
)
def test_other_settings_are_refused(tmp_path, folder, change, message):
    root = synthesize(tmp_path / "set", photographs=folder, **SMALL)
    before = contents(root)
    with pytest.raises(ValueError, match=message):
        synthesize(root, **({"photographs": folder} | SMALL | change))
    assert contents(root) == before


def test_other_versions_are_refused_only_where_work_is_left(tmp_path, folder):
    root = synthesize(tmp_path / "set", photographs=folder, **SMALL)
    said = json.loads((root / "labels.json").read_text())
    said["versions"]["pillow"] = "1.0"
    (root / "labels.json").write_text(json.dumps(said))
    synthesize(root, photographs=folder, **SMALL)
    (root / "distorted_images" / NAMES[0]).unlink()
    with pytest.raises(ValueError, match=r"started with pillow 1.0 instead of \d+"):
        synthesize(root, photographs=folder, **SMALL)


def test_a_folder_with_something_else_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="not an empty folder"):
        synthesize(folder, photographs=folder, **SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        synthesize(tmp_path / "file", photographs=folder, **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"types": [0, 1]}, r"types \[0, 1\]: expected distinct numbers from 1 to 24"),
        ({"types": []}, r"types \[\]"),
        ({"levels": [1, 1]}, r"levels \[1, 1\]: expected distinct numbers from 1 to 5"),
        ({"metric": "mos"}, "metric 'mos': expected one of 'vsi', 'fsim', 'ssim', 'haarpsi'"),
        ({"seed": -1}, "seed -1"),
        ({"image_size": 32}, "image_size 32: expected at least 64"),
        ({"image_size": 72}, r"a.bmp.* is smaller than image_size 72.*\(2 of 4 photographs cannot be used\)"),
        ({"photographs": "absent"}, "absent: no such folder"),
    ],
)
def test_bad_arguments_leave_nothing_behind(tmp_path, folder, change, message):
    if change.get("image_size") == 72:
        Image.open(folder / "a.bmp").resize((70, 71)).save(folder / "a.bmp")
        Image.open(folder / "d.png").resize((90, 90)).save(folder / "d.png")
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "set", **({"photographs": folder} | SMALL | change))
    assert not (tmp_path / "set").exists()


def test_bad_photographs(tmp_path, folder, photograph):
    def refused(message, **change):
        with pytest.raises(ValueError, match=message):
            synthesize(tmp_path / "set", **({"photographs": folder} | SMALL | change))

    (folder / "b.png").write_bytes(b"no image")
    refused(r"b.png: not readable as an image .*1 of 5 photographs cannot be used")
    Image.open(folder / "a.bmp").save(folder / "b.png")
    refused("b.png and a.bmp are the same picture")
    Image.fromarray(photograph(70, seed=9)[:50]).save(folder / "b.png")
    refused("b.png: 70×50: expected sides of at least 64", image_size=None)
    for i in range(100):
        Image.fromarray(photograph(64, seed=100 + i)).save(folder / f"z{i}.bmp")
    (folder / "b.png").unlink()
    refused("104 photographs .*expected 3 to 99")
    few = tmp_path / "few"
    few.mkdir()
    refused(r"few: found 0 photographs \(.png, .jpg.*\) in this folder", photographs=few)


def test_photographs_of_their_own_sizes(tmp_path, folder, photograph):
    Image.fromarray(photograph(90, seed=1)[:66]).save(folder / "B.jpg")
    root = synthesize(tmp_path / "set", photographs=folder, **(SMALL | {"image_size": None}))
    with Image.open(root / "distorted_images" / "i02_01_5.bmp") as image:
        assert image.size == (90, 66)


def test_squares_are_the_centres_of_photographs(folder):
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 200
    Image.fromarray(wide).save(folder / "d.png")
    square = from_folder(folder, Frame(64))[3]
    assert square.file == "d.png"
    assert (square.pixels == 200).all()


def test_the_packages_photographs(tmp_path, capsys):
    photos = from_packages(Frame(64))
    assert [photo.pixels.shape for photo in photos] == [(64, 64, 3)] * 7
    assert len({photo.pixels.tobytes() for photo in photos}) == 7
    root = synthesize(tmp_path / "set", image_size=64, types=[16], levels=[2], metric="ssim")
    assert [len(open_dataset(root, split)) for split in SPLITS] == [4, 1, 2]
    said = capsys.readouterr()
    assert said.out == ""
    assert "distorting" in said.err
    origin = json.loads((root / "references.json").read_text())
    assert all(entry["licence"] and entry["source"].startswith("scikit-") for entry in origin)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"package scikit-image is not installed.*or name a folder of photographs"
    ):
        from_packages(Frame(64))


def test_nothing_is_printed_without_progress(tmp_path, folder, capsys):
    synthesize(tmp_path / "set", photographs=folder, **SMALL)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


OPINIONS = {"types": [1, 10], "levels": [1, 5], "progress": False}


@pytest.fixture
def numbered(tmp_path, photograph) -> Path:
    """Create photographs whose alphabetical order differs from the order of the numbers in their names."""
    folder = tmp_path / "numbered"
    folder.mkdir()
    for name in ("10.png", "kodim02.png", "I03.BMP", "4.png"):
        Image.fromarray(photograph(120, seed=len(name) + ord(name[0]))[:90]).save(folder / name)
    return folder


@pytest.fixture
def opinions(tmp_path) -> Path:
    """Write a score list in TID2013's format. Each score encodes the photograph, type and level of its image."""
    path = tmp_path / "mos_with_names.txt"
    lines = [
        f"{photo / 10 + kind / 1000 + level / 10000:.5f} {'iI'[level % 2]}{photo:02}_{kind:02}_{level}.bmp"
        for photo in range(1, 25)
        for kind in range(1, 12)
        for level in range(1, 6)
    ]
    path.write_text("\n".join(lines))
    return path


def test_opinions_are_those_of_photograph_type_and_level(tmp_path, numbered, opinions):
    root = synthesize(tmp_path / "set", photographs=numbered, opinions=opinions, crop=(80, 64), **OPINIONS)
    lines = (root / "mos_with_names.txt").read_text().splitlines()
    assert len(lines) == 4 * 2 * 2
    for line in lines:
        label, name = line.split()
        photo, kind, level = int(name[1:3]), int(name[4:6]), int(name[7])
        assert float(label) == pytest.approx(photo / 10 + kind / 1000 + level / 10000, abs=1e-5)
    origin = {
        entry["reference"]: entry["file"] for entry in json.loads((root / "references.json").read_text())
    }
    assert origin == {"I02.BMP": "kodim02.png", "I03.BMP": "I03.BMP", "I04.BMP": "4.png", "I10.BMP": "10.png"}
    assert Image.open(root / "distorted_images" / "i10_01_5.bmp").size == (80, 64)
    reference = np.array(Image.open(root / "reference_images" / "I10.BMP"))
    np.testing.assert_array_equal(reference, np.array(Image.open(numbered / "10.png"))[13:77, 20:100])


def test_opinions_leave_out_types_unless_they_are_named(tmp_path, numbered, opinions):
    lines = [f"5.0 i{photo:02}_{kind:02}_1.bmp" for photo in range(1, 25) for kind in range(1, 25)]
    opinions.write_text("\n".join(lines))
    settings = {
        "photographs": numbered,
        "opinions": opinions,
        "crop": (80, 64),
        "levels": [1],
        "progress": False,
    }
    root = synthesize(tmp_path / "default", **settings)
    made = {int(path.name[4:6]) for path in (root / "distorted_images").iterdir()}
    assert made == set(range(1, 25)) - {16, 17, 18}
    root = synthesize(tmp_path / "named", types=[16], **settings)
    assert {int(path.name[4:6]) for path in (root / "distorted_images").iterdir()} == {16}


def test_a_set_of_opinions_says_what_they_are(tmp_path, numbered, opinions):
    root = synthesize(tmp_path / "set", photographs=numbered, opinions=opinions, crop=(80, 64), **OPINIONS)
    said = json.loads((root / "labels.json").read_text())
    assert said["note"].startswith("People's opinions of similar images")
    assert "this dataset is not TID2013" in said["note"]
    about = describe(root)
    assert (about["labels"], about["label_range"]) == ("opinions:TID2013", [0.0, 9.0])
    assert "TID2013 (" not in about["name"]
    before = contents(root)
    synthesize(tmp_path / "set", photographs=numbered, opinions=opinions, crop=(80, 64), **OPINIONS)
    assert contents(root) == before
    with pytest.raises(ValueError, match="holds a set with crop"):
        synthesize(tmp_path / "set", photographs=numbered, opinions=opinions, crop=(64, 64), **OPINIONS)
    with pytest.raises(ValueError, match="holds a set with"):
        synthesize(tmp_path / "set", photographs=numbered, metric="ssim", crop=(80, 64), **OPINIONS)


def test_what_type_and_level_alone_predict_is_reported(tmp_path, numbered, opinions):
    """`type_level_srocc` is 1 if scores depend almost only on type and level.

    It is -1 if the test scores are reversed.
    """
    lines = [
        f"{kind + level / 10 + photo / 1000:.5f} i{photo:02}_{kind:02}_{level}.bmp"
        for photo in (2, 3, 4, 10)
        for kind in (1, 10)
        for level in (1, 5)
    ]
    opinions.write_text("\n".join(lines).replace("10.", "8."))
    settings = {"photographs": numbered, "opinions": opinions, "crop": (80, 64)} | OPINIONS
    assert describe(synthesize(tmp_path / "a", **settings))["type_level_srocc"] == 1
    reverse = [
        f"{9 - float(line.split()[0]):.5f} {line.split()[1]}" for line in opinions.read_text().splitlines()
    ]
    test = describe(tmp_path / "a")["references"]["test"]
    turned = [
        new if new.split()[1][1:3] in test else old
        for old, new in zip(opinions.read_text().splitlines(), reverse, strict=True)
    ]
    opinions.write_text("\n".join(turned))
    assert describe(synthesize(tmp_path / "b", **settings))["type_level_srocc"] == -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"types": [1, 12]},
            r"no opinion for 8 of 16 images, such as i02_12_1.bmp; .*types 1 to 11 and levels 1 to 5",
        ),
        ({"metric": "ssim"}, "opinions was given with metric"),
        ({"packaged": True}, "opinions was given with metric, labels or packaged"),
        ({"image_size": 64}, "expected one of them"),
        ({"crop": (200, 64)}, r"120×90 is smaller than the crop 200×64 \(4 of 4"),
        ({"crop": (80, 20)}, "crop 80×20: expected sides of at least 64"),
    ],
)
def test_opinions_that_do_not_fit_are_refused(tmp_path, numbered, opinions, change, message):
    settings = {"photographs": numbered, "opinions": opinions, "crop": (80, 64)} | OPINIONS | change
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "set", **settings)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("harbour.png", "harbour.png: has no number in its name"),
        ("2.png", r"2.png and kodim02.png are both photograph 2"),
        ("25.png", "25.png: is not a Kodak photograph; expected a number from 1 to 24"),
    ],
)
def test_photographs_that_no_opinion_is_of_are_refused(
    tmp_path, numbered, opinions, photograph, name, message
):
    Image.fromarray(photograph(120, seed=99)[:90]).save(numbered / name)
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "set", photographs=numbered, opinions=opinions, crop=(80, 64), **OPINIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no scores"),
        ("5 i01_01_1.bmp\n5 I01_01_1.bmp", "line 2: I01_01_1.bmp is listed twice"),
        ("9.5 i01_01_1.bmp", "line 1: .*9"),
        ("five", "line 1: 'five': expected a score and a name"),
    ],
)
def test_a_list_that_is_not_tid2013s_is_refused(tmp_path, numbered, opinions, text, message):
    opinions.write_text(text)
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "set", photographs=numbered, opinions=opinions, crop=(80, 64), **OPINIONS)
