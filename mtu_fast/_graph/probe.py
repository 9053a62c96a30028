"""Whether rows add up to what an ordinary backward gives, and what is to blame where they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import densified
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._rows.uses import Use

# powers of two that the rows' weights are spread over, beside what makes their lengths alike
SPREAD = 8
# and at most this many for the lengths, so that nothing leaves its range; float16 has none to spare
LONGEST = 24
UNLIKE = (1.3, 1.7, 1.9)  # factors that round differently at every step of a backward

Uses = Sequence[dict[int, Use]]  # per task, the use of each parameter


@dataclass(frozen=True)
class Fault:
    """A parameter whose rows do not add up: its index, the error and the size of what autograd gives."""

    parameter: int
    error: float
    size: float


class Check:
    """Weighted sums of rows against an ordinary backward of the weighted losses, which is run here.

    Weights are powers of two, by which a backward rounds nothing: what rows and autograd may differ
    by is the order of the last sums. Where that is not enough, since a gradient is itself a
    difference of larger ones, what rounding does to it is measured, by the same backward and by the
    same rows under weights with another mantissa.

    Args:
        graph: the recorded graph; it is kept.
        parameters: the shared parameters.
        kept: per task, the rows that there are uses of, int64; None for all.
        lengths: per task, about how long these rows are.
        seed: of the weights.
        lenient: rows are right by definition, and it is asked whether gradients are linear at all.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: Sequence[Tensor],
        kept: Sequence[Tensor | None],
        lengths: Sequence[Tensor],
        seed: int,
        lenient: bool = False,
    ) -> None:
        self._graph, self._parameters, self._kept, self._lenient = graph, parameters, kept, lenient
        self._weights: list[Tensor] = []
        given = probe_weights(graph, lengths, seed)
        for loss, rows, w in zip(graph.losses, kept, given, strict=True):
            # rows that are not kept weigh nothing
            whole = w if rows is None else w.new_zeros(len(loss)).index_copy(0, rows, w)
            self._weights.append(whole)
        self._truth = _backward(graph, parameters, self._weights, 1.0)
        self._sizes = {j: _norm(g) for j, g in self._truth.items()}
        squares = [size**2 for size in self._sizes.values() if isfinite(size)]
        self._slack = min(8 * torch.finfo(graph.dtype).eps, 2.0**-7)
        self._floor = self._slack * sum(squares) ** 0.5 / 32
        self._noise: list[dict[int, float]] = []
        self._noise_of_rows: list[dict[int, float]] = []

    def fault(self, uses: Uses, again: Callable[[float], Uses]) -> Fault | None:
        """The first parameter whose rows do not add up, None if all do.

        Args:
            uses: per task, the use of each parameter.
            again: the same of the losses times a factor.
        """
        for j in range(len(self._parameters)):
            size = self._sizes.get(j, 0.0)
            if not isfinite(size):
                continue  # a row has no finite gradient: the Gram names it
            error = _distance(self._combined(uses, j), self._truth.get(j))
            if self._passes(error, size) or self._is_rounding(j, error, size):
                continue
            if self._linear(j, size) and error <= self._rounding_of_rows(j, uses, again):
                continue
            return Fault(j, error, size)
        return None

    def _passes(self, error: float, size: float) -> bool:
        """Whether the error is that of the order of sums."""
        bound = self._slack * size
        if error <= bound:
            return True
        # What is lost or counted twice is no rounding, however small its parameter's gradient is
        # beside others.
        return error <= bound + self._floor and (self._lenient or error <= size / 8)

    def _is_rounding(self, j: int, error: float, size: float) -> bool:
        """Whether the gradient of a parameter rounds as much as that."""
        if not self._linear(j, size):
            return False
        others = [distances.get(j, 0.0) for distances in self._noise[1:]]
        return error <= self._slack * size + self._times(j) * max(others)

    def _linear(self, j: int, size: float) -> bool:
        """Whether twice the losses have twice the gradient: random numbers and bounds are no rounding."""
        if not self._noise:
            # at the lower end of float16 twice as much has a digit more
            twice = 1.0 if self._graph.dtype == torch.float16 else 2.0
            self._noise = [self._rounded_by(factor) for factor in (twice, *UNLIKE)]
        return self._noise[0].get(j, 0.0) <= self._slack * size + self._floor

    def _rounding_of_rows(self, j: int, uses: Uses, again: Callable[[float], Uses]) -> float:
        """How much the rows of a parameter may err by rounding: sums in another order cancel less well."""
        if not self._noise_of_rows:
            for factor in UNLIKE:
                self._noise_of_rows.append(self._rows_rounded_by(factor, uses, again(factor)))
        return self._times(j) * max(distances[j] for distances in self._noise_of_rows)

    def _times(self, j: int) -> float:
        """The fewer numbers, the more two roundings may differ in size."""
        return 4 + 12 / self._parameters[j].numel() ** 0.5

    def _rows_rounded_by(self, factor: float, uses: Uses, again: Uses) -> dict[int, float]:
        """How far the weighted sum of the rows moves, by parameter index, under losses times a factor."""
        share = float(torch.tensor(factor, dtype=self._graph.losses[0].dtype))  # as it is rounded
        found: dict[int, float] = {}
        for j in range(len(self._parameters)):
            total = self._combined(again, j)
            if total is not None:
                total = total.to(working_dtype(total)) / share
            found[j] = _distance(total, self._combined(uses, j))
        return found

    def _rounded_by(self, factor: float) -> dict[int, float]:
        """How far each gradient moves, by parameter index, under weights times a factor.

        The gradients are let go before the next factor: four of them would be the peak of a step.
        """
        share = float(torch.tensor(factor, dtype=self._graph.losses[0].dtype))  # as it is rounded
        grads = _backward(self._graph, self._parameters, self._weights, factor)
        found = {}
        for j in self._truth.keys() | grads.keys():
            g = grads.pop(j, None)
            if g is not None and factor != 1:
                g = g.to(working_dtype(g)) / share
            found[j] = _distance(g, self._truth.get(j))
        return found

    def _combined(self, uses: Uses, j: int) -> Tensor | None:
        """`Σ w row` of a parameter over all tasks; None if there are no rows."""
        total: Tensor | None = None
        for of_task, w, rows in zip(uses, self._weights, self._kept, strict=True):
            if j in of_task:
                given = w if rows is None else w[rows]
                part = of_task[j].vjp(given.to(torch.float64))
                total = part if total is None else total + part
        return total


