"""A cache of decoded and resized images: a folder with a size limit, which several processes can share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from srm_model.data.images import Pixels
from srm_model.data.transforms import load_resized
from srm_model.files import atomic_path, check_folder, make_folder

try:
    import fcntl
except ImportError:  # Windows: no lock, so each process may exceed the limit by the image that it stores
    fcntl = None  # type: ignore[assignment]

_FORMAT = 2  # version of the stored arrays; since 2, images are rotated by their EXIF orientation


class ImageCache:
    """A cache for `load_resized`.

    If the cache is full, further images are not stored and no stored image is removed. Removal would not help, because
    every image is read once per epoch, in random order. A file is decoded again if its size or modification time has
    changed. Workers, ranks and training runs can share a folder, even if the training runs have different image sizes.
    The folder may be deleted at any time. If the disk is full, images are still read, but no longer stored.

    Args:
        folder: Folder of the cache, on a disk or in memory (/dev/shm). It is created when the first image is stored.
        limit: Upper limit of the cache's size in bytes.

    Raises:
        ValueError: `limit` is below 1 byte, or `folder` or one of its parents is a file.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"cache limit {limit}: expected at least 1 byte")
        self.folder, self.limit = Path(folder), limit
        check_folder(self.folder)
        self._full = False

    def get(self, path: Path, image_size: int) -> Pixels:
        """Return `load_resized(path, image_size)`, (H, W, 3) uint8, read-only."""
        try:
            key = self._key(path, image_size)
            stored = self.folder / f"{key}.npy"
            return np.load(stored, mmap_mode="r")
        except (
            OSError,
            ValueError,
            EOFError,
        ):  # not stored, or the image is missing, which `load_resized` reports
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
                # The lock file has the number of used bytes. A new lock file is empty. It is also empty if a process
                # was killed between the calls of truncate and write below.
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
