"""What a method, and rows kept from earlier steps, add to a checkpoint's folder: one file for each process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

STATE = "mtu_fast.pt"  # of the process n > 0 it is mtu_fast_n.pt


def save(state: Mapping[str, Any], folder: str, process: int, processes: int) -> None:
    """Write the state of one of the processes."""
    os.makedirs(folder, exist_ok=True)  # the first process may be slower to make it
    torch.save({**state, "processes": processes}, _file(folder, process))


def load(folder: str, process: int, processes: int) -> dict[str, Any] | None:
    """The state that this process goes on from; None where the checkpoint has none.

    Raises:
        ValueError: another number of processes wrote it, and each kept rows of its own.
    """
    # what a method says is alike on all processes, so a new one takes the first one's
    found = [file for file in (_file(folder, process), _file(folder, 0)) if os.path.isfile(file)]
    if not found:
        return None
    state: dict[str, Any] = torch.load(found[0], map_location="cpu", weights_only=True)
    written = state.get("processes", 1)
    if written != processes and state["subspace"] is not None:
        raise ValueError(
            f"checkpoint: found rows kept by {written} processes, expected {processes} as in this run: each has rows "
            "of its own. Resume on as many processes, or make the Trainer without subspace=."
        )
    return state


def _file(folder: str, process: int) -> str:
    stem, end = os.path.splitext(STATE)
    return os.path.join(folder, f"{stem}_{process}{end}" if process else STATE)
