from __future__ import annotations

import csv
import os

import numpy as np
import pytest

from srm_model.data import SPLITS, KonIQ10k
from srm_model.data.koniq10k import SCORES_FILE, SETS_FILE

FEW = "few.csv"  # a subset must not have the published file name
ROWS = [
    ("1.jpg", 80.0, "training"),
    ("2.jpg", 3.5, "validation"),
    ("3.jpg", 55.5, "test"),
    ("4.jpg", 4.0, "training"),
]


def write_sets(path, rows=ROWS):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_name", "c1", "c2", "c3", "c4", "c5", "c_total", "MOS", "SD", "set"])
        writer.writerows([name, 0, 0, 0.5, 0.5, 0, 100, mos, 0.5, word] for name, mos, word in rows)


def write_scores(path, rows=ROWS, shift=0.0):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_name", "c1", "c2", "c3", "c4", "c5", "c_total", "MOS", "SD", "MOS_zscore"])
        writer.writerows([n, 0, 0, 50, 50, 0, 100, 1 + 0.04 * mos, 0.5, mos + shift] for n, mos, _ in rows)


@pytest.fixture
def koniq(tmp_path, copies):
    write_sets(tmp_path / FEW)
    copies(tmp_path / "1024x768", [name for name, _, _ in ROWS])
    return tmp_path


def test_the_true_table(tmp_path, shared, copies):
    published = shared(f"data/koniq10k/{SETS_FILE}")
    (tmp_path / SETS_FILE).write_bytes(published.read_bytes())
    with published.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10073
    copies(tmp_path / "512x384", [row["image_name"] for row in rows])
    words = {"train": "training", "val": "validation", "test": "test"}
    sizes = {}
    for split in SPLITS:
        part = KonIQ10k(tmp_path, split, image_size=4)
        expected = [row for row in rows if row["set"] == words[split]]
        assert part.names == [row["image_name"] for row in expected]
        assert part.mos.tolist() == pytest.approx([float(row["MOS"]) / 100 for row in expected], abs=1e-15)
        assert (part.labels, part.image_folder) == ("mos", "512x384")
        sizes[split] = len(part)
    assert sizes == {"train": 7058, "val": 1000, "test": 2015}
    assert part[0][0].shape == (3, 4, 4)
    with (tmp_path / SETS_FILE).open("w") as file:
        file.writelines(published.read_text().splitlines(keepends=True)[:-1])
    message = (
        r"koniq10k_distributions_sets.csv: has the split train 7057, val 1000, test 2015; expected the published "
        r"split, train 7058, val 1000, test 2015; give the list of a subset another file name"
    )
    with pytest.raises(ValueError, match=message):
        KonIQ10k(tmp_path, "train", image_size=4)


def test_a_few_under_the_published_name_are_not_the_set(koniq):
    (koniq / FEW).rename(koniq / SETS_FILE)
    with pytest.raises(ValueError, match=r"has the split train 2, val 1, test 1; .*another file name"):
        KonIQ10k(koniq, "train")


def test_the_scale_is_that_of_the_table_with_the_split(koniq):
    """The labels come from the table with the split.

    A second table on a scale of 1 to 5 changes nothing, whichever names the two files have.
    """
    alone = {split: KonIQ10k(koniq, split).mos.tolist() for split in SPLITS}
    assert alone == {"train": [0.8, 0.04], "val": [0.035], "test": [0.555]}
    write_scores(koniq / SCORES_FILE)
    assert {split: KonIQ10k(koniq, split).mos.tolist() for split in SPLITS} == alone
    # The scores now have the file name of the split table, but the columns decide which table has the split.
    write_scores(koniq / SETS_FILE)
    (koniq / SCORES_FILE).unlink()
    assert {split: KonIQ10k(koniq, split).mos.tolist() for split in SPLITS} == alone


def test_scores_that_contradict_the_labels(koniq):
    write_scores(koniq / SCORES_FILE, shift=1.0)
    message = (
        r"row 2: 1.jpg has MOS 80 here and MOS_zscore 81.0 in koniq10k_scores.*4 are faulty: 4 contradicted"
    )
    with pytest.raises(ValueError, match=message):
        KonIQ10k(koniq, "train")
    write_scores(koniq / SCORES_FILE, shift=0.001)
    assert len(KonIQ10k(koniq, "train")) == 2


def test_the_scores_alone_have_no_split(koniq):
    (koniq / FEW).unlink()
    write_scores(koniq / SETS_FILE)
    with pytest.raises(ValueError, match=r"no koniq10k_distributions_sets.csv.*has no split"):
        KonIQ10k(koniq, "train")


def test_tables_that_cannot_be_told_apart(koniq):
    write_sets(koniq / "other.csv")
    with pytest.raises(ValueError, match=r"few.csv and other.csv both have the columns"):
        KonIQ10k(koniq, "train")
    (koniq / "other.csv").write_text("image_name,MOS,MOS_zscore,set\n1.jpg,3,50,training\n")
    with pytest.raises(ValueError, match=r"other.csv: has the columns set and MOS_zscore"):
        KonIQ10k(koniq, "train")
    (koniq / "other.csv").write_bytes(b"\xff\xfe some other table\n1\n")
    assert len(KonIQ10k(koniq, "train")) == 2


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("separator", [",", ";", "\t", "; ", "|"])
def test_lists_as_spreadsheets_write_them(koniq, separator, encoding):
    expected = {split: KonIQ10k(koniq, split).mos.tolist() for split in SPLITS}
    lines = (koniq / FEW).read_text().splitlines()
    rewritten = "\r\n".join(separator.join(line.split(",")) for line in lines)
    if separator == ";":  # spreadsheets that separate with semicolons use decimal commas
        rewritten = rewritten.replace(".5;", ",5;").replace(".0;", ",0;")
    (koniq / FEW).write_bytes(rewritten.encode(encoding))
    assert {split: KonIQ10k(koniq, split).mos.tolist() for split in SPLITS} == expected
    write_scores(koniq / "scores.tsv")
    rewritten = "\n".join(
        "\t".join(line.split(",")) for line in (koniq / "scores.tsv").read_text().splitlines()
    )
    (koniq / "scores.tsv").write_bytes(rewritten.encode(encoding))
    assert {split: KonIQ10k(koniq, split).mos.tolist() for split in SPLITS} == expected


