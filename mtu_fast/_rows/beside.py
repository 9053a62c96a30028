"""Few rows of a step beside many kept ones, of parameters that are kept explicitly: a strip of columns at a time.

Let A be the step's V rows, of which those to forget are means, and M the K kept ones. A Aᵀ and A Mᵀ
are made in float64, and M Mᵀ is known from the steps that took the rows in. In float32 A Mᵀ would
take half the time, but what it rounds is multiplied by cond² in the weights, and stays in M Mᵀ once
the rows are kept. Parameters of which factors are kept add their part as those of any rows do
(`gram.py`, `vjp.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mtu_fast._checks.values import all_finite
from mtu_fast._ops._blocks import WIDE, working_dtype
from mtu_fast._ops.gram import row_gram
from mtu_fast._rows.columns import Columns, columns, forget_sums, formed, ranges, width
from mtu_fast._rows.gram import add_fresh
from mtu_fast._rows.pool import Groups, Pooled, Products
from mtu_fast._rows.refine import Direction
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import Formed, Span, TaskRows
from mtu_fast._rows.validity import has_short_rows
from mtu_fast.methods import FORGET

STRIP = 1 << 11  # columns: of some hundred rows, they stay in cache


def kept_of(parts: Sequence[TaskRows], shared: Shared) -> int:
    """How many of the parts are kept rows beside a step's own that may be formed for them; 0 where these may not."""
    kept = sum(part.matrix is not None for part in parts)
    # kept rows come last
    own = parts[: len(parts) - kept]
    dtype = shared.parameters[0].dtype
    plain = dtype == working_dtype(shared.parameters[0])
    for part in own:
        plain &= not part.persistent and all(use.dtype == dtype for use in part.uses.values())
    same = all(p.dtype == dtype for p in shared.parameters)
    return kept if own and plain and same else 0


@dataclass(frozen=True)
class Piece:
    """Rows of one task and step.

    Attributes:
        matrix: `[K, P]`.
        reached: the parameters that they reach; columns of others are zero.
        kept: whether they are of a step before.
    """

    matrix: Tensor
    reached: frozenset[int]
    kept: bool = False


def _kept_pieces(part: TaskRows) -> list[Piece]:
    """The rows of a matrix in memory, task by task."""
    assert part.matrix is not None
    tasks, counts = part.roles.task.unique_consecutive(return_counts=True)
    matrices = part.matrix.split(counts.tolist())
    of_tasks = [part.reached[part.roles.tasks[t]] for t in tasks.tolist()]
    return [Piece(m, reached, True) for m, reached in zip(matrices, of_tasks, strict=True)]


