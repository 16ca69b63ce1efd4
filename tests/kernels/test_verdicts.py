"""Test stored verdicts: for which versions they hold, which files are read, and how broken files are handled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from srm_kernels import verdicts
from srm_kernels.verdicts import Key, UnusableError, Verdict

KEY = Key("NVIDIA Pretended 4090", "8.9", "580.1", "2.13.0+cu130", "3.7.1", "0123456789abcdef")


def row(operator: str = "dyt", status: str = "right", **changes: object) -> verdicts.Row:
    return {
        "operator": operator,
        "backend": "triton",
        "dtype": "bf16",
        "shape": "odd",
        "sizes": [1073, 120],
        "status": status,
        "reason": None if status == "right" else "a reason",
        "ratio": 0.4,
        "milliseconds": {"forward": {"triton": 0.1, "reference": 0.3}},
        "measured": "2025-01-02T03:04:05+00:00",
        **changes,
    }


VERDICT = Verdict(KEY, (row(), row("rms_scale")), frozenset({("pool", "fp32")}))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SRM_KERNELS_CACHE", str(tmp_path / "kept"))
    verdicts._warned.clear()
    return tmp_path / "kept"


def test_a_verdict_is_read_as_it_was_written(folder: Path):
    path = verdicts.save(VERDICT)
    assert path == folder / "verdict-nvidia-pretended-4090-8-9.json"
    assert verdicts.load(KEY) == (VERDICT, None)
    assert [p.name for p in folder.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o077 == 0


def test_nothing_kept_is_no_verdict(caplog: pytest.LogCaptureFixture):
    found, reason = verdicts.load(KEY)
    assert found is None
    assert "not verified" in str(reason)
    assert not caplog.records


@pytest.mark.parametrize("name", ["driver", "torch", "triton", "sources"])
def test_a_changed_key_is_not_valid_and_says_what_changed(name: str):
    verdicts.save(VERDICT)
    found, reason = verdicts.load(KEY._replace(**{name: "another"}))
    assert found is None
    assert f"{name} was {getattr(KEY, name)} and is another" in str(reason)


@pytest.mark.parametrize("name", ["device", "capability"])
def test_another_device_has_another_file(name: str):
    verdicts.save(VERDICT)
    assert verdicts.load(KEY._replace(**{name: "7.0"}))[0] is None


def test_two_names_of_one_file_are_told_apart():
    verdicts.save(VERDICT)
    found, reason = verdicts.load(KEY._replace(device="nvidia pretended 4090"))
    assert found is None
    assert "device was NVIDIA Pretended 4090" in str(reason)


def nested(levels: int) -> dict:
    """Return nested dictionaries.

    The JSON parser accepts some depths at which the recursive checks of its result exceed the recursion limit.
    """
    value: dict = {}
    for _ in range(levels):
        value = {"a": value}
    return value


DEPTHS = (400, 700, 900)
HOSTILE = {
    **{
        f"{name}, {levels} deep": json.dumps(VERDICT.to_dict() | {"rows": [row(**{name: nested(levels)})]})
        for name in ("milliseconds", "backend")
        for levels in DEPTHS
    },
    "nothing": "",
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe",
    "deep": "[" * 100_000,
    "a list": "[]",
    "another format": json.dumps(VERDICT.to_dict() | {"format": 0}),
    "no key": json.dumps(VERDICT.to_dict() | {"key": {}}),
    "a number in the key": json.dumps(VERDICT.to_dict() | {"key": KEY._asdict() | {"driver": 580}}),
    "rows of text": json.dumps(VERDICT.to_dict() | {"rows": "dyt"}),
    "half a character in the key": json.dumps(
        VERDICT.to_dict() | {"key": KEY._asdict() | {"driver": "\udc80"}}
    ),
    "unfinished names": json.dumps(VERDICT.to_dict() | {"unfinished": ["dyt"]}),
    "a list as a row": json.dumps(VERDICT.to_dict() | {"rows": [[]]}),
    **{
        f"{name}={value}": json.dumps(VERDICT.to_dict() | {"rows": [row(**{name: value})]})
        for name, value in (
            ("operator", None),
            ("backend", ["triton"]),
            ("sizes", [1.5]),
            ("sizes", [True]),
            ("status", "fine"),
            ("backend", "bogus"),
            ("backend", ""),
            ("reason", 3),
            ("reason", "\x1b[2J"),
            ("measured", None),
            ("measured", "2025\n"),
            ("ratio", float("nan")),
            ("ratio", 10**400),
            ("milliseconds", {"sideways": {}}),
            ("milliseconds", {"forward": {"triton": 0}}),
            ("milliseconds", {"forward": {"triton": float("inf")}}),
        )
    },
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_broken_file_is_ignored_with_the_reason(content: str | bytes, folder: Path):
    folder.mkdir()
    path = verdicts.path_of(KEY)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    for _ in range(2):
        found, reason = verdicts.load(KEY)
        assert found is None
        assert f"{path} is ignored: " in str(reason)
        assert "\n" not in str(reason)


def test_a_symbolic_link_is_not_followed(folder: Path, tmp_path: Path):
    path = verdicts.save(VERDICT)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert "symbolic link" in str(verdicts.load(KEY)[1])
    # Saving replaces the link, and does not change the file that the link points to.
    assert verdicts.save(VERDICT.with_row(row("later"))) == path
    assert not path.is_symlink()
    assert "later" not in (tmp_path / "elsewhere.json").read_text()


def test_folders_pipes_and_large_files_are_not_read(folder: Path, monkeypatch):
    path = verdicts.path_of(KEY)
    path.mkdir(parents=True)
    with pytest.raises(UnusableError):
        verdicts.read(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UnusableError, match="regular file"):  # does not wait for a writer
        verdicts.read(path)
    path.unlink()
    monkeypatch.setattr(verdicts, "MOST_BYTES", 10)
    verdicts.save(VERDICT)
    with pytest.raises(UnusableError, match="more than"):
        verdicts.read(path)


def test_the_file_of_another_user_is_ignored(monkeypatch):
    verdicts.save(VERDICT)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "another user" in str(verdicts.load(KEY)[1])


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666])
def test_a_file_that_others_can_write_is_ignored(mode: int):
    path = verdicts.save(VERDICT)
    path.chmod(mode)
    assert verdicts.load(KEY) == (None, f"the stored verdict {path} is ignored: other users can write it")
    path.chmod(0o644)
    assert verdicts.load(KEY) == (VERDICT, None)


@pytest.mark.parametrize("what", ["a file", "a read-only folder"])
def test_where_nothing_can_be_written_there_is_one_warning(what: str, tmp_path: Path, monkeypatch, caplog):
    if what == "a file":
        (tmp_path / "kept").write_text("in the way")
    else:
        monkeypatch.setenv("SRM_KERNELS_CACHE", "/proc/nowhere")
    for _ in range(2):
        assert verdicts.save(VERDICT) is None
        with verdicts.held(KEY) as alone:
            assert alone
    assert len(caplog.records) == 1
    assert "could not be saved" in caplog.text


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SRM_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.cache_folder() == tmp_path / "srm_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert verdicts.cache_folder() == tmp_path / "home/.cache/srm_kernels"


WRITER = """
import sys
from srm_kernels import verdicts
from test_verdicts import KEY, VERDICT, row
for i in range(60):
    for number in range(20):
        verdict = VERDICT.with_row(row(f"operator {number} of {sys.argv[1]}"))
    assert verdicts.save(verdict)
    assert verdicts.load(KEY)[0] is not None
