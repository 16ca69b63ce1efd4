"""Verdicts: the results of `python -m srm_kernels verify`, in one file per device.

A verdict measured on this machine holds for one device, one version each of the driver, torch and Triton, and one state
of the kernel sources. A verdict shipped with the package also holds for other drivers and for other patch versions of
torch and Triton. The file of a measured verdict is ignored if it is incomplete, has wrong types, belongs to another
user, can be written by other users, or is a symbolic link.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checks import RENAMED

try:
    import fcntl
except ImportError:  # without POSIX nothing is locked
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("srm_kernels")
COMMAND = "python -m srm_kernels verify"
CACHE_VARIABLE = "SRM_KERNELS_CACHE"
FORMAT = 2
MOST_BYTES = 16 * 2**20
LARGEST = 1e300
PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "shipped"
OWN = "this machine"
NOT_VERIFIED = "the kernels were not verified on this device"
# Sources outside the folders of operators that decide how kernels are called and checked.
SOURCES = ("parts.py", "registration.py", "numerics.py", "verify/cases.py", "verify/measure.py")

IMPLEMENTATIONS = ("reference", "torch", "triton")
RIGHT = "right"
# "unsupported": the backend does not support these sizes. "memory": the device has too little memory. These two are
# not faults.
HARMLESS = (RIGHT, "unsupported", "memory")
FAULTS = ("wrong", "refused", "error", "timeout", "crashed")
# The environment can cause these faults, so the next run tries again.
PASSING = ("memory", "error", "timeout", "crashed")
DIRECTIONS = ("forward", "backward")  # "backward" is the forward and the backward pass together

Row = dict[str, Any]
Group = tuple[str, str]  # name of an operator, name of a dtype


class Key(NamedTuple):
    """The device and the versions for which a verdict holds."""

    device: str
    capability: str
    driver: str
    torch: str
    triton: str
    sources: str


class UnusableError(ValueError):
    """A file cannot be used as a verdict; the message gives the reason."""


@dataclass(frozen=True)
class Verdict:
    """Rows of one device.

    Attributes:
        key: The device and the versions for which the rows hold.
        rows: One row for each operator, backend, dtype and shape; `checked_row` lists the fields.
        unfinished: Groups (operator, dtype) whose measurement was interrupted. From these groups, only the
            rows that have a fault are used.
        origin: "this machine" or "shipped".
    """

    key: Key
    rows: tuple[Row, ...] = ()
    unfinished: frozenset[Group] = field(default_factory=frozenset)
    origin: str = OWN

    def with_row(self, row: Row) -> Verdict:
        """Return a copy with `row` added; an earlier row with the same `identity` is removed."""
        kept = [one for one in self.rows if identity(one) != identity(row)]
        return replace(self, rows=(*kept, row))

    def finished(self, groups: Set[Group]) -> Verdict:
        """Return a copy in which `groups` count as finished and the incomplete rows of these groups are removed.

        A row is incomplete (see `is_done`) if an earlier run was interrupted before it measured the times of this row.
        """
        kept = [row for row in self.rows if group_of(row) not in groups or is_done(row)]
        return replace(self, rows=tuple(kept), unfinished=self.unfinished - groups)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {
            "format": FORMAT,
            "key": self.key._asdict(),
            "unfinished": sorted(map(list, self.unfinished)),
            "rows": list(self.rows),
        }


def identity(row: Row) -> tuple[str, str, str, str]:
    """Return the fields that identify a row of a verdict."""
    return row["operator"], row["backend"], row["dtype"], row["shape"]


def is_done(row: Row) -> bool:
    """Return whether a row is complete. A row with the status "right" must have times; all other rows are complete."""
    return row["status"] != RIGHT or bool(row["milliseconds"])


def group_of(row: Row) -> Group:
    """Return the group of a row: its operator and dtype.

    All rows that are used for a group come from one verdict (see `governing`).
    """
    return row["operator"], row["dtype"]


@cache
def sources_digest() -> str:
    """Return a digest of the source files of all operators with kernels, and of the files in `SOURCES`."""
    files = {path for kernels in PACKAGE.glob("*/*kernels.py") for path in kernels.parent.glob("*.py")}
    files |= {path for name in SOURCES if (path := PACKAGE / name).is_file()}
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def key_of(device: str, capability: tuple[int, int], driver: str) -> Key:
    """Return the `Key` for a device and driver, the installed torch and Triton, and the current kernel sources."""
    return Key(
        device, ".".join(map(str, capability)), driver, torch.__version__, triton_version(), sources_digest()
    )


def key_of_cuda(index: int) -> Key:
    """Return the key of a CUDA device."""
    return key_of(
        torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), driver_version()
    )


@cache
def driver_version() -> str:
    """Return the version of the NVIDIA driver.

    If the version of the driver cannot be read, the result is the CUDA version that the driver supports. If the CUDA
    version cannot be read either, the result is "unknown".
    """
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text("utf-8", errors="replace")
        found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)*)\s", text, flags=re.MULTILINE)
        if found:
            return found[1]
    driver: Any = torch._C
    with suppress(AttributeError, RuntimeError):  # builds without CUDA have no such function
        return f"CUDA {int(driver._cuda_getDriverVersion())}"
    return "unknown"


def triton_version() -> str:
    """Return the version of the installed Triton, or "absent"."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "absent"


