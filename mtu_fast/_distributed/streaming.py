"""Gradients of ordinary backward passes under FSDP2, summed into slices a unit at a time, while a pass runs.

Ranks need not take equally many passes, or reach a unit at the same time. A rank that has the
gradients of a unit asks for their sum (`units.py`); the others join in with theirs, or with zeros
where they do not ask for the same, and ask later themselves. Every gradient is added once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set
from functools import partial

import torch
from torch import Tensor

from mtu_fast._checks.values import all_finite
from mtu_fast._distributed.ranks import Ranks
from mtu_fast._distributed.slices import Gradients, Slices
from mtu_fast._distributed.units import Units


class Stream:
    """The gradients of some sums of losses, of which a rank holds one unit as a whole, and its slices of the others.

    Args:
        units: asks and answers.
        slices: how parameters are held.
        ranks: all that take part.
        kinds: a name for each of the sums, in one order on all ranks.
        what: the call, for errors.

    Attributes:
        not_finite: the sums of which this rank had a gradient that is not finite.
    """

    def __init__(
        self, units: Units, slices: Slices, ranks: Ranks, kinds: Sequence[Hashable], what: str
    ) -> None:
        self._units, self._slices, self._ranks = units, slices, ranks
        self._kinds, self._what = list(kinds), what
        self._now = 0
        self._pending: list[Gradients] = [{} for _ in units.leaves]
        self._place = {p: u for u, leaves in enumerate(units.leaves) for p in leaves}
        self._sums: list[Gradients] = [{} for _ in kinds]
        self._had: list[set[Tensor]] = [set() for _ in kinds]
        self.not_finite: set[Hashable] = set()

    # ---- this rank's passes ----------------------------------------------------------------------

    def begin(self, kind: Hashable) -> None:
        """The passes that follow are of this sum."""
        self._now = self._kinds.index(kind)

    @property
    def taken(self) -> Set[Tensor]:
        """Parameters of which this rank had a gradient."""
        return set().union(*self._had)

    def backward(
        self,
        losses: Sequence[Tensor],
        weights: Sequence[Tensor],
        wanted: Sequence[Tensor],
        retain: bool,
    ) -> Gradients:
        """One pass; the gradients of parameters that are in no unit, those of others are summed on the way."""
        mine = [p for p in wanted if p in self._place]
        hooks = [p.register_hook(partial(self._take, p)) for p in mine]
        try:
            grads = torch.autograd.grad(
                losses, wanted, weights, retain_graph=retain, allow_unused=True
            )
        finally:
            for hook in hooks:
                hook.remove()
        for u in range(len(self._pending)):
            self.flush(u)
        there = zip(wanted, grads, strict=True)
        return {p: g for p, g in there if g is not None and p not in self._place}

    def _take(self, p: Tensor, g: Tensor) -> Tensor:
        """Keep a gradient for its unit's sum, and let autograd hold nothing of it."""
        self._had[self._now].add(p)
        self._pending[self._place[p]][p] = g
        return g.new_zeros(()).expand_as(g)

    def flush(self, u: int) -> None:
        """Ask for the sum of what there is of a unit."""
        own = self._pending[u]
        if not own:
            return
        # looked at before the sum, which does not say whose it was
        if not all_finite(own.values()):
            self.not_finite.add(self._kinds[self._now])
        self._units.ask(self._now * len(self._pending) + u)

    def join(self, number: int, asks: bool) -> None:
        """Take part in a sum that a rank has asked for; a collective.

        Args:
            number: of the sum and the unit.
            asks: whether this rank has asked for it, too; else it gives zeros.
        """
        now, u = divmod(number, len(self._pending))
        own = self._pending[u] if asks else {}
        for p, part in self._slices.summed(self._what, own, self._units.leaves[u], self._ranks):
            before = self._sums[now].get(p)
            self._sums[now][p] = part if before is None else before + part
        own.clear()

    # ---- what came of them -----------------------------------------------------------------------

    def sums(self) -> dict[Hashable, Gradients]:
        """This rank's slices of each sum, of the parameters that a rank had a gradient of; a collective."""
        leaves = [p for of_unit in self._units.leaves for p in of_unit]
        mine = [int(p in had) for had in self._had for p in leaves]
        flags = iter(map(max, zip(*self._ranks.gathered(self._what, mine), strict=True)))
        found: dict[Hashable, Gradients] = {}
        for kind, sums in zip(self._kinds, self._sums, strict=True):
            there = [p for p in leaves if next(flags)]
            found[kind] = {p: sums[p] for p in there}
        return found
