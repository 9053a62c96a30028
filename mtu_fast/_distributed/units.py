"""Parameters of FSDP2 (`fully_shard`) are gathered when a rank asks for them, and all ranks take part.

FSDP gathers a unit in hooks of the backward, which every rank must reach equally often. Passes for
rows are not as many on each rank: one has a task more, or no sample, or makes a plan anew. So while
rows are taken, the hooks ask here. Before every gathering the ranks tell each other which unit they
need, or that they are done; units are gathered for those that need them, the others lend their
slices. Likewise a rank asks for the sum of a unit's gradients over ranks. A rank is back from a call
when all are done.

This file touches what is private in FSDP2: its hooks, and whether a unit is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from mtu_fast._distributed.ranks import Ranks

T = TypeVar("T")
WHAT = "engine: parameters"
DONE = -1


class Sums(Protocol):
    """Sums of gradients over ranks."""

    def flush(self, u: int) -> None:
        """Ask for the sum of what there is of a unit, if there is any."""

    def join(self, number: int, asks: bool) -> None:
        """Take part in a sum that a rank has asked for."""


class Units:
    """The units of a model, each gathered as a whole.

    Args:
        groups: FSDP's parameter groups.
        roots: states of the outermost units.
        ranks: all that take rows together.

    Attributes:
        leaves: of the graph, the parameters of each unit.
        mode: what hooks do, set by whoever takes rows: "whole" if nothing is.
    """

    def __init__(self, groups: Sequence[Any], roots: Sequence[Any], ranks: Ranks) -> None:
        self._groups = list(groups)
        self._roots = list(roots)
        self._ranks = ranks
        self._kept: set[int] = set()  # not let go of before the end
        self._fetched: int | None = None  # the last one that a node outside a pass has needed
        self.leaves = [[p.unsharded_param for p in group.fsdp_params] for group in groups]
        self.mode: Any = None
        self._sums: Sums | None = None

    def during(self, function: Callable[[], T], sums: Sums | None = None) -> T:
        """What a function gives that takes rows; all ranks call it together.

        Args:
            function: takes rows.
            sums: the gradients of its passes, where they are summed a unit at a time.
        """
        self._enter()
        self._sums = sums
        try:
            with self._in_place_of_hooks():
                try:
                    return function()
                finally:
                    # a rank that is done lends its slices to those that are not
                    while self._round(DONE):
                        pass
                    self._end_backward()
        finally:
            self._leave()

    def ask(self, number: int) -> None:
        """Ask for a sum of gradients, by its number among `sums`."""
        self._round(len(self._groups) + number)

    # ---- what passes and nodes ask for -----------------------------------------------------------

    def fetch(self, storages: Collection[int], keep: bool) -> None:
        """Gather the units whose parameters lie in these storages.

        Args:
            storages: numbers of storages, as `untyped_storage()._cdata`.
            keep: until the end; else until another one is asked for.
        """
        for u, group in enumerate(self._groups):
            if not storages.isdisjoint(_storages(group)):  # type: ignore[attr-defined]
                self._fetch(u, keep)

    def keep_all(self) -> None:
        """Gather all units and keep them until the end: where a forward runs again, out of any pass."""
        for u in range(len(self._groups)):
            self._fetch(u, keep=True)

    def _fetch(self, u: int, keep: bool) -> None:
        if keep:
            self._kept.add(u)
        elif not self._groups[u].is_unsharded:
            # nothing says when such a node is done: the next one lets its unit go
            if self._fetched is not None:
                self._let_go(self._fetched)
            self._fetched = u
        self._need(u)

    def _need(self, u: int, *_: object) -> None:
        group, mode = self._groups[u], self._mode()
        if mode == "hollow" and not group.is_unsharded:
            # memory without numbers: nothing is computed from them
            for each in group.fsdp_params:
                each.alloc_all_gather_outputs()
        while mode == "whole" and not group.is_unsharded:
            self._round(u)

    def _let_go(self, u: int, *_: object) -> None:
        group, mode = self._groups[u], self._mode()
        if self._sums is not None:
            self._sums.flush(u)  # behind a unit, all its gradients are there
        if mode == "hollow" and not group.is_unsharded:
            for each in group.fsdp_params:
                each.free_unsharded_param()
        if mode == "whole" and u not in self._kept:
            _reshard(group)

    def _mode(self) -> str:
        return "whole" if self.mode is None else str(self.mode.value)

    # ---- rounds ----------------------------------------------------------------------------------

    def _round(self, wanted: int) -> bool:
        """Every rank says what it needs, and all of that is gathered; whether anything was needed."""
        asked = {which for (which,) in self._ranks.gathered(WHAT, [wanted])}
        # collectives: in one order on all ranks
        for u in sorted(asked - {DONE}):
            if u < len(self._groups):
                self._gather(u, keep=u == wanted)
            elif self._sums is not None:
                self._sums.join(u - len(self._groups), asks=u == wanted)
        return asked != {DONE}

    def _gather(self, u: int, keep: bool) -> None:
        group = self._groups[u]
        there = group.is_unsharded
        if there:  # others need this rank's slice, which FSDP gives only anew
            _reshard(group)
        _unshard(group)
        self._ranks.sent[WHAT] += _lent(group)
        if not keep and not there:
            _reshard(group)

    # ---- FSDP's hooks ----------------------------------------------------------------------------

    def _enter(self) -> None:
        self._kept, self._fetched, self.mode = set(), None, None
        for u, group in enumerate(self._groups):
            if group.is_unsharded:
                self._kept.add(u)  # so far FSDP holds it itself
            else:
                _reshard(group)  # from a smaller mesh, too

    def _leave(self) -> None:
        for group in self._groups:
            if group.reshard_after_backward:
                _reshard(group)
        self._sums = None

    @contextmanager
    def _in_place_of_hooks(self) -> Iterator[None]:
        """FSDP's hooks and recomputed forwards ask here; no gradient is reduced."""
        for u, group in enumerate(self._groups):
            # on the instance: to delete them brings those of the class back
            group.pre_backward = partial(self._need, u)
            group.unshard = partial(self._need, u)
            group.post_backward = partial(self._let_go, u)
            group.reshard = partial(self._let_go, u)
        try:
            yield
        finally:
            for group in self._groups:
                del group.pre_backward, group.unshard, group.post_backward, group.reshard

    def _end_backward(self) -> None:
        """FSDP's own end of a backward, which an error may have kept from being run."""
        for root in self._roots:
            # None where no forward has run: there is nothing to end
            if root._is_root is not None:
                root._root_post_backward_final_callback()


def _unshard(group: Any) -> None:
    kind = type(group)
    kind.unshard(group)
    kind.wait_for_unshard(group)


def _reshard(group: Any) -> None:
    if not group.is_sharded:
        type(group).reshard(group)


def _storages(group: Any) -> set[int]:
    return {p.unsharded_param.untyped_storage()._cdata for p in group.fsdp_params}


def _lent(group: Any) -> int:
    """Bytes that a rank sends of a unit."""
    whole = sum(p.unsharded_param.untyped_storage().nbytes() for p in group.fsdp_params)
    parts = group.mesh_info.shard_mesh_size
    return whole // parts * (parts - 1)
