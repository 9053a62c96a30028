"""Table look-ups: rows are scattered gradients, never one-hot products.

What a node looks up is read off it by `LOOKUPS`, for rows that are told apart by position (the
rules that follow from it) and for explicit rows of what all samples look up alike (`explicit`).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from mtu_fast._graph.carry import signed, stem
from mtu_fast._graph.lookups import LOOKUPS, Lookup
from mtu_fast._graph.rowmap import RowMap
from mtu_fast._graph.rules.base import Shape, rule
from mtu_fast._rows.uses import Gather, Use


@rule("EmbeddingBackward0 IndexBackward0 IndexSelectBackward0", slots=(0,))
def looked_up(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out[places] = table[index[places]]`, b `[*places, *entry]`, rows along one dimension of the places."""
    found = _in_table(node, shape)
    if found is None or rows.dim is None or rows.dim >= found.entries.dim():
        return None
    # [N, S, …] as b
    index = rows.split(found.entries, rows.dim)
    return _gather(shape, index, rows.split(b, rows.dim), found)


def explicit(node: Any, shape: Shape, rows: Tensor) -> Gather | None:
    """Rows of a table from explicit rows of what was looked up in it, `[R, *places, *entry]`; None for other nodes."""
    found = _in_table(node, shape)
    if found is None or not found.entries.dim():
        return None
    return _gather(shape, found.entries.expand(len(rows), *found.entries.shape), rows, found)


def _in_table(node: Any, shape: Shape) -> Lookup | None:
    """The look-up of whole entries, by number, that the node is; None if it is not."""
    read = LOOKUPS.get(stem(node.name()))
    found = None if read is None else read(node, shape)
    return found if found is not None and len(found.first) == 1 else None


def _gather(shape: Shape, index: Tensor, b: Tensor, of: Lookup) -> Gather:
    """Index `[R, *places]` and b `[R, *places, *entry]` as a use of a table `[V, *entry]`."""
    if of.padding >= 0:
        counts = index != of.padding
        # torch gives the padding entry no gradient; a product leaves the index as it is
        b = b * counts.view(*index.shape, *[1] * (b.dim() - index.dim()))
    index = index.flatten(1)
    return Gather(shape, index, b.reshape(*index.shape, prod(shape[1:])), sparse=of.sparse)


@rule("EmbeddingBagBackward0", slots=(0,))
def embedding_bag(node: Any, slot: int, shape: Shape, b: Tensor, rows: RowMap) -> Use | None:
    """`out[n] = Σ_s factor[s] weight[index[s]]` over the places s of bag n, the sum or its mean: b `[N, D]`."""
    if rows.dim != 0 or node._saved_mode not in (SUM, MEAN) or node._saved_scale_grad_by_freq:
        return None
    where, bags = node._saved_indices, _bags(node, len(b))
    # each place has its bag's gradient, times what it counted for
    values = b[bags] * _factors(node, bags, b)[:, None]
    of_places = rows.along[bags.numpy(force=True)]
    places = RowMap(of_places[:, None], tuple(values.shape), rows.count)
    return Gather(shape, places.split(where, 0), places.split(values, 0), sparse=node._saved_sparse)


def _factors(node: Any, bags: Tensor, b: Tensor) -> Tensor:
    """What each place counts in its bag, 0 for padding."""
    factor = (node._saved_indices != signed(node._saved_padding_idx)).to(b.dtype)
    if node._saved_mode == MEAN:
        counts = b.new_zeros(len(b)).index_add_(0, bags, factor)
        factor = factor / counts.clamp(min=1)[bags]  # a bag of padding alone has no place
    if node._saved_per_sample_weights is not None:
        factor = factor * node._saved_per_sample_weights.detach()
    return factor


SUM, MEAN = 0, 1  # `_saved_mode`


def _bags(node: Any, count: int) -> Tensor:
    """The bag of every place, int64: bags are runs of places, of which the first places are saved."""
    where, starts = node._saved_indices, node._saved_offsets[:count]
    ends = torch.cat([starts[1:], starts.new_tensor([len(where)])])
    return torch.repeat_interleave(torch.arange(count, device=where.device), ends - starts)
