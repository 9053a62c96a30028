"""The gradients of one step, from a retain batch and a forget batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtu_fast._rows.update import Update
from mtu_fast.engine import Engine
from mtu_fast.methods import Method
from mtu_fast.rows import Rows, cat
from mtu_fast.subspace import Subspace
from mtu_fast.unlearning.reading import Side

# runs the forward when called, so that one graph lives at a time where rows are taken
Forward = Callable[[], Side]


def add_gradients(
    engine: Engine,
    method: Method,
    retain: Forward,
    forget: Forward,
    targets: Sequence[str],
    subspace: Subspace | None = None,
) -> Update:
    """`.grad += d` of one step: rows of both batches for a method on sample rows, one weighted backward otherwise.

    The rows (forget sample, task that is no target) are retain rows.
    """
    if method.needs_gram and method.per == "sample":
        rows = rows_of_step(engine, retain, forget, targets)
        if subspace is None:
            return rows.backward(method)
        return subspace.step(rows, method)
    losses, present, mask = joined(retain(), forget(), targets)
    return engine.backward(losses, method, forget=mask, present=present)


def rows_of_step(engine: Engine, retain: Forward, forget: Forward, targets: Sequence[str]) -> Rows:
    """The sample rows that a step's method sees, retain batch first."""
    losses, present = retain()
    kept = engine.rows(losses, present=present)
    losses, present = forget()
    gone = {task: torch.full_like(present[task], task in targets) for task in losses}
    return cat(kept, engine.rows(losses, forget=gone, present=present))


def joined(
    retain: Side, forget: Side, targets: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, labelled samples and forget mask of both batches as one, {task: [N_r + N_f]} each.

    Raises:
        ValueError: the batches have losses for different tasks.
    """
    (kept, kept_present), (gone, gone_present) = retain, forget
    if set(kept) != set(gone):
        raise ValueError(
            f"losses: tasks {list(kept)} on the retain batch, {list(gone)} on the forget batch, expected the same; "
            "for a task without labels return any finite loss and a mask of False."
        )
    losses, present, masks = {}, {}, {}
    for task in kept:
        there, gone_there = kept_present[task], gone_present[task]
        losses[task] = torch.cat([kept[task], gone[task]])
        present[task] = torch.cat([there, gone_there])
        forgotten = torch.full_like(gone_there, task in targets)
        masks[task] = torch.cat([torch.zeros_like(there), forgotten])
    return losses, present, masks
