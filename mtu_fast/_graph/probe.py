"""Whether rows add up to what an ordinary backward gives, and what is to blame where they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import densified, recomputes
from mtu_fast._graph.passes import Kept, Passes, Uses
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._rows.uses import Chain, Use, bytes_of

# powers of two that the rows' weights are spread over, beside what makes their lengths alike
SPREAD = 8
# and at most this many for the lengths, so that nothing leaves its range; float16 has none to spare
LONGEST = 24
UNLIKE = (1.3, 1.7, 1.9)  # factors that round differently at every step of a backward

Sums = Callable[[int], Tensor | None]  # the weighted sum of a parameter's rows; None without rows


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
    same rows under weights with another mantissa. All is done for every parameter at once, `[P]`.

    Uses that take more memory than a gradient are not held beside the graph and that of autograd:
    a second pass sums them one by one, and a third takes them for good.

    Args:
        passes: through the recorded graph, which is kept.
        parameters: the shared parameters.
        seed: of the weights.
    """

    def __init__(self, passes: Passes, parameters: Sequence[Tensor], seed: int) -> None:
        graph, kept = passes.graph, passes.kept
        self._passes, self._graph, self._parameters = passes, graph, parameters
        # one backward a row: rows are right by definition, and it is asked whether gradients are
        # linear at all
        self._lenient = passes.plan.alone
        uses = passes.uses(keep=True)
        # rows are weighed by their lengths: a short one that is lost must show, too
        given = probe_weights(graph, lengths_of(graph, uses, kept), seed)
        self._held = uses if self._may_hold(uses) else None
        del uses
        self._weights: list[Tensor] = []
        self._of_rows: list[Tensor] = []
        for loss, rows, w in zip(graph.losses, kept, given, strict=True):
            of_samples = rows.spread(w, loss)
            self._weights.append(of_samples)
            of_rows = of_samples if rows.at is None else w
            self._of_rows.append(of_rows.to(torch.float32))  # which holds powers of two
        # Σ w · loss has the gradient Σ w · row: one backward checks all rows at once
        self._truth = _backward(graph, parameters, self._weights, 1.0)
        self._sizes = self._stacked([self._norm(self._truth.get(j)) for j in self._all])
        # a few units in the last place, for sums in another order
        slack = min(8 * torch.finfo(graph.dtype).eps, 2.0**-7)
        self._bound = slack * self._sizes
        squares = torch.where(self._sizes.isfinite(), self._sizes, 0.0).square()
        # a gradient that is tiny beside the model's may be rounding altogether
        self._floor = slack * squares.sum().sqrt() / 32

    def _may_hold(self, uses: Uses) -> bool:
        """Whether uses take no more memory than a gradient, or too long to be taken again."""
        plan, nodes = self._passes.plan, self._graph.nodes
        # a backward a row, or a checkpointed region once more for each of its parameters
        if plan.alone or any(recomputes(nodes[i]) for i in plan.sites):
            return True
        gradient = sum(self._parameters[j].nbytes for j in set(self._graph.leaf.values()))
        tensors = [t for of_task in uses for use in of_task.values() for t in use.tensors]
        return bytes_of(tensors) <= gradient

    def uses(self) -> Uses:
        """The uses that were checked."""
        self._truth.clear()
        return self._passes.uses(keep=True) if self._held is None else self._held

    @property
    def _all(self) -> range:
        return range(len(self._parameters))

    def fault(self) -> Fault | None:
        """The first parameter whose rows do not add up, None if all do."""
        # from the cheap test to the dear one: order of sums, rounding of autograd, rounding of the
        # rows
        errors = self._errors()
        holds = self._is_order_of_sums(errors)
        if bool(holds.all()):
            return None
        linear, rounding = self._rounding()
        holds |= linear & (errors <= self._bound + rounding)
        if not bool(holds.all()):
            holds |= linear & (errors <= self._rounding_of_rows())
        if bool(holds.all()):
            return None
        j = int((~holds).nonzero()[0])
        return Fault(j, float(errors[j]), float(self._sizes[j]))

    def doubt(self) -> Tensor:
        """Whether there is such a parameter, `[]` bool: nothing is waited for."""
        errors = self._errors()
        # what rounding does is always measured: whether it must be is not known here, and differs
        # from batch to batch
        linear, rounding = self._rounding()
        most = torch.maximum(self._bound + rounding, self._rounding_of_rows())
        holds = self._is_order_of_sums(errors) | (linear & (errors <= most))
        return ~holds.all()

    def _errors(self) -> Tensor:
        sums = self._sums()
        return self._stacked([self._distance(sums(j), self._truth.get(j)) for j in self._all])

    def _is_order_of_sums(self, errors: Tensor) -> Tensor:
        """Whether the errors are those of the order of sums, or no row has a finite gradient: the Gram names it."""
        # What is lost or counted twice is no rounding, however small its parameter's gradient is
        # beside others.
        small = errors <= self._bound + self._floor
        if not self._lenient:
            # an error as large as the gradient itself is a row lost or counted twice
            small &= errors <= self._sizes / 8
        return small | (errors <= self._bound) | ~self._sizes.isfinite()

    def _rounding(self) -> tuple[Tensor, Tensor]:
        """Whether twice the losses have twice the gradient, and how much rounding moves it.

        Random numbers and bounds are no rounding.
        """
        # at the lower end of float16 twice as much has a digit more
        twice = 1.0 if self._graph.dtype == torch.float16 else 2.0
        linear = self._rounded_by(twice) <= self._bound + self._floor
        # a factor that is no power of two shifts every rounding on the way
        moved = [self._rounded_by(factor) for factor in UNLIKE]
        return linear, self._times() * torch.stack(moved).amax(0)

    def _rounding_of_rows(self) -> Tensor:
        """How much the rows may err by rounding: sums in another order cancel less well."""
        # rows are compared with rows: what autograd gave has had its turn
        self._truth.clear()
        sums = self._sums()
        moved = [self._rows_rounded_by(factor, sums) for factor in UNLIKE]
        return self._times() * torch.stack(moved).amax(0)

    def _times(self) -> Tensor:
        """The fewer numbers, the more two roundings may differ in size."""
        zero = self._sizes.new_zeros(())
        return torch.stack([zero + (4 + 12 / p.numel() ** 0.5) for p in self._parameters])

    def _rows_rounded_by(self, factor: float, sums: Sums) -> Tensor:
        """How far the weighted sums of the rows move under losses times a factor."""
        share = _rounded(factor, self._graph.losses[0])
        again = self._sums(factor)
        found = []
        for j in self._all:
            total = again(j)
            if total is not None:
                # back to the scale of the losses, by the factor as it was rounded
                total = total.to(working_dtype(total)) / share
            found.append(self._distance(total, sums(j)))
        return self._stacked(found)

    def _rounded_by(self, factor: float) -> Tensor:
        """How far each gradient moves under weights times a factor.

        The gradients are let go before the next factor: four of them would be the peak of a step.
        """
        share = _rounded(factor, self._graph.losses[0])
        grads = _backward(self._graph, self._parameters, self._weights, factor)
        found = []
        for j in self._all:
            g = grads.pop(j, None)
            if g is not None and factor != 1:
                g = g.to(working_dtype(g)) / share
            found.append(self._distance(g, self._truth.get(j)))
        return self._stacked(found)

    def _sums(self, factor: float = 1.0) -> Sums:
        """`Σ w row` of each parameter over all tasks, of the losses times a factor."""
        if self._held is not None and factor == 1:
            return partial(self._sum_of, self._held)
        parts: dict[tuple[int, Chain], Tensor] = {}

        def add(task: int, j: int, use: Use) -> None:
            part = use.weighted(self._of_rows[task])
            before = parts.get((j, use.chain))
            parts[j, use.chain] = part if before is None else before + part

        self._passes.uses(True, factor, add)
        # a chain cannot be walked while a pass runs
        found: dict[int, Tensor] = {}
        for (j, chain), part in parts.items():
            whole = chain.apply(part)
            found[j] = found[j] + whole if j in found else whole
        return found.get

    def _sum_of(self, uses: Uses, j: int) -> Tensor | None:
        total: Tensor | None = None
        for of_task, w in zip(uses, self._of_rows, strict=True):
            if j in of_task:
                part = of_task[j].vjp(w)
                total = part if total is None else total + part
        return total

    def _stacked(self, numbers: Sequence[Tensor | None]) -> Tensor:
        """Numbers `[]` as `[P]`; None stands for zero."""
        zero = self._weights[0].new_zeros((), dtype=torch.float64)
        return torch.stack([zero if each is None else each for each in numbers])

    @staticmethod
    def _norm(g: Tensor | None) -> Tensor | None:
        return None if g is None else torch.linalg.vector_norm(g, dtype=torch.float64)

    def _distance(self, one: Tensor | None, other: Tensor | None) -> Tensor | None:
        """`‖one - other‖`, None standing for zero."""
        if one is None or other is None:
            return self._norm(other if one is None else one)
        # in the wider dtype: half precision would round the difference away
        return self._norm(one.view_as(other).to(working_dtype(other)) - other)