def test_other_tables_are_passed_over(koniq):
    (koniq / "folder.csv").mkdir()
    (koniq / "gone.csv").symlink_to(koniq / "nowhere")
    os.mkfifo(koniq / "pipe.csv")
    (koniq / "long.csv").write_text("a" * 200_000 + ",b\n1,2\n")
    (koniq / "open.csv").write_text('"' + "a" * 200_000)
    (koniq / "empty.csv").touch()
    (koniq / "binary.csv").write_bytes(bytes(range(256)) * 9)
    assert len(KonIQ10k(koniq, "train")) == 2
    (koniq / FEW).write_text((koniq / FEW).read_text().replace(",", "^"))
    message = r"commas, semicolons, tabs or bars \(\|\); binary.csv has other columns; .*; few.csv has other columns"
    for name in ("folder.csv", "gone.csv", "pipe.csv", "long.csv", "open.csv"):
        path = koniq / name
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=message):
        KonIQ10k(koniq, "train")
    (koniq / FEW).unlink()
    (koniq / FEW).mkdir()
    with pytest.raises(ValueError, match=r"few.csv is not a file"):
        KonIQ10k(koniq, "train")


def test_a_list_that_is_no_table_is_refused_by_name(koniq):
    whole = (koniq / FEW).read_text()
    (koniq / FEW).write_text(whole + '"' + "a" * 200_000)
    with pytest.raises(ValueError, match=r"few.csv, row \d+: not readable as a table \(field larger than"):
        KonIQ10k(koniq, "train")
    (koniq / FEW).write_bytes(whole.encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"few.csv: not readable as utf-16.* text"):
        KonIQ10k(koniq, "train")


def test_names_of_any_bytes(koniq):
    name = os.fsdecode(b"\xe9.jpg")
    (koniq / "1024x768" / "1.jpg").rename(koniq / "1024x768" / name)
    (koniq / FEW).write_bytes((koniq / FEW).read_bytes().replace(b"1.jpg", b"\xe9.jpg"))
    found = KonIQ10k(koniq, "train")
    assert found.names[0] == name
    assert found[0][0].shape[0] == 3
    assert len(found.fingerprint) == 64


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("5.jpg", 50.0, "test"), r"row 6: 5.jpg is not in .*1024x768 \(of 5 rows, 1 is faulty: 1 missing"),
        (("3.jpg", 50.0, "test"), r"row 6: 3.jpg is already listed in row 4"),
        (("4.JPG", 50.0, "test"), r"row 6: 4.JPG is already listed in row 5"),
        (("5.jpg", 101.0, "test"), r"row 6: 5.jpg: the score 101.0 is outside 0 to 100"),
        (("5.jpg", "", "test"), r"row 6: 5.jpg: the score '' is not a number"),
        (
            ("5.jpg", 50.0, "train"),
            r"row 6: 5.jpg: expected an image_name, a MOS and a set of training, validation",
        ),
        (("", 50.0, "test"), r"row 6: no name: expected an image_name"),
    ],
)
def test_a_faulty_row(koniq, row, message):
    write_sets(koniq / FEW, [*ROWS, row])
    with pytest.raises(ValueError, match=message):
        KonIQ10k(koniq, "train")


def test_a_row_cut_short(koniq):
    with (koniq / FEW).open("a") as file:
        file.write("5.jpg,0.0,0.0")
    with pytest.raises(ValueError, match=r"row 6: 5.jpg: expected an image_name, a MOS and a set"):
        KonIQ10k(koniq, "val")


def test_an_image_that_does_not_decode(koniq):
    data = (koniq / "1024x768" / "3.jpg").read_bytes()
    for name in ("2.jpg", "3.jpg"):
        (koniq / "1024x768" / name).unlink()
        (koniq / "1024x768" / name).write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"row 3: 2.jpg cannot be read as an image .*2 unreadable"):
        KonIQ10k(koniq, "train")


def test_the_folder_of_images(koniq, copies):
    assert KonIQ10k(koniq, "train").image_folder == "1024x768"
    copies(koniq / "512x384", [name for name, _, _ in ROWS])
    assert KonIQ10k(koniq, "train").image_folder == "1024x768"
    small = KonIQ10k(koniq, "train", images="512x384")
    assert small.path(0) == koniq / "512x384" / "1.jpg"
    with pytest.raises(ValueError, match="other: no such folder"):
        KonIQ10k(koniq, "train", images="other")
    for name in ("1024x768", "512x384"):
        (koniq / name).rename(koniq / f"not-{name}")
    with pytest.raises(ValueError, match="no folder 1024x768 or 512x384"):
        KonIQ10k(koniq, "train")


def test_an_empty_split(koniq):
    write_sets(koniq / FEW, ROWS[:2])
    assert np.isclose(KonIQ10k(koniq, "val").mos, 0.035).all()
    with pytest.raises(
        ValueError, match=r"the test split of KonIQ-10k \(2 of its 10073 images\) has no images"
    ):
        KonIQ10k(koniq, "test")