"""


def test_two_processes_at_once_leave_a_whole_file(folder: Path):
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"}
    both = [subprocess.Popen([sys.executable, "-c", WRITER, name], env=env) for name in ("one", "two")]
    assert [process.wait() for process in both] == [0, 0]
    assert verdicts.load(KEY)[0] is not None
    assert len(list(folder.iterdir())) == 1


def test_one_process_at_a_time_holds_a_device():
    held = (
        "from srm_kernels import verdicts; from test_verdicts import KEY\n"
        "with verdicts.held(KEY) as alone: print(alone)"
    )
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"}

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-c", held], env=env, capture_output=True, text=True, check=True
        ).stdout.strip()

    with verdicts.held(KEY) as alone:
        assert alone
        assert other() == "False"
    assert other() == "True"


def test_rows_are_exported_and_ship_for_this_device_and_minor_versions(tmp_path: Path):
    unfinished = VERDICT.with_row(row("pool", dtype="fp32"))
    path = tmp_path / "shipped/card.jsonl"
    verdicts.export(unfinished, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["operator"] for one in rows] == ["dyt", "rms_scale"]
    assert all(one["machine"]["device"] == KEY.device for one in rows)
    later = KEY._replace(driver="600.0", torch="2.13.4+cu140", triton="3.7.9")
    found = verdicts.shipped(later, path.parent)
    assert found is not None
    assert found.origin == "shipped"
    assert found.rows == VERDICT.rows
    for name, other in (
        ("device", "another"),
        ("capability", "9.0"),
        ("sources", "another"),
        ("torch", "2.14.0"),
        ("triton", "3.8"),
    ):
        assert verdicts.shipped(KEY._replace(**{name: other}), path.parent) is None


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", '{"operator": "dyt"}', json.dumps(row()), "[" * 100_000,
        *(json.dumps(row(milliseconds=nested(levels))) for levels in DEPTHS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows_before", [0, 2])
def test_a_broken_shipped_file_is_left_out_whole(line: str, rows_before: int, tmp_path: Path, caplog):
    path = tmp_path / "card.jsonl"
    verdicts.export(VERDICT, path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:rows_before]) + line)
    assert verdicts.shipped(KEY, tmp_path) is None
    assert len(caplog.records) == 1
    verdicts.export(VERDICT, tmp_path / "other.jsonl")
    assert verdicts.shipped(KEY, tmp_path).rows == VERDICT.rows, "another file still counts"


@pytest.mark.parametrize("levels", DEPTHS)
def test_a_machine_that_is_nested_deeply_is_another_one(levels: int, tmp_path: Path):
    machine = KEY._asdict() | {"torch": nested(levels)}
    (tmp_path / "card.jsonl").write_text(json.dumps(row(machine=machine)))
    assert verdicts.shipped(KEY, tmp_path) is None


def test_verdicts_that_are_committed_ship_with_the_package():
    root = Path(__file__).resolve().parents[2]
    results = {path.parent.name: path for path in (root / "bench/results").glob("*/verify.jsonl")}
    carried = {path.stem: path for path in verdicts.SHIPPED.glob("*.jsonl")}
    assert results.keys() == carried.keys()
    assert all(path.read_bytes() == carried[name].read_bytes() for name, path in results.items())
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert f"{verdicts.SHIPPED.name}/*.jsonl" in data["srm_kernels"]


def test_what_was_measured_here_goes_before_what_was_shipped():
    others = Verdict(KEY, (row(), row("pool"), row("rms_scale")), origin="shipped")
    own = Verdict(
        KEY,
        (
            row(status="wrong"),
            row("pool"),
            row("rms_scale", shape="odd"),
            row("rms_scale", "wrong", shape="small"),
        ),
        frozenset({("pool", "bf16"), ("rms_scale", "bf16")}),
    )
    found = verdicts.governing(own, others)
    assert found["dyt", "bf16"] == (own, [own.rows[0]])
    assert found["pool", "bf16"][0] is others, "a group that is not finished decides nothing"
    assert [one["status"] for one in found["rms_scale", "bf16"][1]] == ["wrong"], "but for what is wrong"


def test_a_row_replaces_that_of_the_same_case():
    verdict = VERDICT.with_row(row(status="wrong"))
    assert [one["status"] for one in verdict.rows] == ["right", "wrong"]
    assert len(VERDICT.rows) == 2


def test_the_digest_follows_the_sources_of_kernels_and_of_the_check(tmp_path: Path, monkeypatch):
    of_kernels = ("scale/kernels.py", "scale/__init__.py", "neck/end_kernels.py", "neck/tiled.py")
    followed = (*of_kernels, "parts.py", "verify/cases.py")
    for name in (*followed, "dispatch.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("one")
    monkeypatch.setattr(verdicts, "PACKAGE", tmp_path)

    def digest() -> str:
        verdicts.sources_digest.cache_clear()
        return verdicts.sources_digest()

    try:
        first = digest()
        (tmp_path / "dispatch.py").write_text("two")
        assert digest() == first
        for name in followed:
            (tmp_path / name).write_text("two")
            assert digest() != first
            (tmp_path / name).write_text("one")
        assert digest() == first
    finally:
        verdicts.sources_digest.cache_clear()


def test_dates_are_one_or_the_first_and_the_last():
    rows = [row(measured=f"2025-01-0{day}") for day in (3, 2, 4, 2)]
    assert verdicts.dates(rows) == "2025-01-02 to 2025-01-04"
    assert verdicts.dates(rows[:1]) == "2025-01-03"


def test_a_pipe_in_place_of_the_lock_does_not_wait(folder: Path):
    folder.mkdir()
    os.mkfifo(folder / f"{verdicts.slug(KEY)}.lock")
    with verdicts.held(KEY) as alone:
        assert alone


def test_rows_of_the_last_release_name_the_backend_anew():
    times = {"forward": {"sdpa": 1.0, "triton": 2.0}}
    found = verdicts.checked_row(row(backend="sdpa", milliseconds=times))
    assert found["backend"] == "torch"
    assert found["milliseconds"] == {"forward": {"torch": 1.0, "triton": 2.0}}
