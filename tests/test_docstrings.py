"""Test that the docstrings of public names explain exactly their parameters, and that the reference lists every name.

Public names are the names in `docs/API.md` and in `__all__` of the modules listed there. For other functions, Ruff
checks the docstring sections that exist (DOC102).
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, is_typeddict

import pytest

import srm_kernels

ROOT = Path(__file__).resolve().parent.parent


def public_names() -> list[tuple[str, str]]:
    """Return (module, name) of every public name."""
    api = (ROOT / "docs/API.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(srm_model[\w.]*)` \| (.*?) \|$", api, flags=re.MULTILINE)
    names = [("srm_kernels", name) for name in srm_kernels.__all__]
    for module, listed in rows:
        exported = getattr(import_module(module), "__all__", [])
        names += [(module, name) for name in [*re.findall(r"`(\w+)`", listed), *exported]]
    return list(dict.fromkeys(names))


NAMES = public_names()
OBJECTS = {f"{module}.{name}": getattr(import_module(module), name) for module, name in NAMES}
OBJECTS_BY_NAME = {name.rpartition(".")[2]: value for name, value in OBJECTS.items()}
INTERNAL = {"srm_model.data.ImageQualityDataset"}  # only its subclasses are constructed
DOCUMENTED = {name: value for name, value in OBJECTS.items() if callable(value) and name not in INTERNAL}


def section(docstring: str, title: str) -> list[str] | None:
    """Return the names that a Google-style section explains, such as ["x", "size"], or None if it is missing."""
    found = re.search(rf"^{title}:\n((?:[ ]+\S.*\n|\n)+)", f"{docstring}\n", flags=re.MULTILINE)
    entries = (
        re.findall(r"^    ([\w*]+(?:, [\w*]+)*)(?: \(.*\))?:", found[1], flags=re.MULTILINE) if found else []
    )
    return [name.lstrip("*") for entry in entries for name in entry.split(", ")] if found else None


def raised(function: Any) -> set[str]:
    """Return the exceptions that a function's own body creates and raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    names = {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
    classes = {name for name in names if name[0].isupper()}
    return classes - {"AssertionError"}  # an error of the program, not of the arguments


def faults(value: Any) -> list[str]:
    """Return what the docstring of a function or class lacks.

    A docstring may name a public function that explains the other parameters: "Arguments that are not listed are those
    of `pgd`".
    """
    docstring = inspect.getdoc(value) if value.__doc__ else None
    if not docstring:
        return ["no docstring"]
    is_class = isinstance(value, type)
    if is_class and (issubclass(value, (enum.Enum, BaseException)) or getattr(value, "_is_protocol", False)):
        return []
    parameters = [] if is_typeddict(value) else list(inspect.signature(value).parameters)
    has_fields = is_class and (dataclasses.is_dataclass(value) or hasattr(value, "_fields"))
    named = section(docstring, "Attributes" if has_fields else "Args")
    if other := re.search(
        r"\b[Aa]rguments?\b[^.]*? (?:are|is) (?:those\s+of|as\s+in)\s+`([\w.]+)`", docstring
    ):
        *owner, last = other[1].split(".")
        explained = getattr(OBJECTS_BY_NAME[owner[-1]], last) if owner else OBJECTS_BY_NAME[last]
        there = {*inspect.signature(explained).parameters, "arguments"}
        named = [name for name in parameters if name in (named or []) or name in there]
    wanted = parameters if parameters and not (has_fields and named is None) else None
    wrong = [] if sorted(named or []) == sorted(wanted or []) else [f"explains {named}; expected {wanted}"]
    if not is_class:
        returns = inspect.signature(value).return_annotation not in ("None", None)
        has_returns = re.search(r"^Returns:$", docstring, flags=re.MULTILINE) is not None
        if has_returns != returns and parameters and not (other and "result" in other[0]):
            wrong.append("expected Returns" if returns else "expected no Returns")
        missing = set() if other and "errors" in other[0] else raised(value)
        missing -= set(section(docstring, "Raises") or [])
        wrong += [f"raises {name}, which Raises lacks" for name in sorted(missing)]
    return wrong


def test_faults_are_found():
    def good(x: int, y: int) -> int:
        """Add.

        Args:
            x: A number,
                described in two lines: these.
            y: Another.

        Returns:
            Their sum.

        Raises:
            ValueError: `x` is negative.
        """
        if x < 0:
            raise ValueError(x)
        return x + y

    assert faults(good) == []
    text = good.__doc__ or ""
    for before, after in (
        ("y: A", "z: A"),
        ("Returns:", "Gives:"),
        ("ValueError:", "TypeError:"),
        ("Args:", "In:"),
    ):
        good.__doc__ = text.replace(before, after)
        assert len(faults(good)) == 1, after
    good.__doc__ = "Subtract.\n\nArguments, result and errors are those of `pgd`."
    assert faults(good) == ["explains []; expected ['x', 'y']"]
    good.__doc__ = None
    assert faults(good) == ["no docstring"]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_docstring_names_what_its_object_takes(name: str):
    assert faults(DOCUMENTED[name]) == []


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.rst"))
    modules = dict(
        re.findall(r"^\.\. automodule:: (\S+)\n(?:   :members: (.*)\n)?", text, flags=re.MULTILINE)
    )
    single = re.findall(r"^\.\. auto(?:class|data|function):: (\S+)$", text, flags=re.MULTILINE)
    for module, name in NAMES:
        everything = getattr(import_module(module), "__all__", modules.get(module, "").split(", "))
        is_module = isinstance(OBJECTS[f"{module}.{name}"], ModuleType)
        assert module in modules, module
        assert f"{module}.{name}" in (
            modules if is_module else {*single, *(f"{module}.{n}" for n in everything)}
        )
