"""Row numbers on their way from the losses down to the parameters: which nodes are pure, and their row maps."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mtu_fast._graph.carry import Passage, carry_of, stem
from mtu_fast._graph.chains import views_of_parameters
from mtu_fast._graph.graph import Edge, Graph
from mtu_fast._graph.moves import MOVES, SETTLED
from mtu_fast._graph.reach import Probes, Reached
from mtu_fast._graph.rowmap import (
    MEET,
    NO_ROW,
    Answer,
    Ids,
    Meet,
    RowMap,
    carried,
    compact,
    first,
    merged,
)
from mtu_fast._graph.trial import Trial, ask

# node -> row map of each of its outputs, None where no gradient comes
Maps = dict[int, tuple[RowMap | None, ...]]
OfOutputs = tuple[Ids | None, ...]  # the same for one node, with gaps where no row reaches

# whose adjoint adds up what an input broadcasts, whatever the data
SUMS = frozenset(("Add", "Sub", "Rsub", "Expand"))
# what full backward hooks of modules, and those of FSDP2, hang on: hands everything on
PASSES = frozenset(("BackwardHookFunctionBackward", "RegisterPostBackwardFunctionBackward"))


class Walk:
    """From the losses to the parameters, node by node.

    Args:
        graph: of the losses.
        fills: whether places to which no row comes in this batch may be said to be some row's, so that
            what is found holds for other batches, too.

    Attributes:
        mixed: nodes where rows meet, and all nodes below them.
        trials: experiments on data, in the order in which they were made.
        filled: whether a gap was filled.
    """

    def __init__(self, graph: Graph, fills: bool = True) -> None:
        self.graph = graph
        self.filled = False
        self.fills = fills
        # their gradients add up over samples by definition
        self.mixed = views_of_parameters(graph)
        self.trials: list[Trial] = []
        self._counts = [len(loss) for loss in graph.losses]
        # what has come so far to nodes that were not visited yet, and to those that were
        self._coming: list[dict[Edge, Ids]] = [{} for _ in graph.losses]
        self._came: list[dict[int, OfOutputs]] = [{} for _ in graph.losses]
        self._probes = Probes()

    def run(self) -> None:
        """Visit every node above a shared parameter; nodes are numbered in topological order."""
        for task, (root, loss) in enumerate(zip(self.graph.roots, self.graph.losses, strict=True)):
            self._arrive(task, (root, loss.output_nr), first(len(loss)))
        for i in range(len(self.graph.nodes)):
            # in topological order all that comes to a node has come when it is visited
            if self.graph.reaches[i] and i not in self.graph.leaf:
                self._visit(i)

    def maps(self, nodes: Collection[int]) -> list[Maps]:
        """Per task, the row maps of those of some nodes that it reaches."""
        found: list[Maps] = []
        for came, count in zip(self._came, self._counts, strict=True):
            reached = [i for i in came if i in nodes]
            found.append({i: self._row_maps(i, came[i], count) for i in reached})
        return found

    def _row_maps(self, i: int, came: OfOutputs, count: int) -> tuple[RowMap | None, ...]:
        found: list[RowMap | None] = []
        for k, ids in enumerate(came):
            if ids is None:
                found.append(None)
            else:
                found.append(RowMap(compact(ids, fill=True), self.graph.shape((i, k)), count))
        return tuple(found)

    def _visit(self, i: int) -> None:
        if i in self.mixed:
            below = {node for node, _ in self.graph.wanted[i].values()}
            # what has met cannot be told apart again
            self.mixed |= below - self.graph.leaf.keys()
            return
        # tasks mostly enter the shared trunk by the same maps
        known: dict[object, Reached] = {}
        for task, coming in enumerate(self._coming):
            came = tuple(coming.pop((i, k), None) for k in range(len(self.graph.outputs[i])))
            if any(ids is not None for ids in came):
                self._came[task][i] = came
                self._hand_on(i, task, came, known)

    def _hand_on(self, i: int, task: int, came: OfOutputs, known: dict[object, Reached]) -> None:
        """Through a pure node; `known` is what was found for other tasks."""
        key = self._key(task, came)
        if key not in known:
            known[key] = self._through(i, came, self._counts[task])
        for slot, ids in known[key].items():
            self._arrive(task, self.graph.wanted[i][slot], ids)

    def _key(self, task: int, came: OfOutputs) -> object:
        """What tasks that reach a node in the same way have in common: it is asked once for all of them."""
        if len(self._coming) == 1:
            return None
        maps = tuple(None if ids is None else (ids.shape, ids.tobytes()) for ids in came)
        return maps, self._counts[task]

    def _arrive(self, task: int, edge: Edge, ids: Ids | Meet) -> None:
        if 0 in self.graph.shape(edge):
            return  # a branch without elements gives nothing to anyone
        there = self._coming[task].get(edge)
        if ids is not MEET and there is not None:
            ids = merged(there, ids)
        if ids is MEET:
            self.mixed.add(edge[0])
        else:
            self._coming[task][edge] = ids

    def _through(self, i: int, came: OfOutputs, count: int) -> Reached:
        """What a pure node hands on to those of its inputs that are pure so far."""
        found: Reached = {}
        silent: list[int] = []
        for slot, edge in self.graph.wanted[i].items():
            if edge[0] in self.graph.leaf or edge[0] in self.mixed:
                continue
            said = self.structure(i, came, slot, edge)
            if said is None:
                silent.append(slot)
            else:
                found[slot] = said
        return found | self._asked(i, came, silent, count) if silent else found

    def _asked(self, i: int, came: OfOutputs, slots: Collection[int], count: int) -> Reached:
        """What the node itself says of inputs of which structure says nothing."""
        found = ask(self.graph.nodes[i], came, slots, count, self._probes)
        if stem(self.graph.names[i]) in SETTLED:
            return found
        apart: dict[int, Ids] = {}
        for slot, ids in found.items():
            if ids is not MEET:
                apart[slot] = without_gaps(ids, count) if self.fills else ids
                self.filled = self.filled or apart[slot] is not ids
        if apart:
            self.trials.append(Trial(i, came, apart, count))
        return found | apart

    def structure(self, i: int, came: OfOutputs, slot: int, edge: Edge) -> Answer:
        """What structure says of one input: its map, or that rows meet; None where it is silent."""
        if self.graph.names[i] in PASSES:
            nothing = np.full([1] * len(self.graph.shape(edge)), NO_ROW)
            return nothing if came[slot] is None else came[slot]
        total: Ids | None = None
        for k, ids in enumerate(came):
            if ids is None:
                continue
            part = self._of_output((i, k), ids, slot, edge)
            if part is None or part is MEET:
                return part
            # an input receives the sum over the outputs' gradients
            both = part if total is None else merged(total, part)
            if both is MEET:
                return MEET
            total = both
        return total

    def _of_output(self, output: Edge, ids: Ids, slot: int, edge: Edge) -> Answer:
        """The same for the gradient of one output."""
        i, k = output
        node, op = self.graph.nodes[i], stem(self.graph.names[i])
        at = Passage(node, k, slot, self.graph.shape(output), self.graph.shape(edge))
        # exact positions first; CARRY only knows dimensions as a whole
        if op in MOVES:
            return MOVES[op](at, ids)
        carry = carry_of(node, op)
        dims = None if carry is None else carry(at)
        if dims is None:
            return None
        found = carried(ids, dims, at.into)
        if found is None:
            # gaps may hide that the row does not vary along a dimension that is summed over
            found = carried(compact(ids, fill=True), dims, at.into)
        if found is None and op in SUMS:
            return MEET
        return found


def without_gaps(ids: Ids, count: int) -> Ids:
    """A map that an experiment found, without gaps where they are of this batch only: all rows are there, in order."""
    there = ids[ids >= 0]
    if there.size == ids.size or not np.array_equal(np.unique(there), first(count)):
        return ids
    ordered = _in_order(ids, count)
    if ordered is not None:
        return ordered
    filled = compact(ids, fill=True)
    return filled if filled.min() >= 0 else ids


def _in_order(ids: Ids, count: int) -> Ids | None:
    """A map along one dimension in whose regular order lies what is there; None if there is no such order."""
    # samples have a dimension before any: places of a few of them may as well differ in all others
    for d in sorted(range(ids.ndim), key=lambda d: ids.shape[d] != count):
        most = ids.max(tuple(e for e in range(ids.ndim) if e != d), keepdims=True)
        along = RowMap(most, most.shape, count)
        if not along.inner or bool(((ids != most) & (ids >= 0)).any()):
            continue
        # of few samples the places fit several orders: sample by sample, or position by position first
        for run in (most.size // count, 1, along.inner):
            order = (np.arange(most.size) // run % count).reshape(most.shape)
            if np.array_equal(order[most >= 0], most[most >= 0]):
                return compact(order)
    return None
