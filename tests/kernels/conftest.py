"""Fixtures: the effects of importing srm_kernels in a new process, setup.py as a module, and the C++ library."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CODE = """
import json, sys
sys.modules["triton"] = None
import torch
torch.version.cuda = torch.version.cuda or "13.0"  # of such a build torch's FLOP counter warns that Triton is missing
before = set(sys.modules)
import srm_kernels
one = torch.ones(3)
srm_kernels.dyt(torch.ones(2, 3), torch.tensor(1.0), one, one)
operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("srm::")]
loaded = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"operators": operators, "loaded": loaded, "backends": sorted(srm_kernels.backends())}))
"""


@pytest.fixture(scope="session")
def fresh_import() -> dict[str, Any]:
    """Import srm_kernels in a new process, call one operator, and return the effects.

    The effects are the registered operators, the loaded packages, the names of the backends, and the output on stderr.
    In the new process, Triton is blocked, PATH is empty, and warnings are errors.
    """
    hidden = ("SRM_KERNELS_BACKEND", "PYTHONWARNINGS")
    env = {key: value for key, value in os.environ.items() if key not in hidden} | {"PATH": ""}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """Return setup.py as a module."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("srm_setup", Path(__file__).parents[2] / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def core(build: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Provide the C++ library for the CPU: the installed library, or one that is built now."""
    from srm_kernels import native  # imports Triton, and Triton reads TRITON_INTERPRET at import

    with pytest.MonkeyPatch.context() as patch:
        if not native.BUILT:
            if shutil.which(build.CXX) is None or build.torch_folder() is None:
                pytest.skip("no C++ compiler, or no headers of torch")
            library = tmp_path_factory.mktemp("csrc") / "_cpu.so"
            build.build_library(library, build.torch_folder())
            patch.setattr(native, "LIBRARY", library)
            patch.setattr(native, "BUILT", True)
        yield
