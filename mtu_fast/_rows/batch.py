"""What one call is given, checked and uniform: losses, who is to be forgotten, who has a label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mtu_fast._checks.flags import AT_ONCE, Flags
from mtu_fast._checks.losses import Losses, named_losses
from mtu_fast._checks.masks import Mask, kinds, on_host, presence
from mtu_fast.methods import FORGET, RETAIN, Roles
from mtu_fast.methods.roles import ABSENT

Host = bool | Tensor | None  # what the host knows of a mask: a value for all, the mask, or nothing


class Members(NamedTuple):
    """The samples of a task that give rows.

    Attributes:
        of: kind -> mask `[N]`; kinds that surely have no sample are left out.
        all: whether every sample gives a row.
    """

    of: dict[int, Tensor]
    all: bool


class Labelled(NamedTuple):
    """The rows of a task.

    Attributes:
        at: indices of the samples that give a row, int64; None for all.
        mask: `[N]` bool, the samples with a label, where the others give a row of zeros; None where
            they give none.
    """

    at: Tensor | None = None
    mask: Tensor | None = None

    def count(self, loss: Tensor) -> int:
        """The number of rows R of losses `[N]`."""
        return len(loss) if self.at is None else len(self.at)

    def spread(self, w: Tensor, loss: Tensor) -> Tensor:
        """Weights `[R]` of the rows as weights `[N]` of the samples: 0 for those without a label."""
        if self.at is not None:
            # [R] to [N] by position: `at` ascends and no sample gives two rows
            return w.new_zeros(len(loss)).index_copy(0, self.at, w)
        return w if self.mask is None else torch.where(self.mask, w, 0)


@dataclass(frozen=True)
class Batch:
    """The losses of one call.

    Attributes:
        losses: `{task: [N]}`, with their graph.
        kind: `{task: [N]}` int64, RETAIN or FORGET.
        present: `{task: [N]}` bool, the samples that have a label for the task.
        host: `{task: (forget, present)}`, what the host knows of these masks.
        flags: of the call.
        allows_absent: whether a sample without a label may give a row of zeros.
    """

    losses: dict[str, Tensor]
    kind: dict[str, Tensor]
    present: dict[str, Tensor]
    host: dict[str, tuple[Host, Host]]
    flags: Flags = AT_ONCE
    allows_absent: bool = False

    @staticmethod
    def of(
        losses: Losses,
        forget: Mask,
        present: Mapping[str, Tensor] | None,
        flags: Flags = AT_ONCE,
        allows_absent: bool = False,
    ) -> Batch:
        """What the user handed over.

        Raises:
            TypeError: arguments of the wrong kind.
            ValueError: losses or masks that are not as described.
        """
        named = named_losses(losses, flags)
        of_kind, there = kinds(forget, named, flags), presence(present, named)
        host = {}
        for task, loss in named.items():
            of_forget = on_host(forget, task, loss, default=False)
            host[task] = of_forget, on_host(present, task, loss, default=True)
        return Batch(named, of_kind, there, host, flags, allows_absent)

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
        """Who gives rows, per task: kinds without a sample are left out. One wait for the device at most."""
        masks = {task: self._masks(task) for task in self.losses}
        flags: dict[str, Tensor] = {}
        known: dict[str, list[bool]] = {}
        for task in self.losses:
            # masks that came from the host are answered there, without a wait
            on_host = self._known(task)
            if on_host is None:
                of_kind = [mask.any() for mask in masks[task]]
                flags[task] = torch.stack([*of_kind, self.present[task].all()])
            else:
                known[task] = on_host
        if flags:
            # one transfer for all tasks, `[T, 3]`
            known |= zip(flags, torch.stack(list(flags.values())).tolist(), strict=True)
        return {task: _members(masks[task], known[task]) for task in self.losses}

    def _masks(self, task: str) -> list[Tensor]:
        """The samples to retain and to forget, `[N]` bool each."""
        kind, present = self.kind[task], self.present[task]
        if self.host[task][1] is True:
            return [kind == which for which in (RETAIN, FORGET)]
        return [(kind == which) & present for which in (RETAIN, FORGET)]

    def _known(self, task: str) -> list[bool] | None:
        """Whether there are samples to retain, to forget, and none without a label; None if only the device knows."""
        forget, present = self.host[task]
        if forget is None or present is None:
            return None
        count = len(self.losses[task])
        # the common case: one kind for the batch, every sample labelled
        if isinstance(forget, bool) and present is True:
            return [not forget and count > 0, forget and count > 0, True]
        forget, present = (
            mask if isinstance(mask, Tensor) else torch.full((count,), mask)
            for mask in (forget, present)
        )
        return [
            bool((~forget & present).any()),
            bool((forget & present).any()),
            bool(present.all()),
        ]

    @cached_property
    def _numbers(self) -> Tensor:
        """Those of the samples, `[N]`, the same for all tasks."""
        return torch.arange(len(next(iter(self.losses.values()))), device=self.device)

    @cached_property
    def sample_members(self) -> dict[str, Members]:
        """The same for rows per sample: where only a GPU knows of a kind whether it has samples, it stays."""
        if not self.flags.deferred:
            return self.members
        found = {}
        for task in self.losses:
            forget, present = self.host[task]
            known = self._known(task) if isinstance(forget, Tensor) else None
            there = known or [forget is not True, forget is not False, present is True]
            found[task] = _members(self._masks(task), there)
        return found

    def kinds(self, task: str) -> frozenset[int] | None:
        """The kinds of a task's rows; None where the host does not know."""
        there = self._known(task)
        if there is None:
            return None
        return frozenset(kind for kind, some in zip((RETAIN, FORGET), there, strict=False) if some)

    def counts(self) -> dict[tuple[str, int], int]:
        """{(task, kind): samples that give a row}, of those that have any."""
        found = {}
        for task, members in self.members.items():
            for kind, mask in members.of.items():
                found[task, kind] = int(mask.sum())
        return found

    def labels(self) -> dict[str, Labelled]:
        """{task: the samples that give a row}."""
        return {task: self.labelled(task) for task in self.losses}

    def labelled(self, task: str) -> Labelled:
        """The samples that give a row."""
        present = self.host[task][1]
        if present is True:
            return Labelled()
        mask = self.present[task]
        if isinstance(present, Tensor):
            if bool(present.all()):
                return Labelled()
            return Labelled(present.nonzero().flatten().to(mask.device, non_blocking=True))
        if self.allows_absent and self.flags.deferred:
            return Labelled(mask=mask)
        return Labelled() if self.members[task].all else Labelled(mask.nonzero().flatten())

    def roles(self, task: str, labelled: Labelled, dtype: torch.dtype) -> Roles:
        """Roles of the rows of a task's samples."""
        loss, kind, sample = self.losses[task], self.kind[task], self._numbers
        if labelled.at is not None:
            at = labelled.at
            # [R] of [N]: the sample keeps its number in the batch
            loss, kind, sample = loss.detach()[at], kind[at], sample[at]
        if labelled.mask is not None:
            kind = torch.where(labelled.mask, kind, ABSENT)
        return roles_of(task, sample, kind, loss, dtype)


def _members(masks: list[Tensor], known: list[bool]) -> Members:
    named = zip((RETAIN, FORGET), masks, known, strict=False)
    return Members({which: mask for which, mask, there in named if there}, known[-1])


def roles_of(task: str, sample: Tensor, kind: Tensor, loss: Tensor, dtype: torch.dtype) -> Roles:
    """Roles of the rows of one task."""
    values = loss.detach().to(torch.float64, copy=True)  # the loss may be written to later
    return Roles(torch.zeros_like(sample), sample, kind, values, (task,), dtype)
