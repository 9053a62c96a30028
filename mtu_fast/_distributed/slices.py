"""Parameters of which every rank holds a slice: what stands for them in the graph, and gradients summed into slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtu_fast._distributed.chunks import is_cut, with_local
from mtu_fast._distributed.ranks import Outcome, Ranks, attempt
from mtu_fast._distributed.sums import buckets
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._rows.grad import Addition
from mtu_fast._rows.space import Leaves

Gradients = dict[Tensor, Tensor]
# Which gradients a rank has, and these one by one in the same order.
Given = tuple[Sequence[Tensor], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Slice:
    """How a parameter is held.

    Attributes:
        owner: the model's parameter: a DTensor, or a plain one that every rank has as a whole.
        shape: of the whole.
        dim: what the whole is cut along; None where it is not.
        parts: into how many slices.
    """

    owner: Any
    shape: tuple[int, ...]
    dim: int | None
    parts: int

    @property
    def longest(self) -> int:
        """The longest slice along `dim`: that of the first rank."""
        assert self.dim is not None
        return -(-self.shape[self.dim] // self.parts)

    @property
    def numel(self) -> int:
        """Numbers of a slice as it travels: all slices are as long as the longest."""
        return self.longest * (torch.Size(self.shape).numel() // max(self.shape[self.dim or 0], 1))

    def length(self, rank: int) -> int:
        """Of the slice of a rank along `dim`; torch.chunk's rule."""
        assert self.dim is not None
        return min(max(self.shape[self.dim] - rank * self.longest, 0), self.longest)

    def cut(self, whole: Tensor) -> Tensor:
        """All slices, padded with zeros, `[parts, numel]`."""
        # with dim first each slice is one piece of memory
        moved = whole.movedim(self.dim or 0, 0)
        # a reduce-scatter wants pieces of one length
        missing = self.longest * self.parts - len(moved)
        if missing:
            moved = torch.cat([moved, moved.new_zeros(missing, *moved.shape[1:])])
        return moved.reshape(self.parts, self.numel)

    def own(self, padded: Tensor, rank: int) -> Tensor:
        """The slice of a rank from its padded numbers `[numel]`."""
        rest = self._rest()
        found = padded.view(self.longest, *rest)[: self.length(rank)]
        return found.movedim(0, self.dim or 0).contiguous()

    def padded(self, own: Tensor) -> Tensor:
        """The padded numbers of a slice, `[numel]`."""
        moved = own.movedim(self.dim or 0, 0)
        found = own.new_zeros(self.longest, *self._rest())
        found[: len(moved)] = moved
        return found.flatten()

    def joined(self, slices: Sequence[Tensor]) -> Tensor:
        """The whole from the padded numbers of all slices."""
        assert self.dim is not None
        whole = torch.cat([each.view(self.longest, *self._rest()) for each in slices])
        return whole[: self.shape[self.dim]].movedim(0, self.dim).contiguous()

    def _rest(self) -> tuple[int, ...]:
        return tuple(size for d, size in enumerate(self.shape) if d != self.dim)


