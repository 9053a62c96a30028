"""Look-ups: ops that read entries of their first input where an index says, an index that the node saved.

A look-up is read off its node in one place (`LOOKUPS`): for the way that its adjoint moves rows
(`moved_by_index`), and for the rules of tables that are parameters (`rules/embedding.py`). An index
is data: what is found holds for one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtu_fast._graph.carry import Shape, signed, stem
from mtu_fast._graph.rowmap import MEET, NO_ROW, Answer, Ids
from mtu_fast._graph.table import Table


@dataclass(frozen=True)
class Lookup:
    """`out[places] = input[entries[places]]`, entries numbering the first dimensions of the input as one.

    entries: int64. first: those dimensions. padding: an entry that is given no gradient, -1 for
    none. sparse: the gradient of the input is to be sparse.
    """

    entries: Tensor
    first: Shape
    padding: int = -1
    sparse: bool = False


# (node, shape of the input) -> the look-up; None where the node is not one
Read = Callable[[Any, Shape], Lookup | None]

LOOKUPS: Table[Read] = Table()


@LOOKUPS.entry("Embedding")
def embedding(node: Any, into: Shape) -> Lookup | None:
    """`out = self[indices]`; the padding entry is given nothing."""
    if node._saved_scale_grad_by_freq:
        # counts the whole batch: positions of one row then depend on other rows' indices
        return None
    padding = signed(node._saved_padding_idx)
    return Lookup(node._saved_indices, into[:1], padding, node._saved_sparse)


@LOOKUPS.entry("Index")
def index(node: Any, into: Shape) -> Lookup | None:
    """`out = self[indices]`."""
    indices = node._saved_indices
    given = [i for i in indices if i is not None]
    if not given:
        return None
    # the look-up is repeated on the numbers of the entries: what it returns says where each came
    # from
    at = tuple(slice(None) if i is None else i for i in indices)
    first = into[: sum(map(_stands_for, indices))]
    return Lookup(_numbered(first, given[0])[at], first)


@LOOKUPS.entry("IndexSelect")
def index_select(node: Any, into: Shape) -> Lookup | None:
    """`out = self.index_select(dim, index)`."""
    if not into:
        return None
    at = node._saved_index
    dim = signed(node._saved_dim) % len(into)
    first = into[: dim + 1]
    return Lookup(_numbered(first, at).index_select(dim, at), first)


@LOOKUPS.entry("Gather")
def gather(node: Any, into: Shape) -> Lookup | None:
    """`out = self.gather(dim, index)`."""
    at = node._saved_index
    dim = signed(node._saved_dim) % max(len(into), 1)
    return Lookup(_numbered(into, at).gather(dim, at), into)


def is_lookup(node: Any, slot: int) -> bool:
    """Whether an index that the node saved may say how it moves rows to an input."""
    op = stem(node.name())
    return (slot == 0 and op in LOOKUPS) or (slot == 1 and op == "IndexAdd")


def moved_by_index(node: Any, slot: int, out: Shape, into: Shape, ids: Ids) -> Answer:
    """The map of an input's gradient, from that of the output's; None for a node that is no look-up.

    out and into are the shapes of the two gradients.
    """
    op = stem(node.name())
    if op == "IndexAdd":
        return _added_from(node, slot, out, into, ids)
    reads = LOOKUPS.get(op)
    found = reads(node, into) if reads is not None and slot == 0 else None
    return None if found is None else _brought_back(found, ids, out, into)


def _added_from(node: Any, slot: int, out: Shape, into: Shape, ids: Ids) -> Answer:
    """`out = self.index_add(dim, index, source)`: the source is handed what lies at the index."""
    if slot != 1 or len(into) != len(out):
        return None
    dim = signed(node._saved_dim) % max(len(out), 1)
    if ids.shape[dim] == 1:
        return ids
    return ids.take(node._saved_index.cpu().numpy(), dim)


def _brought_back(found: Lookup, ids: Ids, out: Shape, into: Shape) -> Answer:
    """The map of the input of a look-up: the row of each entry that is read, unless several rows read one."""
    rest = into[len(found.first) :]
    # the dimensions of the places, without those of an entry
    known = ids.shape[: len(ids.shape) - len(rest)]
    if (*found.entries.shape, *rest) != tuple(out) or prod(ids.shape) != prod(known):
        return None  # the row depends on what follows the entry, too
    rows = torch.from_numpy(ids.reshape(known).copy()).to(found.entries.device)
    rows = rows.expand(found.entries.shape).flatten()
    where = found.entries.flatten()
    # neither gaps nor padding hand anything back
    there = (rows >= 0) & (where != found.padding)
    by_entry = _only_row(rows[there], where[there], prod(found.first))
    if by_entry is None:
        return MEET
    return np.asarray(by_entry.cpu().numpy().reshape(*found.first, *[1] * len(rest)))


def _only_row(rows: Tensor, where: Tensor, count: int) -> Tensor | None:
    """The row that comes to each of so many entries, NO_ROW for none; None where several come to one."""
    highest = torch.full((count,), NO_ROW, device=rows.device)
    # several places may read one entry: its row is unique where the highest number is the lowest
    highest.scatter_reduce_(0, where, rows, "amax")
    # begun at the highest row, so that an entry that none reaches stays NO_ROW in both
    lowest = highest.clone().scatter_reduce_(0, where, rows, "amin")
    return highest if torch.equal(lowest, highest) else None


def _stands_for(index: Tensor | None) -> int:
    """How many dimensions of the input an index stands for: a mask for as many as it has."""
    if index is None or index.dtype not in {torch.bool, torch.uint8}:
        return 1
    return index.dim()


def _numbered(shape: Shape, like: Tensor) -> Tensor:
    return torch.arange(prod(shape), device=like.device).view(shape)
