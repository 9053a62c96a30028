"""Whether rows may still be used, and whether what they gave is finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtu_fast._checks.flags import AT_ONCE, Flags
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast.errors import NotFiniteError
from mtu_fast.methods import FORGET, MEMORY, RESTING, RETAIN, SUBSPACE, Roles
from mtu_fast.methods.roles import ABSENT

KINDS = {
    RETAIN: "to retain",
    FORGET: "to forget",
    SUBSPACE: "kept for the subspace",
    RESTING: "to forget, at rest",
    MEMORY: "kept in memory",
    ABSENT: "without a label",
}
NAMED = 8  # rows that an error names at most
SHORT = 2.0**-1000  # of squares of lengths: below, products lose digits, or are zero


def check_open(parts: Sequence[TaskRows], shared: Shared) -> None:
    """The rows are not used up, and nothing they are made of has changed.

    Raises:
        RuntimeError: they are, or something has.
    """
    if any(part.spent for part in parts):
        raise RuntimeError(
            "rows: backward was called before and used these rows up; call engine.rows again."
        )
    if any(part.changed() for part in parts):
        raise RuntimeError(
            "rows: an activation or input that these rows are made of changed in place since they were taken (an "
            "input buffer that is filled again?); use a fresh tensor per batch, or call backward first."
        )
    now = shared.versions()
    if any(part.versions[0] != now for part in parts if not part.persistent):
        raise RuntimeError(
            "rows: parameters changed in place since these rows were taken (an optimizer step?), so their "
            "gradients belong to another point; take the rows again, and step only after backward."
        )


def check_gram(gram: Tensor, roles: Roles, flags: Flags = AT_ONCE) -> None:
    """A Gram `[L, R, R]` is finite; a NotFiniteError that names the rows where it is not."""
    flags.check_finite([gram], lambda: _not_finite(gram, roles))


def _not_finite(gram: Tensor, roles: Roles) -> NotFiniteError:
    squares = gram.diagonal(dim1=-2, dim2=-1)
    # the diagonal names rows; off it a single bad row spoils many
    bad = (~torch.isfinite(squares)).any(0).nonzero().flatten()
    return NotFiniteError(
        f"rows: the gradient of (task, sample) {_named(bad, roles)} is not finite although its loss is (an overflow in "
        "half precision, a square root or norm at zero, zero times infinity?); .grad is untouched. Guard it in the "
        "loss, for example (x.square().sum() + eps).sqrt(), rescale the loss, or leave these rows out by `present`."
    )


def check_lengths(
    gram: Tensor, parts: Sequence[TaskRows], roles: Roles, flags: Flags = AT_ONCE
) -> None:
    """No row of float64 is so short that its square underflows: a method would not see it.

    A ValueError names those that are.
    """
    if roles.dtype != gram.dtype:
        return  # the squares of shorter formats are far from the end of float64's range
    short = _short(gram)
    if not flags.deferred and not bool(short.any()):
        return
    of_parts = _of_parts(parts, short)
    # a zero row is no error: only those with an entry that is not zero are
    alive = [_alive(part, None if flags.deferred else mine) for part, mine in of_parts]
    bad = short & torch.cat(alive)
    flags.refuse(bad.any(), lambda: _too_short(bad.nonzero().flatten(), roles))


def _too_short(bad: Tensor, roles: Roles) -> ValueError:
    return ValueError(
        f"rows: the gradient of (task, sample) {_named(bad, roles)} is not zero, but shorter than 1e-150, so that "
        "its inner products underflow; .grad is untouched. Multiply the losses by a power of two, for example "
        "2.0**200."
    )


def has_short_rows(gram: Tensor, roles: Roles) -> bool:
    """Whether rows of float64 are zero, or squares of their lengths underflow."""
    return roles.dtype == gram.dtype and bool(_short(gram).any())


def _short(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(0) < SHORT


def _of_parts(parts: Sequence[TaskRows], of_rows: Tensor) -> Iterator[tuple[TaskRows, Tensor]]:
    yield from zip(parts, of_rows.split([len(part) for part in parts]), strict=True)


def _alive(part: TaskRows, chosen: Tensor | None) -> Tensor:
    """Which of the chosen rows, or of all (None), are not zero, [R] bool."""
    found = torch.zeros(len(part), dtype=torch.bool, device=part.roles.kind.device)
    at = None if chosen is None else chosen.nonzero().flatten()
    for use in part.uses.values():
        if at is None:
            found |= use.alive()
        elif len(at):
            found[at] |= use.select(at).alive()
    return found


def _named(bad: Tensor, roles: Roles) -> str:
    """The first of the bad rows in words."""
    named: dict[str, list[tuple[object, ...]]] = {}
    for r in bad[:NAMED].tolist():
        kind = KINDS[int(roles.kind[r])]
        row: tuple[object, ...] = (roles.tasks[int(roles.task[r])], int(roles.sample[r]))
        if roles.rank is not None:
            row = (*row, f"rank {int(roles.rank[r])}")
        named.setdefault(kind, []).append(row)
    return ", ".join(f"{kind} {which}" for kind, which in named.items())
