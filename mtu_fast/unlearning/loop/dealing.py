"""Rows kept across steps, dealt out anew where another number of ranks goes on with a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

Kept = Mapping[str, Any]


def subspace_of(held: Sequence[Kept], like: Kept) -> dict[str, Any]:
    """The state of a subspace from those of some ranks, whose rows lie behind one another.

    Args:
        held: states of the ranks that this one stands for; of none possibly.
        like: the state of a rank, for all else.
    """
    batches = []
    for i, batch in enumerate(like["batches"]):
        vectors = [each["batches"][i]["vectors"] for each in held]
        batches.append({**batch, "vectors": stacked(vectors)})
    return {**like, "batches": batches}


def memory_of(held: Sequence[Kept], like: Kept, alone: bool) -> dict[str, Any]:
    """The same of a memory, whose rows are stored in one piece by one process, and in parts by each of several.

    Args:
        held: states of the ranks that this one stands for; of none possibly.
        like: the state of a rank, for all else.
        alone: whether one process goes on.
    """
    if like["block"] is None:
        return {**like}
    of_ranks = [_parts(each["block"]) for each in held]
    parts = []
    for i, part in enumerate(_parts(like["block"])):
        parts.append(_joined([of_rank[i] for of_rank in of_ranks], part))
    return {**like, "block": _in_one(parts) if alone else {"parts": parts}}


def stacked(vectors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{name: `[ΣK, *shape]`}, zero where a rank leaves a parameter out."""
    likes: dict[str, Tensor] = {}
    for of_rank in vectors:
        for name, t in of_rank.items():
            likes.setdefault(name, t)
    found = {}
    for name, like in likes.items():
        pieces = []
        for of_rank in vectors:
            # all parameters of a rank hold the same rows
            count = max(map(len, of_rank.values()), default=0)
            pieces.append(of_rank.get(name, like.new_zeros(count, *like.shape[1:])))
        found[name] = torch.cat(pieces)
    return found


def _joined(pieces: Sequence[Kept], like: Kept) -> dict[str, Any]:
    """Rows of one step and task, of some ranks."""
    found = {**like, "vectors": stacked(_column(pieces, "vectors"))}
    for name in ("sample", "loss"):
        none = like[name][:0]
        found[name] = torch.cat([none, *_column(pieces, name)])
    return found


def _parts(block: Kept) -> list[Kept]:
    """The rows by step and task, in whichever way they were stored."""
    if "parts" in block:
        return list(block["parts"])
    found: list[Kept] = []
    start = 0
    task = block["task"].tolist()
    for count in block["counts"]:
        # a step's rows lie task after task, and so they do on ranks
        for number, run in groupby(task[start : start + count]):
            stop = start + len(list(run))
            found.append(_part(block, number, slice(start, stop)))
            start = stop
    return found


def _part(block: Kept, number: int, at: slice) -> Kept:
    """The rows of a slice, all of the task of that number."""
    task, vectors = block["tasks"][number], block["vectors"]
    return {
        # zeros of parameters that the task does not reach are not stored by parts
        "vectors": {name: vectors[name][at] for name in block["reached"][task]},
        "task": task,
        "sample": block["sample"][at],
        "loss": block["loss"][at],
        "dtype": block["dtype"],
    }


def _in_one(parts: Sequence[Kept]) -> dict[str, Any]:
    """All rows in one piece; of products with one another nothing is known."""
    task = _column(parts, "task")
    tasks = list(dict.fromkeys(task))
    number = torch.tensor([tasks.index(name) for name in task])
    sample = _column(parts, "sample")
    counts = [len(t) for t in sample]
    reached: dict[str, dict[str, None]] = {name: {} for name in tasks}
    for part in parts:
        reached[part["task"]] |= dict.fromkeys(part["vectors"])
    return {
        "vectors": stacked(_column(parts, "vectors")),
        "counts": counts,
        "task": number.repeat_interleave(torch.tensor(counts)),
        "sample": torch.cat(sample),
        "loss": torch.cat(_column(parts, "loss")),
        "tasks": tasks,
        # the coarsest, by which all of them are known
        "dtype": max(_column(parts, "dtype"), key=lambda dtype: torch.finfo(dtype).eps),
        "reached": {name: list(of_task) for name, of_task in reached.items()},
        "grams": [],
    }


def _column(parts: Sequence[Kept], name: str) -> list[Any]:
    return [part[name] for part in parts]
