"""Levels: which samples, and which tasks, are forgotten already, by the losses and scores of data never seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._arguments import (
    check_flag,
    check_function,
    check_number,
    check_tensors,
    held_in,
    shown,
)
from mtu_fast._checks.losses import Losses, by_task
from mtu_fast._checks.masks import KIND, Mask, kinds, presence
from mtu_fast._checks.states import check_parts
from mtu_fast.methods import FORGET, RESTING
from mtu_fast.unlearning.arguments import check_loader, check_model, several
from mtu_fast.unlearning.loop.evaluate import Measured, measure
from mtu_fast.unlearning.reading import LossFunction, ScoreFunction, scores_of

STALLED = 0.05  # share of the forget rows that are left, at or below which a task does not move


@dataclass(frozen=True)
class Held:
    """What is known of data never seen, and how far the tasks have come; made anew, never changed in place.

    Attributes:
        losses: {task: [V]}, the held-out losses, lowest first, float64.
        score: {task: held-out score}.
        kappa: {task: factor of the level of a loss}.
        resting: tasks whose score is down to the held-out one.
        left: {task: [] int64}, forget rows that had weight since the last update.
        seen: {task: [] int64}, of so many.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    score: dict[str, float] = field(default_factory=dict)
    kappa: dict[str, float] = field(default_factory=dict)
    resting: tuple[str, ...] = ()
    left: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)


