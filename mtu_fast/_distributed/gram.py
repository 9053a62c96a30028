"""`G = J Jᵀ` of the rows of all ranks.

Every parameter but the largest (`flat.py`) has one rank that multiplies all rows' gradients of it;
parameters are dealt out so that all ranks have as much work. The others send theirs there, factors
or rows as they hold them: each use travels once, each pair of rows is multiplied once, and the work
and the bytes of a rank do not grow with the number of ranks. The sum over parameters is a sum over
ranks.

    bytes a rank sends  ≤  U (W - 1) / W + 2 L R² 8 (W - 1) / W

on average over ranks, U being the bytes its uses take and L the number of matrices asked for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, zip_longest

import torch
from torch import Tensor

from mtu_fast._distributed import flat
from mtu_fast._distributed.packing import Parcel, Parts, packed, rounded, unpacked
from mtu_fast._distributed.ranks import Ranks, attempt
from mtu_fast._rows import products
from mtu_fast._rows.gram import add_gram
from mtu_fast._rows.merge import aligned
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast._rows.uses import Use
from mtu_fast._rows.validity import check_open

WHAT = "rows.gram"
# Bytes that a rank takes in at a time, from all others together; a larger parameter goes alone.
ROUND = 1 << 26
# Bytes of factors of one parameter, of all ranks together, above which they go around in a ring.
HELD = 1 << 30
_NONE, _APART = 0, 1  # in place of a space: no use of the parameter, uses in several spaces


def joined_gram(
    ranks: Ranks, parts: Sequence[TaskRows], shared: Shared, groups: Sequence[Sequence[int]]
) -> Tensor:
    """The Gram matrices of some groups of parameters over the rows of all ranks.

    Args:
        ranks: who takes part.
        parts: this rank's rows, the same parts on every rank.
        shared: the parameters.
        groups: indices of the parameters of each matrix.

    Returns:
        float64 `[L, R, R]`, the same bits on every rank.

    Raises:
        RuntimeError: rows of a rank are used up or out of date.
    """
    opened = attempt(lambda: check_open(parts, shared))
    number = len(shared.parameters)
    uses = {} if opened.error else {j: _uses(parts, j) for j in range(number)}
    spaces = ranks.told(WHAT, opened.error, _spaces(uses, number))
    meeting = _Meeting(ranks, parts, shared, groups)
    return meeting.gram(uses, _to_ground(spaces))


class _Meeting:
    """One exchange: who multiplies what, and what came of it."""

    def __init__(
        self,
        ranks: Ranks,
        parts: Sequence[TaskRows],
        shared: Shared,
        groups: Sequence[Sequence[int]],
    ) -> None:
        self._ranks = ranks
        self._shared = shared
        self._group_of = {j: g for g, group in enumerate(groups) for j in group}
        self._stubs = _stubs(parts, ranks)
        self._device = parts[0].roles.loss.device
        rows = sum(len(stub) for stub in self._stubs)
        shape = (len(groups), rows, rows)
        self._gram = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._error: Exception | None = None

    def gram(self, uses: dict[int, Parts], to_ground: set[int]) -> Tensor:
        """The sum over parameters; uses as `joined_gram` found them."""
        made = attempt(lambda: self._parcels(uses, to_ground))
        parcels: dict[int, Parcel] = made.value or {}
        sizes, dense, work = self._told(uses, parcels, made.error)
        large = self._large(sizes, dense)
        for chosen in _rounds(sizes, work, large):
            of_peers = self._exchange(parcels, chosen, sizes)
            self._try(partial(self._multiply, chosen[self._ranks.rank], uses, of_peers))
        for j, is_dense in large.items():
            if is_dense:
                self._by_columns(j, uses[j])
            else:
                self._around(j, uses[j], parcels.get(j), [of_rank[j] for of_rank in sizes])
        return self._summed(self._error)

    def _told(
        self, uses: dict[int, Parts], parcels: dict[int, Parcel], error: Exception | None
    ) -> tuple[list[list[int]], ...]:
        """Bytes of every rank's uses of each parameter, whether they are explicit rows, and the work of their Gram."""
        number = len(uses)
        own = [uses[j] if j in parcels else {} for j in range(number)]
        columns = (
            [parcels[j].nbytes if j in parcels else 0 for j in range(number)],
            [int(flat.is_dense(of_parameter)) for of_parameter in uses.values()],
            [round(sum(map(products.work, of_parameter.values()))) for of_parameter in own],
        )
        # all in one collective; all ranks decide from these numbers, so that they decide alike
        told = self._ranks.told(WHAT, error, [*chain(*columns)])
        starts = [i * number for i in range(len(columns))]
        return tuple([of_rank[at : at + number] for of_rank in told] for at in starts)

    def _try(self, function: Callable[[], None]) -> None:
        """After an error nothing is multiplied; it is told at the end."""
        if self._error is None:
            self._error = attempt(function).error

    def _large(
        self, sizes: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]
    ) -> dict[int, bool]:
        """Parameters of which no rank takes in all uses, and whether these are explicit rows."""
        found = {}
        for j, of_ranks in enumerate(zip(*sizes, strict=True)):
            is_dense = all(of_rank[j] for of_rank in dense)
            holders = sum(size > 0 for size in of_ranks)
            # what one rank alone has never travels, however large
            if holders > 1 and sum(of_ranks) > (ROUND if is_dense else HELD):
                found[j] = is_dense
        return found

    def _by_columns(self, j: int, uses: Parts) -> None:
        def multiply(found: dict[int, Parts]) -> None:
            by_rank = {(j, rank): of_rank for rank, of_rank in found.items()}
            own = by_rank.pop((j, self._ranks.rank), {})
            self._try(partial(self._multiply, [j], {j: own}, by_rank))

        flat.by_columns(self._ranks, uses, multiply, self._device)

    def _around(self, j: int, uses: Parts, parcel: Parcel | None, sizes: Sequence[int]) -> None:
        own = self._ranks.rank

        def multiply(rank: int, theirs: Parts) -> None:
            self._try(partial(self._multiply_pair, j, {own: uses, rank: theirs}))

        self._try(partial(self._multiply_pair, j, {own: uses}))
        flat.around(self._ranks, parcel, sizes, multiply, self._device)

    def _multiply_pair(self, j: int, of_ranks: dict[int, Parts]) -> None:
        """Add the products of one rank's rows with themselves, or of two ranks' with one another."""
        size, gram = self._ranks.size, self._gram[self._group_of[j]]
        starts = torch.tensor([0, *map(len, self._stubs)]).cumsum(0).tolist()
        laid, at, of = [], [], []
        for i, stub in enumerate(self._stubs):
            k, rank = divmod(i, size)
            if rank in of_ranks and k in of_ranks[rank]:
                laid.append(replace(stub, uses={j: of_ranks[rank][k]}))
                at.append(torch.arange(starts[i], starts[i] + len(stub), device=gram.device))
                of.append(torch.full((len(stub),), rank, device=gram.device))
        if not laid:
            return
        rows, owner = torch.cat(at), torch.cat(of)
        # of the rows that meet here alone, in a matrix of their own
        found = gram.new_zeros(len(rows), len(rows))
        add_gram(found, laid, [j], self._shared.precision)
        if len(of_ranks) > 1:  # the products of each with itself are known
            found *= owner[:, None] != owner
        gram[rows[:, None], rows] += found

    def _parcels(self, uses: dict[int, Parts], to_ground: set[int]) -> dict[int, Parcel]:
        for j in to_ground:
            uses[j] = {k: use.grounded() for k, use in uses[j].items()}
        wire = self._ranks.wire
        if wire is not None:  # this rank's own enter as those of others do
            for j, of_parameter in uses.items():
                uses[j] = rounded(of_parameter, wire)
        return {j: packed(of_parameter, wire) for j, of_parameter in uses.items() if of_parameter}

    def _exchange(
        self,
        parcels: dict[int, Parcel],
        chosen: Sequence[Sequence[int]],
        sizes: Sequence[Sequence[int]],
    ) -> dict[tuple[int, int], Parts]:
        """(parameter, rank) -> its uses, of this rank's parameters of one round."""
        ranks = self._ranks
        mine = chosen[ranks.rank]
        pieces, expected = [], []
        # pieces lie in the order of `chosen`, which is the same on both ends
        for rank, owned in enumerate(chosen):
            is_peer = rank != ranks.rank
            pieces.append(_bytes_of(parcels, owned if is_peer else ()))
            expected.append(sum(sizes[rank][j] for j in mine) if is_peer else 0)
        came = ranks.exchanged(f"{WHAT}: uses", pieces, expected, self._device)
        found: dict[tuple[int, int], Parts] = {}
        for rank, of_rank in enumerate(came):
            start = 0
            for j in mine if len(of_rank) else ():
                size = sizes[rank][j]
                if size:
                    found[j, rank] = unpacked(of_rank[start : start + size])
                start += size
        return found

    def _multiply(
        self,
        owned: Sequence[int],
        uses: dict[int, Parts],
        of_peers: dict[tuple[int, int], Parts],
    ) -> None:
        """Add the products of this rank's parameters of one round."""
        by_group: dict[int, list[int]] = {}
        for j in owned:
            by_group.setdefault(self._group_of[j], []).append(j)
        size, own = self._ranks.size, self._ranks.rank
        for g, group in by_group.items():
            laid = []
            # stubs lie part after part, and within a part rank after rank
            for i, stub in enumerate(self._stubs):
                k, rank = divmod(i, size)
                there: dict[int, Use] = {}
                for j in group:
                    of_rank = uses[j] if rank == own else of_peers.get((j, rank), {})
                    if k in of_rank:
                        there[j] = of_rank[k]
                laid.append(replace(stub, uses=there))
            add_gram(self._gram[g], laid, group, self._shared.precision)

    def _summed(self, error: Exception | None) -> Tensor:
        """The sum over ranks, if none has failed."""
        # whether a rank has failed travels with the matrix: no collective more
        failed = self._gram.new_tensor([float(error is not None)])
        whole = self._ranks.sum(f"{WHAT}: sum", torch.cat([failed, self._gram.flatten()]))
        if bool(whole[0]):
            self._ranks.check(WHAT, [1], error)
        return whole[1:].view(self._gram.shape)


