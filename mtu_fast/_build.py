"""Compiles `mtu_fast._C` against torch's stable ABI, for setup.py and for `python -m mtu_fast build`.

Nothing of torch or of this package is imported: only torch's headers and libraries are used, which
are the same for every Python. In the environment, CXX and CXXFLAGS are a compiler and its flags,
MAX_JOBS how many files are compiled at a time, CUDA_HOME where nvcc is, MTU_FAST_TORCH the folder
of a torch to compile against in place of the installed one, and MTU_FAST_CUDA=0 leaves the CUDA
kernels out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent
# LibTorch's stable ABI as of this version; the binary serves every later one
OLDEST_TORCH = (2, 11)
# those of them that nvcc knows, and PTX of the last, for what comes after
ARCHITECTURES = ("80", "90", "100")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-g0",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
]


class BuildError(Exception):
    """Why the extension was not built."""


# ---- what there is -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    """A torch to compile against: its folder, its version, and its CUDA's, "" without."""

    folder: Path
    version: str
    cuda: str


def find_torch() -> Torch:
    """The torch in MTU_FAST_TORCH, else the installed one.

    Raises:
        BuildError: there is none, or it is older than the stable ABI.
    """
    given = os.environ.get("MTU_FAST_TORCH")
    found = None if given else importlib.util.find_spec("torch")
    if given:
        folder = Path(given)
    elif found is not None and found.origin is not None:
        folder = Path(found.origin).parent
    else:
        raise BuildError("no torch at build time")
    facts = folder / "version.py"
    if not facts.is_file():
        raise BuildError(f"no torch at build time ({folder} has no version.py)")
    text = facts.read_text()
    version = _stated("__version__", text)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"torch {version} at build time, older than {oldest}")
    return Torch(folder, version, _stated("cuda", text))


def _stated(name: str, text: str) -> str:
    """The string that a line of torch's version.py gives a name; "" for None."""
    found = re.search(rf"^{name}\b[^=\n]*= '([^']*)'", text, re.MULTILINE)
    return found.group(1) if found else ""


def sources() -> Path:
    """The folder csrc: in an installed package its own copy, else that of the source tree.

    Raises:
        BuildError: neither is there.
    """
    for folder in (PACKAGE / "_csrc", PACKAGE.parent / "csrc"):
        if (folder / "bindings").is_dir():
            return folder
    raise BuildError(f"the C++ sources are neither in {PACKAGE / '_csrc'} nor beside the package")


def stamp() -> str:
    """What a binary that is built from these sources has in it."""
    root, found = sources(), hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    return f"mtu_fast sources {found.hexdigest()}"


def outdated(binary: Path) -> str:
    """Why a binary does not fit this package; "" where it does.

    Of a source tree alone, whose files a pull or a switch of branches changes: what is installed was
    built together.
    """
    if not (PACKAGE.parent / "csrc" / "bindings").is_dir() or (PACKAGE / "_csrc").is_dir():
        return ""
    if stamp().encode() in binary.read_bytes():
        return ""
    return f"mtu_fast._C is outdated: {binary} was built from other sources than csrc has now"


@dataclass(frozen=True)
class Cuda:
    """What compiles the CUDA kernels, for which architectures; or why nothing does."""

    nvcc: str = ""
    architectures: tuple[str, ...] = ()
    absent: str = ""


