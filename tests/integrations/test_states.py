"""Files of one checkpoint belong together: rows are each process's own, and the rest is rank 0's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from mtu_fast._distributed.ranks import everyone
from mtu_fast.integrations import _states
from tests.integrations.ranks import on_two

CPU = torch.device("cpu")


def state(rank: int, kept: bool, value: float) -> dict[str, Any]:
    rows = {"rows": torch.tensor(float(rank))} if kept else None
    return {"method": {"value": value}, "subspace": rows}


def outcome(folder: str, ranks: Any, keeps: bool = True) -> Any:
    """What this rank goes on from, or the words of the error."""
    try:
        found = _states.load(folder, ranks, keeps=keeps)
    except ValueError as error:
        return str(error)
    assert found is not None
    kept = None if found["subspace"] is None else float(found["subspace"]["rows"])
    return found["method"]["value"], kept


def run(folder: Path, kept: bool) -> list[Any]:
    """A checkpoint as written, without rank 1's file, and with one of another checkpoint."""
    torch.distributed.init_process_group("gloo")
    ranks = everyone(2, CPU)
    assert ranks is not None
    first, second = str(folder / "first"), str(folder / "second")
    for number, at in enumerate((first, second)):
        # a method's state is rank 0's, whatever lies in another's file
        _states.save(state(ranks.rank, kept, number + 10 * ranks.rank), at, ranks)
    found = [outcome(first, ranks), outcome(second, ranks)]
    own = "mtu_fast_1.pt"
    if ranks.rank == 1:
        shutil.copy(folder / "first" / own, folder / "second" / own)
    torch.distributed.barrier()
    found.append(outcome(second, ranks))
    torch.distributed.barrier()
    if ranks.rank == 1:
        (folder / "second" / own).unlink()
    torch.distributed.barrier()
    found.append(outcome(second, ranks))
    # a run that keeps no rows asks for none
    assert outcome(second, ranks, keeps=False) == (1, None)
    torch.distributed.barrier()
    if ranks.rank == 0:
        (folder / "first" / _states.STATE).unlink()
    torch.distributed.barrier()
    found.append(outcome(first, ranks))
    return found


def test_each_rank_has_its_own_rows_or_none_goes_on(tmp_path: Path) -> None:
    first, second = on_two(run, tmp_path, True)
    assert first[:2] == [(0, 0.0), (1, 0.0)] and second[:2] == [(0, 1.0), (1, 1.0)]
    for found in (first, second):
        assert "found mtu_fast_1.pt of another checkpoint" in found[2]
        assert "found no mtu_fast_1.pt, expected the rows that rank 1 kept" in found[3]
        assert "found mtu_fast_1.pt without mtu_fast.pt" in found[4]


def test_without_rows_every_rank_goes_on_from_the_first_ones(tmp_path: Path) -> None:
    """Whatever file of an earlier run lies beside it."""
    for found in on_two(run, tmp_path, False):
        assert found[:4] == [(0, None), (1, None), (1, None), (1, None)]
        assert "without mtu_fast.pt" in found[4]


def test_one_process(tmp_path: Path) -> None:
    assert _states.load(str(tmp_path), None) is None
    _states.save(state(0, True, 3), str(tmp_path), None)
    assert outcome(str(tmp_path), None) == (3, 0.0)
