"""Rows: the gradients of a set of losses, known well enough for `G = J Jᵀ` and `d = Jᵀ w`, never built as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor

from mtu_fast._arguments import check_flag, names
from mtu_fast._checks.flags import Flags, some_bad
from mtu_fast._distributed.choice import Products, products_of
from mtu_fast._distributed.ranks import Ranks
from mtu_fast._keepable import Keepable
from mtu_fast._ops.gram_schmidt import effective_rank
from mtu_fast._rows.autocast import without_autocast
from mtu_fast._rows.grad import Addition, add, as_autograd_gives
from mtu_fast._rows.own import OwnProducts
from mtu_fast._rows.renamed import Renamed
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.solve import Source, solve
from mtu_fast._rows.task_rows import TaskRows, all_roles, uses_of_each
from mtu_fast._rows.update import Planned, Update, check_meant, check_method
from mtu_fast._rows.uses import Gather, bytes_of
from mtu_fast._rows.validity import check_open
from mtu_fast._rows.weights import has_outside
from mtu_fast._uncollected import uncollected
from mtu_fast.methods import FORGET, Method
from mtu_fast.methods._undo import undone
from mtu_fast.methods.base import dependence_tolerance


class Rows(Keepable, Renamed):
    """R row gradients over the engine's parameters; made by `Engine.rows`, joined by `cat`, used up by `backward`.

    Attributes:
        roles: task, sample, kind and loss of every row, each `[R]`; task-major within a call, calls
            in order. Of an engine with `group=`, the rows of all ranks, rank after rank within a
            task: `gram`, `vjp`, `jvp` and `backward` are then called by all ranks alike.
        conditions: of the step that the rows were taken in, where they are kept for others.
    """

    def __init__(
        self, shared: Shared, parts: Sequence[TaskRows], ranks: Ranks | None = None
    ) -> None:
        self._shared = shared
        self._parts = list(parts)
        self.conditions: tuple[Flags, ...] = ()
        self.roles = all_roles(self._parts)
        self._products: Products = OwnProducts(shared, self._parts, self.roles)
        if ranks is not None:
            self._products = products_of(shared, self._parts, self.roles, ranks)

    def _like(self, parts: Sequence[TaskRows]) -> Rows:
        return Rows(self._shared, parts, self._products.ranks)

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
        gram = self._products.gram(groups)
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
        return self._products.shown(self._products.vjp(w))

    @without_autocast
    def wide_vjp(self, w: Tensor) -> dict[Tensor, Tensor]:
        """`vjp` with products and sums in float64, rounded at the end."""
        return self._products.shown(self._products.vjp(w, wide=True))

    @property
    def deferred(self) -> bool:
        """Whether conditions of the rows stay on their device, which runs behind the host."""
        return self._products.flags.deferred

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
        found = self._products.jvp(self._products.from_user(d), groups)
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
        return self._products.jacobian()

    def rank(self) -> Tensor:
        """The effective rank of all rows together: those above the dependence tolerance of their dtype; `[]` int64."""
        return effective_rank(self.gram(), dependence_tolerance(self.roles.dtype))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{name: parameter}, the space the rows lie in."""
        return self._shared.named()

    @property
    def nbytes(self) -> int:
        """Bytes that the rows keep alive; memory that several of them share counts once."""
        tensors: list[Tensor] = []
        for part in self._parts:
            tensors += part.grams.values()
            for use in part.uses.values():
                tensors += use.tensors
        return bytes_of(tensors)

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
        self._products.check_open()
        wanted = self._chosen(tasks)
        chosen = [part for part in self._parts if wanted.issuperset(part.roles.tasks)]
        return self._like([part.to_subspace() for part in chosen])

    def _chosen(self, tasks: Iterable[str] | None) -> set[str]:
        if tasks is None:
            return set(self.roles.tasks)
        wanted = set(names("to_subspace: tasks", tasks))
        unknown = wanted - set(self.roles.tasks)
        if unknown:
            raise ValueError(
                f"to_subspace: tasks: found unknown tasks {sorted(map(str, unknown))}, expected some of "
                f"{list(self.roles.tasks)}."
            )
        return wanted

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
        with undone(method):
            planned = self.planned(method, outside=outside, check=check)
        planned.write()
        planned.run_hooks()
        return planned.update

    @uncollected
    @without_autocast
    def planned(
        self, method: Method | Tensor, *, outside: Tensor | None = None, check: bool = True
    ) -> Planned:
        """The update of `backward`, computed and looked at, of which nothing is written yet."""
        check_method(method)
        check_flag("backward: check", check)
        if check and not isinstance(method, Tensor):
            check_meant(method, self._parts)
        self._products.prepare(method)
        pooled = self._products.pooled(method)
        seen: Source = self._products.source(self) if pooled is None else pooled
        solved = solve(seen, method, self._shared, has_outside(self._parts))
        found, residual = solved.direction(seen, self._shared, self._products.squares)
        weights, of_losses = solved.weights, solved.outside
        if pooled is not None:
            weights, of_losses = pooled.pool.spread(weights), pooled.pool.spread(of_losses)
        others = self._products.outside(of_losses if outside is None else outside)
        self._products.check_finite([*others.values(), *solved.unsure(found)], weights)
        add(found, others)
        flags = self._flags()
        bad = some_bad(flags)
        made = self._products.addition(self._as_autograd_gives(found), bad)
        into = None if pooled is None else pooled.pool.into
        update = Update(weights, self.roles, solved.gram, residual, flags, seen.roles, into)
        return Planned(update, partial(self._write, made, flags, bad), made.run_hooks)

    def _write(self, made: Addition, flags: Sequence[Flags], bad: Tensor | None) -> None:
        """Write `.grad`; the rows are used up."""
        made.write()
        for part in self._parts:
            part.use_up()
        for each in flags:
            each.send(bad)

    def _as_autograd_gives(self, found: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        parameters = self._shared.parameters
        looked_up = {j for p in self._parts for j, u in p.uses.items() if type(u) is Gather}
        for j, (_, uses) in uses_of_each(self._parts, sorted(looked_up)).items():
            if isinstance(uses[0], Gather) and parameters[j] in found:
                d = found[parameters[j]]
                found[parameters[j]] = as_autograd_gives(d, uses)
        return found


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
        _check_joined(each, rows[0])
    parts = [part for each in rows for part in each._parts]
    _check_once(parts)
    return Rows(rows[0]._shared, parts, rows[0]._products.ranks)


def _check_joined(rows: Rows, first: Rows) -> None:
    """Whether rows may be joined with the first ones."""
    if not isinstance(rows, Rows):
        raise TypeError(
            f"cat: found {type(rows).__name__}, expected Rows as engine.rows returns them."
        )
    if rows._shared is not first._shared:
        raise ValueError(
            "cat: found rows of different engines, expected one engine: its parameters are the space."
        )
    # of several ranks they are looked at by all together, before the next exchange
    if rows._products.ranks is None:
        check_open(rows._parts, rows._shared)


def _check_once(parts: Sequence[TaskRows]) -> None:
    """Whether no rows come twice; rows of a subspace may."""
    used_up = [id(part) for part in parts if len(part) and not part.persistent]
    if len(set(used_up)) < len(used_up):
        raise ValueError(
            "cat: found the same rows twice, expected each once: they would count double."
        )
