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
    shapes = {name: t.shape[1:] for of_rank in vectors for name, t in of_rank.items()}
    found = {}
    for name, shape in shapes.items():
        like = next(of_rank[name] for of_rank in vectors if name in of_rank)
        pieces = []
        for of_rank in vectors:
            # all parameters of a rank hold the same rows
            count = max((len(t) for t in of_rank.values()), default=0)
            pieces.append(of_rank.get(name, like.new_zeros(count, *shape)))
        found[name] = torch.cat(pieces)
    return found


def _joined(pieces: Sequence[Kept], like: Kept) -> dict[str, Any]:
    """Rows of one step and task, of some ranks."""
    found = {**like, "vectors": stacked([piece["vectors"] for piece in pieces])}
    for column in ("sample", "loss"):
        found[column] = torch.cat([like[column][:0], *(piece[column] for piece in pieces)])
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
        for t, run in groupby(task[start : start + count]):
            at = slice(start, start + len(list(run)))
            start = at.stop
            found.append({
                "vectors": {name: v[at] for name, v in block["vectors"].items()},
                "task": block["tasks"][t],
                "sample": block["sample"][at],
                "loss": block["loss"][at],
                "dtype": block["dtype"],
            })
    return found


def _in_one(parts: Sequence[Kept]) -> dict[str, Any]:
    """All rows in one piece; of products with one another nothing is known."""
    tasks = list(dict.fromkeys(part["task"] for part in parts))
    counts = [len(part["sample"]) for part in parts]
    number = torch.tensor([tasks.index(part["task"]) for part in parts])
    coarsest = max((part["dtype"] for part in parts), key=lambda dtype: torch.finfo(dtype).eps)
    return {
        "vectors": stacked([part["vectors"] for part in parts]),
        "counts": counts,
        "task": number.repeat_interleave(torch.tensor(counts)),
        "sample": torch.cat([part["sample"] for part in parts]),
        "loss": torch.cat([part["loss"] for part in parts]),
        "tasks": tasks,
        "dtype": coarsest,
        "grams": [],
    }
