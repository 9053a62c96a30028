"""Fused recurrent layers: rows are outer products over time, of the gates' gradients with what entered the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mtu_fast._graph.rowmap import MEET, Ids, RowMap, merged
from mtu_fast._graph.rules.base import RULES, Shape
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._rows.uses import Dense, Outer, Use

LSTM = 2  # `_saved_mode`


@RULES.entry("MkldnnRnnLayerBackward0")
def lstm(
    node: Any,
    wanted: Mapping[int, Shape],
    grads: Sequence[Tensor | None],
    maps: Sequence[RowMap | None],
) -> dict[int, Use]:
    """`a_t = W x_t + U h_{t-1} + biases`: rows of W `Σ_t a'_t ⊗ x_t`, of U `Σ_t a'_t ⊗ h_{t-1}`, of a bias `Σ_t a'_t`.

    One layer in one direction: outputs h `[S, N, H]` and the last h and c `[N, H]`; inputs 1 to 4
    are W `[4H, I]`, U `[4H, H]` and the biases `[4H]`, and a' are the gradients of what enters the
    gates.
    """
    rows = _sequences(maps)
    if node._saved_mode != LSTM or rows is None or not wanted.keys() <= {1, 2, 3, 4}:
        return {}
    dtype = working_dtype(node._saved_input)
    x = _in_order(node, node._saved_input.to(dtype))
    h = _in_order(node, node._saved_result0.to(dtype))
    before = torch.cat([node._saved_hx_.detach().to(dtype)[None], h[:-1]])
    gates = _gates(node, x, before, grads)
    left = rows.split(gates, 1).flatten(1, 2)  # [R, S, 4H]
    entered = {1: x, 2: before}
    uses: dict[int, Use] = {}
    for slot, shape in wanted.items():
        if slot in entered:
            right = rows.split(entered[slot], 1).flatten(1, 2)
            uses[slot] = Outer(shape, left, right)
        else:
            uses[slot] = Dense(shape, left.sum(1))
    return uses


def _gates(node: Any, x: Tensor, before: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
    """The gradients a' `[S, N, 4H]` of what enters the gates, from those of the layer's outputs.

    x `[S, N, I]` are the inputs and before `[S, N, H]` the h that each step began with.
    """
    W, U, *biases = (t.detach().to(x.dtype) for t in _weights(node))
    dh, end, dc = (None if b is None else b.to(x.dtype) for b in grads)
    dh = torch.zeros_like(before) if dh is None else _in_order(node, dh)
    # oneDNN saves no gates of its own that could be read: the forward's products once more
    a = F.linear(x, W, *biases) + F.linear(before, U)
    return _through_time(a, node._saved_cx_.detach().to(x.dtype), U, dh, end, dc)


def _in_order(node: Any, t: Tensor) -> Tensor:
    """A tensor `[S, …]` in the order in which time was walked; a row does not ask for that of its positions."""
    return t.detach().flip(0) if node._saved_reverse else t.detach()


def _weights(node: Any) -> list[Tensor]:
    """W, U and the sum of the biases, if there are any."""
    biases = [node._saved_weight2 + node._saved_weight3] if node._saved_has_biases else []
    return [node._saved_weight0, node._saved_weight1, *biases]


def _sequences(maps: Sequence[RowMap | None]) -> RowMap | None:
    """The row of each of N sequences, if it depends on nothing else and outputs `[…, N, H]` agree on it."""
    known = [m for m in maps if m is not None]
    found: Ids | None = None
    for m in known:
        if m.ids.size != m.ids.shape[-2]:
            return None  # the row depends on another dimension, too
        rows = np.broadcast_to(m.ids.reshape(-1), m.shape[-2:-1])
        both = rows if found is None else merged(found, rows)
        if both is MEET:
            return None
        found = both
    if found is None:
        return None
    return RowMap(found[:, None], known[0].shape[-2:], known[0].count)


def _through_time(
    a: Tensor, c: Tensor, U: Tensor, dh: Tensor, end: Tensor | None, dc: Tensor | None
) -> Tensor:
    """The gradient of a `[S, N, 4H]`, what enters the input, forget, cell and output gates.

    c `[N, H]` is the first cell state, dh `[S, N, H]` the gradient of all h; end and dc `[N, H]`
    are those of the last.
    """
    S, N, H = dh.shape
    i, f, g, o = a.split(H, 2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = [c]
    for entering, kept in zip(i * g, f, strict=True):
        cells.append(torch.addcmul(entering, kept, cells[-1]))
    shown = torch.stack(cells[1:]).tanh()
    earlier = torch.stack(cells[:-1])
    # Each gate's gradient is a multiple of that of its step's cell c = f · earlier + i · g, that of
    # the output gate one of that of its h = o · tanh(c).
    of_c = torch.stack([g * i * (1 - i), earlier * f * (1 - f), i * (1 - g * g)], 2)
    of_h = shown * o * (1 - o)
    slope = o * (1 - shown * shown)  # dh/dc
    found = a.new_empty(S, N, 4, H)
    above = dh[-1] if end is None else dh[-1] + end
    for t in range(S - 1, -1, -1):
        into = above * slope[t] if dc is None else torch.addcmul(dc, above, slope[t])
        torch.mul(into[:, None], of_c[t], out=found[t, :, :3])
        torch.mul(above, of_h[t], out=found[t, :, 3])
        if t:
            above = torch.addmm(dh[t - 1], found[t].view(N, 4 * H), U)
            dc = into * f[t]
    return found.view(S, N, 4 * H)
