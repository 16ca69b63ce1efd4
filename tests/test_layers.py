"""Test the import layers (docs/ARCHITECTURE.md), the length of functions, and which tests get the mark `gpu`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The layers of srm_model, top first. A part may import parts of lower layers. Within a layer, NEIGHBOURS lists the
# allowed imports as pairs (importing part, imported part).
LAYERS = (
    {"cli", "__main__"},
    {"study", "profiling"},
    {"runs", "external", "crops", "quality_map"},
    {"reports", "training", "attacks", "diagnosis"},
    {"data"},
    {"model"},
    {"neck", "backbones", "head", "metrics", "checkpoint"},
    {"statistics"},
    {"config", "files", "graphs", "messages", "modules", "ranks"},
    {"necks", "norms", "attack_suites"},
)
NEIGHBOURS = {("__main__", "cli"), ("training", "attacks"), ("graphs", "modules")}
LONGEST = 60  # lines of a function without its docstring
# Longer functions by the reason why they are not split.
LONGER = {
    "a Triton kernel: a called function would need most of its values as arguments": {
        "srm_kernels/neck/forward_kernels.py cell_probabilities",
    },
    "closures: the functions of an operator share the arguments of its registration": {
        "srm_kernels/registration.py register_operator",
    },
    "a list of independent options or checks": {
        "srm_model/cli/parser.py _add_profile",
        "srm_model/config.py _check_values",
    },
    "a sequence of steps that share most of the arguments": {
        "srm_model/data/synthesize.py synthesize",
    },
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the absolute names of all imports of a file, including imports inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def test_kernels_know_nothing_of_models():
    assert len(modules("srm_kernels")) > 10
    for path in modules("srm_kernels"):
        assert not [
            name for name in imported(path) if name.split(".")[0] in ("srm_model", "bench", "tests")
        ], path


@pytest.mark.parametrize(
    ("one", "other"),
    [("reference", "kernels"), ("kernels", "reference"), ("methods", "kernels"), ("kernels", "methods")],
)
def test_mathematics_and_kernels_do_not_meet(one, other):
    for path in modules("srm_kernels"):
        if path.stem.endswith(one):
            assert not [name for name in imported(path) if name.split(".")[-1].endswith(other)], path


def test_parts_of_the_model_import_downwards():
    known = set().union(*LAYERS)
    for path in modules("srm_model"):
        here = path.relative_to(ROOT / "srm_model").parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        assert here in known, f"{path}: expected it in a layer of LAYERS"
        for name in imported(path):
            package, _, rest = name.partition(".")
            part = rest.split(".")[0]
            if package != "srm_model" or part not in known or part == here:
                continue
            assert layer(part) > layer(here) or (here, part) in NEIGHBOURS, f"{path} imports {name}"


def test_packages_read_nothing_beside_the_checkout():
    for path in [*modules("srm_kernels"), *modules("srm_model"), *modules("bench")]:
        assert "SRM_SHARED" not in path.read_text(encoding="utf-8"), path


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function without its decorators and its docstring."""
    first = function.body[0]
    docstring = 0 if ast.get_docstring(function) is None else first.end_lineno - first.lineno + 1
    return function.end_lineno - function.lineno + 1 - docstring


def test_functions_are_short_except_those_with_a_reason():
    found = set()
    for path in [*modules("srm_kernels"), *modules("srm_model"), *modules("bench")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > LONGEST:
                found.add(f"{path.relative_to(ROOT).as_posix()} {node.name}")
    assert found == set().union(*LONGER.values())


def test_a_module_that_runs_kernels_on_a_gpu_is_marked_so(pytestconfig: pytest.Config):
    """Check that forking tests run first, and that only tests of modules with DEVICE = "cuda" get the mark `gpu`."""
    hooks = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    marks: dict[str, list[str]] = {"cuda": [], "cpu": [], "none": []}
    items = []
    for device, found in marks.items():
        module = ModuleType("tests_of")
        if device != "none":
            module.DEVICE = device  # type: ignore[attr-defined]
        items.append(
            SimpleNamespace(
                module=module,
                add_marker=lambda mark, found=found: found.append(mark.name),
                get_closest_marker=lambda _: None,
            )
        )
    forking = SimpleNamespace(get_closest_marker=lambda name: name == "forks" or None)
    items.append(forking)
    hooks.pytest_collection_modifyitems(items)
    assert items[0] is forking
    assert marks == {"cuda": ["gpu"], "cpu": [], "none": []}
