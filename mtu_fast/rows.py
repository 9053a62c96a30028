"""Rows: the gradients of a set of losses, known well enough for `G = J Jᵀ` and `d = Jᵀ w`, never built as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtu_fast._checks.values import check_direction
from mtu_fast._distributed.gram import joined_gram
from mtu_fast._distributed.joining import given, own_rows
from mtu_fast._distributed.ranks import Ranks
from mtu_fast._distributed.sums import summed
from mtu_fast._ops._blocks import working_dtype
from mtu_fast._ops.gram_schmidt import effective_rank
from mtu_fast._rows import vjp
from mtu_fast._rows.autocast import without_autocast
from mtu_fast._rows.grad import accumulate, add, as_autograd_gives, check_finite
from mtu_fast._rows.gram import add_gram
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.solve import solve
from mtu_fast._rows.task_rows import Span, TaskRows, all_roles, join_roles, uses_of
from mtu_fast._rows.update import Update, check_meant, check_method
from mtu_fast._rows.uses import Dense, Use
from mtu_fast._rows.validity import check_gram, check_lengths, check_open
from mtu_fast._rows.weights import has_outside, outside_gradients, spread
from mtu_fast.errors import NotFiniteError
from mtu_fast.methods import FORGET, SUBSPACE, Method, Roles
from mtu_fast.methods.base import dependence_tolerance


class Rows:
    """R row gradients over the engine's parameters; made by `Engine.rows`, joined by `cat`, used up by `backward`.

    Attributes:
        roles: task, sample, kind and loss of every row, each `[R]`; task-major within a call, calls
            in order. Of an engine with `group=`, the rows of all ranks, rank after rank within a
            task: `gram`, `vjp`, `jvp` and `backward` are then called by all ranks alike.
    """

    def __init__(
        self, shared: Shared, parts: Sequence[TaskRows], ranks: Ranks | None = None
    ) -> None:
        self._shared = shared
        self._parts = list(parts)
        self._ranks = ranks
        self.roles = all_roles(self._parts)

    def __len__(self) -> int:
        return len(self.roles)

    def __repr__(self) -> str:
        forget = int((self.roles.kind == FORGET).sum())
        tasks = ", ".join(map(str, self.roles.tasks))
        return f"Rows({len(self)} rows: {forget} to forget, tasks {tasks})"

    # ---- what rows give --------------------------------------------------------------------------

    @without_autocast
    def gram(self, per: str = "total") -> Tensor:
        """`G = J Jᵀ`, inner products of all pairs of rows.

        Args:
            per: "total" for all parameters together, "layer" for one matrix per module, "tensor"
                for one per parameter.

        Returns:
            float64 `[R, R]`, or `[L, R, R]` in the order of the engine's parameters.

        Raises:
            ValueError: an unknown `per`, or a row of float64 that is not zero and so short that its
                square underflows.
            RuntimeError: the rows are used up, or a row's gradient is not finite.
        """
        groups = self._shared.groups(per)
        if self._ranks is None:
            gram = self._own_gram(groups)
        else:
            gram = joined_gram(self._ranks, self._parts, self._shared, groups)
        check_gram(gram, self.roles)
        if self._ranks is None:
            check_lengths(gram, self._parts, self.roles)
        elif self.roles.dtype == gram.dtype:  # the others are never too short
            self._ranks.agreed("rows.gram", partial(self._check_own_lengths, gram))
        return gram[0] if per == "total" else gram

    def names(self, per: str = "layer") -> tuple[str, ...]:
        """The modules ("layer") or parameters ("tensor") that the matrices of `gram(per)` belong to, in their order.

        Raises:
            ValueError: an unknown `per`.
        """
        return tuple(dict.fromkeys(self._shared.keys(per)))

    @without_autocast
    def vjp(self, w: Tensor) -> dict[Tensor, Tensor]:
        """`d = Jᵀ w`, the vector-Jacobian product.

        Args:
            w: weights `[R]`, or `[L, R]` with L the number of layers or of parameter tensors.

        Returns:
            {parameter: tensor of its shape}; parameters that no row reaches are left out.

        Raises:
            TypeError: weights that are no real tensor.
            ValueError: weights of the wrong shape.
            RuntimeError: the rows are used up, or parameters changed since.
        """
        if self._ranks is None:
            return self._own_vjp(w)
        parameters = self._shared.parameters
        found = summed(self._ranks, "rows.vjp", lambda: self._own_vjp(w), parameters)
        return {parameter: d.to(parameter.dtype) for parameter, d in found.items()}

    @without_autocast
    def jvp(self, d: Mapping[Tensor, Tensor], per: str = "total") -> Tensor:
        """`J d`, the directional derivative of each row's loss, with products and sums in float64.

        Where parameters move by ε d, the loss of row r changes by `ε (J d)_r`.

        Args:
            d: {parameter: tensor of its shape}, as `vjp` gives it; parameters that are left out do
                not move.
            per: "total", or "layer" or "tensor" for the derivative along each group of parameters
                alone.

        Returns:
            float64 `[R]`, or `[L, R]` in the order of `names(per)`.

        Raises:
            TypeError: d is no mapping of parameters to real tensors.
            ValueError: an unknown `per`, something else than the engine's parameters, or not of
                their shape and device.
            RuntimeError: the rows are used up, or parameters changed since.
        """
        groups = self._shared.groups(per)
        if self._ranks is None:
            found = self._own_jvp(d, groups)
        else:
            own = self._ranks.agreed("rows.jvp", lambda: self._own_jvp(d, groups))
            found = self.roles.loss.new_zeros(len(groups), len(self))
            found[:, own_rows(self._parts, self._ranks)] = own
            found = self._ranks.sum("rows.jvp: sum", found)
        return found[0] if per == "total" else found

    @without_autocast
    def jacobian(self) -> dict[Tensor, Tensor]:
        """J itself, `[R, *shape]` for each parameter that a row reaches: R times the memory of a gradient.

        Of an engine with `group=`, the rows that this rank holds, in their order.

        Returns:
            {parameter: its rows}; parameters that no row reaches are left out.

        Raises:
            RuntimeError: the rows are used up.
        """
        check_open(self._parts, self._shared)
        found: dict[Tensor, Tensor] = {}
        count = self._own_count()
        for j, parameter in enumerate(self._shared.parameters):
            for span, use in zip(*uses_of(self._parts, j), strict=True):
                rows = use.grounded().rows
                if parameter not in found:
                    found[parameter] = rows.new_zeros(count, *parameter.shape)
                found[parameter][slice(*span)] = rows.view(-1, *parameter.shape)
        return found

    def rank(self) -> Tensor:
        """The effective rank of all rows together: those above the dependence tolerance of their dtype; `[]` int64."""
        return effective_rank(self.gram(), dependence_tolerance(self.roles.dtype))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{name: parameter}, the space the rows lie in."""
        return dict(zip(self._shared.names, self._shared.parameters, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes that the rows keep alive; memory that several of them share counts once."""
        storages = {}
        for part in self._parts:
            tensors = list(part.grams.values())
            for use in part.uses.values():
                tensors += use.tensors
            for t in tensors:
                storage = t.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    # ---- rows that outlive their step ------------------------------------------------------------

    def to_subspace(self, tasks: Iterable[str] | None = None) -> Rows:
        """The rows of these tasks (of all by default) as rows of kind SUBSPACE, which outlive the step.

        They belong to the point where they were taken, stay when parameters move, and are not used
        up by `backward`.

        Args:
            tasks: names of tasks.

        Raises:
            TypeError: no collection of names.
            ValueError: names that are no tasks of the rows.
            RuntimeError: the rows are used up.
        """
        if self._ranks is None:
            check_open(self._parts, self._shared)
        else:
            opened = partial(check_open, self._parts, self._shared)
            self._ranks.agreed("rows.to_subspace", opened)
        wanted = self._chosen(tasks)
        chosen = [part for part in self._parts if wanted.issuperset(part.roles.tasks)]
        return Rows(self._shared, [part.to_subspace() for part in chosen], self._ranks)

    def _chosen(self, tasks: Iterable[str] | None) -> set[str]:
        if tasks is None:
            return set(self.roles.tasks)
        if isinstance(tasks, str) or not isinstance(tasks, Iterable):
            raise TypeError(
                f"to_subspace: tasks is {tasks!r}, expected several names, for example ('a',)."
            )
        wanted = set(tasks)
        unknown = wanted - set(self.roles.tasks)
        if unknown or not wanted:
            found = f"unknown tasks {sorted(map(str, unknown))}" if unknown else "no task"
            raise ValueError(
                f"to_subspace: tasks: found {found}, expected some of {list(self.roles.tasks)}."
            )
        return wanted

    def replaced(self, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype) -> Rows:
        """Other rows of kind SUBSPACE in the same space, explicit, as `explicit` makes them."""
        rows = explicit(self._shared, vectors, task, dtype)
        if self._ranks is None:
            return rows
        counts = [0] * self._ranks.size
        for part in self._parts:
            if part.everywhere is not None:
                counts = [a + b for a, b in zip(counts, part.everywhere.counts, strict=True)]
        return Rows(self._shared, [given(rows._parts[0], counts)], self._ranks)

    # ---- .grad -----------------------------------------------------------------------------------

    @without_autocast
    def backward(
        self, method: Method | Tensor, *, outside: Tensor | None = None, check: bool = True
    ) -> Update:
        """Add `Jᵀ w` to `.grad`, and the weighted losses' gradient to `.grad` of the parameters outside.

        Args:
            method: a method, or weights `[R]`.
            outside: weights `[R]` of the losses for the parameters outside, equal within each
                (kind, task); by default the method's `outside(roles)`, or the weights themselves.
            check: raise an error where the method is not meant for such rows: sample rows for a
                method of mean rows, or no subspace for one that needs it.

        Returns:
            The weights, the roles and the Gram matrix they were made from.

        Raises:
            TypeError: neither a method nor weights.
            ValueError: rows that the method is not meant for, weights of the wrong shape, or that
                differ within a role for parameters outside.
            RuntimeError: the rows are used up, parameters changed since, or something is not
                finite; `.grad` is untouched on any error.
        """
        check_method(method)
        if check and not isinstance(method, Tensor):
            check_meant(method, self.roles)
        if self._ranks is None:
            check_open(self._parts, self._shared)
        else:
            self._ranks.same_generator(method)
        solved = solve(self, method, self._shared, has_outside(self._parts))
        found, residual = solved.direction(self, self._shared)
        others = self._outside(solved.outside if outside is None else outside)
        self._check_finite([*others.values(), *solved.unsure(found)], solved.weights)
        add(found, others)
        accumulate(self._as_autograd_gives(found))
        for part in self._parts:
            part.use_up()
        return Update(solved.weights, self.roles, solved.gram, residual)

    # ---- of this process -------------------------------------------------------------------------

    def _own_count(self) -> int:
        return sum(map(len, self._parts))

    def _own_gram(self, groups: Sequence[Sequence[int]]) -> Tensor:
        check_open(self._parts, self._shared)
        gram = self.roles.loss.new_zeros(len(groups), len(self), len(self))
        for g, group in enumerate(groups):
            add_gram(gram[g], self._parts, group, self._shared.precision)
        return gram

    def _check_own_lengths(self, gram: Tensor) -> None:
        rows = self._own_rows()
        roles = join_roles([part.roles for part in self._parts])
        check_lengths(gram[:, rows][:, :, rows], self._parts, replace(roles, dtype=gram.dtype))

    def _own_vjp(self, w: Tensor) -> dict[Tensor, Tensor]:
        check_open(self._parts, self._shared)
        of_parameters = spread(w, self._shared, len(self), self.roles.loss)
        weights = _Weights(of_parameters, self._own_rows())
        found: dict[Tensor, Tensor] = {}
        for j, parameter in enumerate(self._shared.parameters):
            spans, uses = uses_of(self._parts, j)
            if uses:
                pieces = [weights.of(j, span, u) for span, u in zip(spans, uses, strict=True)]
                d = vjp.vjp(uses, pieces).view(parameter.shape)
                # over several ranks, sums come first and rounding last
                found[parameter] = d.to(parameter.dtype) if self._ranks is None else d
        return found

    def _own_jvp(self, d: Mapping[Tensor, Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
        check_open(self._parts, self._shared)
        check_direction(d, self.parameters)
        found = self.roles.loss.new_zeros(len(groups), self._own_count())
        for g, group in enumerate(groups):
            for j in group:
                moved = d.get(self._shared.parameters[j])
                if moved is None:
                    continue
                for span, use in zip(*uses_of(self._parts, j), strict=True):
                    found[g, slice(*span)] += use.jvp(moved)
        return found

    def _check_finite(self, update: Sequence[Tensor], weights: Tensor) -> None:
        """Weights and update are finite, else all ranks raise the error of the one that found it."""
        try:
            check_finite([weights, *update])
        except NotFiniteError:
            if self._ranks is not None:
                found = partial(self._own_vjp, weights)
                self._ranks.agreed("rows.backward", lambda: check_finite(found().values()))
            raise

    def _own_rows(self) -> Tensor | None:
        """Which of all rows are this process's; None for all."""
        return None if self._ranks is None else own_rows(self._parts, self._ranks)

    def _outside(self, w: Tensor) -> dict[Tensor, Tensor]:
        """Gradients of the weighted losses by the parameters outside."""
        if self._ranks is None:
            return outside_gradients(self._parts, w)
        ranks, rows = self._ranks, own_rows(self._parts, self._ranks)

        def own() -> dict[Tensor, Tensor]:
            is_whole = w.dim() == 1 and len(w) == len(self)
            found = outside_gradients(self._parts, w[rows] if is_whole else w)
            check_finite(found.values())
            return found

        return summed(ranks, "rows.backward", own, ranks.outside())

    def _as_autograd_gives(self, found: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        for j, parameter in enumerate(self._shared.parameters):
            if parameter in found:
                _, uses = uses_of(self._parts, j)
                found[parameter] = as_autograd_gives(found[parameter], uses)
        return found

    # ---- names of before, for one version --------------------------------------------------------

    def combine(self, w: Tensor) -> dict[Tensor, Tensor]:
        """`vjp`; deprecated."""
        _renamed("combine(w)", "vjp(w)")
        return self.vjp(w)

    def push(self, d: Mapping[Tensor, Tensor], per: str = "total") -> Tensor:
        """`jvp`; deprecated."""
        _renamed("push(d)", "jvp(d)")
        return self.jvp(d, per)

    def kept(self, tasks: Iterable[str] | None = None) -> Rows:
        """`to_subspace`; deprecated."""
        _renamed("kept(tasks)", "to_subspace(tasks)")
        return self.to_subspace(tasks)

    def update(self, method: Method | Tensor, *, outside: Tensor | None = None) -> Update:
        """`backward(method, check=False)`; deprecated."""
        _renamed("update(method)", "backward(method, check=False)")
        return self.backward(method, outside=outside, check=False)

    @property
    def held(self) -> int:
        """`nbytes`; deprecated."""
        _renamed("held", "nbytes")
        return self.nbytes


def _renamed(old: str, new: str) -> None:
    warnings.warn(
        f"rows.{old} is called rows.{new} now; the old name goes in the next version.",
        DeprecationWarning,
        stacklevel=3,
    )


class _Weights:
    """Weights of all parameters, narrowed once for all that share a dtype and span, not once each."""

    def __init__(self, spread: Sequence[Tensor], rows: Tensor | None) -> None:
        self._spread = spread
        self._rows = rows
        self._narrowed: dict[tuple[int, Span, torch.dtype], Tensor] = {}

    def of(self, j: int, span: Span, use: Use) -> Tensor:
        """The weights of parameter j for a span of rows, in the dtype the use works in."""
        dtype = working_dtype(use.tensors[-1])
        key = (id(self._spread[j]), span, dtype)
        if key not in self._narrowed:
            w = self._spread[j]
            own = w if self._rows is None else w[self._rows]
            self._narrowed[key] = own[slice(*span)].to(dtype)
        return self._narrowed[key]


def explicit(shared: Shared, vectors: Mapping[str, Tensor], task: str, dtype: torch.dtype) -> Rows:
    """K vectors, `[K, *shape]` for each parameter by name, as rows of kind SUBSPACE that outlive a step.

    Args:
        shared: the parameters whose space they lie in.
        vectors: {name of a parameter: its part of every vector}; zero where a parameter is left
            out.
        task: the task they are said to be of.
        dtype: the precision in which they were computed, whatever they are held in.

    Returns:
        K rows.
    """
    uses: dict[int, Use] = {}
    for name, v in vectors.items():
        uses[shared.names.index(name)] = Dense(tuple(v.shape[1:]), v)
    count = max((use.count for use in uses.values()), default=0)
    first = torch.zeros(count, dtype=torch.int64, device=shared.parameters[0].device)
    roles = Roles(
        task=first,
        sample=torch.full_like(first, -1),
        kind=torch.full_like(first, SUBSPACE),
        loss=first.to(torch.float64),
        tasks=(task,),
        dtype=dtype,
    )
    return Rows(shared, [TaskRows.explicit(roles, uses, shared)])


def cat(*rows: Rows) -> Rows:
    """All rows of several calls, in order; Gram matrices hold the cross terms.

    The calls may come from different forwards and be of unequal size, but from one engine and one
    point in parameter space. Tasks are matched by name.

    Raises:
        TypeError: something else than rows.
        ValueError: nothing given, the same rows twice, or rows of different engines.
        RuntimeError: rows that are used up, or taken before and after a change of the parameters.
    """
    if not rows:
        raise ValueError("cat: found no rows, expected at least one.")
    for each in rows:
        if not isinstance(each, Rows):
            raise TypeError(
                f"cat: found {type(each).__name__}, expected Rows as engine.rows returns them."
            )
        if each._shared is not rows[0]._shared:
            raise ValueError(
                "cat: found rows of different engines, expected one engine: its parameters are the space."
            )
        if each._ranks is None:  # else looked at by all ranks together, before the next exchange
            check_open(each._parts, each._shared)
    parts = [part for each in rows for part in each._parts]
    used_up = [id(part) for part in parts if len(part) and not part.persistent]
    if len(set(used_up)) < len(used_up):
        raise ValueError(
            "cat: found the same rows twice, expected each once: they would count double."
        )
    return Rows(rows[0]._shared, parts, rows[0]._ranks)
