"""`J Jᵀ`, `Jᵀ w` and `J d` of the rows of this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtu_fast._checks.flags import Flags
from mtu_fast._checks.states import check_rows
from mtu_fast._checks.values import all_finite, check_direction
from mtu_fast._ops._blocks import WIDE, working_dtype
from mtu_fast._rows.beside import Beside, kept_of
from mtu_fast._rows.block import Block, Piece, block_of, chosen, in_memory, state_of
from mtu_fast._rows.columns import NONE, formed
from mtu_fast._rows.explicit import check_vectors
from mtu_fast._rows.grad import Addition, addition, check_finite
from mtu_fast._rows.gram import add_gram
from mtu_fast._rows.keeping import factors_of, zeros
from mtu_fast._rows.narrowing import narrowed
from mtu_fast._rows.pool import Groups, Pool, Pooled, pool_for
from mtu_fast._rows.refine import squares_of
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.solve import Source
from mtu_fast._rows.task_rows import Span, Spans, TaskRows, uses_of, uses_of_each
from mtu_fast._rows.together import multiplies, small, sums
from mtu_fast._rows.uses import Use
from mtu_fast._rows.validity import check_gram, check_lengths, check_open, has_short_rows
from mtu_fast._rows.vjp import vjp
from mtu_fast._rows.weights import outside_gradients, spread
from mtu_fast.methods import Method, Roles


class Whole:
    """Directions where every process holds whole parameters: as they are."""

    def source(self, rows: Source) -> Source:
        """What a method is asked of: the rows themselves."""
        return rows

    def shown(self, d: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """A direction as users see it: as it is."""
        return d

    def from_user(self, d: Mapping[Tensor, Tensor]) -> Mapping[Tensor, Tensor]:
        """A direction that a user gives: as it is."""
        return d

    def squares(
        self, d: Mapping[Tensor, Tensor], blocks: Mapping[Tensor, int], G: Tensor
    ) -> Tensor:
        """`|d|²` of every block."""
        return squares_of(d, blocks, G)

    def addition(self, found: Mapping[Tensor, Tensor], bad: Tensor | None = None) -> Addition:
        """`.grad += gradient`, not yet written; zeros where `bad`."""
        return addition(found, bad)


class OwnProducts(Whole):
    """Products with the rows of this process.

    Args:
        shared: the parameters.
        parts: the rows.
        roles: of all rows that weights are given for.

    Attributes:
        ranks: None; `JoinedProducts` has those whose rows are joined.
        flags: of what is made of the rows.
    """

    ranks = None

    def __init__(self, shared: Shared, parts: Sequence[TaskRows], roles: Roles) -> None:
        self._shared = shared
        self._parts = parts
        self._roles = roles
        self.flags: Flags = shared.ledger.flags(roles.loss.device)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def check_open(self) -> None:
        """The rows may still be used.

        Raises:
            RuntimeError: they are used up, or parameters changed since.
        """
        check_open(self._parts, self._shared)

    def prepare(self, method: object) -> None:
        """Before a method is asked for weights: the rows may still be used."""
        self.check_open()

    def gram(self, groups: Groups) -> Tensor:
        """`[L, R, R]`, finite, of rows that are long enough for it."""
        gram = self._gram(groups, len(self), None)
        check_gram(gram, self._roles, self.flags)
        check_lengths(gram, self._parts, self._roles, self.flags)
        return gram

    def pooled(self, method: Method | Tensor) -> Pooled | None:
        """What a method is to be given in place of all rows; None where it is to be given them."""
        if self.flags.deferred:
            return None
        kept = kept_of(self._parts, self._shared)
        if not kept and not any(
            multiplies(use) for part in self._parts for use in part.uses.values()
        ):
            return None  # sums would save no product
        pool = pool_for(method, self._roles, pays=kept > 0)
        if pool is None:
            return None
        if kept:
            factors = self._parts[-1].factors
            others = [part.only(factors) for part in self._parts]
            of_factors = OwnProducts(self._shared, others, self._roles)
            return Beside(self, self._shared, pool, self._parts, kept, factors, of_factors)
        return Pooled(self, self._shared, pool)

    def gram_of_sums(self, groups: Groups, pool: Pool) -> Tensor:
        """`[L, V, V]` of the rows of a pool, the rows of each added up."""
        gram = self._gram(groups, len(pool.roles), pool)
        if not all_finite([gram]) or has_short_rows(gram, pool.roles):
            self.gram(groups)  # of all rows: its errors name those at fault
        return gram

    def _gram(self, groups: Groups, rows: int, pool: Pool | None) -> Tensor:
        self.check_open()
        # float64 `[L, R, R]`, a sum over the parameters of each group
        gram = self._roles.loss.new_zeros(len(groups), rows, rows)
        for g, group in enumerate(groups):
            add_gram(gram[g], self._parts, group, self._shared.precision, pool)
        return gram

    def vjp(self, w: Tensor, wide: bool = False) -> dict[Tensor, Tensor]:
        """`Jᵀ w` in the dtypes of the parameters; `wide` is that of `unrounded`."""
        return narrowed(self._combined(w, None, wide, rounded=True))

    def unrounded(
        self, w: Tensor, at: Tensor | None = None, wide: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, its part of `Jᵀ w`), in the precision of its sums.

        Args:
            w: weights of all rows.
            at: which of them are this process's; None for all.
            wide: products and sums in float64, whatever the rows are in.

        Yields:
            A pair for each parameter that a row reaches, in their order.
        """
        yield from self._combined(w, at, wide, rounded=False)

    def _combined(
        self, w: Tensor, at: Tensor | None, wide: bool, rounded: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same; `rounded` where sums of many parameters may come as these have them."""
        self.check_open()
        # w of every parameter: the same tensor for all unless weights are per group
        of_parameters = spread(w, self._shared, len(self._roles), self._roles.loss)
        weights = _Weights(of_parameters, at, wide)
        parameters = self._shared.parameters
        each = uses_of_each(self._parts, range(len(parameters)))
        of_small = self._small(each, weights, rounded)
        for j, (spans, uses) in each.items():
            d = of_small.pop(j, None)
            if d is None:
                d = vjp(uses, [weights.of(j, *piece) for piece in zip(spans, uses, strict=True)])
            parameter = parameters[j]
            yield parameter, d if d.shape == parameter.shape else d.view(parameter.shape)

    def _small(
        self, each: Mapping[int, tuple[Spans, list[Use]]], weights: _Weights, rounded: bool
    ) -> dict[int, Tensor]:
        """The sums of all parameters of few explicit numbers a row, by few calls."""
        alike: dict[object, list[int]] = {}
        for j, (spans, uses) in each.items():
            if small(uses):
                of_rows = tuple([use.dtype for use in uses])
                key = spans, weights.key(j), of_rows, self._shared.parameters[j].dtype
                alike.setdefault(key, []).append(j)
        found: dict[int, Tensor] = {}
        for several in alike.values():
            j = several[0]
            pieces = [weights.of(j, *piece) for piece in zip(*each[j], strict=True)]
            dtype = self._shared.parameters[j].dtype if rounded else None
            parts = sums([each[j][1] for j in several], pieces, dtype)
            for j, d in zip(several, parts, strict=True):
                first = each[j][1][0]
                found[j] = first.chain.apply(d if len(first.shape) == 1 else d.view(first.shape))
        return found

    def jvp(self, d: Mapping[Tensor, Tensor], groups: Groups) -> Tensor:
        """`J d`, `[L, R]`."""
        self.check_open()
        names = zip(self._shared.names, self._shared.parameters, strict=True)
        check_direction(d, dict(names))
        found = self._roles.loss.new_zeros(len(groups), len(self))
        for g, group in enumerate(groups):
            for j in group:
                moved = d.get(self._shared.parameters[j])
                if moved is not None:
                    self._add_jvp(found[g], j, moved)
        return found

    def _add_jvp(self, derivatives: Tensor, j: int, moved: Tensor) -> None:
        for span, use in zip(*uses_of(self._parts, j), strict=True):
            # J d = Σ_j J_j d_j
            derivatives[slice(*span)] += use.jvp(moved)

    def jacobian(self) -> dict[Tensor, Tensor]:
        """{parameter: `[R, *shape]`} of those that a row reaches."""
        self.check_open()
        found: dict[Tensor, Tensor] = {}
        for j, parameter in enumerate(self._shared.parameters):
            for span, use in zip(*uses_of(self._parts, j), strict=True):
                rows = use.grounded().rows
                if parameter not in found:
                    # rows of other parts, which do not reach the parameter, stay zero
                    found[parameter] = rows.new_zeros(len(self), *parameter.shape)
                found[parameter][slice(*span)] = rows.view(-1, *parameter.shape)
        return found

    def vectors(self) -> dict[str, Tensor]:
        """{name: `[R, *shape]`} of those that a row reaches."""
        held = self.jacobian()
        names = zip(self._shared.names, self._shared.parameters, strict=True)
        return {name: held[p] for name, p in names if p in held}

    def taken(
        self, at: Tensor, beside: Block | None, dtype: torch.dtype | None, smallest: bool
    ) -> Block:
        """K retain rows, in memory of their own.

        Args:
            at: which of all rows, int64 `[K]`, ascending.
            beside: rows that are kept already; None where these are the first.
            dtype: to hold them in; None for as they are.
            smallest: see `keeps_factors`.
        """
        self.check_open()
        factors = factors_of(self._parts, self._of_parts(at), smallest)
        reached: dict[str, frozenset[int]] = {}
        for part in self._parts:
            task = part.roles.tasks[0]
            reached[task] = reached.get(task, NONE).union(part.uses)
        if beside is not None:
            likes = beside.common(factors, NONE.union(*reached.values()))
            factors = {j: factors.get(j) or zeros(like, len(at)) for j, like in likes.items()}
        rows = formed(self._parts, self._shared, frozenset(factors))
        matrix = rows.matrix
        if len(at) < len(rows.at):
            matrix = matrix[torch.isin(rows.at, at)]
        piece = Piece(matrix, factors)
        held = piece if dtype is None else piece.to(dtype)
        return Block((held,), chosen(self._roles, at), reached, {}, self._shared)

    def _of_parts(self, at: Tensor) -> list[Tensor]:
        """Indices of rows as indices into each part."""
        found, start = [], 0
        for part in self._parts:
            stop = start + len(part)
            found.append(at[(at >= start) & (at < stop)] - start)
            start = stop
        return found

    def remembered(self, block: Block) -> list[TaskRows]:
        """Rows as rows of kind MEMORY that outlive a step."""
        return in_memory(block)

    def block_of(self, state: Mapping[str, Any]) -> Block:
        """What `state_of` gave.

        Raises:
            ValueError: the state is one of several ranks.
        """
        if "parts" in state:
            raise ValueError(
                "Memory: state: found the rows of one of several ranks, expected those of one process; mtu.unlearn "
                "puts the rows of all ranks in its checkpoint together."
            )
        check_rows("Memory: state: block", state)
        check_vectors(state["vectors"], self._shared)
        return block_of(state, self._shared)

    def state_of(self, block: Block) -> dict[str, Any]:
        """Kept rows as plain values and tensors."""
        return state_of(block)

    def outside(self, w: Tensor) -> dict[Tensor, Tensor]:
        """Gradients of the weighted losses by the parameters outside."""
        return outside_gradients(self._parts, w, self.flags)

    def check_finite(self, update: Sequence[Tensor], weights: Tensor) -> None:
        """What tells whether an update is finite is; a NotFiniteError where it is not."""
        check_finite(update, self.flags)

    def given(self, part: TaskRows) -> TaskRows:
        """Explicit rows beside these."""
        return part


class _Weights:
    """Weights of all parameters, narrowed once for all that share a dtype and span, not once each."""

    def __init__(self, spread: Sequence[Tensor], rows: Tensor | None, wide: bool) -> None:
        self._spread = spread
        self._wide = wide
        self._rows = rows
        self._narrowed: dict[tuple[int, Span, torch.dtype], Tensor] = {}

    def key(self, j: int) -> int:
        """Equal for parameters of equal weights."""
        return id(self._spread[j])

    def of(self, j: int, span: Span, use: Use) -> Tensor:
        """The weights of parameter j for a span of rows, in the dtype the use works in."""
        dtype = WIDE if self._wide else working_dtype(use.tensors[-1])
        key = (self.key(j), span, dtype)
        if key not in self._narrowed:
            w = self._spread[j]
            own = w if self._rows is None else w[self._rows]
            self._narrowed[key] = own[slice(*span)].to(dtype)
        return self._narrowed[key]
