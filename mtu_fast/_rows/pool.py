"""Rows that a method sees by their mean alone: summed before products are taken, where there are many.

With S the `[V, R]` matrix that keeps a row, or takes the mean of a task's rows to forget, the method is given S G Sᵀ
in place of G, and its weights w of the V rows weigh the R rows by Sᵀ w. `Jᵀ Sᵀ w` is the same
update: of 192 rows of which half are to be forgotten, a quarter of the products is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from mtu_fast._ops._pooling import Into
from mtu_fast._rows.refine import Direction
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import Spans
from mtu_fast.methods import FORGET, RESTING, Method, Roles

MANY = 32  # rows: of fewer, products cost no more than the sums that would save them
SAVED = 0.8  # of the rows: where more are left, likewise

Groups = Sequence[Sequence[int]]  # the parameters of each group


@dataclass(frozen=True)
class Pool:
    """Which of V rows each of R rows is, or is part of.

    Attributes:
        into: int64 `[R]`, below V; -1 for a row that is left out: at rest, it has no weight.
        counts: float64 `[V]`, how many rows each is the mean of, those at rest among them.
        roles: of the V rows.
    """

    into: Tensor
    counts: Tensor
    roles: Roles
    _of_spans: dict[Spans, tuple[Into, Tensor]] = field(default_factory=dict, repr=False)

    def of(self, spans: Spans) -> tuple[Into, Tensor]:
        """For the rows of these spans: which of their own rows each is summed into, and which of all those are."""
        if spans not in self._of_spans:
            whole = torch.cat([self.into[slice(*span)] for span in spans])
            there = whole[whole >= 0].unique()
            place = torch.full((len(self.counts) + 1,), -1)  # the last of a row that is left out
            place[there] = torch.arange(len(there))
            self._of_spans[spans] = place[whole].tolist(), there
        return self._of_spans[spans]

    def spread(self, w: Tensor) -> Tensor:
        """`Sᵀ w`: weights `[..., V]` as weights `[..., R]`."""
        found = (w / self.counts)[..., self.into]
        return torch.where(self.into >= 0, found, 0.0)

    def mean(self, of_rows: Tensor) -> Tensor:
        """`S x`: numbers of rows `[..., R]` as those of their means `[..., V]`."""
        found = of_rows.new_zeros(*of_rows.shape[:-1], len(self.counts))
        kept = self.into >= 0
        return found.index_add_(-1, self.into[kept], of_rows[..., kept]) / self.counts


def pool_for(method: Method | Tensor, roles: Roles, pays: bool = False) -> Pool | None:
    """The rows that a method is to see; None where that is all of them.

    On the CPU only: on a GPU the number of rows to forget would have to be waited for. `pays` says
    that it surely does, however few are saved.
    """
    few = len(roles) < MANY and not pays
    if isinstance(method, Tensor) or few or not _averages(type(method)):
        return None
    if roles.task.device.type != "cpu":
        return None
    into, first = _places(roles)
    if not len(first):  # all are at rest
        return None
    if len(first) > SAVED * len(roles) and not pays:
        return None
    return _pool(into, first, roles)


def _places(roles: Roles) -> tuple[Tensor, Tensor]:
    """Of each row, which of V it is, or -1; and of each of the V rows, the first of those it is made of."""
    R, forget = len(roles), roles.kind == FORGET
    opening = torch.full((len(roles.tasks),), R)  # of each task, the first row to forget
    at = forget.nonzero().flatten()
    opening.scatter_reduce_(0, roles.task[at], at, "amin")
    opens = ~forget & (roles.kind != RESTING)
    opens[opening[opening < R]] = True
    number = opens.cumsum(0) - 1
    of_task = number[opening.clamp(max=R - 1)][roles.task]
    into = torch.where(forget, of_task, torch.where(opens, number, -1))
    return into, opens.nonzero().flatten()


def _averages(kind: type[Method]) -> bool:
    """What the class says; one that makes weights in another way than the class that said so must say it again."""
    for each in kind.__mro__:
        own = vars(each)
        if "averages_forget" in own:
            return bool(own["averages_forget"])
        if any(_acts(name, f) for name, f in own.items()):
            return False
    return False


def _acts(name: str, value: object) -> bool:
    """Whether an attribute of a class may make weights in another way: a method, a property."""
    if name[:2] == "__" and name != "__call__":
        return False
    return callable(value) or hasattr(value, "__get__")


def _pool(into: Tensor, first: Tensor, roles: Roles) -> Pool:
    task, kind, kept = roles.task[first], roles.kind[first], into >= 0
    own = torch.bincount(into[kept], minlength=len(first))
    loss = roles.loss.new_zeros(len(first)).index_add_(0, into[kept], roles.loss[kept]) / own
    # those at rest count in the mean, with gradients of 0
    resting = torch.bincount(roles.task[roles.kind == RESTING], minlength=len(roles.tasks))
    counts = (own + torch.where(kind == FORGET, resting[task], 0)).double()
    sample = roles.sample[first].masked_fill(kind == FORGET, -1)
    return Pool(into, counts, replace(roles, task=task, sample=sample, kind=kind, loss=loss))


class Products(Protocol):
    """Products with all R rows, and the Gram of rows of which some are summed."""

    def gram(self, groups: Groups) -> Tensor: ...
    def gram_of_sums(self, groups: Groups, pool: Pool) -> Tensor: ...
    def vjp(self, w: Tensor, wide: bool = False) -> Direction: ...
    def jvp(self, d: Mapping[Tensor, Tensor], groups: Groups) -> Tensor: ...


@dataclass(frozen=True)
class Pooled:
    """The V rows: what a method is given in place of all R."""

    products: Products
    shared: Shared
    pool: Pool

    @property
    def deferred(self) -> bool:
        """Never: rows of a GPU are not pooled."""
        return False

    @property
    def roles(self) -> Roles:
        """What each of the V rows is."""
        return self.pool.roles

    def gram(self, per: str = "total") -> Tensor:
        """`S G Sᵀ`, `[V, V]` or `[L, V, V]`."""
        sums = self.products.gram_of_sums(self.shared.groups(per), self.pool)
        gram = sums / (self.pool.counts[:, None] * self.pool.counts)
        return gram[0] if per == "total" else gram

    def vjp(self, w: Tensor) -> Direction:
        """`Jᵀ Sᵀ w`."""
        return self.products.vjp(self.pool.spread(w))

    def wide_vjp(self, w: Tensor) -> Direction:
        """`Jᵀ Sᵀ w`, summed in float64."""
        return self.products.vjp(self.pool.spread(w), wide=True)

    def jvp(self, d: Mapping[Tensor, Tensor], per: str = "total") -> Tensor:
        """`S J d`."""
        found = self.pool.mean(self.products.jvp(d, self.shared.groups(per)))
        return found[0] if per == "total" else found
