"""Sums of values that an index puts in one place, in an order that is always the same."""

from __future__ import annotations

import torch
from torch import Tensor


def summed_at(index: Tensor, values: Tensor, size: int) -> Tensor:
    """`found[i] = Σ_{k: index[k] = i} values[k]`: index `[K]`, values `[K, *]` -> `[size, *]`.

    On a GPU `index_add_` adds in the order in which its threads come, so that the last bits differ
    from call to call; the backward of an embedding sorts first.
    """
    if values.device.type == "cpu":
        return values.new_zeros(size, *values.shape[1:]).index_add_(0, index, values)
    flat = values.flatten(1) if values.dim() > 1 else values[:, None]
    found = torch.ops.aten.embedding_dense_backward(flat, index, size, -1, False)
    return found.view(size, *values.shape[1:])
