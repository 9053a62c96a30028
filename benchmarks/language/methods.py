"""The methods that the language benchmark tries: one line each."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks.data import Samples
from benchmarks.language import model
from benchmarks.methods import METHODS as GENERAL
from benchmarks.methods import OURS
from benchmarks.protocol import Entry, Losses, Mask, Situation, Step
from mtu_fast.losses import npo

BETA = 0.1


class Preference:
    """NPO beside a retain loss: forget losses are replaced by `mtu_fast.losses.npo` of them and a frozen original's."""

    batch: Samples
    model: nn.Module
    frozen: nn.Module

    def prepare(
        self, batch: Samples, forget: Mask, generator: torch.Generator
    ) -> tuple[Samples, Mask]:
        """The batch as drawn, which the step then looks at."""
        self.batch = batch
        return batch, forget

    def begin(self, situation: Situation) -> Step:
        """The step of one run."""
        self.frozen = copy.deepcopy(situation.model).requires_grad_(False)

        def step(losses: Losses, forget: Mask, present: Mask) -> object:
            changed = self._preferred(losses, forget)
            return situation.engine.backward(
                changed, situation.method, forget=forget, present=present
            )

        return cast(Step, step)

    def _preferred(self, losses: Losses, forget: Mask) -> dict[str, Tensor]:
        """A method ascends forget losses as they are here, and descends the others."""
        with torch.no_grad():
            held = model.losses(self.frozen(self.batch.image), self.batch.labels, reduction="sum")
        found = {}
        for task, loss in losses.items():
            summed = loss * model.counts(self.batch.labels, task)
            found[task] = torch.where(forget[task], npo(summed, held[task], beta=BETA), loss)
        return found


_PREFERENCE = Preference()

ENTRIES: tuple[Entry, ...] = (
    GENERAL["Ascent"],
    GENERAL["GradDiff"],
    Entry(
        "NPO",
        mtu.GradDiff,
        family="protective",
        prepare=_PREFERENCE.prepare,
        begin=_PREFERENCE.begin,
    ),
    GENERAL["OrthoGrad"],
    GENERAL[OURS],
)
METHODS = {entry.name: entry for entry in ENTRIES}
