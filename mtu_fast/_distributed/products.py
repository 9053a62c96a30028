"""`J Jᵀ`, `Jᵀ w` and `J d` of the rows of all ranks, with the same calls as those of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from mtu_fast._checks.flags import AT_ONCE
from mtu_fast._checks.values import all_finite
from mtu_fast._distributed.gram import joined_gram
from mtu_fast._distributed.joining import given, own_rows
from mtu_fast._distributed.kept import Keeping
from mtu_fast._distributed.pooling import pooled_gram
from mtu_fast._distributed.ranks import Ranks
from mtu_fast._distributed.sums import summed
from mtu_fast._rows.grad import check_finite
from mtu_fast._rows.own import Groups, OwnProducts, Whole
from mtu_fast._rows.pool import Pool, Pooled, pool_for
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows, join_roles
from mtu_fast._rows.validity import check_gram, check_lengths, has_short_rows
from mtu_fast._rows.weights import outside_gradients
from mtu_fast.errors import NotFiniteError
from mtu_fast.methods import Method, Roles


class JoinedProducts(Keeping, Whole):
    """Products with the rows of all ranks, of which this one holds a part.

    Args:
        shared: the parameters.
        parts: this rank's rows, the same parts on every rank.
        roles: of the rows of all ranks.
        ranks: who takes part.

    Attributes:
        ranks: who takes part.
        flags: of what is made of the rows; every rank waits for the others anyway.
    """

    def __init__(
        self, shared: Shared, parts: Sequence[TaskRows], roles: Roles, ranks: Ranks
    ) -> None:
        self.ranks = ranks
        self._own = OwnProducts(shared, parts, roles)
        self.flags = AT_ONCE
        self._shared = shared
        self._parts = parts
        self._roles = roles

    def check_open(self) -> None:
        """The rows of every rank may still be used."""
        self.ranks.agreed("rows.to_subspace", self._own.check_open)

    def prepare(self, method: object) -> None:
        """Before a method is asked for weights: it draws the same numbers everywhere."""
        self.ranks.same_generator(method)

    def pooled(self, method: Method | Tensor) -> Pooled | None:
        """What a method is to be given in place of all rows; None where it is to be given them."""
        # by the roles of all rows: every rank decides alike
        pool = pool_for(method, self._roles)
        return None if pool is None else Pooled(self, self._shared, pool)

    def gram_of_sums(self, groups: Groups, pool: Pool) -> Tensor:
        """`[L, V, V]` of the rows of a pool, the rows of each added up."""
        gram = pooled_gram(self.ranks, self._parts, self._shared, groups, pool)
        # alike on every rank, which then all look for the rows at fault
        if not all_finite([gram]) or has_short_rows(gram, pool.roles):
            self.gram(groups)
        return gram

    def gram(self, groups: Groups) -> Tensor:
        """`[L, R, R]`, finite, of rows that are long enough for it; the same bits on every rank."""
        gram = joined_gram(self.ranks, self._parts, self._shared, groups)
        check_gram(gram, self._roles)
        if self._roles.dtype == gram.dtype:  # the others are never too short
            self.ranks.agreed("rows.gram", partial(self._check_lengths, gram))
        return gram

    def vjp(self, w: Tensor, wide: bool = False) -> dict[Tensor, Tensor]:
        """`Jᵀ w` in the dtypes of the parameters: sums come first, and rounding last."""
        own = partial(self._vjp, w, wide)
        found = summed(self.ranks, "rows.vjp", own, self._shared.parameters)
        return {parameter: d.to(parameter.dtype) for parameter, d in found.items()}

    def jvp(self, d: Mapping[Tensor, Tensor], groups: Groups) -> Tensor:
        """`J d`, `[L, R]`."""
        own = self.ranks.agreed("rows.jvp", lambda: self._own.jvp(d, groups))
        found = self._roles.loss.new_zeros(len(groups), len(self._roles))
        # zero in the rows of other ranks: the sum then puts all together, exactly
        found[:, self._at()] = own
        return self.ranks.sum("rows.jvp: sum", found)

    def jacobian(self) -> dict[Tensor, Tensor]:
        """{parameter: `[R, *shape]`} of the rows that this rank holds."""
        return self._own.jacobian()

    def vectors(self) -> dict[str, Tensor]:
        """{name: `[R, *shape]`} of the rows that this rank holds."""
        return self._own.vectors()

    def outside(self, w: Tensor) -> dict[Tensor, Tensor]:
        """Gradients of the weighted losses by the parameters outside."""
        rows = self._at()

        def own() -> dict[Tensor, Tensor]:
            is_whole = w.dim() == 1 and len(w) == len(self._roles)
            found = outside_gradients(self._parts, w[rows] if is_whole else w)
            check_finite(found.values())
            return found

        return summed(self.ranks, "rows.backward", own, self.ranks.outside())

    def check_finite(self, update: Sequence[Tensor], weights: Tensor) -> None:
        """Weights and update are finite, else all ranks raise the error of the one that found it."""
        try:
            check_finite([weights, *update])
        except NotFiniteError:
            # weights and update have the same bits on each rank: all come here, or none. Each one's
            # part, computed again, says which rank it was
            self.ranks.agreed("rows.backward", lambda: check_finite(self._vjp(weights).values()))
            raise

    def given(self, part: TaskRows) -> TaskRows:
        """Explicit rows beside these, as many on each rank as it holds of a subspace."""
        counts = [0] * self.ranks.size
        for each in self._parts:
            if each.everywhere is not None:
                counts = [a + b for a, b in zip(counts, each.everywhere.counts, strict=True)]
        return given(part, counts)

    def _at(self) -> Tensor:
        """Which of all rows are this rank's."""
        return own_rows(self._parts, self.ranks)

    def _vjp(self, w: Tensor, wide: bool = False) -> dict[Tensor, Tensor]:
        """This rank's part of `Jᵀ w`."""
        return dict(self._own.unrounded(w, self._at(), wide))

    def _check_lengths(self, gram: Tensor) -> None:
        rows = self._at()
        roles = join_roles([part.roles for part in self._parts])
        check_lengths(gram[:, rows][:, :, rows], self._parts, replace(roles, dtype=gram.dtype))
