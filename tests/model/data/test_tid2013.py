from __future__ import annotations

import json
import pickle
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from srm_model.data import SPLITS, TID2013
from srm_model.data.tid2013 import split_by_reference


def test_the_true_list_with_its_mixed_case(tmp_path, shared, copies):
    """The published list (3,000 names in mixed case, CRLF line ends) matches files whose names differ only in case."""
    published = shared("data/tid2013/mos_with_names.txt").read_bytes()
    (tmp_path / "mos_with_names.txt").write_bytes(published)
    listed = [line.split() for line in published.decode().split("\r\n") if line]
    assert len(listed) == 3000
    choose = random.Random(0)
    names = [choose.choice([name.lower(), name.upper(), f"I{name[1:]}"]) for _, name in listed]
    copies(tmp_path / "distorted_images", names)
    sets = {split: TID2013(tmp_path, split, image_size=4) for split in SPLITS}
    assert {split: len(part) for split, part in sets.items()} == {"train": 1800, "val": 600, "test": 600}
    mos = {name: float(score) / 9 for score, name in listed}
    order = {name: i for i, (_, name) in enumerate(listed)}
    for part in sets.values():
        assert part.labels == "mos"
        assert part.mos.tolist() == pytest.approx([mos[name] for name in part.names], abs=1e-15)
        assert part.mos.dtype == np.float64
        assert sorted(part.names, key=order.__getitem__) == part.names
        assert all(part.path(i).name.lower() == name.lower() for i, name in enumerate(part.names))
    assert {part.name for part in sets.values()} == {"TID2013"}
    assert len(set().union(*(part.names for part in sets.values()))) == 3000


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_split_is_the_rule(seed):
    ids = [f"{i:02}" for i in range(1, 26)]
    order = np.random.default_rng(seed).permutation(25)
    expected = {"train": order[:15], "val": order[15:20], "test": order[20:]}
    found = split_by_reference(reversed(ids * 3), seed)
    for split, places in expected.items():
        assert {ref for ref, name in found.items() if name == split} == {ids[i] for i in places}


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1)), (7, (4, 1, 2)), (10, (6, 2, 2)), (99, (59, 20, 20))],
)
def test_sets_of_any_size_are_split(count, sizes):
    found = list(split_by_reference([str(i) for i in range(count)], 0).values())
    assert tuple(found.count(split) for split in SPLITS) == sizes


def test_too_few_references(tid):
    with pytest.raises(ValueError, match="2 references: expected at least 3"):
        TID2013(tid(references=2), "train")


def test_no_reference_is_in_two_splits(tid):
    root = tid(references=7)
    groups = [set(TID2013(root, split, seed=3).groups) for split in SPLITS]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 7


def test_another_seed_is_another_split_and_fingerprint(tid):
    root = tid(references=9)
    first, again, other = (TID2013(root, "test", seed=seed) for seed in (0, 0, 1))
    assert first.names == again.names != other.names
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.fingerprint == TID2013(root, "train", seed=0).fingerprint
    text = (root / "mos_with_names.txt").read_text().replace("2.50000", "2.50001")
    (root / "mos_with_names.txt").write_text(text)
    assert TID2013(root, "test", seed=0).fingerprint != first.fingerprint


def test_the_same_number_written_otherwise_is_the_same_reference(tid, copies):
    root = tid(lines=["1 i01_01_1.bmp", "1 I1_01_2.BMP", "1 i02_01_1.bmp", "1 i03_01_1.bmp"])
    copies(root / "distorted_images", ["I1_01_2.BMP"])
    parts = [TID2013(root, split) for split in SPLITS]
    assert sorted(ref for part in parts for ref in part.groups) == ["01", "01", "02", "03"]
    assert sorted(len(part) for part in parts) == [1, 1, 2]


GOOD = ["1 i01_01_1.bmp", "2 i02_01_1.bmp", "3 i03_01_1.bmp", "4 i04_01_1.bmp"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [*GOOD, "3 i09_01_1.bmp", "3 i08_01_1.bmp"],
            r"row 5: i09_01_1.bmp is not in .*6 rows, 2 are .*2 missing",
        ),
        (
            [*GOOD, "", "3 i01_01_2.bmp", "3 I01_01_2.bmp"],
            r"row 7: I01_01_2.bmp is already listed in row 6 .*1 listed twice",
        ),
        (
            [*GOOD, "i05_01_1.bmp 3"],
            r"row 5: 'i05_01_1.bmp 3' is not a score and a name .*1 is faulty: 1 malformed",
        ),
        ([*GOOD, "3 i05_01_1.bmp x"], r"row 5: '3 i05_01_1.bmp x' is not a score and a name"),
        ([*GOOD, "3 photo.bmp"], r"row 5: '3 photo.bmp' is not a score and a name"),
        ([*GOOD, "9.1 i05_01_1.bmp"], r"row 5: i05_01_1.bmp: the score 9.1 is outside 0 to 9"),
        ([*GOOD, "-1 i05_01_1.bmp"], r"outside 0 to 9"),
        ([*GOOD, "nan i05_01_1.bmp"], r"the score nan is outside 0 to 9"),
        (
            [*GOOD, "x i05_01_1.bmp", "y i05_01_2.bmp"],
            r"row 5: i05.*the score 'x' is not a number .*2 with no valid",
        ),
        ([], "lists no images"),
    ],
)
def test_a_faulty_list_is_one_error_with_the_row_and_the_count(tid, lines, message):
    root = tid(lines=lines)
    with pytest.raises(ValueError, match=message) as error:
        TID2013(root, "train")
    assert str(root / "mos_with_names.txt") in str(error.value)


