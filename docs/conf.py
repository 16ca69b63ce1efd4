"""Configuration of Sphinx; `make docs` builds the site.

The source directory is the root of the repository, so that the Markdown pages are read as they are on GitHub and
their relative links hold.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as installed_version
from typing import Any, NamedTuple

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

project = "srm-iqa"
author = "The srm-iqa authors"
version = release = installed_version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**",
    "bench/**.md",
    "csrc/*.md",
    "experiments/**.md",
    "srm_model/shipped/*.md",
]
exclude_patterns = [".*", "**/.*", "build", "dist", "runs", "srm_kernels", "tests"]

html_theme = "furo"
html_title = f"{project} {version}"
html_extra_path = ["redirect"]  # the site's index.html
maximum_signature_line_length = 88

myst_heading_anchors = 4  # links to headings work as on GitHub
suppress_warnings = ["myst.header"]  # the generated tables of experiments/ start at level 3

default_role = "py:obj"  # `name` in a docstring links to the name if the reference has it
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:.*", r"(?!srm_(kernels|model)\.).*"),  # types of other packages
    ("myst", r"(\.\./)+[\w/-]+|robustness|checkpoint"),  # links to folders
]

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_type_aliases = {"ArrayLike": "numpy.typing.ArrayLike"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


class _Tuple(NamedTuple):
    field: int


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out "Alias for field number 0"; the docstring of a `NamedTuple` describes the fields."""
    return True if isinstance(obj, type(_Tuple.field)) else None


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn about public names without an entry, because autodoc leaves out names without a docstring."""
    described = env.domains["py"].objects
    for module in [name for name, entry in described.items() if entry.objtype == "module"]:
        for name in getattr(import_module(module), "__all__", ()):
            if f"{module}.{name}" not in described:
                logging.getLogger(__name__).warning("%s.%s has no entry in the reference", module, name)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("env-check-consistency", check_public_names)
