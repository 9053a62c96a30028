"""A rank that is killed ends the others by the group's timeout, with the name of the exchange."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from mtu_fast.unlearning.loop import sealed
from tests.distributed.killed import BETWEEN, TIMEOUT, run
from tests.distributed.starting import started

SLACK = 20  # seconds, on a busy machine
NAMES = ("engine.rows:", "engine: parameters:", "rows.gram", "rows.vjp", "rows.backward")
CASES = [
    ("group", BETWEEN),
    ("group", "rows.gram: uses"),
    ("ddp", "engine.rows"),
    ("ddp", "rows.gram"),
    ("ddp", "rows.gram: sum"),
    ("ddp", "rows.vjp: sum"),
    ("ddp", "rows.backward: sum"),
    ("fsdp", "engine: parameters"),
    ("fsdp", "rows.gram: uses"),
    ("fsdp", "rows.vjp: sum"),
    ("tensor parallel", "engine.rows"),
    ("tensor parallel", "rows.gram: sum"),
]

WRITTEN = "unlearn: checkpoint: pieces"  # of every rank its piece, and of none the file


def outcomes(
    folder: Path, size: int, kind: str, where: str, dies: int, how: signal.Signals
) -> list[tuple[float, bool, str]]:
    """Of each rank that is left: seconds until its error, whether `.grad` is untouched, and the words."""
    ranks = started(run, size, str(folder), kind, where, dies, how)
    others = [rank for rank in range(size) if rank != dies]
    try:
        for rank in others:
            ranks[rank].join(TIMEOUT + 2 * SLACK)
    finally:
        for each in ranks:
            each.kill()
    ranks[dies].join()
    assert ranks[dies].exitcode == -signal.SIGKILL
    found = []
    for rank in others:
        seconds, untouched, text = (folder / str(rank)).read_text().split("\n", 2)
        found.append((float(seconds), untouched == "True", text))
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("kind", "where"), CASES)
def test_a_killed_rank(tmp_path: Path, size: int, kind: str, where: str) -> None:
    dies = size - 1 if "rows" in where else 0
    for seconds, untouched, text in outcomes(tmp_path, size, kind, where, dies, signal.SIGKILL):
        assert text.startswith(NAMES) and "Did a rank die" in text, text
        # the exchange at which it ended, where that is one of the engine's own
        assert where in (BETWEEN, "engine: parameters") or text.startswith(f"{where}:"), text
        assert untouched and seconds < TIMEOUT + SLACK


def test_a_rank_that_hangs(tmp_path: Path) -> None:
    """It keeps its connections: the others wait for the timeout, and no longer."""
    of_all = outcomes(tmp_path, 3, "fsdp", "rows.gram: uses", 2, signal.SIGSTOP)
    for seconds, untouched, text in of_all:
        assert text.startswith("rows.gram: uses:") and untouched
        assert seconds < TIMEOUT + SLACK
    assert max(seconds for seconds, _, _ in of_all) >= 0.9 * TIMEOUT


@pytest.mark.parametrize(
    ("kind", "where", "dies"),
    [("unlearn", "rows.gram: uses", 1), ("unlearn in slices", WRITTEN, 0)],
)
def test_a_killed_rank_of_unlearn(kind: str, where: str, dies: int, tmp_path: Path) -> None:
    """The loop ends on the others, and the run goes on from its checkpoint, on all ranks."""
    of_all = outcomes(tmp_path, 3, kind, where, dies, signal.SIGKILL)
    assert all(f"{where}:" in text and untouched for _, untouched, text in of_all)
    again = tmp_path / "again"
    again.mkdir()
    for file in tmp_path.glob("run.pt*"):
        file.rename(again / file.name)
    left = {file.name for file in again.glob("run.pt.*of3.*")}
    state = sealed.read(again / "run.pt")
    old = {name for name, _ in state.get("pieces", ())}
    # the new pieces lie beside the old ones, which the file names
    assert state["step"] == 3 and len(left) == 2 * len(old) and left >= old
    ranks = started(run, 3, str(again), kind, "nowhere", -1, signal.SIGKILL)
    for rank in ranks:
        rank.join(TIMEOUT + 2 * SLACK)
    assert [(again / str(rank)).read_text().split("\n", 2)[2] for rank in range(3)] == [""] * 3
    now = {file.name for file in again.glob("run.pt.*of3.*")}
    assert len(now) == len(old) and not now & old
