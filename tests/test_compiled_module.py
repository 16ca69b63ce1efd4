"""Test that every pytest session can run the tests of compiled kernels and reports their failures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from compiled_module import CompiledModule, CompiledTestsFailedError, only_compiled

TESTS = Path(__file__).resolve().parent
COMPILED = "tests/bench/ptx/test_ptx_faults.py"


@pytest.mark.parametrize("passes", [True, False])
def test_a_file_is_one_test_in_a_process_that_compiles(passes, tmp_path, request, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "test_of_a_process.py"
    expected = 'os.environ.get("TRITON_INTERPRET") is None'
    text = f"import os\n\ndef test_it():\n    assert {expected if passes else 'False, 1234'}\n"
    path.write_text(text, encoding="utf-8")
    (item,) = CompiledModule.from_parent(request.session, path=path).collect()
    if passes:
        item.runtest()
        return
    with pytest.raises(CompiledTestsFailedError, match="1234") as caught:
        item.runtest()
    assert "1 failed" in item.repr_failure(caught)


@pytest.mark.parametrize("interprets", [True, False])
def test_the_session_decides_by_the_folder(interprets, request, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interprets)))
    hooks = request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    found = hooks.pytest_pycollect_makemodule(TESTS.parent / COMPILED, request.session)
    assert isinstance(found, CompiledModule) == interprets
    assert hooks.pytest_pycollect_makemodule(TESTS / "test_layers.py", request.session) is None


@pytest.mark.parametrize(
    ("arguments", "compiled"),
    [
        ([COMPILED], True),
        ([f"{COMPILED}::test_a_trap", "tests/bench/ptx"], True),
        ([COMPILED, "tests/test_layers.py"], False),
        (["tests"], False),
        ([], False),
    ],
)
def test_a_session_compiles_where_it_is_given_nothing_else(arguments, compiled):
    config = SimpleNamespace(args=arguments, invocation_params=SimpleNamespace(dir=TESTS.parent))
    assert only_compiled(config) == compiled
