"""Rows kept across steps, dealt out anew where another number of ranks goes on with a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mtu_fast._rows.keeping import end_to_end, zeros
from mtu_fast._rows.plain import plain_of, use_of
from mtu_fast._rows.uses import Dense, Use

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
    if alone:
        # step after step, and of each rank after rank
        pieces = [piece for of_part in zip(*of_ranks, strict=True) for piece in of_part]
        return {**like, "block": _in_one([piece for piece in pieces if len(piece["sample"])])}
    parts = []
    for i, part in enumerate(_parts(like["block"])):
        parts.append(_joined([of_rank[i] for of_rank in of_ranks], part))
    return {**like, "block": {"parts": parts}}


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
    counts = [len(piece["sample"]) for piece in pieces]
    found = {**like, **_plain(_end_to_end(list(map(_rows_of, pieces)), counts))}
    for name in ("sample", "loss"):
        none = like[name][:0]
        found[name] = torch.cat([none, *_column(pieces, name)])
    return found


def _rows_of(part: Kept) -> dict[str, Use]:
    """{parameter: what is kept of it}, of the rows of one step and task."""
    found: dict[str, Use] = {}
    for name, rows in part["vectors"].items():
        found[name] = Dense(tuple(rows.shape[1:]), rows)
    for name, (plain,) in part["factors"].items():
        found[name] = use_of(f"Memory: state: factors[{name!r}]", plain)
    return found


def _end_to_end(rows: Sequence[Mapping[str, Use]], counts: Sequence[int]) -> dict[str, Use]:
    """{parameter: what is kept of it} of all rows behind one another: factors where these have them in common."""
    found: dict[str, Use] = {}
    for name in dict.fromkeys(name for each in rows for name in each):
        uses = [each.get(name) for each in rows]
        found[name] = end_to_end(uses, counts) or _explicit(uses, counts)
    return found


def _explicit(uses: Sequence[Use | None], counts: Sequence[int]) -> Dense:
    """The rows of all, zeros where there are none."""
    like = next(use.dense() for use in uses if use is not None)
    pieces = []
    for use, count in zip(uses, counts, strict=True):
        none = like.rows.new_zeros(count, *like.shape)
        pieces.append(none if use is None else use.dense().rows)
    return Dense(like.shape, torch.cat(pieces))


def _plain(rows: Mapping[str, Use]) -> dict[str, Any]:
    """What a state holds of rows in one piece: vectors and factors."""
    vectors = {name: use.rows for name, use in rows.items() if isinstance(use, Dense)}
    factors = {name: [plain_of(use)] for name, use in rows.items() if name not in vectors}
    return {"vectors": vectors, "factors": factors}


def _in_pieces(rows: Sequence[Mapping[str, Use]], counts: Sequence[int]) -> dict[str, Any]:
    """What a state holds of rows in several pieces: factors, whatever their sizes, where no row is explicit."""
    vectors: dict[str, Tensor] = {}
    factors: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(name for each in rows for name in each):
        uses = [each.get(name) for each in rows]
        some = [use for use in uses if use is not None]
        if any(isinstance(use, Dense) for use in some):
            vectors[name] = _explicit(uses, counts).rows
        else:
            whole = [use or zeros(some[0], n) for use, n in zip(uses, counts, strict=True)]
            factors[name] = [plain_of(use) for use in whole]
    return {"vectors": vectors, "factors": factors}


def _parts(block: Kept) -> list[Kept]:
    """The rows by step and task, in whichever way they were stored."""
    if "parts" in block:
        return list(block["parts"])
    found: list[Kept] = []
    first = 0
    task = block["task"].tolist()
    for i, count in enumerate(block["counts"]):
        start = first
        # a step's rows lie task after task, and so they do on ranks
        for number, run in groupby(task[first : first + count]):
            stop = start + len(list(run))
            found.append(_part(block, number, i, first, slice(start, stop)))
            start = stop
        first += count
    return found


def _part(block: Kept, number: int, piece: int, first: int, at: slice) -> Kept:
    """The rows of a slice, all of the task of that number, of a piece that begins at a row."""
    task, vectors = block["tasks"][number], block["vectors"]
    # zeros of parameters that the task does not reach are not stored by parts
    reached = block["reached"][task]
    rows: dict[str, Use] = {}
    for name in reached:
        if name in vectors:
            rows[name] = Dense(tuple(vectors[name].shape[1:]), vectors[name][at])
        else:
            whole = use_of(f"Memory: state: factors[{name!r}]", block["factors"][name][piece])
            rows[name] = whole.select(torch.arange(at.start - first, at.stop - first))
    return {
        **_plain(rows),
        "task": task,
        "sample": block["sample"][at],
        "loss": block["loss"][at],
        "dtype": block["dtype"],
    }


def _in_one(parts: Sequence[Kept]) -> dict[str, Any]:
    """The rows of all parts as one process holds them; of products with one another nothing is known."""
    task = _column(parts, "task")
    tasks = list(dict.fromkeys(task))
    number = torch.tensor([tasks.index(name) for name in task])
    sample = _column(parts, "sample")
    counts = [len(t) for t in sample]
    reached: dict[str, dict[str, None]] = {name: {} for name in tasks}
    for part in parts:
        reached[part["task"]] |= dict.fromkeys([*part["vectors"], *part["factors"]])
    return {
        **_in_pieces(list(map(_rows_of, parts)), counts),
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
