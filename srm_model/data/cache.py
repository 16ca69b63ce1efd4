"""Decoded and resized images in a folder, shared by all processes that read it, up to a bound on its size."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from srm_model.data.images import Pixels
from srm_model.data.transforms import load_resized
from srm_model.files import atomic_path, check_folder, make_folder

try:
    import fcntl
except ImportError:  # not on Windows; processes that store at once may then pass the bound by an image each
    fcntl = None  # type: ignore[assignment]

_FORMAT = 2  # of what is stored: 2 since images are turned as their EXIF orientation says


class ImageCache:
    """`get` gives what `load_resized` does, from the folder where it is there already.

    folder: on a disk, or in memory where the system keeps files there (/dev/shm). limit: of the bytes in it. Once it is
    full nothing is replaced: every image is read once an epoch, in random order, so that no other one were better kept.
    A file that has another size or time than when it was stored is read anew. Workers and ranks may share a folder, and
    so may trainings at several sizes; it may be deleted at any time. A disk that fills up earlier ends the storing,
    not the reading. The folder is made when something is
    stored. ValueError for a limit below 1, or where a file is in the way.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"cache limit {limit}: expected at least one byte")
        self.folder, self.limit = Path(folder), limit
        check_folder(self.folder)
        self._full = False

    def get(self, path: Path, image_size: int) -> Pixels:
        """The image with its shorter side brought to `image_size`, (H, W, 3) uint8, read-only."""
        try:
            key = self._key(path, image_size)
            stored = self.folder / f"{key}.npy"
            return np.load(stored, mmap_mode="r")
        except (OSError, ValueError, EOFError):  # not there, or the image itself is not: loading tells
            pixels = load_resized(path, image_size)
        if not self._full:
            self._store(stored, pixels)
        return pixels

    def _key(self, path: Path, image_size: int) -> str:
        state = path.stat()
        text = f"{path.absolute()}\0{state.st_size}\0{state.st_mtime_ns}\0{image_size}\0{_FORMAT}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]

    def _store(self, stored: Path, pixels: Pixels) -> None:
        try:
            make_folder(self.folder)
            with (self.folder / "lock").open("a+") as lock:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                lock.seek(0)
                # Empty at first, and where a kill came between emptying and writing it.
                used = int(lock.read() or sum(path.stat().st_size for path in self.folder.glob("*.npy")))
                size = pixels.nbytes + 128  # numpy's header
                self._full = used + size > self.limit
                if self._full or stored.exists():
                    return
                with atomic_path(stored) as temporary, temporary.open("wb") as file:
                    np.save(file, pixels)
                lock.seek(0)
                lock.truncate()
                lock.write(str(used + size))
        except OSError:
            self._full = True
