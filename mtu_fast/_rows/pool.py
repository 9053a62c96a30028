"""Rows that a method sees by their mean alone: summed before products are taken, where there are many.

With S the `[V, R]` matrix that keeps a row, or takes the mean of a task's rows to forget, the method is given S G Sᵀ
in place of G, and its weights w of the V rows weigh the R rows by Sᵀ w. `Jᵀ Sᵀ w` is the same
update: of 192 rows of which half are to be forgotten, a quarter of the products is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
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
# On the CPU, where rows are pooled: numpy takes a microsecond where torch takes ten.
Numbers = np.ndarray[Any, Any]


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
            into = self.into.numpy()
            whole = np.concatenate([into[slice(*span)] for span in spans])
            there = np.bincount(whole + 1, minlength=len(self.counts) + 1)[1:].nonzero()[0]
            place = np.full(len(self.counts) + 1, -1)  # the last of a row that is left out
            place[there] = np.arange(len(there))
            self._of_spans[spans] = place[whole].tolist(), torch.from_numpy(there)
        return self._of_spans[spans]

    def spread(self, w: Tensor) -> Tensor:
        """`Sᵀ w`: weights `[..., V]` as weights `[..., R]`."""
        # a row of a mean of n has the n-th part of its weight
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


def _places(roles: Roles) -> tuple[Numbers, Numbers]:
    """Of each row, which of V it is, or -1; and of each of the V rows, the first of those it is made of."""
    R, task, kind = len(roles), roles.task.numpy(), roles.kind.numpy()
    forget = kind == FORGET
    opening = np.full(len(roles.tasks), R)  # of each task, the first row to forget
    at = forget.nonzero()[0]
    np.minimum.at(opening, task[at], at)
    opens = ~forget & (kind != RESTING)
    opens[opening[opening < R]] = True
    number = opens.cumsum() - 1
    of_task = number[np.minimum(opening, R - 1)][task]
    into = np.where(forget, of_task, np.where(opens, number, -1))
    return into, opens.nonzero()[0]


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


def _pool(into: Numbers, first: Numbers, roles: Roles) -> Pool:
    kept, all_kinds, all_tasks = into >= 0, roles.kind.numpy(), roles.task.numpy()
    task, kind, sample = all_tasks[first], all_kinds[first], roles.sample.numpy()[first]
    own = np.bincount(into[kept], minlength=len(first))
    loss = np.bincount(into[kept], roles.loss.numpy()[kept], minlength=len(first)) / own
    # those at rest count in the mean, with gradients of 0
    resting = np.bincount(all_tasks[all_kinds == RESTING], minlength=len(roles.tasks))
    counts = (own + np.where(kind == FORGET, resting[task], 0)).astype(np.float64)
    sample[kind == FORGET] = -1  # of a copy: what an index array picks is one
    rank = roles.rank
    if rank is not None:
        # a mean over all ranks is said to be rank 0's, as everywhere
        rank = torch.from_numpy(np.where(kind == FORGET, 0, rank.numpy()[first]))
    of_sums = replace(
        roles,
        rank=rank,
        task=torch.from_numpy(task),
        sample=torch.from_numpy(sample),
        kind=torch.from_numpy(kind),
        loss=torch.from_numpy(loss),
    )
    return Pool(torch.from_numpy(into), torch.from_numpy(counts), of_sums)


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
        # ⟨Σ_i g_i / n, Σ_j g_j / m⟩ = ⟨Σ g_i, Σ g_j⟩ / (n m)
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
