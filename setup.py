"""The package is described in pyproject.toml; this file builds its optional CUDA library from `csrc/`.

It is built where nvcc is on PATH and torch's headers lie in this interpreter's site-packages, else skipped with one
line; SRM_BUILD_EXT=0 switches it off, SRM_BUILD_EXT=1 makes a failure an error. No GPU is needed or looked for, and
nothing of torch is imported: an isolated build has none, so its headers are taken from beside the interpreter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = (80, 86, 89, 90, 120)
TORCH_TARGET = "0x020b000000000000ULL"  # 2.11: the oldest torch that the library is to serve
NVCC = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC"]
BINDING = ["-O2", "-std=c++20", "-fPIC", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


def architecture_flags() -> list[str]:
    """Machine code for each architecture, and PTX of the last for what comes after it."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    return [*flags, f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]


def torch_folder() -> Path | None:
    """torch in this interpreter's site-packages, if it has the headers of the stable ABI."""
    for scheme in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(scheme)) / "torch"
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    return None


def build_library(target: Path, torch: Path, nvcc: str) -> None:
    """Compile `csrc/` and link it against torch's C interface and a static CUDA runtime."""
    with tempfile.TemporaryDirectory() as folder:
        kernels, binding = Path(folder, "jacobi.o"), Path(folder, "binding.o")
        _run([nvcc, *NVCC, *architecture_flags(), "-c", str(ROOT / "csrc/jacobi.cu"), "-o", str(kernels)])
        compiler = os.environ.get("CXX", "g++")
        include = f"-I{torch / 'include'}"
        _run([compiler, *BINDING, include, "-c", str(ROOT / "csrc/binding.cpp"), "-o", str(binding)])
        # nvcc knows where its static runtime lies; torch's libraries are found by name once torch is loaded.
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
        link = ["-shared", "-cudart=static", f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed", *libraries]
        _run([nvcc, *link, str(kernels), str(binding), "-o", str(target)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])


class BuildLibrary(build_ext):
    """`srm_kernels/_cuda.so`, a plain shared library: torch loads it, Python does not."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        torch, nvcc = torch_folder(), shutil.which("nvcc")
        assert torch is not None
        assert nvcc is not None
        try:
            build_library(target, torch, nvcc)
        except (OSError, RuntimeError) as error:
            if os.environ.get("SRM_BUILD_EXT") == "1":
                raise
            ext.optional = True
            print(f"srm-iqa: the CUDA library was not built: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """In an editable install; nothing to copy where nothing was built."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.is_file():
                shutil.copy2(built, ROOT / self.get_ext_filename(ext.name))


def extensions() -> list[Extension]:
    """The library, or nothing and a line that says why."""
    wanted = os.environ.get("SRM_BUILD_EXT", "")
    reason = None
    if wanted == "0":
        reason = "SRM_BUILD_EXT=0"
    elif sys.platform != "linux":
        reason = f"it is built on Linux only, not on {sys.platform}"
    elif shutil.which("nvcc") is None:
        reason = "there is no nvcc on PATH"
    elif torch_folder() is None:
        reason = f"torch is not installed in {sysconfig.get_path('purelib')}"
    if reason is None:
        return [Extension("srm_kernels._cuda", sources=[])]
    if wanted == "1":
        raise SystemExit(f"srm-iqa: SRM_BUILD_EXT=1, but the CUDA library cannot be built: {reason}")
    print(f"srm-iqa: the CUDA library is not built: {reason}", file=sys.stderr)
    return []


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibrary})