def _rounded(factor: float, like: Tensor) -> Tensor:
    """A factor as it is rounded in a dtype, `[]`."""
    return like.new_full((), factor)


def lengths_of(graph: Graph, uses: Uses, kept: Kept) -> list[Tensor]:
    """Per task, about how long each of the kept rows is, float64."""
    found = []
    for loss, of_task, rows in zip(graph.losses, uses, kept, strict=True):
        squares = loss.new_zeros(rows.count(loss), dtype=torch.float64)
        for use in of_task.values():
            # ‖row‖² over all parameters, `[R]`
            squares += use.lengths().square()
        # a length that is not finite must not weigh other rows away
        found.append(squares.nan_to_num(0, 0, 0).sqrt())
    return found


def probe_weights(graph: Graph, lengths: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Powers of two for every row, `[R]` a task: rows of unlike lengths `[R]` come out alike, but for a random factor.

    None exceeds 1, so that nothing leaves its range. A row of length 0 is weighed like a short one:
    whether it is lost is what is asked.
    """
    generator = torch.Generator().manual_seed(seed)
    largest = [length.max() for length in lengths if len(length)]
    longest = torch.stack(largest).max() if largest else 0.0
    room, spread = (0, 4) if graph.dtype == torch.float16 else (LONGEST, SPREAD)
    found = []
    tiny = torch.finfo(torch.float64).tiny
    for length in lengths:
        # drawn on the CPU, so that weights do not depend on the device
        some = torch.randint(spread, (len(length),), generator=generator)
        some = some.to(length.device, non_blocking=True)
        # how many times a row can be doubled until it is as long as the longest
        short = (longest / length.clamp(min=tiny)).log2().round().clamp(0, room)
        # the exponent is at most 0: some ≤ spread - 1 and short ≤ room
        found.append(torch.exp2(some - spread + 1 + short - room))
    return found


def blame(graph: Graph) -> str:
    """What is known of a graph whose backward is not linear in its losses, in words."""
    nodes = [i for i in range(len(graph.nodes)) if graph.reaches[i]]
    edges = graph.edges(nodes)
    names = [graph.names[i] for i in nodes for _ in graph.outputs[i]]
    for task, loss in enumerate(graph.losses):
        one = torch.ones_like(loss)
        # the same pass twice shows randomness, the third with twice the losses linearity
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
        # in the dtype of the loss, as a loss scaled by the user would be
        given.append(w.to(loss) * _rounded(factor, loss))
    grads = torch.autograd.grad(
        graph.losses, list(live.values()), given, retain_graph=True, allow_unused=True
    )
    return {j: densified(g) for j, g in zip(live, grads, strict=True) if g is not None}
