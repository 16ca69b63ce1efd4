"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # no POSIX: nothing is locked, and studies do not work
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; moved into place when the block ends, removed if it raises.

    The temporary name keeps the suffix, for writers that choose a format by it. Parent folders are made.
    """
    path = Path(path)
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".partial{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # a temporary file is its owner's alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: str | Path) -> None:
    """Make a folder and those above it, where they are not there; a file in the way is a ValueError that names it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        check_folder(path)
        raise


def check_folder(path: str | Path) -> None:
    """Raise the ValueError of `make_folder` where a file is in the way, and make nothing."""
    path = Path(path)
    file = next((place for place in (path, *path.parents) if place.exists()), path)
    if file.exists() and not file.is_dir():
        raise ValueError(f"{path}: {file} is a file; expected a folder, or a name that is not taken")


@contextmanager
def utf8_path(path: str | Path) -> Iterator[Path]:
    """What is at `path` under a name that is UTF-8, which safetensors and TensorBoard expect."""
    path = Path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "link")
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically; bytes of file names that are not UTF-8 become `\\udc80` to `\\udcff`.

    In JSON these are escapes, by which the name is read back as it was.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinities are written as null, which every reader accepts."""
    write_text(path, json_text(value, indent=1) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON, on one line without `indent`; NaN and infinities are null, which every reader accepts."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def append_line(path: str | Path, text: str) -> None:
    """Add a line to a file that several processes may add to; one that a kill cut short stays a line of its own."""
    make_folder(Path(path).parent)
    with Path(path).open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        whole = file.seek(0, os.SEEK_END) == 0
        if not whole:
            file.seek(-1, os.SEEK_END)
            whole = file.read(1) == b"\n"
        file.write(("" if whole else "\n").encode() + text.encode(errors="backslashreplace") + b"\n")


@contextmanager
def claimed(path: str | Path, name: str) -> Iterator[bool]:
    """Whether this process holds `name` for the block; one that ends, however it does, has let go of all.

    path: a file for the locks of everybody; it stays empty.
    """
    make_folder(Path(path).parent)
    offset = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    with Path(path).open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except OSError:
            yield False
            return
        yield True


@contextmanager
def held(folder: str | Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder for the block: this process alone writes there, or with `shared` those that share it do.

    The folder is made where it is missing, and removed again if nothing was written. The lock belongs to the process:
    the kernel releases it when the process ends, and processes that were forked do not keep it. A file system without
    locks holds nothing.

    Raises:
        ValueError: another process holds the folder.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _locked(folder, shared)
    try:
        yield
    finally:
        with suppress(OSError):
            if not shared:
                (folder / LOCK).unlink(missing_ok=True)
        file.close()
        with suppress(OSError):
            if shared:
                _remove_unused(folder / LOCK)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _locked(folder: Path, shared: bool) -> IO[bytes]:
    """The lock file of a folder, open and locked."""
    # The last process that shares a folder takes the lock alone for a moment, in order to remove the file.
    pauses = iter((0.01, 0.1, 0.5))
    while True:
        make_folder(folder)
        with suppress(FileNotFoundError):  # the process before this one removes what it made
            file = (folder / LOCK).open("ab+")
            try:
                if fcntl is not None:
                    fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.close()
                if (pause := next(pauses, None)) is None:
                    raise ValueError(
                        f"{folder}: another process writes here; expected a folder that no other command is using"
                    ) from None
                time.sleep(pause)
                continue
            except OSError:
                return file
            if os.fstat(file.fileno()).st_ino == (folder / LOCK).stat().st_ino:
                return file
            file.close()


def _remove_unused(lock: Path) -> None:
    """Remove a lock file that no process holds, of those that shared it."""
    with lock.open("rb+") as file:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
            lock.unlink()


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one is a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None


def finite(value: Any) -> Any:
    """A JSON value with None for every number that is not finite, and text for every key."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
