"""Updates: what a `backward` did, and what it asks of a method first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mtu_fast._checks.flags import Flags, some_bad
from mtu_fast._ops.gram_schmidt import effective_rank
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast.methods import RETAIN, SUBSPACE, Method, Roles
from mtu_fast.methods.base import HOW_TO_WRITE_ONE, check_flags, dependence_tolerance


@dataclass(frozen=True, repr=False)
class Update:
    """What a `backward` did: w, and from what.

    Attributes:
        weights: w `[R]`, or `[L, R]` for a method that works per layer or tensor.
        roles: what each row is.
        gram: G `[R, R]` or `[L, R, R]`, float64, of the rows `seen`; None where no Gram was needed.
        residual: the largest `|J_r d| / (|J_r| |d|)` left of what the method constrains, `[]` or
            `[L]`: for OrthoGrad the step's own retain rows, of which those in a memory are none.
            None where it was not measured: rows that are well conditioned or of float64,
            or a method that constrains nothing. None on a GPU with fast float64, where `Jᵀ w` is
            summed in float64 instead.
        flags: the conditions of the step that only its device knows yet.
        seen: what each row of `gram` is: `roles`, or, of many rows on the CPU (but rank-one ones) or beside those of a
            memory, with those that the method sees by their mean alone as one row per task
            (`Method.averages_forget`).
        into: which row of `gram` each row is, or is part of, int64 `[R]`, -1 for one
            at rest; None where it is itself.
    """

    weights: Tensor
    roles: Roles
    gram: Tensor | None
    residual: Tensor | None = None
    flags: tuple[Flags, ...] = field(default=(), compare=False)
    seen: Roles | None = None
    into: Tensor | None = None

    def __repr__(self) -> str:
        rank = "none needed" if self.rank is None else self.rank.tolist()
        return f"Update({len(self.roles)} rows, rank of the retain rows: {rank})"

    def gram_of(self, rows: Tensor) -> Tensor:
        """The Gram `[..., K, K]` of these rows, int64 `[K]`, none of which is part of a mean."""
        at = self.places(rows)
        assert self.gram is not None
        return self.gram[..., at[:, None], at]

    def places(self, rows: Tensor) -> Tensor:
        """Where these rows are in `gram`."""
        return rows if self.into is None else self.into[rows]

    @property
    def rank(self) -> Tensor | None:
        """Effective rank of the retain rows: how many directions were protected; None without a Gram."""
        if self.gram is None or self.seen is None:
            return None
        # other rows become zero rows, which have no direction
        retain = (self.seen.kind == RETAIN).to(self.gram.dtype)
        return effective_rank(
            self.gram * retain * retain[:, None], dependence_tolerance(self.seen.dtype)
        )

    @property
    def unsound(self) -> Tensor | None:
        """Whether the step was unsound and added nothing, `[]` bool on the device; None where it surely was not."""
        return some_bad(self.flags)

    def check(self) -> None:
        """Wait for the device, and raise what was wrong with the step: on the CPU that was raised in the step itself.

        Raises:
            ValueError: losses or weights that are not as described.
            RuntimeError: something was not finite, or the plan of the graph did not hold.
        """
        errors = [error for flags in self.flags for error in flags.settled()]
        if errors:
            raise errors[0]


@dataclass(frozen=True)
class Planned:
    """An update of which nothing is written yet.

    Attributes:
        update: what it will have done.
        write: adds it to `.grad`, and uses its rows up.
        run_hooks: runs what users want done with `.grad`.
    """

    update: Update
    write: Callable[[], None]
    run_hooks: Callable[[], None]


def check_method(method: object) -> None:
    """A method, or weights.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(method, type):
        raise TypeError(
            f"backward: found the class {method.__name__}, expected an instance of a method, such as "
            "mtu.OrthoGrad(alpha=0.5): call the class with its settings."
        )
    if isinstance(method, Method):
        check_flags(method)
    elif not isinstance(method, Tensor):
        raise TypeError(
            f"backward: found {type(method).__name__}, expected an mtu.Method such as mtu.OrthoGrad(alpha=0.5), or "
            f"weights [R]. {HOW_TO_WRITE_ONE}"
        )


def check_meant(method: Method, parts: Sequence[TaskRows]) -> None:
    """The rows are such as the method is meant for.

    Raises:
        ValueError: sample rows for a method of mean rows, or no subspace for one that needs it.
    """
    name = type(method).__name__
    if method.per == "task" and _of_samples(parts):
        raise ValueError(
            f"backward: {name} works on mean rows, one per task and role, found rows per sample; take them by "
            "engine.rows(..., per='task'), or call engine.backward(losses, method). rows.backward(method, check=False) "
            "does not ask."
        )
    in_subspace = any(part.has(SUBSPACE) for part in parts if part.persistent)
    if method.needs_subspace and not in_subspace:
        raise ValueError(
            f"backward: {name} moves in a subspace of rows kept from earlier steps, found none among these; call "
            "subspace.step(rows, method) with an mtu.Subspace() made before the loop."
        )


def _of_samples(parts: Sequence[TaskRows]) -> bool:
    """Whether there are rows of a sample each, those kept from earlier steps aside."""
    own = [part for part in parts if part.count_everywhere and not part.persistent]
    return not all(part.is_mean for part in own)
