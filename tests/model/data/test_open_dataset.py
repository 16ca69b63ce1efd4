from __future__ import annotations

import pytest
from PIL import Image

from srm_model.data import TID2013, KonIQ10k, describe, open_dataset
from srm_model.runs import dataset_card

TABLE = "image_name,MOS,set\n1.jpg,50,training\n2.jpg,60,validation\n3.jpg,70,test\n4.jpg,10,training\n"


@pytest.fixture
def koniq(tmp_path, copies):
    root = tmp_path / "koniq"
    copies(root / "512x384", [f"{i}.jpg" for i in range(1, 5)])
    (root / "few.csv").write_text(TABLE)
    return root


def test_the_set_is_found_out_by_its_files(tid, koniq):
    part = open_dataset(tid(), "val", seed=3, image_size=8, train=True, cache=True, verify="fast")
    assert isinstance(part, TID2013)
    assert (part.split, part.seed, part.image_size, part.train) == ("val", 3, 8, True)
    assert isinstance(open_dataset(koniq, "val"), KonIQ10k)


def test_folders_with_no_set_or_two(tmp_path, tid):
    with pytest.raises(ValueError, match=r"absent: no such folder"):
        open_dataset(tmp_path / "absent", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: neither TID2013 .*nor KonIQ-10k"):
        open_dataset(tmp_path / "empty", "train")
    root = tid()
    (root / "koniq10k_distributions_sets.csv").write_text(TABLE)
    with pytest.raises(ValueError, match="holds files of TID2013 and KonIQ-10k"):
        open_dataset(root, "train")


def test_an_unfinished_set_is_named_as_such(tid):
    root = tid()
    (root / "mos_with_names.txt").unlink()
    text = '{"format": "srm-iqa-labels/1", "metric": "vsi", "range": [0, 9], "direction": "higher is better"}'
    (root / "labels.json").write_text(text)
    with pytest.raises(ValueError, match="an unfinished dataset"):
        open_dataset(root, "train")


def test_describe(tid, koniq):
    root = tid(references=7)
    found = describe(root, seed=1)
    assert found["name"] == "TID2013 (14 of its 3000 images)"
    assert found["images"] == 14
    assert found["splits"] == {"train": 8, "val": 2, "test": 4}
    assert {split: len(ids) for split, ids in found["references"].items()} == {
        "train": 4,
        "val": 1,
        "test": 2,
    }
    assert found["fingerprint"] == TID2013(root, "test", seed=1).fingerprint
    found = describe(koniq)
    assert found["splits"] == {"train": 2, "val": 1, "test": 1}
    assert (found["labels"], found["label_range"], found["image_folder"]) == ("mos", [0.0, 100.0], "512x384")
    (koniq / "512x384" / "4.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"row 2: 1.jpg cannot be read"):  # all four names link to one file
        describe(koniq)


def test_the_card_says_whether_an_image_is_resized(koniq):
    sides = [(40, 30), (30, 55), (30, 30), (90, 30)]
    for number, size in enumerate(sides, 1):
        path = koniq / "512x384" / f"{number}.jpg"
        path.unlink()
        Image.new("RGB", size, (number, 0, 0)).save(path)
    assert dataset_card(open_dataset(koniq, "train", image_size=30))["resized"] is False
    assert dataset_card(open_dataset(koniq, "train", image_size=31))["resized"] is True
    path = koniq / "512x384" / "4.jpg"  # of the train split
    Image.new("RGB", (31, 90)).save(path)
    assert dataset_card(open_dataset(koniq, "train", image_size=30))["resized"] is True
    assert dataset_card(open_dataset(koniq, "val", image_size=30))["resized"] is False
