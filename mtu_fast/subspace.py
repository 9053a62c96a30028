"""Subspace: rows of the target tasks kept from earlier batches, which span where an update may move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtu_fast._arguments import check_flag, check_function, held_in, names
from mtu_fast._checks.values import check_direction
from mtu_fast._kept import Form, orthonormal, step
from mtu_fast._ops.project import project
from mtu_fast._rows.update import Update
from mtu_fast.methods import FORGET, RETAIN, Method
from mtu_fast.rows import Rows, cat


@dataclass(frozen=True)
class Held:
    """What a subspace holds between two steps; made anew by a step that succeeds, never changed in place.

    Attributes:
        size: rows to hold; None until the first step says it.
        age: calls of `keep` since a batch was taken in.
        batches: the rows, oldest first.
        basis: an orthonormal basis of them, where it stands for them.
    """

    size: int | None
    age: int = 0
    batches: tuple[Rows, ...] = ()
    basis: Rows | None = None

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.batches)

    @property
    def full(self) -> bool:
        """Whether as many rows are held as asked for."""
        return self.size is not None and len(self) >= self.size


class Subspace:
    """span{g_1 … g_K}: per-sample gradients of the target tasks, kept from earlier batches as rows of kind SUBSPACE.

    `engine.backward(losses, method, forget=mask, subspace=subspace)` joins them to the step's rows,
    so that a method sees them in G, and keeps the step's own for later. Until it is full, the
    method goes without them. They are the gradients of the point where they were taken, and as many
    bytes as rows of that size take (`memory`).

    Args:
        size: rows to hold, K; by default twice the retain rows of the first step, since K minus
            that is what is left to move in.
        every: a full subspace takes in a batch and drops its oldest at every so many steps.
        tasks: the tasks whose rows are kept; by default those with forget rows in the step.
        basis: hold an orthonormal basis Q of the rows, made anew whenever a batch is taken in, in
            place of the rows: K explicit vectors of all parameters.
        rank: the most dimensions of the basis.
        energy: share of Σσ² of the rows that the basis must hold.
        dtype: of the basis; by default that of the parameters. torch.bfloat16 takes half the memory
            of float32, and then the basis is orthonormal, and `project` right, to about 5e-4 only.

    Attributes:
        held: what is held, a value; a loop of your own that undoes steps assigns the one from
            before them.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: one out of range, or rank, energy or dtype without `basis`.

    Source: our reading of the task-specific subspaces of arXiv 2605.19042.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        every: int = 10,
        tasks: Iterable[str] | None = None,
        basis: bool = False,
        rank: int | None = None,
        energy: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        named = None if tasks is None else names("Subspace: tasks", tasks)
        self._form = Form("Subspace", size, every, basis, rank, energy, dtype)
        if not basis and dtype is not None:
            raise ValueError("Subspace: dtype is that of a basis; pass basis=True too.")
        self._tasks = named
        self.held = Held(size)

    @property
    def every(self) -> int:
        """Steps between two batches that are taken in once it is full."""
        return self._form.every

    @property
    def options(self) -> dict[str, Any]:
        """The arguments, as plain values: what a checkpoint compares."""
        form = asdict(self._form)
        return form | {"dtype": str(self._form.dtype), "tasks": self._tasks}

    def __len__(self) -> int:
        """Rows held, whether or not a basis stands for them."""
        return len(self.held)

    def __repr__(self) -> str:
        return f"Subspace({len(self)} of {self.size or '?'} rows, {self.memory / 2**20:.1f} MiB)"

    @property
    def size(self) -> int | None:
        """Rows to hold; None until the first step says it."""
        return self.held.size

    @property
    def full(self) -> bool:
        """Whether as many rows are held as asked for."""
        return self.held.full

    @property
    def memory(self) -> int:
        """Bytes held."""
        return sum(
            rows.nbytes for rows in (*self.held.batches, self.held.basis) if rows is not None
        )

    def join(self, rows: Rows) -> Rows:
        """The rows of a step with those held behind them; the step's rows alone until the subspace is full.

        Raises:
            ValueError: rows of another engine.
        """
        # on a GPU a step turns out to be unsound only after its rows were kept
        self._drop_unsound()
        if not self.full:
            return rows
        return cat(rows, *(self.held.batches if self.held.basis is None else [self.held.basis]))

    def _drop_unsound(self) -> None:
        """Let go of rows of steps that turned out to be unsound after they had been taken in."""
        sound = tuple(rows for rows in self.held.batches if not rows.is_unsound)
        if len(sound) < len(self.held.batches):
            self.held = replace(self.held, batches=sound, basis=None)

    def keep(self, rows: Rows) -> bool:
        """Take in the target tasks' rows of a step, if it is time: always until full, then at every `every` calls.

        Args:
            rows: rows per sample that were not used up; they stay usable.

        Returns:
            Whether the subspace is full.

        Raises:
            TypeError: something else than rows.
            ValueError: rows per task, or unknown names in `tasks`.
            RuntimeError: the rows are used up, or one of those to be kept is not finite; nothing is
                kept then.
        """
        after = self._after(rows)
        if after.batches and after.age == 0:
            after.batches[-1].gram()  # names the rows that are not finite
        self.held = after
        return self.full

    def step(self, rows: Rows, method: Method) -> Update:
        """`join(rows).update(method)`, then the rows of the step are kept; on an error, of both, nothing is."""
        return step(rows, method, self)

    def look(self, rows: Rows) -> Callable[[Update], Held]:
        """What is to be held after a step with these rows, which are looked at before it uses them up."""
        after = self._after(rows)

        def held(update: Update) -> Held:
            if after.age == 0 and after.batches:
                after.batches[-1].conditions = update.flags  # which may turn out not to hold
            return after

        return held

    def project(self, gradients: dict[Tensor, Tensor], into: bool = True) -> dict[Tensor, Tensor]:
        """`Qᵀ(Q g)`, the part of {parameter: g} inside the span of the basis, or `g - Qᵀ(Q g)`, the part outside.

        Exact to the precision in which the basis is held: of `g`, about 5e-4 is on the wrong side
        with dtype=torch.bfloat16, 1e-6 with float32.

        Raises:
            TypeError: something else than {parameter: real tensor}.
            ValueError: a key that is none of the parameters, or a tensor of another shape or device.
            RuntimeError: the subspace is not `basis=True`, or not full yet.
        """
        check_flag("project: into", into)
        if self.held.basis is None:
            raise RuntimeError(
                f"Subspace: project needs a basis, found {self!r}; make it with basis=True and fill it."
            )
        check_direction(gradients, self.held.basis.parameters, "gradients")
        rows = self.held.basis.jacobian()
        # a parameter without a gradient is a part of the inner products all the same
        zero = [gradients.get(p, torch.zeros_like(p)) for p in rows]
        return dict(zip(rows, project(zero, list(rows.values()), into), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What is held, as plain values and explicit rows {parameter's name: [K, *shape]}.

        From here on this subspace holds its rows explicitly too, so that it and one that loads the
        state go on alike.
        """
        held, batches = self.held, [_explicit(rows) for rows in self.held.batches]
        self.held = replace(held, batches=tuple(rows for rows, _ in batches))
        basis = None if held.basis is None else _explicit(held.basis)[1]
        return {
            "size": held.size,
            "age": held.age,
            "batches": [state for _, state in batches],
            "basis": basis,
        }

    def load_state_dict(self, state: Mapping[str, Any], kept: Callable[..., Rows]) -> None:
        """Go on from what `state_dict` gave.

        Args:
            state: what it gave.
            kept: `engine.subspace_rows` of an engine of the same parameters, which refuses others.

        Raises:
            TypeError: a state that is no mapping, or `kept` is no function.
            ValueError: a state in which a part is missing.
        """
        held_in("Subspace: state", state, "size", "age", "batches", "basis")
        check_function("Subspace: kept", kept, "vectors, task, dtype")
        batches = tuple(kept(**batch) for batch in state["batches"])
        basis = None if state["basis"] is None else kept(**state["basis"])
        self.held = Held(state["size"], state["age"], batches, basis)

    def _after(self, rows: Rows) -> Held:
        """What is to be held after a step with these rows: the target tasks' ones too, if it is time."""
        if not isinstance(rows, Rows):
            raise TypeError(
                f"Subspace: found {type(rows).__name__}, expected Rows as engine.rows returns them."
            )
        if self._form.basis and rows.roles.rank is not None:
            raise ValueError(
                "Subspace: found basis=True with rows of several ranks, expected basis=False: a basis needs all rows "
                "in one place, while each rank keeps its own."
            )
        held = replace(self.held, age=self.held.age + 1)
        if held.full and held.age < self.every:
            return held
        held = self._with_batch(held, rows)
        return self._with_basis(held) if self._form.basis and held.full else held

    def _with_batch(self, held: Held, rows: Rows) -> Held:
        """The target tasks' rows taken in, the oldest batches dropped that are not needed any more."""
        targets = rows.asked("Subspace", self.options, lambda: self._targets(rows))
        # twice the retain rows of a step: a span of more dimensions than the constraints take
        size = held.size or max(1, 2 * int((rows.roles.kind == RETAIN).sum()))
        batches = list(held.batches)
        if targets:
            batches.append(rows.to_subspace(targets))
        # whole batches go: what the others hold is still enough
        while sum(map(len, batches[1:])) >= size:
            batches.pop(0)
        age = 0 if targets else held.age
        return replace(held, size=size, age=age, batches=tuple(batches))

    def _with_basis(self, held: Held) -> Held:
        of, first = self._form, held.batches[0]
        named, _ = orthonormal(held.batches, of.rank, of.energy, of.dtype)
        # in the lowest precision of the rows, of which their dependence is judged
        basis = first.replaced(named, first.roles.tasks[0], cat(*held.batches).roles.dtype)
        return replace(held, basis=basis)

    def _targets(self, rows: Rows) -> tuple[str, ...]:
        if rows.has_means:
            raise ValueError(
                "Subspace: found mean rows (per='task'), expected a row per sample (per='sample')."
            )
        tasks = self._tasks
        if tasks is None:
            return rows.tasks_with(FORGET)
        unknown = [task for task in tasks if task not in rows.roles.tasks]
        if unknown:
            found = list(rows.roles.tasks)
            raise ValueError(f"Subspace: tasks names {unknown}, the rows have {found}.")
        return tasks


def _explicit(rows: Rows) -> tuple[Rows, dict[str, Any]]:
    """The same rows made explicit, and the arguments of `Engine.subspace_rows` that make them again."""
    names = rows.vectors()
    task, dtype = rows.roles.tasks[0], rows.roles.dtype
    return rows.replaced(names, task, dtype), {"vectors": names, "task": task, "dtype": dtype}


def check_subspace(method: Method | Tensor, subspace: object) -> None:
    """A method that works in a subspace has one, and no other is given one.

    Raises:
        TypeError: something else than a Subspace.
        ValueError: it is missing, or would not be looked at.
    """
    name = type(method).__name__
    needed = isinstance(method, Method) and method.needs_subspace
    if subspace is not None and not isinstance(subspace, Subspace):
        raise TypeError(f"subspace: found {type(subspace).__name__}, expected an mtu.Subspace.")
    if needed and subspace is None:
        raise ValueError(
            f"subspace: {name} moves in a subspace of rows kept from earlier steps, found None, expected an "
            "mtu.Subspace; make one before the loop, subspace = mtu.Subspace(), and pass subspace=subspace. It fills "
            "in the first steps."
        )
    if subspace is not None and not needed:
        raise ValueError(
            f"subspace: {name} does not use one, expected subspace=None; a method of your own that does says so by "
            "needs_subspace = True."
        )
