"""Pythons of this machine, and environments made of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST = (3, 10)
NEWEST = (3, 14)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# for a torch with CUDA, which is what an index without CPU builds has
FREE_DISK = 12 << 30
INSTALLING = 900.0  # seconds, then a torch counts as not to be had
FACTS = (
    "import sys, sysconfig, os; assert os.path.isfile(sysconfig.get_path('include') + '/Python.h');"
    "import ensurepip, venv; print(*sys.version_info[:2], sys.executable)"
)


class NotHere(Exception):
    """What a check needs and this machine cannot get."""


@dataclass(frozen=True)
class Interpreter:
    """A Python with its headers, from which an environment can be made."""

    version: tuple[int, int]
    path: Path

    @property
    def name(self) -> str:
        """`"3.10"`."""
        return "{}.{}".format(*self.version)


def interpreter(path: str | Path) -> Interpreter | None:
    """The Python at `path`; None where it does not run, lacks headers or venv, or is not served."""
    try:
        done = subprocess.run([path, "-c", FACTS], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor, executable = done.stdout.split(maxsplit=2)
    version = int(major), int(minor)
    served = OLDEST <= version <= NEWEST
    return Interpreter(version, Path(executable.strip())) if served else None


def interpreters(first: Path) -> list[Interpreter]:
    """One Python a version, oldest first: `first` for its own, then those in PATH and of pyenv."""
    found: dict[tuple[int, int], Interpreter] = {}
    for path in _candidates(first):
        each = interpreter(path)
        if each is not None:
            found.setdefault(each.version, each)
    return [found[version] for version in sorted(found)]


def _candidates(first: Path) -> Iterator[str | Path]:
    yield first
    for minor in range(OLDEST[1], NEWEST[1] + 1):
        path = shutil.which(f"python3.{minor}")
        if path is not None:
            yield path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob("versions/*/bin/python"))


def run(
    command: Sequence[str | Path],
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> str:
    """Standard output of a command.

    Raises:
        NotHere: it failed, or took longer than `timeout` seconds; its last line.
    """
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean.update(environment or {})
    try:
        done = subprocess.run(
            command, cwd=folder, env=clean, timeout=timeout, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        raise NotHere(f"{Path(command[0]).name} took more than {timeout:.0f} s") from None
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or [""]
        raise NotHere(_telling(lines))
    return done.stdout


def _telling(lines: Sequence[str]) -> str:
    """The first line that speaks of an error, else the last."""
    errors = [line for line in lines if line.startswith(("ERROR", "error"))]
    return (errors or lines[-1:])[0]


def environment(python: Interpreter, folder: Path) -> Path:
    """A new virtual environment in `folder`, with a pip that reads today's packages; its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    run([python.path, "-m", "venv", folder])
    return folder / "bin" / "python"


def install_torch(python: Path, torch: str) -> str:
    """Install a torch, a build for the CPU where there is an index of such; its version.

    Raises:
        NotHere: it cannot be had, in time or at all, or the disk is too small for it.
    """
    free = shutil.disk_usage(python.parents[1]).free
    if free < FREE_DISK:
        raise NotHere(f"{free >> 30} GiB of disk are free, {torch} may need {FREE_DISK >> 30}")
    extra = []
    settings = run([python, "-m", "pip", "config", "list"])
    if not any(word in settings for word in ("index-url", "find-links", "no-index")):
        extra = ["--extra-index-url", CPU_INDEX]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *extra]
    run([*pip, torch, "numpy"], timeout=INSTALLING)
    return run([python, "-c", "import torch; print(torch.__version__)"]).strip()
