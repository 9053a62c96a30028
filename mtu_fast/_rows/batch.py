"""What one call is given, checked and uniform: losses, who is to be forgotten, who has a label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mtu_fast._checks.losses import Losses, named_losses
from mtu_fast._checks.masks import Mask, kinds, presence
from mtu_fast.methods import FORGET, RETAIN, Roles


class Members(NamedTuple):
    """The samples of a task that give rows.

    Attributes:
        of: kind -> mask `[N]`; kinds without a sample are left out.
        all: whether every sample gives a row.
    """

    of: dict[int, Tensor]
    all: bool


@dataclass(frozen=True)
class Batch:
    """The losses of one call.

    Attributes:
        losses: `{task: [N]}`, with their graph.
        kind: `{task: [N]}` int64, RETAIN or FORGET.
        present: `{task: [N]}` bool, the samples that have a label for the task.
    """

    losses: dict[str, Tensor]
    kind: dict[str, Tensor]
    present: dict[str, Tensor]

    @staticmethod
    def of(losses: Losses, forget: Mask, present: Mapping[str, Tensor] | None) -> Batch:
        """What the user handed over.

        Raises:
            TypeError: arguments of the wrong kind.
            ValueError: losses or masks that are not as described.
        """
        named = named_losses(losses)
        return Batch(named, kinds(forget, named), presence(present, named))

    @property
    def device(self) -> torch.device:
        """Where the losses are."""
        return next(iter(self.losses.values())).device

    @property
    def is_empty(self) -> bool:
        """Whether there is no sample."""
        return not any(loss.numel() for loss in self.losses.values())

    @cached_property
    def members(self) -> dict[str, Members]:
        """Who gives rows, per task; one wait for the device."""
        masks = {}
        flags = []
        for task, kind in self.kind.items():
            of_kind = [(kind == which) & self.present[task] for which in (RETAIN, FORGET)]
            masks[task] = of_kind
            some = [mask.any() for mask in of_kind]
            flags.append(torch.stack([*some, self.present[task].all()]))
        found = {}
        for (task, of_kind), known in zip(masks.items(), torch.stack(flags).tolist(), strict=True):
            named = zip((RETAIN, FORGET), of_kind, known, strict=False)
            found[task] = Members({which: mask for which, mask, there in named if there}, known[-1])
        return found

    def counts(self) -> dict[tuple[str, int], int]:
        """{(task, kind): samples that give a row}, of those that have any."""
        found = {}
        for task, members in self.members.items():
            for kind, mask in members.of.items():
                found[task, kind] = int(mask.sum())
        return found

    def labels(self) -> dict[str, Tensor]:
        """{task: indices of the samples that give a row}, int64."""
        return {task: mask.nonzero().flatten() for task, mask in self.present.items()}

    def labelled(self, task: str) -> Tensor | None:
        """Indices of the samples that give a row, int64; None for all."""
        return None if self.members[task].all else self.present[task].nonzero().flatten()

    def roles(self, task: str, at: Tensor | None, dtype: torch.dtype) -> Roles:
        """Roles of the rows of a task's samples, of those at these indices or all (None)."""
        loss, kind = self.losses[task], self.kind[task]
        sample = torch.arange(len(loss), device=loss.device)
        if at is not None:
            loss, kind, sample = loss.detach()[at], kind[at], sample[at]
        return roles_of(task, sample, kind, loss, dtype)


def roles_of(task: str, sample: Tensor, kind: Tensor, loss: Tensor, dtype: torch.dtype) -> Roles:
    """Roles of the rows of one task."""
    values = loss.detach().to(torch.float64, copy=True)  # the loss may be written to later
    return Roles(torch.zeros_like(sample), sample, kind, values, (task,), dtype)