def lengths_of(graph: Graph, uses: Uses, kept: Sequence[Tensor | None]) -> list[Tensor]:
    """Per task, about how long each of the kept rows is, float64."""
    found = []
    for loss, of_task, rows in zip(graph.losses, uses, kept, strict=True):
        count = len(loss) if rows is None else len(rows)
        squares = loss.new_zeros(count, dtype=torch.float64)
        for use in of_task.values():
            squares += use.lengths().square()
        found.append(squares.nan_to_num(0, 0, 0).sqrt())
    return found


def probe_weights(graph: Graph, lengths: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Powers of two for every row, `[R]` a task: rows of unlike lengths `[R]` come out alike, but for a random factor.

    None exceeds 1, so that nothing leaves its range. A row of length 0 is weighed like a short one:
    whether it is lost is what is asked.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max((float(length.max()) for length in lengths if len(length)), default=0.0)
    room, spread = (0, 4) if graph.dtype == torch.float16 else (LONGEST, SPREAD)
    found = []
    tiny = torch.finfo(torch.float64).tiny
    for length in lengths:
        some = torch.randint(spread, (len(length),), generator=generator).to(length.device)
        # how many times a row can be doubled until it is as long as the longest
        short = (longest / length.clamp(min=tiny)).log2().round().clamp(0, room)
        found.append(torch.exp2(some - spread + 1 + short - room))
    return found


def blame(graph: Graph) -> str:
    """What is known of a graph whose backward is not linear in its losses, in words."""
    nodes = [i for i in range(len(graph.nodes)) if graph.reaches[i]]
    edges = graph.edges(nodes)
    names = [graph.names[i] for i in nodes for _ in graph.outputs[i]]
    for task, loss in enumerate(graph.losses):
        one = torch.ones_like(loss)
        passes = [graph.backward(task, edges, w) for w in (one, one, 2 * one)]
        for name, *grads in zip(names, *passes, strict=True):
            found = _oddity(grads)
            if found:
                return f"the gradient that arrives at {name} {found}"
    return "the gradient is not the sum of what each loss gives (a hook that looks at all of it?)"


def _oddity(grads: Sequence[Tensor | None]) -> str:
    """What is odd about the gradients of a backward, of another one and of one of twice the losses; "" if nothing."""
    g, again, twice = grads
    if g is None or again is None or twice is None:
        return ""
    if not torch.equal(g, again):
        return "differs from one backward to the next (random numbers?)"
    if not torch.equal(2 * g, twice):
        return "is not linear in the losses (a hook that clamps it?)"
    return ""


def _backward(
    graph: Graph, parameters: Sequence[Tensor], weights: Sequence[Tensor], factor: float
) -> dict[int, Tensor]:
    """An ordinary backward of the losses under weights times a factor, by parameter index."""
    live = {j: parameters[j] for j in sorted(set(graph.leaf.values()))}
    given = []
    for loss, w in zip(graph.losses, weights, strict=True):
        share = torch.tensor(factor, dtype=loss.dtype, device=loss.device)
        given.append(w.to(loss) * share)
    grads = torch.autograd.grad(
        graph.losses, list(live.values()), given, retain_graph=True, allow_unused=True
    )
    return {j: densified(g) for j, g in zip(live, grads, strict=True) if g is not None}


def _norm(g: Tensor) -> float:
    return float(torch.linalg.vector_norm(g, dtype=torch.float64))


def _distance(one: Tensor | None, other: Tensor | None) -> float:
    """`‖one - other‖`, None standing for zero."""
    if one is None or other is None:
        there = other if one is None else one
        return 0.0 if there is None else _norm(there)
    return _norm(one.view_as(other).to(working_dtype(other)) - other)
