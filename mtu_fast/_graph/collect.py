"""The uses of each parameter, gathered while a pass runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from mtu_fast._rows.merge import aligned, merge
from mtu_fast._rows.shared import version
from mtu_fast._rows.together import is_table
from mtu_fast._rows.uses import Dense, Gather, Use

WRITTEN = (
    "rows: a gradient was written to after rows had been taken from it, while the backward still ran; .grad is "
    "untouched. A tensor hook, or the backward of an autograd function, that changes the gradient it is given? "
    "Let it return a new tensor instead."
)


class Collector:
    """Gathers the uses of each parameter in one pass; once all are there, keeps the smaller of rows and factors.

    Or the rows, where they pay (`Use.rows_pay`) and the budget allows. A large table that is looked
    up and multiplied with, an embedding that is the head too, becomes rows for the budget only.

    Args:
        expected: how many uses of each parameter will come.
        rows: which rows of a use are kept, int64; None for all.
        budget: bytes that rows may take beyond factors.
        take: what each use is handed to once it is whole; none is kept then.

    Attributes:
        budget: what is left of it.
    """

    def __init__(
        self,
        expected: Counter[int],
        rows: Tensor | None,
        budget: int,
        take: Callable[[int, Use], None] | None = None,
    ) -> None:
        self.budget = budget
        self._expected = expected
        self._rows = rows
        self._take = take
        self._parts: dict[int, list[_Seen]] = {}  # of parameters of which more uses may come
        self._whole: dict[int, Use] = {}
        self._held: list[Tensor] = []  # by those, and how often each was written to
        self._versions: list[int] = []

    def visit(self, parameter: int, use: Use) -> None:
        """Take one use of a parameter, as `sweep` hands it over."""
        if self._rows is not None:
            # before anything is formed: rows that are not kept cost nothing
            use = use.select(self._rows)
        begun = parameter in self._whole or parameter in self._parts
        if self._expected[parameter] == 1 and not begun:
            self._complete(parameter, use)  # mostly: nothing to merge
            return
        parts = self._parts.setdefault(parameter, self._begun(parameter))
        parts.append(_Seen(use, use.versions))
        # A chain cannot be walked while a pass runs, so uses behind unequal chains wait for its
        # end.
        if len(parts) == self._expected[parameter] and aligned([part.use for part in parts]):
            self._complete(parameter, _merged(self._parts.pop(parameter)))

    def _begun(self, parameter: int) -> list[_Seen]:
        """What there is of a parameter of which more comes than was expected."""
        use = self._whole.pop(parameter, None)
        return [] if use is None else [_Seen(use, use.versions)]

    def finish(self) -> dict[int, Use]:
        """One use per parameter, once the pass is over; nothing where each was handed over.

        Raises:
            RuntimeError: what a use is made of was written to since it was visited.
        """
        if list(map(version, self._held)) != self._versions:
            raise RuntimeError(WRITTEN)
        whole = {j: _merged(parts) for j, parts in self._parts.items()}
        if self._take is None:
            return self._whole | whole
        for parameter, use in whole.items():
            self._take(parameter, use)
        return {}

    def _complete(self, parameter: int, whole: Use) -> None:
        use = self._cheaper(whole)
        if self._take is not None:
            self._take(parameter, use)
            return
        self._whole[parameter] = use
        self._held += use.tensors
        self._versions += map(version, use.tensors)

    def _cheaper(self, use: Use) -> Use:
        if isinstance(use, Dense) or (isinstance(use, Gather) and use.sparse):
            return use
        # The rows of a table count as a whole: while they are formed the factors, gradients of
        # logits, are there too.
        beyond = use.rows_bytes() - (0 if is_table(use) else use.held)
        if beyond > self.budget or (beyond > 0 and not use.rows_pay()):
            return use
        # first come, first served: parameters are met from the losses down
        self.budget -= max(beyond, 0)
        return use.dense()


class _Seen(NamedTuple):
    """A use, and the versions of what it holds when it was visited: the pass goes on and hands the same tensors on."""

    use: Use
    versions: tuple[int, ...]


def _merged(parts: Sequence[_Seen]) -> Use:
    if any(use.versions != versions for use, versions in parts):
        raise RuntimeError(WRITTEN)
    return merge([part.use for part in parts])