def cache_folder() -> Path:
    """Return the folder of the verdict files: SRM_KERNELS_CACHE if set, else `srm_kernels` in the XDG cache folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or ""
    try:
        folder = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # the home folder is unknown
        folder = Path(tempfile.gettempdir()) / f"cache-{os.getuid() if hasattr(os, 'getuid') else 0}"
    return folder / "srm_kernels"


def slug(key: Key) -> str:
    """Return the base name of a device's files: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{key.device} {key.capability}".lower()).strip("-")


def path_of(key: Key) -> Path:
    """Return the path of a device's verdict file.

    The file name contains no versions, so a new verdict of the device replaces the old one.
    """
    return cache_folder() / f"verdict-{slug(key)}.json"


def load(key: Key) -> tuple[Verdict | None, str | None]:
    """Read the verdict of a device.

    Returns:
        (verdict, None) if the verdict holds for `key`. Otherwise (None, reason): nothing was measured
        (`NOT_VERIFIED`), the measurement was made with other versions, or the file cannot be used.
    """
    path = path_of(key)
    try:
        verdict = read(path)
    except FileNotFoundError:
        return None, NOT_VERIFIED
    except UnusableError as error:
        return None, f"the stored verdict {path} is ignored: {error}"
    changed = [
        f"{name} was {old} and is {new}"
        for name, old, new in zip(Key._fields, verdict.key, key, strict=True)
        if old != new
    ]
    if changed:
        return None, f"the stored verdict is no longer valid: {'; '.join(changed)}"
    return verdict, None


def doubts(key: Key) -> Verdict | None:
    """Return the faults measured on this machine before the driver or the patch version of torch or Triton changed.

    A shipped verdict holds for all drivers and patch versions. But if this machine measured a fault in a group
    (an operator and a dtype), the shipped verdict is not used for this group, and calls of the operator in this dtype
    use the default backend. Faults that the environment can cause, such as a timeout, do not have this effect and are
    not returned.

    Returns:
        A verdict whose rows are the faults, or None if there are no faults. All groups of this verdict are
        marked as unfinished, because the other rows of these groups are left out.
    """
    try:
        kept = read(path_of(key))
    except (FileNotFoundError, UnusableError):
        return None
    found = tuple(row for row in faults(kept.rows) if row["status"] not in PASSING)
    if kept.key == key or not found or not _serves(kept.key._asdict(), key):
        return None
    return Verdict(kept.key, found, frozenset(map(group_of, found)))


def read(path: Path) -> Verdict:
    """Read the file of a verdict.

    Raises:
        FileNotFoundError: There is no such file.
        UnusableError: The file is a symbolic link or not a regular file, belongs to another user, can be written by
            other users, is too large, is not JSON or has wrong types.
    """
    text = _text_of(path)
    try:
        return _checked(json.loads(text))
    except UnusableError:
        raise
    except RecursionError:  # of the parser or of the checks
        raise UnusableError("it is nested too deeply") from None
    except ValueError:
        raise UnusableError("it is not JSON") from None


