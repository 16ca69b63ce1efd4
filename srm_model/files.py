"""Write files atomically, lock names and folders, and read and write JSON."""

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
except ImportError:  # not POSIX: folders are not locked, and `append_line` and `claimed` do not work
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield the path of a temporary file. If the `with` block ends without an exception, this file replaces `path`.

    The temporary file has the suffix of `path`, because some writers choose the format by the suffix. Missing parent
    folders are created.
    """
    path = Path(path)
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".partial{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp gives access only to the owner
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: str | Path) -> None:
    """Create a folder and its parents if they are missing.

    Raises:
        ValueError: `path` or one of its parents is a file, or the folder cannot be created.
    """
    path = Path(path)
    for attempt in range(100):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
            check_folder(path)
            if attempt == 99:  # retry before: another process may have removed the folder during mkdir
                raise _not_writable(path, error) from None
        except OSError as error:
            raise _not_writable(path, error) from None
        else:
            return


def _not_writable(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"{folder}: not writable ({error.strerror}); expected a folder with write permission")


def check_folder(path: str | Path) -> None:
    """Raise ValueError if `make_folder` would raise it. Nothing is created."""
    path = Path(path)
    file = next((place for place in (path, *path.parents) if place.exists()), path)
    if file.exists() and not file.is_dir():
        raise ValueError(f"{path}: {file} is a file; expected a folder, or a name that does not exist")


@contextmanager
def utf8_path(path: str | Path) -> Iterator[Path]:
    """Yield `path`, or a temporary symbolic link to `path` if `path` is not valid UTF-8.

    Use this function for safetensors and TensorBoard, because they accept only names in UTF-8.
    """
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
    """Write a UTF-8 text file atomically.

    `text` may contain file names that are not valid UTF-8. In such a name, Python represents each invalid byte by a
    lone surrogate, U+DC80 to U+DCFF. The surrogate is written to the file as a JSON escape, for example `\\udc80`, so a
    JSON reader restores the file name.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically. NaN and infinities become null."""
    write_text(path, json_text(value, indent=1) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON, on one line unless `indent` is given. NaN and infinities become null."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def append_line(path: str | Path, text: str) -> None:
    """Append a line to a file that several processes write to.

    If the last line has no line break, a line break is written first.
    """
    make_folder(Path(path).parent)
    with Path(path).open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + text.encode(errors="backslashreplace") + b"\n")


@contextmanager
def claimed(path: str | Path, name: str) -> Iterator[bool]:
    """Try to lock a name during the `with` block, and yield whether this process has the lock.

    The operating system releases the lock when the process ends, even if the process is killed.

    Args:
        path: The file that all processes lock. It stays empty.
        name: The name to lock.
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
    """Lock a folder during the `with` block, so that no other process of this program writes to the folder.

    If the folder is missing, it is created; if it then stays empty, it is removed at the end of the block. The
    operating system releases the lock when the process ends. Forked processes do not inherit the lock. On a file system
    without locks, nothing is locked.

    Args:
        folder: The folder to lock.
        shared: Whether other processes that also pass `shared` may write to the folder at the same time.

    Raises:
        ValueError: Another process has locked the folder, or the folder is not writable.
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
    """Open and lock the lock file of a folder."""
    # Retry, because an exclusive lock may be short: the last process that uses a shared folder takes such a lock while
    # it removes the lock file.
    pauses = iter((0.01, 0.1, 0.5))
    missing = 0
    while True:
        make_folder(folder)
        try:
            file = (folder / LOCK).open("ab+")
        except FileNotFoundError as error:  # another process may have removed the folder now
            missing += 1
            if missing == 100:
                raise _not_writable(folder, error) from None
            continue
        except OSError as error:
            raise _not_writable(folder, error) from None
        with suppress(FileNotFoundError):  # another process may remove the lock file now
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
    """Remove a shared lock file unless another process holds the lock."""
    with lock.open("rb+") as file:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
            lock.unlink()


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: The file is missing or not readable as JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a JSON file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value: Any) -> Any:
    """Copy a JSON value; replace every number that is not finite by None, and convert the keys of dicts to text."""
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
