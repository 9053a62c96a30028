"""Table look-ups: rows are scattered gradients, never one-hot products."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtu_fast.rowmap import RowMap
from mtu_fast.rules.base import rule
from mtu_fast.uses import Gather, Use


@rule("EmbeddingBackward0", slots=(0,))
def embedding(node: Any, slot: int, shape: tuple[int, ...], b: Tensor, rows: RowMap) -> Use | None:
    """`out[…] = weight[index[…]]`, b `[*index.shape, D]`; the padding entry has no gradient."""
    index = node._saved_indices
    # Scaling by frequency counts the whole batch: positions of one row then depend on other rows' indices.
    if rows.dim is None or rows.dim == index.dim() or node._saved_scale_grad_by_freq:
        return None
    b = b * (index != node._saved_padding_idx)[..., None]
    where = rows.split(index, rows.dim).flatten(1)
    return Gather(shape, where, rows.split(b, rows.dim).flatten(1, -2))