@dataclass(frozen=True)
class Beside(Pooled):
    """The V rows of a step and K kept ones, laid in the order: not to be forgotten, means, kept.

    Attributes:
        parts: all rows.
        kept: how many of the parts are in memory, the last ones.
        factors: the parameters of which these have factors.
        of_factors: products of all rows that are sums over these parameters.
    """

    parts: Sequence[TaskRows]
    kept: int
    factors: frozenset[int]
    of_factors: Products

    @cached_property
    def _places(self) -> Columns:
        return columns(self.shared, self.factors)

    @cached_property
    def _own(self) -> Formed:
        return formed(self.parts[: len(self.parts) - self.kept], self.shared, self.factors)

    @cached_property
    def _order(self) -> Tensor:
        """Which of `roles` all rows are, in the order they are laid in."""
        mine, held = self.pool.into.split([self._own.count, len(self.pool.into) - self._own.count])
        return torch.cat([mine[self._own.at], self._mean_at, held])

    @cached_property
    def _mean_at(self) -> Tensor:
        """Which of `roles` are means."""
        return (self.pool.roles.kind == FORGET).nonzero().flatten()

    @cached_property
    def _means(self) -> Tensor:
        roles, at = self.pool.roles, self._mean_at
        tasks = [roles.tasks[t] for t in roles.task[at].tolist()]
        dtype = self._own.matrix.dtype
        own = self.parts[: len(self.parts) - self.kept]
        sums = forget_sums(own, tasks, self.shared, self._places, dtype)
        return sums.div_(self.pool.counts[at].to(dtype)[:, None])

    @cached_property
    def _matrices(self) -> list[Tensor]:
        held = [p.matrix for p in self.parts[len(self.parts) - self.kept :] if p.matrix is not None]
        return [self._own.matrix, self._means, *held]

    @cached_property
    def _pieces(self) -> list[Piece]:
        """All rows in the order they are laid in, those of one task and step together."""
        own, held = self.parts[: -self.kept], self.parts[-self.kept :]
        rows, means, roles = self._own.matrix, self._means, self.pool.roles
        found = []
        for part, matrix in zip(own, rows.split(self._own.counts), strict=True):
            found.append(Piece(matrix, frozenset(part.uses)))
        for t, mean in zip(roles.task[self._mean_at].tolist(), means, strict=True):
            of_task = [part.uses for part in own if part.roles.tasks[0] == roles.tasks[t]]
            found.append(Piece(mean[None], frozenset().union(*of_task)))
        for part in held:
            found += _kept_pieces(part)
        return found

    @cached_property
    def _laid(self) -> list[Tensor]:
        """Which rows, as they are laid, each piece has."""
        counts = [len(piece.matrix) for piece in self._pieces]
        return list(torch.arange(sum(counts)).split(counts))

    # ---- what a method asks ----------------------------------------------------------------------

    def gram(self, per: str = "total") -> Tensor:
        """`[V + K, V + K]` or `[L, V + K, V + K]`."""
        groups = self.shared.groups(per)
        laid = torch.stack([self._gram(group) for group in groups])
        order = self._order
        gram = torch.empty_like(laid)
        # a symmetric permutation: P (A; M)(A; M)ᵀ Pᵀ
        gram[:, order[:, None], order] = laid
        if self.factors:
            gram += torch.stack([self._gram_of_factors(group) for group in groups])
        if not all_finite([gram]) or has_short_rows(gram, self.roles):
            self._refuse(groups)
        return gram[0] if per == "total" else gram

    def _refuse(self, groups: Groups) -> None:
        self.products.gram(groups)  # of all rows: its errors name those at fault

    def _gram(self, group: Sequence[int]) -> Tensor:
        """Products of explicit rows, and all that are known."""
        K = sum(map(len, self._matrices[2:]))
        gram = torch.zeros(len(self._order), len(self._order), dtype=WIDE)
        # A Aᵀ and A Mᵀ
        for which, alike in self._alike(group):
            self._add_products(gram, which, alike)
        gram[-K:, -K:] = self._known(group)
        return gram

    def _gram_of_factors(self, group: Sequence[int]) -> Tensor:
        """Of the parameters that are kept as factors, but products of kept rows with one another."""
        found, counts = (
            torch.zeros(len(self._order), len(self._order), dtype=WIDE),
            self.pool.counts,
        )
        known = sum(map(len, self.parts[-self.kept :]))
        chosen = [j for j in group if j in self.factors]
        add_fresh(found, self.parts, chosen, self.shared.precision, self.pool, known)
        return found / (counts[:, None] * counts)

    def _alike(self, group: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """(pieces that reach them, parameters), neighbours of the group together."""
        found: list[tuple[list[int], list[int]]] = []
        for j in group:
            if j in self.factors:
                continue
            which = [i for i, piece in enumerate(self._pieces) if j in piece.reached]
            if found and found[-1][0] == which:
                found[-1][1].append(j)
            else:
                found.append((which, [j]))
        return found

    def _add_products(self, gram: Tensor, which: Sequence[int], alike: Sequence[int]) -> None:
        pieces = [self._pieces[i] for i in which]
        known = sum(len(piece.matrix) for piece in pieces if piece.kept)
        if all(piece.kept for piece in pieces):
            return
        at = torch.cat([self._laid[i] for i in which])
        for span in ranges(alike, self._places):
            part = row_gram([piece.matrix[:, slice(*span)] for piece in pieces], known)
            if len(at) == len(gram):
                gram += part
            else:
                gram[at[:, None], at] += part

    def _known(self, group: Sequence[int]) -> Tensor:
        """Products of kept rows with one another, made once."""
        tail, key = self.parts[-self.kept :], tuple(group)
        if key not in tail[-1].grams:
            # rows may be kept in half precision
            wide = [matrix.to(working_dtype(matrix)) for matrix in self._matrices[2:]]
            K = sum(map(len, wide))
            made = torch.zeros(K, K, dtype=WIDE)
            for span in ranges(group, self._places):
                made += row_gram([matrix[:, slice(*span)] for matrix in wide])
            chosen = [j for j in group if j in self.factors]
            add_fresh(made, tail, chosen, self.shared.precision)
            tail[-1].grams[key] = made
        return tail[-1].grams[key]

    def vjp(self, w: Tensor) -> Direction:
        """`Jᵀ w` in the dtype of the parameters."""
        matrices = self._matrices
        dtype, counts = matrices[0].dtype, [len(matrix) for matrix in matrices]
        # Jᵀ w as one vector `[P]`, cut into parameters at the end
        total = matrices[0].new_zeros(matrices[0].shape[1])
        for of_group, spans in self._spans(w):
            pieces = of_group[self._order].to(dtype).split(counts)
            for start, stop in spans:
                for piece, matrix in zip(pieces, matrices, strict=True):
                    total[start:stop] += piece @ matrix[:, start:stop].to(dtype)
        reached = {j for part in self.parts for j in part.uses}
        found = self.of_factors.vjp(self.pool.spread(w)) if self.factors else {}
        for j, span in self._places.items():
            if j in reached:
                parameter = self.shared.parameters[j]
                found[parameter] = total[slice(*span)].view(parameter.shape).clone()
        return found

    def _spans(self, w: Tensor) -> list[tuple[Tensor, list[Span]]]:
        """Weights `[V + K]`, and the columns that they are for."""
        if w.dim() == 1:
            return [(w, ranges(range(len(self.shared.names)), self._places))]
        layers = self.shared.groups("layer")
        groups = layers if len(layers) == len(w) else self.shared.groups("tensor")
        return [(one, ranges(group, self._places)) for one, group in zip(w, groups, strict=True)]

    def jvp(self, d: Mapping[Tensor, Tensor], per: str = "total") -> Tensor:
        """`J d`, with products and sums in float64."""
        groups, flat = self.shared.groups(per), self._flat(d)
        found = []
        for group in groups:
            laid = torch.cat([self._along(m, flat, group) for m in self._matrices])
            of_rows = torch.empty_like(laid)
            of_rows[self._order] = laid
            found.append(of_rows)
        derivatives = torch.stack(found)
        if self.factors:
            derivatives += self.pool.mean(self.of_factors.jvp(d, groups))
        return derivatives[0] if per == "total" else derivatives

    def _flat(self, d: Mapping[Tensor, Tensor]) -> Tensor:
        """d as one vector `[ΣP]` in float64, zero where it does not move a parameter."""
        flat = torch.zeros(width(self._places), dtype=WIDE)
        for j, span in self._places.items():
            moved = d.get(self.shared.parameters[j])
            if moved is not None:
                flat[slice(*span)] = moved.detach().flatten()
        return flat

    def _along(self, matrix: Tensor, d: Tensor, group: Sequence[int]) -> Tensor:
        found = d.new_zeros(len(matrix))
        for first, stop in ranges(group, self._places):
            for start in range(first, stop, STRIP):
                strip = slice(start, min(start + STRIP, stop))
                found += matrix[:, strip].to(WIDE) @ d[strip]
        return found
