"""What figures depend on: device, threads, versions, date and commit, written beside every figure that is kept."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT


def environment(device: str = "cpu") -> dict[str, Any]:
    """Device and processor, threads, versions, date, commit and whether the tree differs from it."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "mtu_fast": _version("mtu_fast"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "changed": changed(),
    }


@cache
def processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this tree: from git, else from the file COMMIT of an exported tree, else ""."""
    note = ROOT / "COMMIT"
    return _git("rev-parse", "HEAD") or (note.read_text().strip() if note.is_file() else "")


def changed() -> bool:
    """Whether the tree differs from its commit; of an exported tree its file COMMIT says so."""
    return bool(_git("status", "--porcelain", "--untracked-files=no")) or commit().endswith("+")


def stamp() -> str:
    """What COMMIT says of a copy of this tree: the commit, and + where the tree differs from it."""
    return commit().rstrip("+") + ("+" if changed() else "")


def _version(package: str) -> str:
    if package == "mtu_fast":
        import mtu_fast  # the one that runs, installed or not

        return mtu_fast.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
