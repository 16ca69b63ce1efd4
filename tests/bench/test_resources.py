"""Test the table of compiled kernels: which rows are kept, replaced or dropped, and the digest of a launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.resources import Resources, Table, _code
from srm_model.profiling.results import read

ROOT = Path(__file__).resolve().parents[2]


def row(kernel: str, code: str, family: str = "neck") -> dict[str, Any]:
    return {"family": family, "architecture": 89, **Resources(kernel, 4, 32, 0, 64)._asdict(), "code": code}


def test_rows_are_taken_over_replaced_and_dropped(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [row("old", "a"), row("same", "b"), row("other", "c", "solve")]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    table = Table(path)
    assert table.known["b"] == Resources("same", 4, 32, 0, 64)
    table.add(row("same", "b"))
    table.add(row("new", "d"))
    assert [each["code"] for each in read(path)] == ["a", "b", "c", "d"]  # an interrupted run keeps all rows
    table.close(lambda each: each["family"] == "neck")
    found = read(path)
    assert [each["code"] for each in found] == ["c", "b", "d"]
    assert set(found[-1]["machine"]) == {"triton", "python"}


def test_a_digest_is_of_sources_constants_and_architecture():
    """The digest of a launch depends on the kernel's source code, the constants, the options and the architecture.

    The source code includes the functions that the kernel calls, but not comments, docstrings and line breaks.
    """
    pytest.importorskip("triton")
    code = """
from bench import resources, shapes
(forward, *_) = resources.FAMILIES["solve"].launches(shapes.SYSTEMS[0], 89)
kernel, args, options = forward
def digest(args=args, options=options, architecture=89):
    return resources.digest((kernel, args, options), architecture)
found = [digest(), digest(), digest(architecture=90), digest(options=options | {"num_warps": 2})]
name = next(name for name, value in options.items() if type(value) is bool)
found.append(digest(options=options | {name: not options[name]}))
names = kernel.fn.__globals__
called = names[next(name for name in kernel.fn.__code__.co_names if hasattr(names.get(name), "src"))]
called._unsafe_update_src(called.src + "    # changed\\n")
found.insert(2, digest())
called._unsafe_update_src(called.src + "    changed = 0\\n")
found.append(digest())
print(*found)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    first, again, commented, *others = done.stdout.split()
    assert first == again == commented
    plain = _code("def f(a):\n    return a")
    assert plain == _code('def f(\n    a,\n):\n    """Changed."""\n\n    return a  # changed')
    assert plain != _code('def f(a):\n    """Return."""\n    return -a')
    assert len({first, *others}) == 5
