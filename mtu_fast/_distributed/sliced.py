"""`J Jᵀ`, `Jᵀ w` and `J d` where every rank holds a slice of the parameters: directions are slices, never whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from mtu_fast._checks.flags import AT_ONCE
from mtu_fast._checks.values import check_direction
from mtu_fast._distributed.cut import cut, whole
from mtu_fast._distributed.kept import WHAT as KEPT
from mtu_fast._distributed.kept import Keeping, SharedBlock, restored
from mtu_fast._distributed.products import JoinedProducts
from mtu_fast._distributed.ranks import Ranks
from mtu_fast._distributed.slices import Given, Slices
from mtu_fast._ops._blocks import WIDE, working_dtype
from mtu_fast._rows.grad import Addition, check_finite
from mtu_fast._rows.gram import add_gram
from mtu_fast._rows.own import Groups, OwnProducts
from mtu_fast._rows.refine import squares_of
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.solve import Source
from mtu_fast._rows.task_rows import TaskRows, uses_of
from mtu_fast._rows.validity import check_gram, check_open
from mtu_fast._rows.vjp import vjp
from mtu_fast._rows.weights import outside_gradients, spread
from mtu_fast.methods import Roles

Direction = dict[Tensor, Tensor]  # leaf of the graph -> this rank's slice


class _Products(Protocol):
    """What `Inner` needs of products."""

    def gram(self, groups: Groups) -> Tensor: ...
    def vjp(self, w: Tensor, wide: bool = False) -> Direction: ...
    def jvp(self, d: Mapping[Tensor, Tensor], groups: Groups) -> Tensor: ...


class Inner:
    """Rows as a method needs them, with directions that are slices.

    Args:
        products: of the rows.
        shared: the parameters.
        roles: of all rows.
    """

    deferred = False

    def __init__(self, products: _Products, shared: Shared, roles: Roles) -> None:
        self.roles = roles
        self._products = products
        self._shared = shared

    def gram(self, per: str = "total") -> Tensor:
        """`J Jᵀ`."""
        found = self._products.gram(self._shared.groups(per))
        return found[0] if per == "total" else found

    def vjp(self, w: Tensor) -> Direction:
        """`Jᵀ w`."""
        return self._products.vjp(w)

    def wide_vjp(self, w: Tensor) -> Direction:
        """`Jᵀ w`, products and sums in float64."""
        return self._products.vjp(w, wide=True)

    def jvp(self, d: Mapping[Tensor, Tensor], per: str = "total") -> Tensor:
        """`J d`."""
        found = self._products.jvp(d, self._shared.groups(per))
        return found[0] if per == "total" else found


class _Cut:
    """What directions that are slices have in common, whoever holds the rows."""

    ranks: Ranks
    _slices: Slices
    _shared: Shared
    _roles: Roles

    def source(self, rows: Source) -> Source:
        """What a method is asked of."""
        return Inner(self, self._shared, self._roles)  # type: ignore[arg-type]

    def shown(self, d: Mapping[Tensor, Tensor]) -> Direction:
        """{the model's parameter: DTensor}."""
        return self._slices.shown(d)

    def from_user(self, d: Any) -> Any:
        """{leaf: slice} of what a user has for a direction."""
        return self._slices.from_user(d)

    def addition(self, found: Mapping[Tensor, Tensor], bad: Tensor | None = None) -> Addition:
        """`.grad += gradient` of the model's parameters, not yet written; what is bad was raised before."""
        return self._slices.addition(found)

    def squares(
        self, d: Mapping[Tensor, Tensor], blocks: Mapping[Tensor, int], G: Tensor
    ) -> Tensor:
        """`|d|²` of every block, over all slices."""
        # a parameter that is whole on all ranks counts once
        mine = {p: t for p, t in d.items() if self._slices.counts(p)}
        return self._slices.ranks.sum("rows.backward: lengths", squares_of(mine, blocks, G))

    def check_finite(self, update: Sequence[Tensor], weights: Tensor) -> None:
        """Weights and update are finite on all ranks, else all raise the error of the one that found it."""
        self.ranks.agreed("rows.backward", partial(self._check_finite, update, weights))

    def _check_finite(self, update: Sequence[Tensor], weights: Tensor) -> None:
        check_finite([weights, *update])

    def _rounded(self, found: Mapping[Tensor, Tensor]) -> Direction:
        """In the dtypes of the model's parameters: sums come first, and rounding last."""
        return {p: d.to(self._slices.owner(p).dtype) for p, d in found.items()}


class ShardedProducts(_Cut, JoinedProducts):
    """Products with the rows of all ranks, of which this one holds some; their directions are slices.

    Args:
        shared: the parameters.
        parts: this rank's rows, the same parts on every rank.
        roles: of the rows of all ranks.
        ranks: who takes part.
        slices: how parameters are held.
    """

    def __init__(
        self,
        shared: Shared,
        parts: Sequence[TaskRows],
        roles: Roles,
        ranks: Ranks,
        slices: Slices,
    ) -> None:
        super().__init__(shared, parts, roles, ranks)
        self._slices = slices

    def vjp(self, w: Tensor, wide: bool = False) -> Direction:
        """`Jᵀ w`, this rank's slices of the sum over ranks."""

        def own() -> Given:
            check_open(self._parts, self._shared)
            # for its errors, which must come before the first collective
            spread(w, self._shared, len(self._roles), self._roles.loss)
            reached = {j for part in self._parts if len(part) for j in part.uses}
            # said beforehand, so that the gradients can be made one at a time
            leaves = [p for j, p in enumerate(self._shared.parameters) if j in reached]
            return leaves, self._own.unrounded(w, self._at(), wide)

        leaves = self._shared.parameters
        return self._rounded(self._slices.scattered("rows.vjp", own, leaves, self.ranks))

    def jvp(self, d: Mapping[Tensor, Tensor], groups: Groups) -> Tensor:
        """`J d`, `[L, R]`; one whole parameter of d is there at a time."""
        self.ranks.agreed("rows.jvp", partial(_check_direction, d, self._shared))
        found = self._roles.loss.new_zeros(len(groups), len(self._roles))
        rows = self._at()
        for g, group in enumerate(groups):
            for j in group:
                leaf = self._shared.parameters[j]
                if leaf in d:
                    # a collective: directions have the same keys on all ranks
                    whole = self._slices.gathered("rows.jvp", leaf, d[leaf])
                    own = self.ranks.agreed("rows.jvp", lambda: self._own.jvp({leaf: whole}, [[j]]))  # noqa: B023
                    found[g, rows] += own[0]
        return self.ranks.sum("rows.jvp: sum", found)

    def jacobian(self) -> Direction:
        """{the model's parameter: `[R, *shape]`} of the rows that this rank holds."""
        return {self._slices.owner(p): rows for p, rows in super().jacobian().items()}

    def outside(self, w: Tensor) -> Direction:
        """Gradients of the weighted losses by the parameters outside, as slices."""
        rows = self._at()

        def own() -> Given:
            is_whole = w.dim() == 1 and len(w) == len(self._roles)
            found = outside_gradients(self._parts, w[rows] if is_whole else w)
            check_finite(found.values())
            return list(found), iter(found.items())

        leaves = self.ranks.outside()
        return self._rounded(self._slices.scattered("rows.backward", own, leaves, self.ranks))


class SlicedProducts(Keeping, _Cut):
    """Products with rows of which every rank holds its slice of the parameters.

    Args:
        shared: the parameters.
        parts: the rows, the same on every rank.
        roles: of them.
        ranks: who takes part.
        slices: how parameters are held.

    Attributes:
        ranks: who takes part.
        flags: of what is made of the rows; every rank waits for the others anyway.
    """

    def __init__(
        self,
        shared: Shared,
        parts: Sequence[TaskRows],
        roles: Roles,
        ranks: Ranks,
        slices: Slices,
    ) -> None:
        self.ranks = ranks
        self._shared = shared
        self._parts = parts
        self._roles = roles
        self._slices = slices
        self.flags = AT_ONCE
        self._own = OwnProducts(shared, parts, roles)

    def pooled(self, method: object) -> None:
        """Nothing: rows of several ranks are met one by one."""

    def check_open(self) -> None:
        """The rows may still be used, on all ranks."""
        self.ranks.agreed("rows", self._own.check_open)

    def prepare(self, method: object) -> None:
        """Before a method is asked for weights: it draws the same numbers everywhere."""
        self.check_open()
        self.ranks.same_generator(method)

    def gram(self, groups: Groups) -> Tensor:
        """`[L, R, R]`, the sum over slices; the same bits on every rank."""
        own = self.ranks.agreed("rows.gram", partial(self._gram, groups))
        gram = self._slices.ranks.sum("rows.gram: sum", own)
        check_gram(gram, self._roles)
        return gram

    def _gram(self, groups: Groups) -> Tensor:
        """Of this rank's slices, those that are to be counted."""
        self._own.check_open()
        rows = len(self._roles)
        gram = self._roles.loss.new_zeros(len(groups), rows, rows)
        for g, group in enumerate(groups):
            # a parameter that is whole on all ranks counts once
            mine = [j for j in group if self._slices.counts(self._shared.parameters[j])]
            add_gram(gram[g], self._parts, mine, self._shared.precision)
        return gram

    def vjp(self, w: Tensor, wide: bool = False) -> Direction:
        """`Jᵀ w`, this rank's slices; nothing travels but whether all is well."""
        return self._rounded(self.ranks.agreed("rows.vjp", lambda: dict(self._vjp(w, wide))))

    def _vjp(self, w: Tensor, wide: bool) -> Iterator[tuple[Tensor, Tensor]]:
        self._own.check_open()
        weights = spread(w, self._shared, len(self._roles), self._roles.loss)
        for j, leaf in enumerate(self._shared.parameters):
            spans, uses = uses_of(self._parts, j)
            if uses:
                dtype = WIDE if wide else working_dtype(uses[0].tensors[-1])
                yield leaf, vjp(uses, [weights[j][slice(*span)].to(dtype) for span in spans])

    def jvp(self, d: Mapping[Tensor, Tensor], groups: Groups) -> Tensor:
        """`J d`, `[L, R]`, the sum over slices."""
        own = self.ranks.agreed("rows.jvp", partial(self._jvp, d, groups))
        return self._slices.ranks.sum("rows.jvp: sum", own)

    def _jvp(self, d: Mapping[Tensor, Tensor], groups: Groups) -> Tensor:
        self._own.check_open()
        _check_direction(d, self._shared)
        found = self._roles.loss.new_zeros(len(groups), len(self._roles))
        for g, group in enumerate(groups):
            for j in group:
                leaf = self._shared.parameters[j]
                if leaf in d and self._slices.counts(leaf):
                    for span, use in zip(*uses_of(self._parts, j), strict=True):
                        found[g, slice(*span)] += use.jvp(d[leaf])
        return found

    def jacobian(self) -> Direction:
        """{the model's parameter: `[R, *slice]`}."""
        self._own.check_open()
        found: Direction = {}
        for j, leaf in enumerate(self._shared.parameters):
            for span, use in zip(*uses_of(self._parts, j), strict=True):
                rows = use.grounded().rows
                owner = self._slices.owner(leaf)
                if owner not in found:
                    found[owner] = rows.new_zeros(len(self._roles), *rows.shape[1:])
                found[owner][slice(*span)] = rows
        return found

    def vectors(self) -> dict[str, Tensor]:
        """{name: `[R, *shape]`}, whole on every rank; a collective."""
        held, found = self.jacobian(), {}
        for name, leaf in zip(self._shared.names, self._shared.parameters, strict=True):
            owner = self._slices.owner(leaf)
            if owner in held:
                found[name] = self._slices.gathered_rows("rows.vectors", leaf, held[owner])
        return found

    def outside(self, w: Tensor) -> Direction:
        """Gradients of the weighted losses by the parameters outside, as slices."""
        own = self.ranks.agreed("rows.backward", partial(outside_gradients, self._parts, w))
        return self._rounded(own)

    def state_of(self, block: SharedBlock) -> dict[str, Any]:
        """What `block_of` takes: the rows whole, on every rank; a collective."""
        parts = [whole(part, self._shared, self._slices) for part in block.parts]
        return super().state_of(replace(block, parts=tuple(parts)))

    def block_of(self, state: Mapping[str, Any]) -> SharedBlock:
        """This rank's slices of what `state_of` gave; a collective.

        Raises:
            Exception: of the kind that one of the ranks found.
        """
        parts = self.ranks.agreed(KEPT, lambda: restored(state, self._shared))
        return self._block([cut(part, self._shared, self._slices) for part in parts])

    def given(self, part: TaskRows) -> TaskRows:
        """This rank's slices of explicit rows, to be beside these."""
        return cut(part, self._shared, self._slices)


def _check_direction(d: Any, shared: Shared) -> None:
    """Keys are the engine's parameters.

    Raises:
        TypeError: no mapping.
        ValueError: another key.
    """
    if not isinstance(d, Mapping):
        check_direction(d, {})
    known = set(map(id, shared.parameters))
    strange = [p for p in d if id(p) not in known]
    if strange:
        raise ValueError(
            f"jvp: found {len(strange)} keys that are none of the engine's parameters, expected those of rows.vjp(w); "
            "by name they are rows.parameters[name]."
        )
    for p, t in d.items():
        if not isinstance(t, Tensor) or t.is_complex() or t.device != p.device:
            raise ValueError(
                f"jvp: found {type(t).__name__} for a parameter of shape {tuple(p.shape)}, expected a real DTensor as "
                "rows.vjp(w) gives it, on its device."
            )
