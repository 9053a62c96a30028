"""Whether rows may still be used, and whether what they gave is finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtu_fast._checks.values import all_finite
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast.errors import NotFiniteError
from mtu_fast.methods import FORGET, RETAIN, SUBSPACE, Roles

KINDS = {RETAIN: "to retain", FORGET: "to forget", SUBSPACE: "kept for the subspace"}
NAMED = 8  # rows that an error names at most


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


def check_gram(gram: Tensor, roles: Roles) -> None:
    """A Gram `[L, R, R]` is finite.

    Raises:
        NotFiniteError: it is not; names the rows.
    """
    if all_finite([gram]):
        return
    squares = gram.diagonal(dim1=-2, dim2=-1)
    bad = (~torch.isfinite(squares)).any(0).nonzero().flatten()
    named: dict[str, list[tuple[str, int]]] = {}
    for r in bad[:NAMED].tolist():
        kind = KINDS[int(roles.kind[r])]
        task = roles.tasks[int(roles.task[r])]
        named.setdefault(kind, []).append((task, int(roles.sample[r])))
    rows = ", ".join(f"{kind} {which}" for kind, which in named.items())
    raise NotFiniteError(
        f"rows: the gradient of (task, sample) {rows} is not finite although its loss is (an overflow in half "
        "precision, a square root or norm at zero, zero times infinity?); .grad is untouched. Guard it in the loss, "
        "(x.square().sum() + eps).sqrt() say, rescale the loss, or leave these rows out by `present`."
    )