def find_cuda(torch: Torch) -> Cuda:
    """How the CUDA kernels are built here, or why they are left out."""
    if os.environ.get("MTU_FAST_CUDA") == "0":
        return Cuda(absent="left out by MTU_FAST_CUDA=0")
    if not torch.cuda:
        return Cuda(absent=f"torch {torch.version} is built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        return Cuda(absent="nvcc was not found in CUDA_HOME or PATH")
    return _compiled_by(nvcc)


def _compiled_by(nvcc: str) -> Cuda:
    """The architectures that this compiler serves, or why it serves none."""
    try:
        listed = _run([nvcc, "--list-gpu-arch"]).stdout
    except OSError as error:  # not a program of this machine
        return Cuda(absent=f"{nvcc} does not run: {error.strerror}")
    known = re.findall(r"^compute_(\d+)$", listed, re.MULTILINE)
    served = tuple(sm for sm in ARCHITECTURES if sm in known)
    if served:
        return Cuda(nvcc, served)
    wanted = ", ".join(f"compute_{sm}" for sm in ARCHITECTURES)
    found = " ".join(known) or "nothing"
    return Cuda(absent=f"{nvcc} --list-gpu-arch names none of {wanted}, but {found}")


# ---- compiling -----------------------------------------------------------------------------------


def build(target: Path) -> None:
    """Compile the extension and put it at `target`, which is whole at every moment.

    What keeps the CUDA kernels from being built is printed and costs them only.

    Raises:
        BuildError: no torch, no sources, no headers of Python, or a compiler failed.
    """
    torch = find_torch()
    cuda = find_cuda(torch)
    if cuda.nvcc:
        try:
            return _build(target, torch, cuda)
        except BuildError as error:
            cuda = Cuda(absent=str(error))
    print(f"mtu_fast: built without CUDA kernels: {cuda.absent}", file=sys.stderr)
    return _build(target, torch, cuda)


def build_in_place() -> Path:
    """Compile the extension into this package's folder, and tell pip of it, so that it goes when the package does.

    Returns:
        The file.

    Raises:
        BuildError: as in `build`, or the folder cannot be written to.
    """
    target = PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not os.access(PACKAGE, os.W_OK):
        raise BuildError(f"{PACKAGE} cannot be written to; use a virtual environment of your own")
    build(target)
    leave_note(PACKAGE, "")
    _record(target)
    return target


def leave_note(package: Path, reason: str) -> None:
    """Write why there is no extension beside the package's files, or remove an outdated note.

    pip hides what a build prints; `python -m mtu_fast` shows the note.
    """
    note = package / "_C.missing"
    note.unlink(missing_ok=True)
    if reason:
        note.write_text(reason + "\n")
        print(f"mtu_fast: built without mtu_fast._C: {reason}", file=sys.stderr)


def _record(target: Path) -> None:
    """Add a file to those that pip removes with the package; nothing to do in a source tree."""
    site = PACKAGE.parent
    name = target.relative_to(site).as_posix()
    for folder in site.glob("mtu_fast-*.dist-info"):
        record = folder / "RECORD"
        listed = record.read_text() if record.is_file() else ""
        if "mtu_fast/__init__.py," in listed and f"{name}," not in listed:
            record.write_text(f"{listed}{name},,\n")


def _build(target: Path, torch: Torch, cuda: Cuda) -> None:
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise BuildError(f"Python's headers are not in {headers} (on Debian: python3-dev)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mtu_fast-") as temporary:
        folder = Path(temporary)
        linked = compile_cuda(cuda, folder) if cuda.nvcc else []
        objects = compile_cpp(torch, cuda, headers, folder)
        part = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            _link(part, [*objects, *linked], torch, bool(cuda.nvcc))
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def compile_cpp(torch: Torch, cuda: Cuda, headers: Path, folder: Path) -> list[str]:
    """The objects of csrc's C++ files, newly compiled into `folder`.

    Raises:
        BuildError: the compiler failed; its first error.
    """
    root = sources()
    flags = [*FLAGS, "-fPIC", *definitions(cuda), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    include = torch.folder / "include"
    for path in (include, include / "torch" / "csrc" / "api" / "include", headers):
        flags += ["-isystem", str(path)]
    objects, commands = [], []
    for source in sorted(root.rglob("*.cpp")):
        objects.append(str(folder / f"{source.parent.name}.{source.stem}.o"))
        commands.append([*_compiler(), *flags, "-c", str(source), "-o", objects[-1]])
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_check, commands))
    return objects


def definitions(cuda: Cuda) -> list[str]:
    """Macros: the oldest torch that is served, and how this was built."""
    major, minor = OLDEST_TORCH
    quoted = cuda.absent.replace("\\", "/").replace('"', "'")
    defined = [
        f"-DTORCH_TARGET_VERSION={(major << 56) + (minor << 48):#x}ULL",
        f'-DMTU_FAST_TORCH_TARGET="{major}.{minor}"',
        f'-DMTU_FAST_FLAGS="{" ".join(FLAGS)}"',
        f'-DMTU_FAST_SOURCES="{stamp()}"',
    ]
    if not cuda.nvcc:
        return [*defined, f'-DMTU_FAST_NO_CUDA="no: {quoted}"']
    served = " ".join(f"sm_{sm}" for sm in cuda.architectures)
    return [*defined, "-DUSE_CUDA", f'-DMTU_FAST_CUDA="{served}"']


def compile_cuda(cuda: Cuda, folder: Path) -> list[str]:
    """The objects of csrc/cuda, newly compiled, and what links them: the runtime that belongs to nvcc, static.

    Raises:
        BuildError: nvcc failed; its first error.
    """
    last = cuda.architectures[-1]
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in cuda.architectures]
    flags.append(f"-gencode=arch=compute_{last},code=compute_{last}")
    objects = []
    for source in sorted((sources() / "cuda").glob("*.cu")):
        objects.append(str(folder / f"{source.stem}.cuda.o"))
        _check([cuda.nvcc, *flags, "-c", str(source), "-o", objects[-1]])
    said = _run([cuda.nvcc, "--dryrun", "-c", "x.cu"]).stderr
    folders = re.findall(r'"(-L[^"]+)"', said)
    return [*objects, *folders, "-lcudart_static", "-lpthread", "-ldl", "-lrt"]


def _link(target: Path, inputs: Sequence[str], torch: Torch, with_cuda: bool) -> None:
    shared = ["-shared"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    libraries = ["-ltorch", "-ltorch_cpu"]
    if with_cuda:
        libraries.append("-ltorch_cuda")
    found = f"-L{torch.folder / 'lib'}"
    _check([*_compiler(), *shared, *inputs, found, *libraries, "-o", str(target)])


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def _check(command: Sequence[str]) -> None:
    """Run a compiler, its warnings passed on."""
    name = Path(command[0]).name
    try:
        done = _run(command)
    except OSError as error:
        raise BuildError(f"compiling failed ({name}: {error.strerror})") from None
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        errors = [line for line in lines if "error" in line.lower()]
        first = (errors or lines[-1:])[0]
        raise BuildError(f"compiling failed ({name}: {' '.join(first.split())[:200]})")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
