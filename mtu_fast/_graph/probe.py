"""Whether rows add up to what an ordinary backward gives, and what is to blame where they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

# parameter, weights [N] a task -> Σ w row, or None
Combine = Callable[[int, Sequence[Tensor]], Tensor | None]


Uses = Sequence[dict[int, Use]]  # per task, the use of each parameter


@dataclass(frozen=True)
class Fault:
    """A parameter whose rows do not add up: its index, the error and the size of what autograd gives."""

    parameter: int
    error: float
    size: float


def check(
    graph: Graph,
    parameters: Sequence[Tensor],
    uses: Uses,
    kept: Sequence[Tensor | None],
    seed: int,
    lenient: bool = False,
) -> Fault | None:
    """Whether uses of the kept rows add up to what an ordinary backward gives; see `probe`.

    Args:
        graph: the recorded graph; it is kept.
        parameters: the shared parameters.
        uses: per task, the use of each parameter.
        kept: per task, the rows that the uses have, int64; None for all.
        seed: of the rows' weights.
        lenient: see `probe`.

    Returns:
        The first parameter whose rows do not add up, None if all do.
    """
    lengths = []
    for loss, of_task, rows in zip(graph.losses, uses, kept, strict=True):
        lengths.append(_spread(_lengths(loss, of_task, rows), loss, rows))
    weights = probe_weights(graph, lengths, seed)
    for w, rows in zip(weights, kept, strict=True):
        if rows is not None:
            w.masked_fill_(torch.ones_like(w, dtype=torch.bool).index_fill(0, rows, False), 0)

    def combine(j: int, given: Sequence[Tensor]) -> Tensor | None:
        total: Tensor | None = None
        for of_task, w, rows in zip(uses, given, kept, strict=True):
            if j in of_task:
                part = of_task[j].vjp((w if rows is None else w[rows]).to(torch.float64))
                total = part if total is None else total + part
        return total

    return probe(graph, parameters, weights, combine, lenient)


def _lengths(loss: Tensor, uses: Mapping[int, Use], rows: Tensor | None) -> Tensor:
    """About how long each kept row is, float64."""
    count = len(loss) if rows is None else len(rows)
    squares = loss.new_zeros(count, dtype=torch.float64)
    for use in uses.values():
        squares += use.lengths().square()
    return squares.nan_to_num(0, 0, 0).sqrt()


def _spread(lengths: Tensor, loss: Tensor, rows: Tensor | None) -> Tensor:
    """Numbers of the kept rows as numbers of all, `[N]`, 0 elsewhere."""
    return lengths if rows is None else lengths.new_zeros(len(loss)).index_copy(0, rows, lengths)


def probe(
    graph: Graph,
    parameters: Sequence[Tensor],
    weights: Sequence[Tensor],
    combine: Combine,
    lenient: bool = False,
) -> Fault | None:
    """Compare weighted sums of rows with an ordinary backward of the weighted losses.

    Weights are powers of two, by which a backward rounds nothing: what rows and autograd may differ
    by is the order of the last sums. Where that is not enough, since a gradient is itself a
    difference of larger ones, what rounding does to it is measured, by the same backward under
    weights with another mantissa.

    Args:
        graph: the recorded graph; it is kept.
        parameters: the shared parameters.
        weights: per task, `[N]`, powers of two or 0.
        combine: what the rows make of such weights.
        lenient: rows are right by definition, and it is asked whether gradients are linear at all.
    """
    truth = _backward(graph, parameters, weights, 1.0)
    sizes = {j: _norm(g) for j, g in truth.items()}
    scale = sum(size**2 for size in sizes.values() if isfinite(size)) ** 0.5
    slack = min(8 * torch.finfo(graph.dtype).eps, 2.0**-7)
    noise: list[dict[int, Tensor]] = []
    for j in range(len(parameters)):
        ours, wanted = combine(j, weights), truth.get(j)
        error, size = _distance(ours, wanted), sizes.get(j, 0.0)
        if not isfinite(size):
            continue  # a row has no finite gradient: the Gram names it
        bound, floor = slack * size, slack * scale / 32
        # What is lost or counted twice is no rounding, however small its parameter's gradient is
        # beside others.
        if error <= bound or (error <= bound + floor and (lenient or error <= size / 8)):
            continue
        noise = noise or [
            _backward(graph, parameters, weights, factor) for factor in (1.0, *UNLIKE)
        ]
        again, *others = (_distance(of.get(j), wanted) for of in noise)
        # The fewer numbers, the more two roundings may differ in size. Random numbers, seen again,
        # are no rounding.
        if again > bound + floor or not error <= bound + (
            4 + 12 / parameters[j].numel() ** 0.5
        ) * max(others):
            return Fault(j, error, size)
    return None


def probe_weights(graph: Graph, lengths: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Powers of two for every row, `[N]` a task: rows of unlike lengths `[N]` come out alike, but for a random factor.

    None exceeds 1, so that nothing leaves its range. A row of length 0 is weighed like a short one:
    whether it is lost is what is asked.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max((float(length.max()) for length in lengths if len(length)), default=0.0)
    room, spread = (0, 4) if graph.dtype == torch.float16 else (LONGEST, SPREAD)
    found = []
    for length in lengths:
        some = torch.randint(spread, (len(length),), generator=generator).to(length.device)
        short = (
            (longest / length.clamp(min=torch.finfo(torch.float64).tiny))
            .log2()
            .round()
            .clamp(0, room)
        )
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
        for name, g, again, twice in zip(names, *passes, strict=True):
            if g is None or again is None or twice is None:
                continue
            if not torch.equal(g, again):
                return f"the gradient that arrives at {name} differs from one backward to the next (random numbers?)"
            if not torch.equal(2 * g, twice):
                return f"the gradient that arrives at {name} is not linear in the losses (a hook that clamps it?)"
    return "the gradient is not the sum of what each loss gives (a hook that looks at all of it?)"


def _backward(
    graph: Graph, parameters: Sequence[Tensor], weights: Sequence[Tensor], factor: float
) -> dict[int, Tensor]:
    """An ordinary backward of the losses under weights times a factor, divided by it, by parameter index."""
    live = {j: parameters[j] for j in sorted(set(graph.leaf.values()))}
    given, shares = [], []
    for loss, w in zip(graph.losses, weights, strict=True):
        share = torch.tensor(factor, dtype=loss.dtype, device=loss.device)
        given.append(w.to(loss) * share)
        shares.append(float(share))
    grads = torch.autograd.grad(
        graph.losses, list(live.values()), given, retain_graph=True, allow_unused=True
    )
    found = {j: densified(g) for j, g in zip(live, grads, strict=True) if g is not None}
    return (
        found if factor == 1 else {j: g.to(working_dtype(g)) / shares[0] for j, g in found.items()}
    )


def _norm(g: Tensor) -> float:
    return float(torch.linalg.vector_norm(g, dtype=torch.float64))


def _distance(one: Tensor | None, other: Tensor | None) -> float:
    """`‖one - other‖`, None standing for zero."""
    if one is None or other is None:
        there = other if one is None else one
        return 0.0 if there is None else _norm(there)
    return _norm(one.view_as(other).to(working_dtype(other)) - other)
