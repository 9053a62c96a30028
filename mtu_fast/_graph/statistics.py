"""Running statistics, and whatever else a forward in training writes into buffers, within checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import recompute_once, some_recompute


@contextmanager
def used_up(graph: Graph, model: nn.Module) -> Iterator[None]:
    """Release a graph at the end, with buffers as one ordinary backward would have left them.

    A checkpointed region runs again whenever what it saved is read, and its norms in training then
    count the batch once more: here by several passes, and by what frees the graph. After an error
    buffers are as they were before.
    """
    buffers = _written(model)
    if not buffers or not some_recompute(graph.nodes):
        yield
        graph.release()
        return
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        _put(buffers, before)
    # Once is what one ordinary backward counts; what frees the graph must not count again.
    recompute_once(graph.nodes)
    after = [buffer.clone() for buffer in buffers]
    graph.release()
    _put(buffers, after)


def _written(model: nn.Module) -> list[Tensor]:
    """The buffers of modules in training."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    left = [model]
    while left:
        module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        left += [child for child in module._modules.values() if child is not None]
        if module.training:
            found |= {id(b): b for b in module._buffers.values() if b is not None}
    return list(found.values())


def _put(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values back; not as a change, since a graph may have saved the buffer with this value."""
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)
