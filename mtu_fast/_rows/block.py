"""Rows kept across steps: a piece for each step that gave some, so that none is copied to go on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from mtu_fast._rows.columns import NONE, columns, views, width
from mtu_fast._rows.keeping import Factors, end_to_end, row_bytes, zeros
from mtu_fast._rows.plain import factors_in, plain_of
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows, join_roles
from mtu_fast._rows.uses import Dense, Use
from mtu_fast.methods import MEMORY, RETAIN, Roles

# More pieces, or fewer bytes, are joined: many small products cost more than the copy.
PIECES, COPIED = 8, 1 << 24

Grams = Mapping[tuple[int, ...], Tensor]  # group of parameters -> Gram of rows
Reached = Mapping[str, frozenset[int]]


@dataclass(frozen=True)
class Piece:
    """Rows kept of one step, of each parameter as factors or as columns of a matrix.

    Attributes:
        matrix: `[K, ΣP]`, explicit, the columns of all parameters without factors (`columns.py`).
        factors: parameter -> its use of the K rows.
    """

    matrix: Tensor
    factors: Factors

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.matrix.nbytes + sum(use.held for use in self.factors.values())

    def to(self, dtype: torch.dtype) -> Piece:
        """They in another dtype."""
        return Piece(self.matrix.to(dtype), {j: use.to(dtype) for j, use in self.factors.items()})

    def select(self, at: Tensor) -> Piece:
        """The rows at these indices."""
        return Piece(self.matrix[at], {j: use.select(at) for j, use in self.factors.items()})

    def formed_as(self, likes: Factors, shared: Shared) -> Piece:
        """The same with factors of these parameters and no others; zeros where rows do not reach one."""
        if likes.keys() == self.factors.keys():
            return self
        before, places = columns(shared, self.factors), columns(shared, likes)
        matrix = self.matrix.new_empty(len(self), width(places))
        for j, span in places.items():
            if j in before:
                rows = self.matrix[:, slice(*before[j])]
            else:
                rows = self.factors[j].matrix()
            matrix[:, slice(*span)] = rows
        factors = {j: self.factors.get(j) or zeros(like, len(self)) for j, like in likes.items()}
        return Piece(matrix, factors)


@dataclass(frozen=True)
class Block:
    """Kept rows.

    Attributes:
        pieces: the rows, those of the oldest step first; all have factors of the same parameters.
        roles: what they were in the steps that took them.
        reached: task -> the parameters that its rows reach, by index; zeros elsewhere.
        grams: group of parameters -> `[K, K]`, where it is known.
        shared: the parameters.
    """

    pieces: tuple[Piece, ...]
    roles: Roles
    reached: Reached
    grams: Grams
    shared: Shared

    def __len__(self) -> int:
        return len(self.roles)

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """What of the rows is explicit, of each piece."""
        return tuple(piece.matrix for piece in self.pieces)

    @property
    def factors(self) -> frozenset[int]:
        """The parameters of which factors are kept."""
        return frozenset(self.pieces[0].factors)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row, the most of those that are held."""
        itemsize = self.pieces[0].matrix.itemsize
        return max(row_bytes(piece.factors, self.shared, itemsize) for piece in self.pieces)

    @property
    def parameters(self) -> list[int]:
        """Those that one of the rows reaches."""
        return sorted(NONE.union(*self.reached.values()))

    def before(self, new: Block) -> Block:
        """Both, the new ones last."""
        roles = join_roles([self.roles, new.roles])
        reached = {
            task: self.reached.get(task, NONE) | new.reached.get(task, NONE) for task in roles.tasks
        }
        likes = self.common(new.pieces[0].factors, new.parameters)
        pieces = [piece.formed_as(likes, self.shared) for piece in self.pieces + new.pieces]
        return Block(tuple(pieces), roles, reached, {}, self.shared)

    def common(self, others: Factors, reached: Collection[int]) -> dict[int, Use]:
        """The factors that these rows and others go on with together: what is so in both, or in one that alone has it.

        Args:
            others: their factors.
            reached: the parameters that they reach.
        """
        mine, own = self.pieces[0].factors, set(self.parameters)
        found = {j: use for j, use in mine.items() if j in others or j not in reached}
        return found | {j: use for j, use in others.items() if j not in own}

    def select(self, at: Tensor) -> Block:
        """The rows at these indices, which ascend; a piece of which all stay is not copied."""
        kept, start = [], 0
        for piece in self.pieces:
            mine = at[(at >= start) & (at < start + len(piece))] - start
            start += len(piece)
            if len(mine):
                kept.append(piece if len(mine) == len(piece) else piece.select(mine))
        # on a GPU every further piece is a kernel call in each product
        few = sum(piece.nbytes for piece in kept) <= COPIED
        if len(kept) > 1 and (few or len(kept) > PIECES or not at.is_cpu):
            kept = _joined(kept)
        return Block(tuple(kept), chosen(self.roles, at), self.reached, {}, self.shared)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """All rows as one piece; as they are where factors of two pieces have not as many positions."""
    counts = [len(piece) for piece in pieces]
    factors: dict[int, Use] = {}
    for j in pieces[0].factors:
        uses = [piece.factors[j] for piece in pieces]
        whole = end_to_end(uses, counts) if _as_many_positions(uses) else None
        if whole is None:
            return list(pieces)
        factors[j] = whole
    return [Piece(torch.cat([piece.matrix for piece in pieces]), factors)]


