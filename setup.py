"""The package is described in pyproject.toml; this file is the place of the optional CUDA extension.

`csrc/` holds no sources yet, so nothing is compiled and no compiler or GPU is looked for.
"""

from setuptools import setup

setup()
