"""Build the optional C++ library `srm_kernels/_cpu.so` from `csrc/`; pyproject.toml describes the package.

The library can be built only on Linux. It needs a C++ compiler (g++, or the one that CXX names) and the headers
of torch in the site-packages of this interpreter. If the library cannot be built, the package is built without
it, and one line on stderr gives the reason. With SRM_BUILD_EXT=1, the build of the package fails instead. With
SRM_BUILD_EXT=0, the library is not built. This file does not import torch, because torch is not installed in an
isolated build environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000ULL"  # 2.11: the oldest torch that the library supports
CXX = os.environ.get("CXX", "g++")
# Vectorising a conditional needs -fno-trapping-math; vectorising a reduction needs -fopenmp-simd.
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-ffp-contract=fast", "-fno-trapping-math", "-fopenmp-simd"]
FLAGS += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


def torch_folder() -> Path | None:
    """Return the folder of torch in site-packages, or None if torch or the headers of its stable ABI are missing."""
    for scheme in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(scheme)) / "torch"
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    return None


def build_library(target: Path, torch: Path) -> None:
    """Compile `csrc/cpu.cpp` and link it against the libraries of torch."""
    libraries = ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    paths = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
    command = [CXX, *FLAGS, "-shared", str(ROOT / "csrc/cpu.cpp"), *paths, *libraries, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        output = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(output[-1] if output else f"{CXX} ended with exit code {done.returncode}")


class BuildLibrary(build_ext):
    """Build `srm_kernels/_cpu.so`, a plain shared library that torch loads and Python does not import."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        torch = torch_folder()
        assert torch is not None
        try:
            build_library(target, torch)
        except (OSError, RuntimeError) as error:
            if os.environ.get("SRM_BUILD_EXT") == "1":
                raise
            ext.optional = True
            print(f"srm-iqa: the C++ library was not built: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Copy the library into the source tree, for an editable install.

        The file is moved into place: overwriting a library that a running process has loaded would crash that process.
        """
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.is_file():
                target = ROOT / self.get_ext_filename(ext.name)
                shutil.copy2(built, temporary := target.with_name(f"{target.name}.partial"))
                temporary.replace(target)


def extensions() -> list[Extension]:
    """Return a list with the library's extension module, or an empty list if the library is not built.

    In the second case, the reason is printed on stderr. With SRM_BUILD_EXT=1, SystemExit is raised instead if the
    library cannot be built.
    """
    wanted = os.environ.get("SRM_BUILD_EXT", "")
    reason = "SRM_BUILD_EXT=0" if wanted == "0" else _obstacle()
    if reason is None:
        return [Extension("srm_kernels._cpu", sources=[])]
    if wanted == "1":
        raise SystemExit(f"srm-iqa: SRM_BUILD_EXT=1, but the C++ library cannot be built: {reason}")
    print(f"srm-iqa: the C++ library is not built: {reason}", file=sys.stderr)
    return []


def _obstacle() -> str | None:
    if sys.platform != "linux":
        return f"it is built on Linux only, not on {sys.platform}"
    if shutil.which(CXX) is None:
        return f"there is no {CXX} on PATH"
    return None if torch_folder() else f"torch is not installed in {sysconfig.get_path('purelib')}"


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary})