def _as_many_positions(uses: Sequence[Use]) -> bool:
    """Whether no zeros would stand for positions that are not there."""
    return len({tuple(t.shape[1] for t in use.tensors) for use in uses}) == 1


def chosen(roles: Roles, at: Tensor) -> Roles:
    """Roles of the rows at these indices."""
    names = ["task", "sample", "kind", "loss"]
    if roles.rank is not None:
        names.append("rank")
    return replace(roles, **{name: getattr(roles, name)[at] for name in names}, memory=0)


def in_memory(block: Block) -> list[TaskRows]:
    """The rows as rows of kind MEMORY that outlive a step, a part for each piece; the last has the Grams."""
    counts, places = [len(piece) for piece in block.pieces], columns(block.shared, block.factors)
    # which rows of the block each piece holds
    rows = torch.arange(len(block), device=block.roles.task.device).split(counts)
    parts = []
    for piece, at in zip(block.pieces, rows, strict=True):
        # `memory` says how many of the rows are in memory: all of this part
        own = chosen(block.roles, at)
        roles = replace(own, kind=torch.full_like(own.kind, MEMORY), memory=len(own))
        uses = views(piece.matrix, block.shared, places, block.parameters) | dict(piece.factors)
        part = TaskRows.lasting(roles, uses, block.shared, MEMORY)
        parts.append(replace(part, matrix=piece.matrix, reached=block.reached))
    parts[-1].grams.update(block.grams)
    return parts


# ---- as plain values -----------------------------------------------------------------------------


def state_of(block: Block) -> dict[str, Any]:
    """What `block_of` takes, as plain values and tensors."""
    names, roles = block.shared.names, block.roles
    places = columns(block.shared, block.factors)
    whole = views(torch.cat(block.matrices), block.shared, places, block.parameters)
    factors = {}
    for j in sorted(block.factors):
        factors[names[j]] = [plain_of(piece.factors[j]) for piece in block.pieces]
    return {
        "vectors": {names[j]: use.tensors[0] for j, use in whole.items()},
        "factors": factors,
        "counts": [len(piece) for piece in block.pieces],
        "task": roles.task,
        "sample": roles.sample,
        "loss": roles.loss,
        "tasks": list(roles.tasks),
        "dtype": roles.dtype,
        "reached": {
            task: [names[j] for j in sorted(reached)] for task, reached in block.reached.items()
        },
        "grams": [[list(group), gram] for group, gram in block.grams.items()],
    }


