"""A user's script under `mypy --strict`, against the editable install of this tree."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "smoke.py"


@pytest.fixture(scope="module")
def editable() -> None:
    """Skip unless what is installed here is this very tree."""
    try:
        where = metadata.distribution("mtu_fast").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        where = None
    if where is None or json.loads(where)["url"] != ROOT.as_uri():
        pytest.skip("no editable install of this tree in this environment")


def mypy(folder: Path, text: str) -> str:
    """What mypy says of a script outside of the tree, with no configuration."""
    (folder / "user.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run([*command, "user.py"], cwd=folder, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_a_users_script_is_strictly_typed(editable: None, tmp_path: Path) -> None:
    assert mypy(tmp_path, SCRIPT.read_text()).startswith("Success: no issues found")


def test_a_wrong_argument_is_found(editable: None, tmp_path: Path) -> None:
    said = mypy(tmp_path, "import mtu_fast as mtu\n\nmtu.Engine(3)\n")
    assert 'Argument 1 to "Engine" has incompatible type "int"' in said
