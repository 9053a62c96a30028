"""What `mtu_fast.Subspace` and `mtu_fast.Memory` ask of rows that they keep across steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtu_fast._checks.flags import Flags
from mtu_fast._distributed.choice import Products
from mtu_fast._distributed.kept import SharedBlock
from mtu_fast._rows.autocast import without_autocast
from mtu_fast._rows.block import Block, of_vectors
from mtu_fast._rows.explicit import explicit
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast._rows.update import Update
from mtu_fast.methods import Roles

Self = TypeVar("Self", bound="Keepable")
T = TypeVar("T")
Kept = Block | SharedBlock  # all rows of this process, or its part of those of all ranks


class Keepable:
    """Rows that others can be made like, in the same space, and that can be held across steps."""

    roles: Roles
    conditions: tuple[Flags, ...]  # of the step that kept rows were taken in
    _shared: Shared
    _parts: list[TaskRows]
    _products: Products

    def _like(self: Self, parts: Sequence[TaskRows]) -> Self:
        """Other rows in the same space."""
        raise NotImplementedError

    def _flags(self) -> tuple[Flags, ...]:
        """Those of the calls that the rows were taken in, and of what was made of them."""
        found = [*(flags for part in self._parts for flags in part.flags), self._products.flags]
        return tuple({id(flags): flags for flags in found}.values())

    # ---- what they are ---------------------------------------------------------------------------

    @property
    def has_means(self) -> bool:
        """Whether some rows are means over samples."""
        return any(part.is_mean for part in self._parts if part.count_everywhere)

    @property
    def of_ranks(self) -> bool:
        """Whether several processes hold the rows."""
        return self._products.ranks is not None

    @property
    def is_unsound(self) -> bool:
        """Whether the host knows by now that the rows, or the step they were taken in, were unsound."""
        return any(flags.is_unsound for flags in (*self._flags(), *self.conditions))

    def tasks_with(self, kind: int) -> tuple[str, ...]:
        """The tasks that have rows of a kind, in order."""
        found = {part.roles.tasks[0] for part in self._parts if part.has(kind)}
        return tuple(task for task in self.roles.tasks if task in found)

    def groups(self, per: str) -> list[tuple[int, ...]]:
        """The parameters of each matrix of `gram(per)`, by index."""
        return [tuple(group) for group in self._shared.groups(per)]

    # ---- kept across steps -----------------------------------------------------------------------

    def vectors(self) -> dict[str, Tensor]:
        """{name: `[K, *shape]`} of the rows that this process holds, whole: of slices a collective."""
        return self._products.vectors()

    def replaced(self: Self, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype) -> Self:
        """Other rows of kind SUBSPACE, explicit, as `explicit` makes them."""
        part = explicit(self._shared, vectors, task, dtype)
        return self._like([self._products.given(part)])

    def asked(self, what: str, settings: object, function: Callable[[], T]) -> T:
        """What a function gives; over ranks, where it raises on none, and all have the same settings: a collective."""
        ranks = self._products.ranks
        return function() if ranks is None else ranks.alike(what, settings, function)

    @without_autocast
    def taken(
        self,
        at: Tensor,
        beside: Any = None,
        dtype: torch.dtype | None = None,
        smallest: bool = False,
    ) -> Kept:
        """The retain rows at these indices, to go on with those that were taken before.

        Args:
            at: int64 `[K]`, ascending.
            beside: what `taken` gave before, in whose form they are held; None where there is none.
            dtype: to hold them in; None for as they are.
            smallest: in the form of the fewest bytes, whatever products with them cost.

        Returns:
            The rows, in memory of their own.

        Raises:
            RuntimeError: the rows are used up.
        """
        found: Kept = self._products.taken(at, beside, dtype, smallest)
        return found

    def remembered(self: Self, block: Any) -> Self:
        """Rows as `taken` gives them as rows of kind MEMORY."""
        return self._like(self._products.remembered(block))

    def block_of_vectors(self, vectors: Mapping[str, Tensor], roles: Roles) -> Block:
        """K vectors of this process, `[K, *shape]` for each parameter by name, as what `remembered` takes."""
        return of_vectors(vectors, roles, self._shared)

    def block_of(self, state: Mapping[str, Any]) -> Kept:
        """What `state_of` gave, as what `remembered` takes.

        Raises:
            TypeError: a part of another kind.
            ValueError: a part is missing, or the state is one of other processes.
        """
        found: Kept = self._products.block_of(state)
        return found

    def state_of(self, block: Any) -> dict[str, Any]:
        """What `taken` gave as plain values and tensors."""
        return self._products.state_of(block)

    def grams_in(self, update: Update, place: Tensor) -> dict[tuple[int, ...], Tensor]:
        """The Gram of the rows at these places of an update, of each of its groups of parameters."""
        gram = update.gram
        assert gram is not None
        per = "total"
        if gram.dim() == 3:
            per = "layer" if len(gram) == len(self.groups("layer")) else "tensor"
        matrices = update.gram_of(place).reshape(-1, len(place), len(place))
        return dict(zip(self.groups(per), matrices, strict=True))
