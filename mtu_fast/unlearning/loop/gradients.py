"""The gradients of one step, from a retain batch and a forget batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from mtu_fast._distributed.chunks import is_cut, whole
from mtu_fast._kept import Keeper, step
from mtu_fast._rows.update import Update
from mtu_fast.engine import Engine
from mtu_fast.methods import RETAIN, Method
from mtu_fast.rows import Rows, cat
from mtu_fast.unlearning.reading import Side

# runs the forward when called, so that one graph lives at a time where rows are taken
Forward = Callable[[], Side]
# (losses, present) of a forget batch -> {task: [N]}, what of it is to be forgotten: a mask, or kinds
Choice = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def add_gradients(
    engine: Engine,
    method: Method,
    retain: Forward,
    forget: Forward,
    choice: Choice,
    *kept: Keeper | None,
) -> Update:
    """`.grad += d` of one step: rows of both batches for a method on sample rows, one weighted backward otherwise.

    The rows (forget sample, task that is no target) are retain rows.
    """
    if method.needs_gram and method.per == "sample":
        return step(rows_of_step(engine, retain, forget, choice), method, *kept)
    losses, present, mask = joined(retain(), forget(), choice)
    return engine.backward(losses, method, forget=mask, present=present)


def all_of(targets: Sequence[str]) -> Choice:
    """Every sample is to be forgotten, from these tasks."""

    def choice(losses: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {task: torch.full_like(present[task], task in targets) for task in losses}

    return choice


def rows_of_step(engine: Engine, retain: Forward, forget: Forward, choice: Choice) -> Rows:
    """The sample rows that a step's method sees, retain batch first."""
    # its graph is used up before the forward on forget data builds another
    losses, present = retain()
    kept = engine.rows(losses, present=present)
    losses, present = forget()
    gone = choice(losses, present)
    return cat(kept, engine.rows(losses, forget=gone, present=present))


def joined(
    retain: Side, forget: Side, choice: Choice
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
    chosen = choice(gone, gone_present)
    losses, present, masks = {}, {}, {}
    for task in kept:
        there, gone_there = kept_present[task], gone_present[task]
        losses[task] = torch.cat([kept[task], gone[task]])
        present[task] = torch.cat([there, gone_there])
        retained = torch.full_like(there, RETAIN, dtype=chosen[task].dtype)
        masks[task] = torch.cat([retained, chosen[task]])
    return losses, present, masks


def clip(parameters: Sequence[Tensor], bound: float) -> None:
    """`.grad *= min(1, bound / |.grad|)`, one norm over all parameters."""
    # torch stacks the norms of plain gradients, or of DTensors, and not of both
    kinds: dict[bool, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            kinds.setdefault(is_cut(p.grad), []).append(p)
    if len(kinds) < 2:
        clip_grad_norm_(parameters, bound)
        return
    norms = [whole(get_total_norm(list(map(_grad, part)))) for part in kinds.values()]
    total = torch.stack(norms).norm()
    for part in kinds.values():
        clip_grads_with_norm_(part, bound, total)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
