"""The oldest Python and torch that are promised: the extension compiled by them, and tests of the core.

python -m tools.floor tests/engine ...    the arguments are pytest's

The environment is out/floor, and is used again. Where that torch cannot be had, the reason is
printed and the exit status is 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.interpreters import (
    OLDEST,
    Interpreter,
    NotHere,
    environment,
    install_torch,
    interpreters,
    run,
)

ROOT = Path(__file__).parents[1]
VENV = ROOT / "out" / "floor"
TORCH = "torch==2.11.0"
TOOLS = ("setuptools>=77,<82", "wheel", "pytest>=8", "pytest-xdist", "hypothesis", "packaging")


def prepared(python: Interpreter) -> Path:
    """The environment's Python, with torch and the tools.

    Raises:
        NotHere: something cannot be installed.
    """
    note, wanted = VENV / "ready", f"{python.name} {TORCH} {TOOLS}"
    if note.is_file() and note.read_text() == wanted:
        return VENV / "bin" / "python"
    executable = environment(python, VENV)
    install_torch(executable, TORCH)
    run([executable, "-m", "pip", "install", "--quiet", *TOOLS])
    note.write_text(wanted)
    return executable


def main(arguments: Sequence[str]) -> int:
    """Prepare, compile, test; the process's exit status."""
    oldest = interpreters(Path(sys.executable))[0]
    if oldest.version > OLDEST:
        promised = "{}.{}".format(*OLDEST)
        print(f"floor: Python {promised} is not here, {oldest.name} is the oldest")
    try:
        python = prepared(oldest)
    except NotHere as why:
        print(f"floor: SKIPPED: Python {oldest.name} with {TORCH} cannot be had here: {why}")
        return 0
    install = ["-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable"]
    clean = {**os.environ, "OMP_NUM_THREADS": "1"}
    clean.pop("PYTHONPATH", None)
    for command in ([*install, "."], ["tools/smoke.py", "--kernels"], ["-m", "pytest", *arguments]):
        done = subprocess.run([python, *command], cwd=ROOT, env=clean, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