def _bytes_of(parcels: dict[int, Parcel], owned: Sequence[int]) -> Tensor:
    """What a rank is sent of the parameters that it multiplies."""
    found = [parcels[j].bytes_of() for j in owned if j in parcels]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.uint8)


def _uses(parts: Sequence[TaskRows], j: int) -> Parts:
    return {k: part.uses[j] for k, part in enumerate(parts) if j in part.uses and len(part)}


def _spaces(uses: dict[int, Parts], number: int) -> list[int]:
    """For each parameter a number that is the same where uses share a chain and shape."""
    found = [_NONE] * number
    for j, of_parameter in uses.items():
        those = list(of_parameter.values())
        if those:
            # a checksum stands for chain and shape, which other ranks only compare
            space = repr((those[0].chain.key, those[0].shape)).encode()
            found[j] = 2 + zlib.crc32(space) if aligned(those) else _APART
    return found


def _to_ground(spaces: Sequence[Sequence[int]]) -> set[int]:
    """Parameters whose uses do not meet on this side of their chains on all ranks."""
    found = set()
    for j, of_ranks in enumerate(zip(*spaces, strict=True)):
        # rows multiply only where both stand on the same side of a chain
        distinct = set(of_ranks) - {_NONE}
        if len(distinct) > 1 or _APART in distinct:
            found.add(j)
    return found


