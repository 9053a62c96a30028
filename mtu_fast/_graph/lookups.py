"""How the adjoint of a look-up moves the rows of its output gradient, as the index that it saved says.

Each entry of `BY_INDEX` is a function of `(node, slot, out, into, ids)`, out and into being shapes
and ids the map of the output's gradient. It returns a tuple of the map of the input's gradient, or
of None where two rows meet in one place, and an empty tuple where it does not know. An index is
data: what is found holds for this batch.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtu_fast._graph.carry import Shape, signed
from mtu_fast._graph.rowmap import NO_ROW, Ids

Answer = tuple[Ids | None] | tuple[()]
LookUp = Callable[[Any, int, Shape, Shape, Ids], Answer]

BY_INDEX: dict[str, LookUp] = {}


def looks_up(op: str) -> Callable[[LookUp], LookUp]:
    """Register the function of an op."""

    def register(function: LookUp) -> LookUp:
        if op in BY_INDEX:
            raise ValueError(f"two entries for {op}")
        BY_INDEX[op] = function
        return function

    return register


@looks_up("Index")
def index(node: Any, slot: int, out: Shape, into: Shape, ids: Ids) -> Answer:
    """`out = self[indices]`."""
    at = tuple(slice(None) if i is None else i for i in node._saved_indices)
    first = into[: _dims(node._saved_indices)]
    return _brought_back(ids, out, into, _numbered(first, node)[at], first)


@looks_up("IndexSelect")
def index_select(node: Any, slot: int, out: Shape, into: Shape, ids: Ids) -> Answer:
    """`out = self.index_select(dim, index)`."""
    dim = signed(node._saved_dim) % len(into)
    first = into[: dim + 1]
    return _brought_back(
        ids, out, into, _numbered(first, node).index_select(dim, node._saved_index), first
    )


@looks_up("Gather")
def gather(node: Any, slot: int, out: Shape, into: Shape, ids: Ids) -> Answer:
    """`out = self.gather(dim, index)`."""
    dim = signed(node._saved_dim) % max(len(into), 1)
    return _brought_back(ids, out, into, _numbered(into, node).gather(dim, node._saved_index), into)


@looks_up("Embedding")
def embedding(node: Any, slot: int, out: Shape, into: Shape, ids: Ids) -> Answer:
    """`out = self[indices]`; the padding entry is given nothing."""
    if node._saved_scale_grad_by_freq:
        return ()
    indices = node._saved_indices
    padded = (indices == signed(node._saved_padding_idx)).cpu().numpy()
    return _brought_back(np.where(padded[..., None], NO_ROW, ids), out, into, indices, into[:1])


@looks_up("IndexAdd")
def index_add(node: Any, slot: int, out: Shape, into: Shape, ids: Ids) -> Answer:
    """`out = self.index_add(dim, index, source)`: the source is handed what lies at the index."""
    dim = signed(node._saved_dim) % max(len(out), 1)
    if slot != 1 or len(into) != len(out):
        return ()
    return (ids if ids.shape[dim] == 1 else ids.take(node._saved_index.cpu().numpy(), dim),)


def _dims(indices: tuple[Tensor | None, ...]) -> int:
    """How many dimensions of the input these indices stand for: a mask stands for as many as it has."""
    return sum(
        i.dim() if i is not None and i.dtype in {torch.bool, torch.uint8} else 1 for i in indices
    )


def _numbered(shape: Shape, node: Any) -> Tensor:
    device = next(i for i in _tensors(node) if i is not None).device
    return torch.arange(prod(shape), device=device).view(shape)


def _tensors(node: Any) -> tuple[Tensor | None, ...]:
    return node._saved_indices if hasattr(node, "_saved_indices") else (node._saved_index,)


def _brought_back(ids: Ids, out: Shape, into: Shape, source: Tensor, first: Shape) -> Answer:
    """The map of an input whose first dimensions were read at `source`, flat positions in the output's first ones."""
    rest = len(into) - len(first)
    known = ids.shape[: len(out) - rest]
    if (
        tuple(source.shape) + tuple(into[len(first) :]) != tuple(out)
        or ids.shape[len(known) :] != (1,) * rest
    ):
        return ()
    rows = (
        torch.from_numpy(ids.reshape(known).copy()).to(source.device).expand(source.shape).flatten()
    )
    there = rows >= 0
    rows, where = rows[there], source.flatten()[there]
    highest = torch.full((prod(first),), NO_ROW, device=source.device).scatter_reduce_(
        0, where, rows, "amax"
    )
    lowest = highest.clone().scatter_reduce_(0, where, rows, "amin")
    if not torch.equal(lowest, highest):
        return (None,)
    return (highest.cpu().numpy().reshape(*first, *[1] * rest),)