def test_every_kind_of_fault_is_counted_and_the_first_row_named(tid):
    lines = [*GOOD, "5 i01_01_2.bmp", "5 i07_01_1.bmp", "99 i02_01_2.bmp", "5 i01_01_1.bmp", "?"]
    root = tid(lines=lines)
    path = root / "distorted_images" / "i01_01_2.bmp"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-20])
    with pytest.raises(ValueError, match=r"row 5: i01_01_2.bmp cannot be read as an image") as error:
        TID2013(root, "test")
    for count in (
        "of 9 rows, 5 are faulty",
        "1 unreadable",
        "1 missing",
        "1 with no valid",
        "1 listed twice",
        "1 malf",
    ):
        assert count in str(error.value)


def test_a_fault_outside_the_split_counts_too(tid):
    root = tid()
    part = TID2013(root, "train")
    other = next(p for p in (root / "distorted_images").iterdir() if p.name not in part.names)
    other.unlink()
    with pytest.raises(ValueError, match=f"{other.name} is not in"):
        TID2013(root, "train")


def test_two_files_that_differ_in_case_only(tid, copies):
    root = tid()
    copies(root / "distorted_images", ["I02_01_1.BMP"])
    with pytest.raises(ValueError, match=r"row 3: i02_01_1.bmp could be I02_01_1.BMP or i02_01_1.bmp in"):
        TID2013(root, "train")


def test_the_train_transform_crops_to_crop_size(tid):
    root = tid()
    whole = TID2013(root, "train", image_size=16, train=False)
    part = TID2013(root, "train", image_size=16)
    assert part.crop_size == 16
    part.crop_size = whole.crop_size = 6
    assert whole[0][0].shape == (3, 16, 16)
    seen = set()
    for epoch in range(20):
        part.epoch = epoch
        crop = part[0][0]
        assert crop.shape == (3, 6, 6)
        seen.add(crop.numpy().tobytes())
    assert len(seen) > 10


def test_missing_list_folder_and_arguments(tmp_path, tid):
    with pytest.raises(ValueError, match=r"mos_with_names.txt: no such file"):
        TID2013(tmp_path, "train")
    root = tid()
    with pytest.raises(ValueError, match="split 'training': expected one of 'train', 'val', 'test'"):
        TID2013(root, "training")
    with pytest.raises(ValueError, match="seed -1"):
        TID2013(root, "train", seed=-1)
    with pytest.raises(ValueError, match="image_size 0"):
        TID2013(root, "train", image_size=0)
    (root / "distorted_images").rename(root / "images")
    with pytest.raises(ValueError, match=r"distorted_images: no such folder"):
        TID2013(root, "train")


def test_labels_of_a_metric(tid):
    root = tid()
    plain = TID2013(root, "test")
    labels = {
        "format": "srm-iqa-labels/1",
        "metric": "vsi",
        "range": [-1, 9],
        "direction": "higher is better",
    }
    (root / "labels.json").write_text(json.dumps(labels))
    part = TID2013(root, "test")
    assert plain.labels == "mos"
    assert re.fullmatch(r"TID2013 \(\d+ of its 3000 images\)", plain.name)
    assert part.labels == "metric:vsi"
    assert "TID2013 (" not in part.name
    np.testing.assert_allclose(part.mos, (plain.mos * 9 + 1) / 10, atol=1e-15)


@pytest.mark.parametrize(
    "change",
    [{"format": "x"}, {"metric": None}, {"direction": "lower is better"}, {"range": [9, 0]}, {"range": 9}],
)
def test_labels_that_are_not_understood_are_refused(tid, change):
    root = tid()
    labels = {"format": "srm-iqa-labels/1", "metric": "vsi", "range": [0, 9], "direction": "higher is better"}
    (root / "labels.json").write_text(json.dumps(labels | change))
    with pytest.raises(ValueError, match=r"labels.json: .*expected"):
        TID2013(root, "test")