def _text_of(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else f"it cannot be read ({error.strerror})"
        raise UnusableError(reason) from None
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise UnusableError("it is not a regular file")
        if hasattr(os, "geteuid") and about.st_uid != os.geteuid():
            raise UnusableError("it belongs to another user")
        if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.name == "posix":
            raise UnusableError("other users can write it")
        if about.st_size > MOST_BYTES:
            raise UnusableError(f"it has more than {MOST_BYTES >> 20} MiB")
        with os.fdopen(os.dup(handle), "rb") as file:
            return file.read(MOST_BYTES).decode()
    except UnicodeDecodeError:
        raise UnusableError("it is not JSON") from None
    except OSError as error:
        raise UnusableError(f"it cannot be read ({error.strerror})") from None
    finally:
        os.close(handle)


def _checked(found: Any) -> Verdict:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UnusableError(f"it is not of format {FORMAT}")
    key, rows, unfinished = found.get("key"), found.get("rows"), found.get("unfinished")
    if not isinstance(key, dict) or set(key) != set(Key._fields) or not all(map(_is_text, key.values())):
        raise UnusableError("its key does not describe a device")
    if not isinstance(rows, list):
        raise UnusableError("its rows are not a list")
    if not isinstance(unfinished, list) or not all(
        isinstance(one, list) and len(one) == 2 and all(map(_is_text, one)) for one in unfinished
    ):
        raise UnusableError("its unfinished groups are not pairs of names")
    return Verdict(
        Key(**key), tuple(map(checked_row, rows)), frozenset((one[0], one[1]) for one in unfinished)
    )


def checked_row(row: Any) -> Row:
    """Check a row of a verdict, and return the row without unknown fields.

    A row has these fields:

    - `operator`, `backend`, `dtype` and `shape`: names.
    - `sizes`: list of integers.
    - `status`: an element of `HARMLESS` or of `FAULTS`.
    - `reason`: text or None.
    - `ratio`: the error divided by its bound, or None.
    - `milliseconds`: direction → implementation → median time.
    - `measured`: date and time of the run in ISO 8601, UTC.

    All text must be printable.

    Raises:
        UnusableError: A field is missing or has the wrong type.
    """
    if not isinstance(row, dict):
        raise UnusableError("a row is not an object")
    row = {
        name: _renamed(value) if name in ("backend", "milliseconds") else value for name, value in row.items()
    }
    tests: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("operator", "dtype", "shape", "measured"), _is_text),
        "backend": lambda backend: backend in IMPLEMENTATIONS,
        "sizes": lambda sizes: isinstance(sizes, list) and all(type(size) is int for size in sizes),
        "status": lambda status: status in (*HARMLESS, *FAULTS),
        "reason": lambda reason: reason is None or _is_text(reason),
        "ratio": lambda ratio: ratio is None or (_is_number(ratio) and ratio >= 0),
        "milliseconds": _are_times,
    }
    wrong = [name for name, test in tests.items() if name not in row or not test(row[name])]
    if wrong:
        raise UnusableError(f"a row has no valid {', '.join(wrong)}")
    return {name: row[name] for name in tests}


def _renamed(value: Any) -> Any:
    """Return a field of a row, with old backend names replaced by the names of this release."""
    if isinstance(value, dict):
        return {_renamed(key): _renamed(inner) for key, inner in value.items()}
    return RENAMED.get(value, value) if isinstance(value, str) else value


def _is_text(value: Any) -> bool:
    """Return whether a value is text without control characters and lone surrogates, which can disturb a terminal."""
    return isinstance(value, str) and value.isprintable()


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


def _are_times(value: Any) -> bool:
    return isinstance(value, dict) and all(
        direction in DIRECTIONS
        and isinstance(times, dict)
        and all(_is_text(name) and _is_number(time) and time > 0 for name, time in times.items())
        for direction, times in value.items()
    )


