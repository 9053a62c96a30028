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

from mtu_fast._graph import nodes as node_ops
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
    # an index may lie on the host, wherever what is looked up does
    device = node_ops.outputs(node)[0].device
    indices = [None if i is None else i.to(device) for i in node._saved_indices]
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
    known = _known(found, ids, out, into)
    if known is None:
        return None
    rows = torch.from_numpy(ids.reshape(known).copy()).to(found.entries.device)
    lowest, highest = _rows_of_entries(found, rows)
    # several places may read one entry: its row is unique where the highest number is the lowest
    if not torch.equal(lowest, highest):
        return MEET
    return np.asarray(_as_map(highest, found, into).cpu().numpy())


def _known(found: Lookup, ids: Ids, out: Shape, into: Shape) -> Shape | None:
    """The map's dimensions of the places, without those of an entry; None where the row depends on these, too."""
    rest = into[len(found.first) :]
    known = ids.shape[: len(ids.shape) - len(rest)]
    alike = (*found.entries.shape, *rest) == tuple(out) and prod(ids.shape) == prod(known)
    return known if alike else None


def _rows_of_entries(found: Lookup, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest row that comes to each entry, NO_ROW for none; no shape depends on numbers."""
    count = prod(found.first)
    rows, where = rows.expand(found.entries.shape).flatten(), found.entries.flatten()
    # neither gaps nor padding hand anything back: they meet behind the last entry
    where = torch.where((rows >= 0) & (where != found.padding), where, count)
    highest = torch.full((count + 1,), NO_ROW, dtype=rows.dtype, device=rows.device)
    highest.scatter_reduce_(0, where, rows, "amax")
    # begun at the highest row, so that an entry that none reaches stays NO_ROW in both
    lowest = highest.clone().scatter_reduce_(0, where, rows, "amin")
    return lowest[:count], highest[:count]


def _as_map(rows: Tensor, found: Lookup, into: Shape) -> Tensor:
    """The rows of entries as the map of the input: the same whatever follows the entry."""
    return rows.view(*found.first, *[1] * (len(into) - len(found.first)))


def strays_by_index(
    node: Any,
    slot: int,
    out: Shape,
    into: Shape,
    ids: Ids,
    then: Ids,
    on: Callable[[Ids, torch.device], Tensor],
) -> Tensor | None:
    """Whether rows come elsewhere than to places that were theirs, `[]` bool on the device of the index.

    None where only a look tells: at a mask, whose entries are as many as it holds.

    Args:
        node: of which `is_lookup` holds for the slot.
        slot: of the input.
        out: the shape of the output.
        into: that of the input.
        ids: the map of the output's gradient.
        then: that of the input's, as known.
        on: a map as a tensor on a device.
    """
    op = stem(node.name())
    if op == "IndexAdd":
        index, dim = node._saved_index, signed(node._saved_dim) % max(len(out), 1)
        now = on(ids, index.device)
        if ids.shape[dim] > 1:
            now = now.index_select(dim, index)
        return _elsewhere(now, on(then, index.device))
    if op == "Index" and any(_is_mask(i) for i in node._saved_indices):
        return None
    found = LOOKUPS[op](node, into)
    known = None if found is None else _known(found, ids, out, into)
    if found is None or known is None:
        return None
    device = found.entries.device
    lowest, highest = _rows_of_entries(found, on(ids, device).view(known))
    now = _as_map(highest, found, into)
    return (lowest != highest).any() | _elsewhere(now, on(then, device))


def _elsewhere(now: Tensor, then: Tensor) -> Tensor:
    return ((now != then) & (now >= 0)).any()


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in {torch.bool, torch.uint8}


def _stands_for(index: Tensor | None) -> int:
    """How many dimensions of the input an index stands for: a mask for as many as it has."""
    return index.dim() if index is not None and _is_mask(index) else 1


def _numbered(shape: Shape, like: Tensor) -> Tensor:
    return torch.arange(prod(shape), device=like.device).view(shape)
