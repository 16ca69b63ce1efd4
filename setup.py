"""The package is described in pyproject.toml; this file builds its optional libraries from `csrc/`.

`_cpu.so` is built where a C++ compiler is (g++, or what CXX names), `_cuda.so` where nvcc is on PATH, both where the
headers of torch lie in this interpreter's site-packages; else each is skipped with one line. SRM_BUILD_EXT=0 switches
both off, SRM_BUILD_EXT=1 makes a failure of either an error. No GPU is needed or looked for, and nothing of torch is
imported: an isolated build has none, so its headers are taken from beside the interpreter.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = (80, 86, 89, 90, 120)
TORCH_TARGET = "0x020b000000000000ULL"  # 2.11: the oldest torch that the libraries are to serve
CXX = os.environ.get("CXX", "g++")
TOOLS = {"cpu": CXX, "cuda": "nvcc"}  # library → what it cannot be built without
NVCC = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC"]
# The compiler vectorises choices only where it may forget floating-point traps, reductions only where it is told to.
HOST = ["-O3", "-std=c++20", "-fPIC", "-ffp-contract=fast", "-fno-trapping-math", "-fopenmp-simd"]
HOST += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


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


def build_library(name: str, target: Path, torch: Path) -> None:
    """Compile a library of `csrc/` and link it against torch's C interface; "cuda" has a static CUDA runtime in it."""
    with tempfile.TemporaryDirectory() as folder:
        binding, kernels = (str(Path(folder, part)) for part in ("binding.o", "kernels.o"))
        source = {"cpu": "csrc/cpu.cpp", "cuda": "csrc/binding.cpp"}[name]
        _run([CXX, *HOST, f"-I{torch / 'include'}", "-c", str(ROOT / source), "-o", binding])
        linker = [CXX, binding]
        if name == "cuda":
            _run(["nvcc", *NVCC, *architecture_flags(), "-c", str(ROOT / "csrc/jacobi.cu"), "-o", kernels])
            linker = ["nvcc", "-cudart=static", binding, kernels]  # it knows where its static runtime lies
        # torch's libraries are found by name once torch is loaded.
        libraries = ["-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        _run([*linker, "-shared", f"-L{torch / 'lib'}", *libraries, "-o", str(target)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(told[-1] if told else f"{command[0]} ended with {done.returncode}")


def csrc_digest() -> str:
    """SHA-256 over the sources of csrc, as `srm_kernels.verdicts` computes it in a checkout."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.glob("csrc/*.[ch]*")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


class BuildPackage(build_py):
    """The package, and in a wheel the digest of csrc: a verdict about kernels holds for their sources."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "srm_kernels/_csrc.txt")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(csrc_digest(), encoding="utf-8")


class BuildLibrary(build_ext):
    """`srm_kernels/_<name>.so`, a plain shared library: torch loads it, Python does not."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        torch = torch_folder()
        assert torch is not None
        name = ext.name.rpartition("_")[2]
        try:
            build_library(name, target, torch)
        except (OSError, RuntimeError) as error:
            if os.environ.get("SRM_BUILD_EXT") == "1":
                raise
            ext.optional = True
            print(f"srm-iqa: the {name} library was not built: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """In an editable install; nothing to copy where nothing was built.

        Moved into place: written over, a library that a running process has loaded would end that process.
        """
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.is_file():
                target = ROOT / self.get_ext_filename(ext.name)
                shutil.copy2(built, temporary := target.with_name(f"{target.name}.partial"))
                temporary.replace(target)


def extensions() -> list[Extension]:
    """The libraries that can be built here, and for each of the others a line that says why not."""
    wanted = os.environ.get("SRM_BUILD_EXT", "")
    found = []
    for name, tool in TOOLS.items():
        reason = "SRM_BUILD_EXT=0" if wanted == "0" else _obstacle(tool)
        if reason is None:
            found.append(Extension(f"srm_kernels._{name}", sources=[]))
        elif wanted == "1":
            raise SystemExit(f"srm-iqa: SRM_BUILD_EXT=1, but the {name} library cannot be built: {reason}")
        else:
            print(f"srm-iqa: the {name} library is not built: {reason}", file=sys.stderr)
    return found


def _obstacle(tool: str) -> str | None:
    if sys.platform != "linux":
        return f"it is built on Linux only, not on {sys.platform}"
    if shutil.which(tool) is None:
        return f"there is no {tool} on PATH"
    return None if torch_folder() else f"torch is not installed in {sysconfig.get_path('purelib')}"


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_py": BuildPackage, "build_ext": BuildLibrary})
