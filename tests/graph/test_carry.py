"""What structure says of every op (`carry.py`, `moves.py`): rows along each dimension in turn, and one vjp per row.

The truth of a node is its own adjoint, run on one row at a time. Where structure hands a map to an
input, each element that a row reaches must be that row's; it may be silent, but not of everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtu_fast._graph import nodes as node_ops
from mtu_fast._graph.carry import CARRY, stem
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.moves import MOVES, SETTLED
from mtu_fast._graph.rowmap import MEET, NO_ROW, Ids, RowMap
from mtu_fast._graph.walk import Walk
from tests.graph.recorded import CASES
from tests.graph.recorded.cases import words

pytestmark = pytest.mark.usefixtures("one_thread")


# Ops of other devices and builds; those below them in their family are tested on the CPU by the
# same entry.
ELSEWHERE = words(
    """
    ConvolutionOverrideable CudnnBatchNorm CudnnConvolution FusedRmsNorm Linear MiopenBatchNorm
    MkldnnConvolution ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention
    ScaledDotProductFlashAttention ScaledDotProductFusedAttentionOverrideable
    """
)


@pytest.fixture(autouse=True)
def any_kernel() -> Iterator[None]:
    """Some ops have no deterministic kernel, which is of no importance here."""
    wanted = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(wanted)


def recorded(op: str, made: Tensor | Sequence[Tensor]) -> tuple[Graph, int] | None:
    """The graph of what a case made, and its first node of that op; None where the op is not there."""
    ends = [t for t in ([made] if isinstance(made, Tensor) else made) if t.requires_grad]
    total = sum((torch.view_as_real(t) if t.is_complex() else t).double().sum() for t in ends)
    assert isinstance(total, Tensor)
    graph = Graph([total[None]], [])
    found = [i for i, name in enumerate(graph.names) if stem(name) == op]
    # Of several of one kind, the last recorded one but for what makes the losses, which no case is
    # about.
    inner = [i for i in found if graph.nodes[i] in _below(ends)]
    return (graph, inner[0]) if inner else None


def _below(ends: Iterable[Tensor]) -> set[Any]:
    return set(node_ops.below([t.grad_fn for t in ends]))


def maps(shape: tuple[int, ...]) -> Iterator[Ids]:
    """Rows along each dimension, along two at once, and with a gap."""
    yield np.zeros([1] * len(shape), np.int64)
    for d, size in enumerate(shape):
        if size > 1:
            ids = np.arange(size).reshape([size if k == d else 1 for k in range(len(shape))])
            yield ids
            yield np.where(ids == 0, NO_ROW, size - ids)
    for pair in itertools.combinations([d for d, size in enumerate(shape) if size > 1], 2):
        sizes = [size if d in pair else 1 for d, size in enumerate(shape)]
        if np.prod(sizes) <= 16:
            yield np.arange(np.prod(sizes)).reshape(sizes)


def truth(graph: Graph, i: int, output: int, ids: Ids) -> dict[int, dict[int, Tensor]]:
    """Row -> slot -> the elements of that input that the row reaches, by the node's own adjoint."""
    shape, meta = graph.shape((i, output)), graph.outputs[i][output]
    noise = (
        torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
            meta.dtype
        )
        + 0.5
    )
    where, found = torch.from_numpy(np.broadcast_to(ids, shape).copy()), {}
    for row in np.unique(ids[ids >= 0]):
        grads = [
            torch.where(where == row, noise, 0) if k == output else None
            for k in range(len(graph.outputs[i]))
        ]
        reached = node_ops.vjp(graph.nodes[i], grads)
        found[int(row)] = {
            slot: node_ops.conformed(g, graph.nodes[edge[0]], edge[1]) != 0
            for slot, (edge, g) in enumerate(zip(graph.next[i], reached, strict=True))
            if edge is not None and g is not None
        }
    return found


def compare(graph: Graph, i: int, output: int, ids: Ids) -> int:
    """Whether each input's map is the truth; returns how many maps with several rows were said."""
    arrived = tuple(ids if k == output else None for k in range(len(graph.outputs[i])))
    rows, said = truth(graph, i, output, ids), 0
    if not any(rows.values()):
        return 0  # an output whose gradient the adjoint does not read: the statistics of a norm
    for slot, edge in enumerate(graph.next[i]):
        if edge is None or 0 in graph.shape(edge):
            continue
        found = Walk(graph).structure(i, arrived, slot, edge)
        if found is None:
            continue
        reached = [
            (row, of_row[slot])
            for row, of_row in rows.items()
            if slot in of_row and bool(of_row[slot].any())
        ]
        if found is MEET:
            continue
        mine = found
        into = graph.shape(edge)
        assert mine.ndim == len(into), f"slot {slot}: a map {mine.shape} of an input {into}"
        assert all(n in (1, size) for n, size in zip(mine.shape, into, strict=True)), (
            slot,
            mine.shape,
            into,
        )
        RowMap(mine, into, int(ids.max()) + 1)
        full = torch.from_numpy(np.broadcast_to(mine, into).copy())
        for row, there in reached:
            wrong = there & (full != row)
            assert not wrong.any(), (
                f"slot {slot}: row {row} reaches {int(wrong.sum())} elements said to be another's"
            )
        said += mine.size > 1
    return said


def _differentiable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@pytest.mark.parametrize("op", sorted({*CARRY, *MOVES} - ELSEWHERE))
def test_structure_says_what_the_adjoint_does(op: str) -> None:
    """Every case of the op, every output, rows along every dimension; and not silent in all of them."""
    assert op in CASES, f"{op} is in a table, but no case records it"
    torch.manual_seed(0)
    said, seen = 0, 0
    for number, make in enumerate(CASES[op]):
        found = recorded(op, make())
        if found is None:
            continue
        graph, i = found
        seen += 1
        for output in range(len(graph.outputs[i])):
            shape = graph.shape((i, output))
            if 0 in shape or not _differentiable(graph.outputs[i][output].dtype):
                continue
            for ids in maps(shape):
                try:
                    said += compare(graph, i, output, ids)
                except AssertionError as error:
                    place = f"case {number}, output {output} {shape}, rows {ids.ravel()} along {ids.shape}"
                    raise AssertionError(f"{place}: {error}") from error
    assert seen, f"no case of {op} records it"
    assert said or op == "Dot", f"structure says nothing of {op}"


def test_every_case_is_of_an_op_in_the_tables() -> None:
    assert set(CASES) <= {*CARRY, *MOVES}
    assert not set(CASES) & ELSEWHERE
    assert not ELSEWHERE - {*CARRY, *MOVES}
    assert not SETTLED & {*CARRY}