class Slices(Leaves):
    """The sliced parameters of a model.

    Args:
        held: leaf of the graph -> how the model holds it.
        ranks: whose slices make up a whole.
        copies: the ranks that hold the same slice; None where there is one.

    Attributes:
        ranks: as given.
    """

    def __init__(
        self, held: Mapping[Tensor, Slice], ranks: Ranks, copies: Ranks | None = None
    ) -> None:
        self.ranks = ranks
        self._held = dict(held)
        self._copies = copies
        self._leaf_of = {id(each.owner): leaf for leaf, each in held.items()}

    # ---- names of parameters ---------------------------------------------------------------------

    def leaf(self, parameter: Tensor) -> Tensor:
        """What a parameter is in the graph."""
        return self._leaf_of.get(id(parameter), parameter)

    def owners(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The model's own parameters."""
        return tuple(map(self.owner, leaves))

    def owner(self, leaf: Tensor) -> Any:
        """The model's own parameter."""
        return self._held[leaf].owner if leaf in self._held else leaf

    def counts(self, leaf: Tensor) -> bool:
        """Whether this rank's numbers of a parameter are to be counted: of a whole one those of the first rank are."""
        return self._is_cut(leaf) or self.ranks.rank == 0

    def _is_cut(self, leaf: Tensor) -> bool:
        return leaf in self._held and self._held[leaf].dim is not None

    # ---- what users see --------------------------------------------------------------------------

    def shown(self, d: Mapping[Tensor, Tensor]) -> Gradients:
        """{the model's parameter: DTensor} of {leaf: slice}."""
        return {self.owner(leaf): self._as_owner(leaf, own) for leaf, own in d.items()}

    def from_user(self, d: Any) -> Any:
        """{leaf: slice} of what a user gives for the model's parameters; what is none of it stays."""
        if not isinstance(d, Mapping):
            return d
        found = {}
        for parameter, t in d.items():
            local = t.to_local() if hasattr(t, "to_local") else t
            found[self.leaf(parameter)] = local
        return found

    def addition(self, d: Mapping[Tensor, Tensor]) -> Addition:
        """`.grad += gradient` of the model's parameters, from {leaf: slice}; not yet written."""
        placed, added = [], []
        for leaf, own in d.items():
            owner = self.owner(leaf)
            own = own.to(owner.dtype)
            if owner.grad is None:
                placed.append((owner, self._as_owner(leaf, own)))
            else:
                # in place, as autograd does it: others may hold this tensor
                added.append((_local(owner.grad), own))
        return Addition(self.owners(tuple(d)), placed, added)

    def _as_owner(self, leaf: Tensor, own: Tensor) -> Tensor:
        owner = self.owner(leaf)
        mine = own.detach()
        return with_local(owner, mine.to(owner.device) if is_cut(owner) else mine)

    # ---- over ranks ------------------------------------------------------------------------------

    def scattered(
        self, what: str, own: Callable[[], Given], parameters: Sequence[Tensor], among: Ranks
    ) -> Gradients:
        """This rank's slices of gradients summed over ranks, in the precision of their sums.

        One whole gradient or one bucket of small ones is there at a time.

        Args:
            what: the call, for errors.
            own: gives this rank's gradients; without collectives.
            parameters: all leaves that a rank may have one of, in one order.
            among: all ranks that have gradients.

        Returns:
            {leaf: slice} of those that a rank has one of.

        Raises:
            Exception: of the kind that `own` raised on a rank.
        """
        given = attempt(own)
        present: set[Tensor] = set(given.value[0]) if given.error is None else set()
        told = among.told(what, given.error, [int(p in present) for p in parameters])
        flags = map(max, zip(*told, strict=True))
        wanted = [p for p, there in zip(parameters, flags, strict=True) if there]
        # gradients are computed here, bucket by bucket: few are whole at a time
        source = _InOrder(iter(given.value[1]))
        found: Gradients = {}
        for bucket in self._buckets(wanted):
            wholes = {p: source.of(p) if p in present else None for p in bucket}
            found |= self._summed(what, wholes, among)
        # an error on the way waits until here: each rank has joined in every sum
        among.told(what, source.error, [])
        return found

    def summed(
        self, what: str, own: Gradients, leaves: Sequence[Tensor], among: Ranks
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(leaf, this rank's slice of the sum over ranks) of all leaves, zero where a rank gives none; a collective."""
        for bucket in self._buckets(leaves):
            wholes = {p: own.get(p) for p in bucket}
            yield from self._summed(what, wholes, among).items()

    def gathered(self, what: str, leaf: Tensor, own: Tensor) -> Tensor:
        """The whole from the slices of all ranks."""
        return self.gathered_rows(what, leaf, own[None])[0]

    def gathered_rows(self, what: str, leaf: Tensor, own: Tensor) -> Tensor:
        """The wholes `[K, *shape]` from the slices `[K, *slice]` of all ranks."""
        if not self._is_cut(leaf):
            return own
        held = self._held[leaf]
        wholes = own.new_zeros(len(own), *held.shape)
        padded = own.new_zeros(len(own), held.numel)
        for k, each in enumerate(own):
            padded[k] = held.padded(each)
        of_ranks = self.ranks.gathered_rows(what, padded, [len(own)] * self.ranks.size)
        for k, slices in enumerate(zip(*of_ranks, strict=True)):
            wholes[k] = held.joined(slices)
        return wholes

    def own_of(self, leaf: Tensor, whole: Tensor) -> Tensor:
        """This rank's slice of a whole."""
        return self.own_rows(leaf, whole[None])[0]

    def own_rows(self, leaf: Tensor, wholes: Tensor) -> Tensor:
        """This rank's slices `[K, *slice]` of wholes `[K, *shape]`."""
        if not self._is_cut(leaf):
            return wholes
        held, rank = self._held[leaf], self.ranks.rank
        assert held.dim is not None
        size = held.length(rank)
        start = min(rank * held.longest, held.shape[held.dim] - size)
        return wholes.narrow(held.dim + 1, start, size).contiguous()

    def _buckets(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters that travel together: of one dtype, cut or whole."""
        kinds: dict[tuple[object, bool], list[Tensor]] = {}
        for p in parameters:
            kinds.setdefault((working_dtype(p), self._is_cut(p)), []).append(p)
        for of_kind in kinds.values():
            yield from buckets(of_kind)

    def _summed(self, what: str, wholes: Mapping[Tensor, Tensor | None], among: Ranks) -> Gradients:
        filled = {p: _dense(p, g) for p, g in wholes.items()}
        if not self._is_cut(next(iter(filled))):
            return {p: among.sum(f"{what}: sum", g) for p, g in filled.items()}
        pieces = [self._held[p].cut(g) for p, g in filled.items()]
        sizes = [piece.shape[1] for piece in pieces]
        # over slices first: the copies then add up a slice, and not the whole
        own = self.ranks.scattered(f"{what}: sum", torch.cat(pieces, 1))
        if self._copies is not None:
            own = self._copies.sum(f"{what}: sum", own)
        found = {}
        for p, padded in zip(filled, own.split(sizes), strict=True):
            found[p] = self._held[p].own(padded, self.ranks.rank)
        return found


class _InOrder:
    """Gradients that come one by one; after an error none, and the error is kept."""

    def __init__(self, source: Iterator[tuple[Tensor, Tensor]]) -> None:
        self._source = source
        self._ahead: dict[Tensor, Tensor] = {}
        self.error: Exception | None = None

    def of(self, parameter: Tensor) -> Tensor | None:
        """The gradient of a parameter."""
        while parameter not in self._ahead and self.error is None:
            outcome: Outcome = attempt(partial(next, self._source, None))
            self.error = outcome.error
            # no more come: the gradient of a parameter that no row reached is zero
            if outcome.value is None:
                break
            # the source has its own order: what comes early waits
            self._ahead.update([outcome.value])
        return self._ahead.pop(parameter, None)


def _dense(parameter: Tensor, g: Tensor | None) -> Tensor:
    dtype = working_dtype(parameter)
    if g is None:
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
    return g.to(dtype)


def _local(t: Any) -> Tensor:
    found: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return found