class Levels:
    """f_i = 1[l_i < κ τ_t] · 1[s_t > s*_t] / n_t: forget rows at the level of data never seen lose their weight.

    τ_t is the original model's mean loss on validation data, s*_t its score there, s_t the score on
    the forget data at the last `update`, n_t the forget rows of task t in the step. A row whose loss
    has reached κ τ_t rests, and so do all rows of a task whose score has come down to s*_t. What
    rests has no weight, whatever the method, and gives no mean row. `mtu.unlearn` does all this; a
    loop of one's own takes three lines:

        levels = mtu.Levels().measure(model, validation, losses, score)           # once, before
        ...
            engine.backward(batch_losses, method, forget=levels.left(batch_losses, mask))
        ...
            levels.update(score(model, forget))  # at every evaluation, before the first step too

    κ_t is 1 until a run stalls: where at most 5 % of a task's forget rows since the last update had
    weight, and its score is above s*_t all the same, κ_t is multiplied by `growth`. (Where τ_t is
    negative, as that of a density may be, the level is τ_t + (κ_t - 1) |τ_t|, which is κ_t τ_t
    otherwise.) In a loop of your own each process goes by the rows it sees.

    Args:
        quantiles: each row has a level of its own in place of τ_t: of the n_t forget rows of a step
            that of rank j, lowest loss first from 0, rests at the (j + ½) / n_t quantile of the
            held-out losses. Losses of forgotten samples then spread as those of data never seen,
            which a membership attack looks at.
        growth: of κ_t, at least 1; 1 leaves κ_t at 1.

    Attributes:
        held: what is known, a value; a loop of your own that undoes steps assigns the one from
            before them.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: `growth` is below 1 or not finite.

    Source: ours; the held-out loss as the end of an ascent is that of ∇τ, arXiv 2403.14339.
    """

    def __init__(self, *, quantiles: bool = False, growth: float = 1.25) -> None:
        check_flag("Levels: quantiles", quantiles)
        check_number("Levels: growth", growth, "a finite number of at least 1")
        if growth < 1.0:
            raise ValueError(f"Levels: growth: found {growth}, expected a number of at least 1.")
        self._quantiles, self._growth = quantiles, float(growth)
        self.held = Held()

    @property
    def options(self) -> dict[str, Any]:
        """The arguments, as plain values: what a checkpoint compares."""
        return {"quantiles": self._quantiles, "growth": self._growth}

    @property
    def measured(self) -> bool:
        """Whether the levels are known."""
        return bool(self.held.losses)

    @property
    def tau(self) -> dict[str, float]:
        """{task: mean held-out loss of the original}."""
        return {task: float(found.mean()) for task, found in self.held.losses.items()}

    @property
    def score(self) -> dict[str, float]:
        """{task: held-out score of the original}, a copy."""
        return dict(self.held.score)

    @property
    def kappa(self) -> dict[str, float]:
        """{task: factor of the level of a loss}, a copy."""
        return dict(self.held.kappa)

    @property
    def resting(self) -> tuple[str, ...]:
        """Tasks that were at their level at the last `update`."""
        return self.held.resting

    def __repr__(self) -> str:
        chosen = f"quantiles={self._quantiles}, growth={self._growth:g}"
        return f"Levels({chosen}, tau={self.tau})" if self.measured else f"Levels({chosen})"

    def measure(
        self,
        model: nn.Module,
        validation: Iterable[Any],
        losses: LossFunction,
        score: ScoreFunction | None = None,
        generators: Iterable[torch.Generator] = (),
    ) -> Levels:
        """Losses and scores of the original model on data never seen; forgets what was known before.

        Args:
            model: the original, measured in evaluation mode.
            validation: a loader of data never seen.
            losses: `losses(model, batch)`, as for `mtu.unlearn`.
            score: `score(model, loader)` gives {task: score}, higher better; minus the mean loss by
                default.
            generators: what these functions draw from, beside the default ones.

        Returns:
            The levels themselves.

        Raises:
            TypeError: arguments of the wrong kind, or functions that do not give what they should.
            ValueError: the loader gives no batch, a loss is not finite, or there is no score.
        """
        check_model("model", model)
        check_loader("validation", validation)
        check_function("losses", losses, "model, batch")
        if score is not None:
            check_function("score", score, "model, loader")
        draws = several(generators)
        return self.take(measure("validation", model, validation, losses, score, draws))

    def take(self, found: Measured) -> Levels:
        """What `measure` measures, measured before.

        Raises:
            TypeError: something else.
            ValueError: a loss is not finite, or there is no score.
        """
        if not isinstance(found, Measured):
            raise TypeError(
                f"Levels.take: found {type(found).__name__}, expected what an evaluation gave; call levels.measure."
            )
        for task, values in found.losses.items():
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"Levels: losses: a held-out loss of task {task!r} is not finite.")
        if not found.score:
            raise ValueError("Levels: score: found that of no task, expected {task: number}.")
        # in order once: a quantile is then found by its place
        ranked = {task: values.sort().values for task, values in found.losses.items()}
        self.held = Held(ranked, dict(found.score), dict.fromkeys(ranked, 1.0))
        return self

    def left(
        self,
        losses: Losses,
        forget: Mask,
        present: Mapping[str, Tensor] | None = None,
        *,
        before: Mapping[str, Tensor] | None = None,
        after: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """{task: [N] int8}: FORGET where a row is still to be forgotten, RESTING where it is, RETAIN elsewhere.

        This is what `forget=` of the engine takes. The losses are those that the levels were
        measured by, which are not those of a step on wrong labels.

        Args:
            losses: of the step, [N] or {task: [N]}.
            forget: the mask that says what is to be forgotten, as for `Engine.backward`.
            present: {task: [N]}, the samples that have a label.
            before: {task: [M]}, losses of rows to forget that other processes have in this step,
                which `quantiles` ranks these among: those of processes before this one.
            after: likewise, of processes after this one.

        Raises:
            RuntimeError: the levels were not measured.
            TypeError: losses or masks of the wrong kind, `before` or `after` no mapping of tensors.
            ValueError: they do not fit, or a task with forget rows has no held-out loss.
        """
        if not self.measured:
            raise RuntimeError(
                "Levels: nothing is known of data never seen; call levels.measure(model, validation, losses) first."
            )
        named = by_task(losses)
        there = presence(present, named)
        of_others = _of_others("before", before), _of_others("after", after)
        found, left, seen = {}, dict(self.held.left), dict(self.held.seen)
        for task, kind in kinds(forget, named).items():
            gone = (kind == FORGET) & there[task]
            found[task] = kind
            if not self._is_known(task, gone):
                continue
            if task in self.held.resting:
                found[task] = torch.where(gone, RESTING, kind)
                continue
            others = [each.get(task) for each in of_others]
            # a row rests once its loss has come up to the level
            still = gone & self._below(task, named[task].detach().double(), gone, *others)
            found[task] = torch.where(gone & ~still, RESTING, kind)
            # counts stay on the device: a step does not wait for them
            left[task] = left.get(task, 0) + still.sum()
            seen[task] = seen.get(task, 0) + gone.sum()
        self.held = replace(self.held, left=left, seen=seen)
        return {task: kind.to(KIND) for task, kind in found.items()}

    def update(self, score: Mapping[str, float]) -> None:
        """Say how far the tasks have come: {task: score on the forget data}, of the function that `measure` took.

        Raises:
            TypeError: no mapping of numbers.
            ValueError: a score is not a number.
        """
        held, resting, kappa = self.held, [], dict(self.held.kappa)
        for task, value in scores_of(score).items():
            if math.isnan(value):
                raise ValueError(f"Levels.update: the score of task {task!r} is not a number.")
            if task not in held.score:
                continue
            # scores fall while data are forgotten: down to the held-out one is enough
            if value <= held.score[task]:
                resting.append(task)
            # all losses are at their level and the score is not: the level rises
            elif self._is_stalled(task):
                kappa[task] = self._growth * kappa[task]
        # the counts begin anew: stalled is what did not move since this update
        self.held = replace(held, resting=tuple(resting), kappa=kappa, left={}, seen={})

    def state_dict(self) -> dict[str, Any]:
        """All that is known, as plain values and tensors."""
        held = self.held
        return {
            "losses": dict(held.losses),
            "score": dict(held.score),
            "kappa": dict(held.kappa),
            "resting": list(held.resting),
            "left": dict(held.left),
            "seen": dict(held.seen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            TypeError: a state, or a part of it, of another kind.
            ValueError: a part is missing.
        """
        held_in("Levels: state", state, "resting")
        parts = check_parts("Levels: state", state, ("losses", "left", "seen"), ("score", "kappa"))
        resting = state["resting"]
        if not isinstance(resting, list | tuple) or not all(isinstance(t, str) for t in resting):
            raise TypeError(f"Levels: state: resting: found {shown(resting)}, expected task names.")
        self.held = Held(resting=tuple(resting), **parts)

    # ---- a task ----------------------------------------------------------------------------------

    def _is_known(self, task: str, gone: Tensor) -> bool:
        """Whether there is a level for the task; where there is none, nothing of it may be to forget."""
        if task in self.held.losses:
            return True
        if bool(gone.any()):
            raise ValueError(
                f"Levels: no held-out loss for task {task!r}, expected one of {list(self.held.losses)}; is there a "
                "label for it in the validation data?"
            )
        return False

    def _below(
        self,
        task: str,
        loss: Tensor,
        gone: Tensor,
        before: Tensor | None = None,
        after: Tensor | None = None,
    ) -> Tensor:
        """Which of the losses [N] are below their level, [N] bool."""
        held_out = self.held.losses[task].to(loss.device)
        # τ_t, `[]`; or a quantile for each row, `[N]`
        level = held_out.mean()
        if self._quantiles:
            level = _matching_quantiles(held_out, loss, gone, before, after)
        # κ times a positive level; one below zero rises as well
        return loss < level + (self.held.kappa[task] - 1.0) * level.abs()

    def _is_stalled(self, task: str) -> bool:
        """Whether hardly a forget row since the last update had weight."""
        seen = int(self.held.seen.get(task, 0))
        return seen > 0 and int(self.held.left[task]) <= STALLED * seen


def _of_others(name: str, losses: Any) -> Mapping[str, Tensor]:
    """{task: losses [M]} of rows that other processes have; none where nothing is given."""
    if losses is None:
        return {}
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"Levels.left: {name}: found {type(losses).__name__}, expected {{task: losses [M]}} of other processes."
        )
    for task, loss in losses.items():
        check_tensors(**{f"Levels.left: {name}[{task!r}]": loss})
        if loss.dim() != 1:
            raise ValueError(
                f"Levels.left: {name}[{task!r}]: found shape {tuple(loss.shape)}, expected one loss per row, [M]."
            )
    return losses


def _matching_quantiles(
    held_out: Tensor, loss: Tensor, gone: Tensor, before: Tensor | None, after: Tensor | None
) -> Tensor:
    """The (j + ½) / n quantile of the held-out losses [V] for the loss of rank j among the n that are `gone`, [N]."""
    none = loss[:0]
    first, last = (none if t is None else t.to(loss) for t in (before, after))
    # rows that are not `gone` come last in the order, whose inverse is the rank
    every = torch.cat([first, torch.where(gone, loss, math.inf), last])
    rank = every.argsort(stable=True).argsort()[len(first) : len(first) + len(loss)]
    count = gone.sum() + len(first) + len(last)
    # rank j of n stands for the share (j + ½) / n of the rows
    share = (rank.to(loss) + 0.5) / count.clamp(min=1)
    # sample i of V held-out losses is their (i + ½) / V quantile
    place = (share * len(held_out) - 0.5).clamp(0.0, len(held_out) - 1.0)
    below = place.floor().long()
    above = (below + 1).clamp(max=len(held_out) - 1)
    return torch.lerp(held_out[below], held_out[above], place - below)