def _rounds(
    sizes: Sequence[Sequence[int]], work: Sequence[Sequence[int]], large: Collection[int] = ()
) -> list[list[list[int]]]:
    """Which parameters each rank multiplies, round after round; the same on every rank. Not the large ones.

    Those of most work go first, each to the rank with the least so far. One that a single rank has
    stays there.

    Args:
        sizes: bytes, for each rank and parameter.
        work: of the Gram of each rank's own rows; that of all rows is in proportion to their sum.
        large: parameters that are left out.
    """
    owned: list[list[int]] = [[] for _ in sizes]
    load = [0] * len(sizes)
    totals, works = ([sum(each) for each in zip(*table, strict=True)] for table in (sizes, work))
    shared_out = [j for j, total in enumerate(totals) if total and j not in large]
    # the number breaks ties, here and below: every rank must find the same order
    for j in sorted(shared_out, key=lambda j: (-works[j], -totals[j], j)):
        owner = min(_candidates(sizes, j), key=lambda rank: (load[rank], rank))
        owned[owner].append(j)
        load[owner] += works[j]
    chunks = [_chunks(of_rank, totals) for of_rank in owned]
    return [list(one) for one in zip_longest(*chunks, fillvalue=[])]


def _candidates(sizes: Sequence[Sequence[int]], j: int) -> list[int]:
    """Ranks that may multiply a parameter: the only one that has uses of it, or any."""
    holders = [rank for rank, of_rank in enumerate(sizes) if of_rank[j]]
    return holders if len(holders) == 1 else list(range(len(sizes)))


def _chunks(owned: Sequence[int], totals: Sequence[int]) -> list[list[int]]:
    """Parameters that are taken in together: as many as fit into `ROUND`, in their own order."""
    found: list[list[int]] = []
    taken = ROUND
    for j in sorted(owned):
        if taken + totals[j] > ROUND:
            found.append([])
            taken = 0
        found[-1].append(j)
        taken += totals[j]
    return found


def _stubs(parts: Sequence[TaskRows], ranks: Ranks) -> list[TaskRows]:
    """Every part of every rank without uses, in the order of the joined rows."""
    found = []
    for part in parts:
        assert part.everywhere is not None
        roles, start = part.everywhere.roles, 0
        for count in part.everywhere.counts:
            at = slice(start, start + count)
            own = replace(
                roles,
                task=roles.task[at],
                sample=roles.sample[at],
                kind=roles.kind[at],
                loss=roles.loss[at],
                rank=None,
            )
            found.append(TaskRows(own, {}, {}, part.versions))
            start += count
    return found
