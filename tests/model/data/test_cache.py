from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import srm_model.data.cache as cache_module
from srm_model.data import TID2013, ImageCache
from srm_model.data.transforms import load_resized

BYTES = 24 * 32 * 3 + 128  # bytes of one cached image in the tests below


@pytest.fixture
def pictures(tmp_path: Path, photograph) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        Image.fromarray(photograph(64, seed=number)[:48]).save(path)
    return paths


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.npy"))


def test_what_is_kept_is_what_would_be_read_and_is_not_decoded_again(tmp_path, pictures, monkeypatch):
    cache = ImageCache(tmp_path / "cache", 10**6)
    expected = [load_resized(path, 24) for path in pictures]
    for _ in range(2):
        assert all(np.array_equal(cache.get(p, 24), e) for p, e in zip(pictures, expected, strict=True))
    assert stored(cache.folder) == 6 * BYTES
    monkeypatch.setattr(cache_module, "load_resized", lambda *_: pytest.fail("decoded again"))
    again = pickle.loads(pickle.dumps(ImageCache(tmp_path / "cache", 10**6)))
    assert np.array_equal(again.get(pictures[3], 24), expected[3])


def test_the_bound_is_kept_by_processes_that_store_at_once(tmp_path, pictures):
    folder = tmp_path / "cache"

    def read(first: int) -> None:
        save = np.save
        # a delay, so that the processes overlap
        np.save = lambda *arguments: (time.sleep(0.05), save(*arguments))
        cache = ImageCache(folder, 3 * BYTES + 5)
        for path in pictures[first:] + pictures[:first]:
            assert np.array_equal(cache.get(path, 24), load_resized(path, 24))
        os._exit(0)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=read, args=(2 * number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert stored(folder) == 3 * BYTES
    # SIGKILL can leave an empty lock file; the next process counts the files again
    (folder / "lock").write_text("")
    ImageCache(folder, 3 * BYTES + 5).get(pictures[5], 24)
    ImageCache(folder, 3 * BYTES + 5).get(pictures[0], 24)
    assert stored(folder) == 3 * BYTES


def test_a_changed_file_another_size_and_a_damaged_copy_are_read_anew(tmp_path, pictures, photograph):
    cache = ImageCache(tmp_path / "cache", 10**6)
    cache.get(pictures[0], 24)
    Image.fromarray(photograph(64, seed=9)[:48]).save(pictures[0])
    os.utime(pictures[0], ns=(1, 1))
    assert np.array_equal(cache.get(pictures[0], 24), load_resized(pictures[0], 24))
    assert cache.get(pictures[0], 12).shape == (12, 16, 3)
    for path in cache.folder.glob("*.npy"):
        path.write_bytes(b"short")
    assert np.array_equal(cache.get(pictures[0], 24), load_resized(pictures[0], 24))


def test_what_was_stored_under_other_rules_is_read_anew(tmp_path, pictures, monkeypatch):
    cache = ImageCache(tmp_path / "cache", 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_FORMAT", 1)
        patch.setattr(cache_module, "load_resized", lambda *_: np.zeros((24, 32, 3), np.uint8))
        assert not cache.get(pictures[0], 24).any()
    assert np.array_equal(cache.get(pictures[0], 24), load_resized(pictures[0], 24))


def test_an_image_that_has_vanished_is_missed_though_it_is_kept(tmp_path, pictures):
    cache = ImageCache(tmp_path / "cache", 10**6)
    cache.get(pictures[0], 24)
    pictures[0].unlink()
    with pytest.raises(ValueError, match=r"0\.png: no such file; expected an image"):
        cache.get(pictures[0], 24)


def test_a_full_disk_ends_the_keeping_only(tmp_path, pictures, monkeypatch):
    cache = ImageCache(tmp_path / "cache", 10**6)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    assert np.array_equal(cache.get(pictures[0], 24), load_resized(pictures[0], 24))
    assert stored(cache.folder) == 0
    assert not list(cache.folder.glob(".*"))


def test_a_data_set_reads_the_same_through_it_with_workers(tid, tmp_path):
    root, cache = tid(), ImageCache(tmp_path / "cache", 10**6)
    plain = TID2013(root, "train", image_size=6)
    kept = TID2013(root, "train", image_size=6, cache=cache)
    expected = [images for images, _ in DataLoader(plain, batch_size=2)]
    for _ in range(2):
        found = [images for images, _ in DataLoader(kept, batch_size=2, num_workers=1)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert stored(cache.folder) > 0
    with pytest.raises(ValueError, match="cache limit 0: expected at least 1 byte"):
        ImageCache(tmp_path, 0)
