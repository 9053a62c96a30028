"""Whether a checkpoint holds all that a run needs, before anything of the run is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtu_fast._arguments import shown

Kinds = Mapping[str, type | tuple[type, ...]]

STATE: Kinds = {
    "format": int,
    "settings": Mapping,
    "history": Mapping,
    "model": Mapping,
    "optimizer": Mapping,
    "draws": Sequence,
    "random": Mapping,
    "buffers": Mapping,
    "forget_place": Mapping,
    "retain_place": Mapping,
    "step": int,
    "seconds": (int, float),
    "others": Sequence,
}
HISTORY: Kinds = {
    "tasks": Sequence,
    "targets": Sequence,
    "level": (Mapping, type(None)),
    "records": Sequence,
    "reason": str,
    "step": int,
}
RECORD: Kinds = {
    "step": int,
    "forget": Mapping,
    "retain": Mapping,
    "forget_loss": Mapping,
    "retain_loss": Mapping,
    "drift": Mapping,
    "seconds": (int, float),
    "validation": Mapping,
}
RANDOM: Kinds = {
    "python": Sequence,
    "numpy": Mapping,
    "torch": Tensor,
    "cuda": Sequence,
    "generators": Sequence,
}
NUMPY: Kinds = {"key": Tensor, "pos": int, "has_gauss": int, "gauss": float}
PLACE: Kinds = {
    "passes": int,
    "open": bool,
    "given": int,
    "length": (int, type(None)),
    "begun": Mapping,
}
PIECES: Kinds = {"pieces": Sequence, "cut": Mapping, "shares": int}
SLICED: Kinds = {"shape": Sequence, "dtype": torch.dtype, "chunks": Mapping}
COUNTS = {"step", "passes", "given", "seconds", "shares"}
MOST = 2**53  # of a count; more than any run lasts


def check_contents(path: str | Path, state: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Every part is there and of its kind.

    Args:
        path: the file, for errors.
        state: what it holds.
        needed: further parts that this run needs: scheduler, method, subspace.

    Raises:
        ValueError: a part is missing or of another kind.
    """
    _check(path, "", state, STATE)
    for name in needed:
        _check(path, "", state, {name: Mapping})
    _check_history(path, state["history"])
    _check_random(path, "random", state["random"])
    for side in ("forget_place", "retain_place"):
        _check_place(path, side, state[side])


def check_pieces(path: str | Path, state: Mapping[str, Any]) -> None:
    """Every piece has its name and its checksum, and every slice its place.

    Args:
        path: the file, for errors.
        state: what it holds.

    Raises:
        ValueError: a part is missing or of another kind.
    """
    _check(path, "", state, PIECES)
    for i, piece in enumerate(state["pieces"]):
        if len(piece) != 2 or not all(isinstance(word, str) for word in piece):
            raise ValueError(
                f"checkpoint: {path} is damaged: pieces[{i}] is {shown(piece)}, expected a name and a checksum."
            )
    if not 1 <= state["shares"] <= len(state["pieces"]):
        raise ValueError(
            f"checkpoint: {path} is damaged: shares is {state['shares']}, expected at most its "
            f"{len(state['pieces'])} pieces."
        )
    for place, entry in state["cut"].items():
        _check(path, f"cut[{place!r}]", entry, SLICED)


def _check_history(path: str | Path, history: Any) -> None:
    _check(path, "history", history, HISTORY)
    if not history["records"]:
        raise ValueError(f"checkpoint: {path} is damaged: history holds no record.")
    for name in ("tasks", "targets"):
        _check_names(path, f"history.{name}", history[name])
    if history["level"] is not None:
        _check_numbers(path, "history.level", history["level"])
    for i, record in enumerate(history["records"]):
        _check_record(path, f"history.records[{i}]", record)


def _check_names(path: str | Path, where: str, found: Sequence[Any]) -> None:
    are_names = bool(found) and all(isinstance(name, str) for name in found)
    # a string is a sequence of strings, too
    if isinstance(found, str) or not are_names:
        raise ValueError(
            f"checkpoint: {path} is damaged: {where} is {shown(found)}, expected names."
        )


def _check_record(path: str | Path, where: str, record: Any) -> None:
    _check(path, where, record, RECORD)
    for name, part in record.items():
        if isinstance(part, Mapping):
            _check_numbers(path, f"{where}.{name}", part)


def _check_place(path: str | Path, where: str, place: Any) -> None:
    _check(path, where, place, PLACE)
    if place["open"]:
        _check_random(path, f"{where}.begun", place["begun"])


def _check_numbers(path: str | Path, where: str, found: Mapping[Any, Any]) -> None:
    for task, value in found.items():
        if not isinstance(task, str) or not isinstance(value, int | float):
            raise ValueError(
                f"checkpoint: {path} is damaged: {where} holds {shown(task)}: {shown(value)}, expected a number by "
                "the name of its task."
            )


def _check_random(path: str | Path, where: str, found: Any) -> None:
    _check(path, where, found, RANDOM)
    _check(path, f"{where}.numpy", found["numpy"], NUMPY)


def _check(path: str | Path, where: str, found: Any, kinds: Kinds) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(
            f"checkpoint: {path} is damaged: {where} is {type(found).__name__}, expected a mapping."
        )
    for name, kind in kinds.items():
        part = f"{where}.{name}" if where else name
        if name not in found:
            raise ValueError(f"checkpoint: {path} is incomplete: it holds no {part}.")
        value = found[name]
        # to Python a bool is a number, too
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(
                f"checkpoint: {path} is damaged: {part} is {type(value).__name__}, expected {_named(kind)}."
            )
        if name in COUNTS:
            _check_count(path, part, value)


def _check_count(path: str | Path, part: str, value: Any) -> None:
    if not 0 <= value <= MOST:  # NaN neither
        raise ValueError(
            f"checkpoint: {path} is damaged: {part} is {value}, expected at least 0 and at most {MOST}."
        )


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(one.__name__ for one in kinds)