def save(verdict: Verdict) -> Path | None:
    """Write a verdict to its file atomically, and return the path.

    If the file cannot be written, log one warning per process and return None.
    """
    path = path_of(verdict.key)
    text = json.dumps(verdict.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(path, text)
    except OSError as error:
        warn_once(f"{path}: the verdict could not be saved ({error.strerror or error})")
        return None
    return path


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".partial", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode(errors="backslashreplace"))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def held(key: Key) -> Iterator[bool]:
    """Lock a device for measurement. Yield False if another process holds the lock, and True otherwise.

    The lock is released when the context exits or the process ends. If the system cannot write or lock the lock file,
    for example in a read-only folder, the context yields True, and the measurement runs without a lock.
    """
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"{slug(key)}.lock"
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        file = open(os.open(path, flags, 0o600), "ab")  # noqa: SIM115, PTH123 - closed below
    except OSError:
        yield True
        return
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True


def with_machine(rows: Iterable[Row], key: Key) -> list[Row]:
    """Return copies of rows with an additional field `machine`.

    `machine` contains the fields of `key`, "cuda" as the kind of the device, and the CUDA version of torch. `export`
    and `python -m srm_kernels verify --json` write rows in this form.
    """
    machine = {**key._asdict(), "kind": "cuda", "cuda": torch.version.cuda}
    return [{**row, "machine": machine} for row in rows]


def export(verdict: Verdict, path: Path) -> None:
    """Write the rows of finished groups as JSON lines, for `bench/results` or `SHIPPED`.

    Each line is one row with an additional field `machine`: the device and the versions (see `with_machine`).
    """
    finished = [
        row for row in with_machine(verdict.rows, verdict.key) if group_of(row) not in verdict.unfinished
    ]
    lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) for row in finished]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, "".join(f"{line}\n" for line in lines))
    with suppress(OSError):
        path.chmod(0o644)


def shipped(key: Key, folder: Path | None = None) -> Verdict | None:
    """Return the shipped verdict for the device, capability, sources, and minor torch and Triton versions of `key`.

    A verdict that was measured with another driver is accepted. If a file of the folder cannot be read, or one of its
    lines is not a valid row with a field `machine`, the whole file is ignored with a warning.
    """
    rows: list[Row] = []
    for path in sorted((folder or SHIPPED).glob("*.jsonl")):
        try:
            found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            checked = [checked_row(row) for row in found]
            if not all(isinstance(row.get("machine"), dict) for row in found):
                raise UnusableError("a row has no valid machine")
            rows += [row for row, line in zip(checked, found, strict=True) if _serves(line["machine"], key)]
        except (OSError, ValueError, RecursionError) as error:
            warn_once(f"{path}: ignored, {error}")
    return Verdict(key, tuple(rows), origin="shipped") if rows else None


def _serves(machine: dict[str, Any], key: Key) -> bool:
    same = all(machine.get(name) == getattr(key, name) for name in ("device", "capability", "sources"))
    return same and all(
        _minor(str(machine.get(name))) == _minor(getattr(key, name)) for name in ("torch", "triton")
    )


def _minor(text: str) -> list[str]:
    return text.split("+")[0].split(".")[:2]


def governing(own: Verdict | None, others: Verdict | None) -> dict[Group, tuple[Verdict, list[Row]]]:
    """Return, for each group, which verdict to use and which rows of that verdict to use.

    `own` is the verdict of this machine or the result of `doubts`, and `others` is the shipped verdict. For
    each group, there are three cases:

    - `own` contains the group, and the group is finished: all rows of the group in `own` are used.
    - The group is unfinished in `own`, but at least one of its rows has a fault: only the rows with a fault
      are used.
    - Otherwise, the rows of `others` are used, if `others` contains the group.
    """
    found: dict[Group, tuple[Verdict, list[Row]]] = {}
    for verdict in filter(None, (others, own)):
        for group, rows in grouped(verdict.rows).items():
            if group not in verdict.unfinished:
                found[group] = verdict, rows
            elif faults(rows):
                found[group] = verdict, faults(rows)
    return found


def faults(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with a fault."""
    return [row for row in rows if row["status"] in FAULTS]


def dates(rows: Iterable[Row]) -> str:
    """Return the time at which rows were measured, as text; if the times differ, the first and the last time."""
    found = sorted({row["measured"] for row in rows})
    return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else ""


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Group rows by operator and dtype, and keep the order of the rows in each group."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault(group_of(row), []).append(row)
    return found


_warned: set[str] = set()


def warn_once(text: str) -> None:
    """Log a warning, but each text only once per process."""
    if text not in _warned:
        _warned.add(text)
        logger.warning("%s", text)