def block_of(state: Mapping[str, Any], shared: Shared) -> Block:
    """What `state_of` gave as a block of the same pieces.

    Raises:
        TypeError: factors of another kind.
        ValueError: factors of other rows, or rows that reach what they are said not to.
    """
    roles = Roles(
        task=state["task"],
        sample=state["sample"],
        kind=torch.full_like(state["task"], RETAIN),
        loss=state["loss"],
        tasks=tuple(state["tasks"]),
        dtype=state["dtype"],
    )
    factors = _factors_of(state, shared)
    whole = of_vectors(state["vectors"], roles, shared, frozenset(factors))
    pieces = []
    for i, matrix in enumerate(whole.matrices[0].split(state["counts"])):
        # memory of their own: a block lets its pieces go one by one
        pieces.append(Piece(matrix.clone(), {j: uses[i] for j, uses in factors.items()}))
    reached = {task: _indices(state["reached"].get(task, ()), shared) for task in roles.tasks}
    grams = {tuple(group): gram for group, gram in state["grams"]}
    block = replace(whole, pieces=tuple(pieces), reached=reached, grams=grams)
    _check_zeros(block)
    return block


def _factors_of(state: Mapping[str, Any], shared: Shared) -> dict[int, list[Use]]:
    shapes = {n: tuple(p.shape) for n, p in zip(shared.names, shared.parameters, strict=True)}
    held = factors_in("Memory: state: block: factors", state["factors"], shapes, state["counts"])
    twice = held.keys() & state["vectors"].keys()
    if twice:
        raise ValueError(
            f"Memory: state: block: factors: found {sorted(twice)} among the vectors too, expected one of them."
        )
    return {shared.names.index(name): uses for name, uses in held.items()}


def _indices(names: Sequence[str], shared: Shared) -> frozenset[int]:
    return frozenset(j for j, name in enumerate(shared.names) if name in names)


def _check_zeros(block: Block) -> None:
    """Rows are zero where they are said to reach nothing: those columns are never looked at.

    Raises:
        ValueError: they are not.
    """
    for part in in_memory(block):
        for t, task in enumerate(part.roles.tasks):
            at = (part.roles.task == t).nonzero().flatten()
            for j, use in _everything(part, block).items():
                if j not in block.reached[task] and bool(use.select(at).alive().any()):
                    raise ValueError(
                        f"Memory: state: block: reached: found rows of task {task!r} that reach "
                        f"{block.shared.names[j]!r}, which is not among what is said of them; take the state as "
                        "`state_dict` gave it."
                    )


def _everything(part: TaskRows, block: Block) -> dict[int, Use]:
    """The uses of a part, and the columns of parameters that no row is said to reach."""
    assert part.matrix is not None
    places = columns(block.shared, block.factors)
    factors = {j: use for j, use in part.uses.items() if not isinstance(use, Dense)}
    return views(part.matrix, block.shared, places, places) | factors


def of_vectors(
    vectors: Mapping[str, Tensor], roles: Roles, shared: Shared, factors: frozenset[int] = NONE
) -> Block:
    """K vectors, `[K, *shape]` for each parameter by name, as rows; zero where a parameter is left out.

    Args:
        vectors: the parameters' parts of the rows.
        roles: of the rows.
        shared: the parameters.
        factors: parameters that have no columns.
    """
    places = columns(shared, factors)
    like = next(iter(vectors.values()), shared.parameters[0])
    dtype = reduce(torch.promote_types, [v.dtype for v in vectors.values()] or [like.dtype])
    matrix = like.new_zeros(len(roles), width(places), dtype=dtype)
    reached = frozenset(j for j, name in enumerate(shared.names) if name in vectors)
    for j in reached:
        given = vectors[shared.names[j]].detach()
        matrix[:, slice(*places[j])] = given.reshape(len(roles), -1)
    return Block((Piece(matrix, {}),), roles, dict.fromkeys(roles.tasks, reached), {}, shared)
