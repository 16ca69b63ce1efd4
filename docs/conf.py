"""Configuration of Sphinx; `make docs` builds the site.

The source directory is the root of the repository, so that the Markdown pages are read as they are on GitHub and
their relative links hold.
"""

from __future__ import annotations

from collections import namedtuple
from importlib.metadata import version as installed_version
from typing import Any

from sphinx.application import Sphinx

project = "srm-iqa"
author = "The srm-iqa authors"
version = release = installed_version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "bench/**.md", "csrc/*.md", "experiments/**.md"]
exclude_patterns = [".*", "**/.*", "build", "dist", "runs", "srm_kernels", "srm_model", "tests"]

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
    ("myst", r"(\.\./)*[\w/-]+"),  # links to folders
]

autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_type_aliases = {"ArrayLike": "numpy.typing.ArrayLike"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True

FIELD = type(namedtuple("Pair", "one")._fields and namedtuple("Pair", "one").one)


def _skip_named_tuple_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool:
    """Skip "Alias for field number 0": the class's own docstring describes its fields."""
    return skip or isinstance(obj, FIELD)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", _skip_named_tuple_fields)