def test_a_synthesised_set_without_its_labels_file_is_not_taken_for_peoples(tid):
    root = tid()
    (root / "references.json").write_text("[]")
    with pytest.raises(ValueError, match=r"without labels.json"):
        TID2013(root, "test")


@pytest.fixture
def pictures(tid, photograph):
    root = tid()
    for i, path in enumerate(sorted((root / "distorted_images").iterdir())):
        path.unlink()
        Image.fromarray(photograph(48, seed=i)[:40]).save(path)
    return root


def test_items(pictures):
    part = TID2013(pictures, "train", image_size=32)
    assert len(list(part)) == len(part) == 6
    image, mos = part[2]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    assert type(mos) is float
    assert mos == part.mos[2]
    assert part[-1][1] == part.mos[5]
    with pytest.raises(IndexError):
        part[6]


def test_train_items_depend_on_seed_epoch_and_index_only(pictures):
    def items(seed: int, epoch: int, order=range(6)) -> dict[int, torch.Tensor]:
        part = TID2013(pictures, "train", image_size=32).subset(range(6))
        part.seed, part.epoch = seed, epoch
        return {i: part[i][0] for i in order}

    first = items(0, 3)
    again = items(0, 3, order=[5, 0, 3, 3, 1, 2, 4])
    assert all(torch.equal(first[i], again[i]) for i in range(6))
    for other in (items(0, 4), items(1, 3)):
        assert sum(not torch.equal(first[i], other[i]) for i in range(6)) >= 5
    state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    items(0, 0)
    assert np.array_equal(state[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(state[1], torch.get_rng_state())


def test_evaluation_items_are_the_same_every_epoch(pictures):
    for part in (
        TID2013(pictures, "val", image_size=32),
        TID2013(pictures, "train", image_size=32, train=False),
    ):
        before = part[0][0]
        part.epoch = 5
        assert torch.equal(before, part[0][0])
    with pytest.raises(ValueError, match="epoch -1"):
        part.epoch = -1


def test_the_cache_changes_nothing_and_reads_once(pictures):
    plain = TID2013(pictures, "train", image_size=32)
    cached = TID2013(pictures, "train", image_size=32, cache=True)
    for epoch in (0, 1):
        plain.epoch = cached.epoch = epoch
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plain, cached, strict=True))
    for path in (pictures / "distorted_images").iterdir():
        path.unlink()
    assert cached[0][0].shape == (3, 32, 32)
    with pytest.raises(ValueError, match="no such file; expected an image"):
        pickle.loads(pickle.dumps(cached))[0]  # each worker's copy starts with an empty cache


def test_persistent_workers_see_the_epoch(pictures):
    part = TID2013(pictures, "train", image_size=32)
    loader = DataLoader(part, batch_size=3, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        part.epoch = epoch
        images = torch.cat([images for images, _ in loader])
        assert torch.equal(images, torch.stack([image for image, _ in part]))


def test_a_subset_is_a_data_set(pictures):
    part = TID2013(pictures, "train", image_size=32, cache=True)
    few = part.subset([4, 1])
    assert few.names == [part.names[4], part.names[1]]
    assert few.mos.tolist() == [part.mos[4], part.mos[1]]
    assert few.path(0) == part.path(4)
    assert len(few) == 2
    assert few.fingerprint == part.fingerprint
    few.epoch = 3
    assert part.epoch == 0
    assert part.names[0] not in few.names
    few.train = part.train = False
    assert torch.equal(few[0][0], part[4][0])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("separator", [" ", "\t", ";", " ; ", ",", '";"'])
def test_lists_as_editors_and_spreadsheets_write_them(tid, separator, encoding):
    root = tid()
    expected = [TID2013(root, split).mos.tolist() for split in SPLITS]
    lines = (root / "mos_with_names.txt").read_text().splitlines()
    quote = '"' if '"' in separator else ""
    for point in (".", ","):
        rewritten = [quote + separator.join(line.replace(".", point, 1).split()) + quote for line in lines]
        (root / "mos_with_names.txt").write_bytes("\r\n".join(rewritten).encode(encoding))
        assert [TID2013(root, split).mos.tolist() for split in SPLITS] == expected


def test_a_list_that_cannot_be_read_is_named(tid):
    root = tid()
    (root / "mos_with_names.txt").write_bytes(b"\xff\xfeabc")
    with pytest.raises(ValueError, match=r"mos_with_names.txt: not readable as utf-16.* text"):
        TID2013(root, "train")
    (root / "mos_with_names.txt").unlink()
    (root / "mos_with_names.txt").mkdir()
    with pytest.raises(ValueError, match=r"mos_with_names.txt: not readable \(Is a directory\)"):
        TID2013(root, "train")
