"""What a method, and rows kept from earlier steps, add to a checkpoint's folder: one file for each process."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

import torch

from mtu_fast._distributed.ranks import Ranks

STATE = "mtu_fast.pt"  # of the process n > 0 it is mtu_fast_n.pt
WHAT = "checkpoint"


def save(state: Mapping[str, Any], folder: str, ranks: Ranks | None) -> None:
    """Write this process's state; all files of one checkpoint share a token."""
    token = secrets.token_hex(8)
    rank, processes = 0, 1
    if ranks is not None:
        token, rank, processes = ranks.objects(WHAT, token)[0], ranks.rank, ranks.size
    os.makedirs(folder, exist_ok=True)  # the first process may be slower to make it
    torch.save({**state, "processes": processes, "token": token}, _file(folder, rank))


def load(folder: str, ranks: Ranks | None, *, keeps: bool = True) -> dict[str, Any] | None:
    """The state that this process goes on from; None where the checkpoint has none.

    Args:
        folder: the checkpoint's.
        ranks: as for `save`.
        keeps: whether this run keeps rows; otherwise those of the checkpoint are left.

    Raises:
        ValueError: on all processes, where one keeps rows and its file is missing or of another checkpoint, or
            another number of processes wrote them.
    """
    if ranks is None:
        own = _read(folder, 0)
        _check(_told(own, keeps), own, 0, 1)
        return own
    own = ranks.agreed(WHAT, lambda: _read(folder, ranks.rank))
    # the file of rank 0 may lie on another machine
    first = ranks.objects(WHAT, _told(own, keeps))[0]
    ranks.agreed(WHAT, lambda: _check(first, own, ranks.rank, ranks.size))
    if first is None:
        return None
    # what a method says is alike on all processes; rows are each one's own
    kept = own["subspace"] if own is not None and first["subspace"] else None
    return {**first, "subspace": kept}


def _read(folder: str, rank: int) -> dict[str, Any] | None:
    file = _file(folder, rank)
    if not os.path.isfile(file):
        return None
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _told(own: Mapping[str, Any] | None, keeps: bool) -> dict[str, Any] | None:
    """A state without its rows, and whether it has some that are wanted."""
    if own is None:
        return None
    return {**own, "subspace": keeps and own["subspace"] is not None}


def _check(
    first: Mapping[str, Any] | None, own: Mapping[str, Any] | None, rank: int, processes: int
) -> None:
    name = os.path.basename(_file("", rank))
    if first is None:
        if own is not None:
            raise ValueError(
                f"checkpoint: found {name} without {STATE}, expected both: they are of another run, or rank 0's is "
                "lost. Resume from a whole checkpoint."
            )
        return
    # without kept rows the first one's state is enough, for any number of processes
    if not first["subspace"]:
        return
    written = first["processes"]
    if written != processes:
        raise ValueError(
            f"checkpoint: found rows kept by {written} processes, expected {processes} as in this run: each has rows "
            "of its own. Resume on as many processes, or make the Trainer without subspace=."
        )
    if own is None or own["token"] != first["token"]:
        found = f"no {name}" if own is None else f"{name} of another checkpoint"
        raise ValueError(
            f"checkpoint: found {found}, expected the rows that rank {rank} kept, written with {STATE}. "
            "Resume from a whole checkpoint, or make the Trainer without subspace=."
        )


def _file(folder: str, rank: int) -> str:
    stem, end = os.path.splitext(STATE)
    return os.path.join(folder, f"{stem}_{rank}{end}" if rank else STATE)
