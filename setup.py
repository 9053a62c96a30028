"""Builds the optional extension `mtu_fast._C`; without torch or a compiler the package is pure Python and complete.

Everything else is in pyproject.toml. A build without the extension leaves the reason in
`mtu_fast/_C.missing`, because pip hides what a build prints; `python -m mtu_fast` shows it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
OLDEST_SETUPTOOLS = 77  # reads the licence in pyproject.toml
# LibTorch's stable ABI as of this version; the binary serves every later one
OLDEST_TORCH = (2, 11)
# those of them that nvcc knows, and PTX of the last, for what comes after
ARCHITECTURES = ("80", "90", "100")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
]

try:
    import torch
    from torch.utils import cpp_extension

    build_ext = cpp_extension.BuildExtension
    ABSENT = ""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        ABSENT = f"torch {torch.__version__} at build time, older than {'.'.join(map(str, OLDEST_TORCH))}"
except ImportError:
    ABSENT = "no torch at build time; with torch installed, use `pip install --no-build-isolation`"


def extension() -> Extension:
    """The module `_C`: all of csrc, against torch's stable ABI."""
    target = (OLDEST_TORCH[0] << 56) + (OLDEST_TORCH[1] << 48)
    return Extension(
        "mtu_fast._C",
        sources=[
            path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").rglob("*.cpp"))
        ],
        depends=[
            path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").rglob("*.[hc]*"))
        ],
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch", "torch_cpu"],
        extra_compile_args=[
            *FLAGS,
            f"-DTORCH_TARGET_VERSION={target:#x}ULL",
            f'-DMTU_FAST_TORCH_TARGET="{".".join(map(str, OLDEST_TORCH))}"',
            f'-DMTU_FAST_FLAGS="{" ".join(FLAGS)}"',
        ],
    )


class Cuda(NamedTuple):
    """What compiles the CUDA kernels, for which architectures; or why nothing does."""

    nvcc: str = ""
    architectures: tuple[str, ...] = ()
    absent: str = ""


def cuda_part() -> Cuda:
    """How the CUDA kernels are built here, or why they are left out."""
    if torch.version.cuda is None:
        return Cuda(absent=f"torch {torch.__version__} is built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        return Cuda(absent="nvcc was not found in CUDA_HOME or PATH")
    try:
        listed = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False
        ).stdout
    except OSError as error:  # not a program of this machine
        return Cuda(absent=f"{nvcc} does not run: {error.strerror}")
    known = re.findall(r"^compute_(\d+)$", listed, re.MULTILINE)
    served = tuple(sm for sm in ARCHITECTURES if sm in known)
    if not served:
        wanted = ", ".join(f"compute_{sm}" for sm in ARCHITECTURES)
        return Cuda(
            absent=f"{nvcc} --list-gpu-arch names none of {wanted}, but {' '.join(known) or 'nothing'}"
        )
    return Cuda(nvcc, served)


def compile_cuda(cuda: Cuda, folder: Path) -> list[str]:
    """The objects of csrc/cuda, newly compiled, and what links them: the runtime that belongs to nvcc, static.

    Raises:
        RuntimeError: nvcc failed; its first error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = cuda.architectures[-1]
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in cuda.architectures]
    targets.append(f"-gencode=arch=compute_{last},code=compute_{last}")
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        objects.append(str(folder / f"{source.stem}.cuda.o"))
        command = [
            cuda.nvcc,
            "-std=c++17",
            "-O3",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            *targets,
        ]
        command += ["-c", str(source), "-o", objects[-1]]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        sys.stderr.write(done.stderr)
        if done.returncode:
            lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(
                "nvcc: " + next((line for line in lines if "error" in line.lower()), lines[-1])
            )
    dry_run = subprocess.run(
        [cuda.nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
    ).stderr
    return [
        *objects,
        *re.findall(r'"(-L[^"]+)"', dry_run),
        "-lcudart_static",
        "-lpthread",
        "-ldl",
        "-lrt",
    ]


def leave_note(folder: Path, reason: str) -> None:
    """Write why there is no extension beside the package's files, or remove an outdated note."""
    note = folder / "mtu_fast" / "_C.missing"
    note.unlink(missing_ok=True)
    if reason:
        note.write_text(reason + "\n")
        print(f"mtu_fast: built without mtu_fast._C: {reason}", file=sys.stderr)


class Package(Distribution):
    """What pyproject.toml says; to build the extension alone nothing of it is needed, and older setuptools serve."""

    def parse_config_files(self, *arguments, **options) -> None:
        """Read pyproject.toml.

        Raises:
            SystemExit: setuptools is too old to; it would speak of a "data.license" that is not
                valid.
        """
        if int(setuptools.__version__.partition(".")[0]) >= OLDEST_SETUPTOOLS:
            super().parse_config_files(*arguments, **options)
        elif sys.argv[1:2] != ["build_ext"]:
            found, needed = setuptools.__version__, f"setuptools>={OLDEST_SETUPTOOLS}"
            raise SystemExit(
                f"mtu_fast: setuptools {found} cannot read pyproject.toml: `pip install '{needed}'`. Without network, "
                "`python setup.py build_ext --inplace` builds the extension in the source tree"
            )


class BuildPython(build_py):
    """Copies the package, with the note when no extension is going to be built."""

    def run(self) -> None:
        """Build, then leave the note."""
        super().run()
        leave_note(ROOT if self.editable_mode else Path(self.build_lib), ABSENT)


class BuildExtension(build_ext):
    """Builds the extension, or goes on without it and says why."""

    def run(self) -> None:
        """Build; a failure costs the CUDA part, then the extension, not the installation."""
        reason = ""
        if self.extensions:
            cuda = cuda_part()
            if cuda.nvcc and (failed := self.attempt(cuda)):
                cuda = Cuda(absent=failed)
            if not cuda.nvcc:
                print(f"mtu_fast: built without CUDA kernels: {cuda.absent}", file=sys.stderr)
                reason = self.attempt(cuda)
        if reason:
            self.extensions = []
        leave_note(ROOT if self.inplace else Path(self.build_lib), reason)

    def attempt(self, cuda: Cuda) -> str:
        """Build, with the CUDA part if there is an nvcc; why that failed, or ""."""
        compiler, inplace = self.compiler, self.inplace
        try:
            for each in self.extensions:
                plain = extension()
                each.libraries, each.extra_link_args = plain.libraries, plain.extra_link_args
                if cuda.nvcc:
                    each.libraries.append("torch_cuda")
                    each.extra_link_args = compile_cuda(cuda, Path(self.build_temp) / "cuda")
                    built_for = " ".join(f"sm_{sm}" for sm in cuda.architectures)
                    served = ["-DUSE_CUDA", f'-DMTU_FAST_CUDA="{built_for}"']
                else:
                    quoted = cuda.absent.replace("\\", "/").replace('"', "'")
                    served = [f'-DMTU_FAST_NO_CUDA="no: {quoted}"']
                each.extra_compile_args = [*plain.extra_compile_args, *served]
            super().run()
        # compilers, linkers and torch's checks all fail in their own ways
        except Exception as error:
            self.compiler, self.inplace = compiler, inplace  # as before, for the next attempt
            return f"compiling failed ({' '.join(str(error).split())[:200]})"
        return ""


if __name__ == "__main__":  # pip runs it so, too
    os.chdir(ROOT)
    setup(
        distclass=Package,
        packages=find_packages(include=["mtu_fast", "mtu_fast.*"]),
        package_dir={
            "": "."
        },  # an editable install is then a plain path, which type checkers follow
        ext_modules=[] if ABSENT else [extension()],
        cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
    )
