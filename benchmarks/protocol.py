"""How every method is tried: one way to draw batches, one stop, one choice, one judge, on any data.

Every method gets the same care: the same number of (alpha, lr) settings, the same batches, plain
SGD on a direction clipped to one global norm (which keeps orthogonality). A run stops when its mean
forget score over the target tasks is down to the level (the original's score on validation data;
chance for a class), or at the step limit; or it settles there (`benchmarks.settling`). The setting
that counts is the one with the lowest UIS on validation data, among those that reached the level;
test data serve the final table alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks.data import Dataset, Samples, concat
from benchmarks.settling import Settling
from mtu_fast.unlearning import metrics

Table = dict[str, dict[str, float]]  # {split: {task: score}}
Grid = tuple[tuple[float, float], ...]  # (alpha, lr)
Losses = Mapping[str, Tensor]
Mask = dict[str, Tensor]
Tick = Callable[[int], object]  # told how many epochs or steps are over
Look = Callable[[int, nn.Module], Mapping[str, Any]]  # (step, model) to what goes into the history
REPORTED = ("forget", "retain", "test")
CHUNK = 64  # samples of a forward without gradients


@dataclass(frozen=True)
class Problem:
    """What is unlearned from: the tasks, those of the partial request, the net, its losses {task: [N]} and scores.

    `classes` {task: how many}, of the tasks whose label is one class a sample: only from these can
    a class be forgotten.
    """

    name: str
    tasks: tuple[str, ...]
    partial: tuple[str, ...]
    net: Callable[[], nn.Module]
    losses: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]
    scores: Callable[[nn.Module, Any], dict[str, float]]
    classes: Mapping[str, int] = field(default_factory=dict)

    @property
    def requests(self) -> dict[str, tuple[str, ...]]:
        """{request: tasks to forget from}."""
        return {"full": self.tasks, "partial": self.partial}


@dataclass(frozen=True)
class Protocol:
    """How much of everything; `grids` {family: (alpha, lr) settings}, equally many in each."""

    epochs: int = 60
    peak: float = 4e-3  # learning rate of training
    batch: int = 32  # samples of a training step
    retain_batch: int = 32  # samples of each side of an unlearning step
    forget_batch: int = 16
    steps: int = 160  # at most
    every: int = 2  # steps between evaluations
    clip: float = 0.1  # global norm of a direction
    watch: bool = True  # score the retain data on the way too
    # rows of a subspace for each retain row of a step; with fewer, less is left of the forget
    # gradient
    kept: int = 4
    grids: dict[str, Grid] = field(default_factory=dict)


@dataclass(frozen=True)
class Situation:
    """What a method may use for its state: all but the test data."""

    problem: Problem
    protocol: Protocol
    engine: mtu.Engine
    model: nn.Module
    method: mtu.Method
    parts: Mapping[str, Dataset]
    targets: tuple[str, ...]
    generator: torch.Generator


# (losses, forget mask, present) to `.grad`
Step = Callable[[Losses, Mask, Mapping[str, Tensor]], object]


def plain(situation: Situation) -> Step:
    """`.grad` by the engine alone: for methods that need nothing but the step's rows."""

    def step(losses: Losses, forget: Mask, present: Mapping[str, Tensor]) -> object:
        return situation.engine.backward(losses, situation.method, forget=forget, present=present)

    return step


def unseen(step: int, model: nn.Module) -> dict[str, Any]:
    """Nothing is looked at on the way."""
    return {}


def unchanged(batch: Samples, forget: Mask, generator: torch.Generator) -> tuple[Samples, Mask]:
    """The batch as drawn."""
    return batch, forget


@dataclass(frozen=True)
class Entry:
    """One line of the table of methods.

    Attributes:
        make: alpha -> the method, anew for each run.
        reference: its name in `mtu_fast.reference.backward`, or a function (parameters, losses,
            forget, alpha) that leaves the direction in `.grad`; None where there is none.
        family: whose settings are searched.
        prepare: changes a batch and its mask before the forward (random labels).
        begin: makes the step of one run, with its state (schedules, subspaces).
        period: steps after which the work of a step repeats, where some do more than others.
    """

    name: str
    make: Callable[[float], mtu.Method]
    reference: str | Callable[[Sequence[Tensor], Losses, Mask, float], object] | None = None
    family: str = "protective"
    prepare: Callable[[Samples, Mask, torch.Generator], tuple[Samples, Mask]] = unchanged
    begin: Callable[[Situation], Step] = plain
    period: Callable[[Protocol, Mapping[str, Dataset]], int] = lambda protocol, parts: 1


# ---- unlearning ----------------------------------------------------------------------------------


@dataclass
class Run:
    """One unlearning run: its setting, how it went, its model and the scores that decide.

    `seconds`: processor time of the steps, forward to update, without evaluations.
    """

    alpha: float
    lr: float
    reached: bool
    steps: int
    history: list[dict[str, Any]]
    model: nn.Module
    uis_validation: float = float("nan")
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """All but history and model."""
        return {
            name: value for name, value in vars(self).items() if name not in ("history", "model")
        }


def draw(
    problem: Problem, parts: Mapping[str, Dataset], targets: tuple[str, ...], protocol: Protocol,
    generator: torch.Generator,
) -> tuple[Samples, Mask]:  # fmt: skip
    """One step's batch, retain samples first, and its mask {task: [N] bool}: True on (forget sample, target task).

    Retain samples are drawn from `parts["available"]` where only a part of them is still at hand.
    """
    kept = parts.get("available", parts["retain"])
    retain, forget = (
        _some(kept, protocol.retain_batch, generator),
        _some(parts["forget"], protocol.forget_batch, generator),
    )
    last = torch.arange(len(retain) + len(forget)) >= len(retain)
    mask = {task: last if task in targets else torch.zeros_like(last) for task in problem.tasks}
    return concat(retain, forget), mask


def _some(data: Dataset, count: int, generator: torch.Generator) -> Samples:
    return data[torch.randperm(len(data), generator=generator)[:count]]


def unlearn(
    problem: Problem, original: nn.Module, parts: Mapping[str, Dataset], targets: tuple[str, ...], entry: Entry,
    alpha: float, lr: float, level: Mapping[str, float], protocol: Protocol, seed: int, tick: Tick,
    look: Look = unseen, levels: mtu.Levels | None = None, settling: Settling | None = None,
) -> Run:  # fmt: skip
    """Unlearn parts["forget"] from the target tasks until the mean of their forget scores is at most that of `level`.

    `look` (step, model) adds what it finds to the history at every evaluation; `levels` says which
    forget samples and tasks still weigh; with `settling` the run goes on at the level, to its last
    step.
    """
    model, generator = copy.deepcopy(original), torch.Generator().manual_seed(seed)
    # batches are the same for every method
    engine, private = mtu.Engine(model), torch.Generator().manual_seed(seed)
    situation = Situation(
        problem, protocol, engine, model, entry.make(alpha), parts, targets, private
    )
    step = entry.begin(situation)
    # no momentum: it moves the weights even where d is zero
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    watched = ("forget", "retain") if protocol.watch else ("forget",)
    goal, seconds, history = mean_of(level, targets), 0.0, list[dict[str, Any]]()
    for count in range(protocol.steps + 1):
        if count % protocol.every == 0 or count == protocol.steps:
            found = {split: problem.scores(model, parts[split]) for split in watched}
            history.append({"step": count} | found | dict(look(count, model)))
            scores = found["forget"]
            if levels is not None:
                levels.update(scores)
            down = mean_of(scores, targets) <= goal
            if down and settling is not None:
                settling.look(count, model, history)
            if count == protocol.steps or (down and settling is None):
                break
        if settling is not None:
            optimizer.param_groups[0]["lr"] = lr * settling.rate(count)
        drawn, mask = draw(problem, parts, targets, protocol, generator)
        batch, mask = entry.prepare(drawn, mask, private)
        began = time.process_time()
        optimizer.zero_grad()
        outputs, there = model(batch.image), metrics.present(batch.labels)
        if levels is not None:  # by the true labels, where the method has others
            mask = levels.left(problem.losses(outputs, drawn.labels), mask, there)
        step(problem.losses(outputs, batch.labels), mask, there)
        nn.utils.clip_grad_norm_(model.parameters(), protocol.clip)
        optimizer.step()
        seconds += time.process_time() - began
        tick(1)
    if settling is not None and settling.begun is not None:
        down, history = True, settling.put_back(model, history)
    return Run(alpha, lr, down, count, history, model, seconds=seconds)


def mean_of(scores: Mapping[str, float], targets: Sequence[str]) -> float:
    """The mean score of the target tasks."""
    return sum(scores[task] for task in targets) / len(targets)


def unseen_level(
    problem: Problem, original: nn.Module, parts: Mapping[str, Dataset], targets: tuple[str, ...]
) -> dict[str, float]:
    """{target: the original's score on validation data}, what a forget score comes down to."""
    found = problem.scores(original, parts["validation"])
    return {task: found[task] for task in targets}


class HeldOut:
    """UIS with validation data in place of test data: what settings are chosen by, and models of a run that settles."""

    def __init__(
        self, problem: Problem, original: nn.Module, parts: Mapping[str, Dataset], targets: tuple[str, ...],
        removal: str = "instance",
    ) -> None:  # fmt: skip
        self._problem, self._parts = problem, parts
        before = {
            "forget": problem.scores(original, parts["forget"]), "test": self._unseen(original)
        }  # fmt: skip
        self._uis = partial(metrics.uis, before, targets=targets, removal=removal)

    def __call__(self, model: nn.Module, forget: Mapping[str, float]) -> float:
        """That of a model with these scores on the forget data."""
        return self._uis({"forget": forget, "test": self._unseen(model)})

    def of(self, run: Run) -> float:
        """That of what a run came to."""
        return self(run.model, run.history[-1]["forget"])

    def _unseen(self, model: nn.Module) -> dict[str, float]:
        return self._problem.scores(model, self._parts["validation"])


def search(
    problem: Problem, original: nn.Module, parts: Mapping[str, Dataset], targets: tuple[str, ...], entry: Entry,
    protocol: Protocol, seed: int, tick: Tick,
) -> list[Run]:  # fmt: skip
    """Every setting of a method's family, the one that counts first: level reached, then lowest validation UIS."""
    level = unseen_level(problem, original, parts, targets)
    held_out = HeldOut(problem, original, parts, targets)
    runs = []
    for alpha, lr in protocol.grids[entry.family]:
        run = unlearn(
            problem, original, parts, targets, entry, alpha, lr, level, protocol, seed, tick
        )
        run.uis_validation = held_out.of(run)
        runs.append(run)
        tick(protocol.steps - run.steps)
    return sorted(runs, key=lambda run: (not run.reached, run.uis_validation))


# ---- judging -------------------------------------------------------------------------------------


def table(problem: Problem, model: nn.Module, parts: Mapping[str, Dataset]) -> Table:
    """Scores on the three splits that are reported."""
    return {name: problem.scores(model, parts[name]) for name in REPORTED}


def judge(
    o: Table, u: Table, r: Table, targets: tuple[str, ...], removal: str = "instance"
) -> dict[str, Any]:
    """Every score of `mtu_fast.unlearning.metrics` that compares the original, an unlearned and the retrained model."""
    tow = metrics.tow(u, r)
    return {
        "uis": metrics.uis(o, u, targets, removal), "mean_gap": metrics.mean_gap(u, r), "gaps": metrics.gaps(u, r),
        "tow": sum(tow.values()) / len(tow), "over_forgotten": metrics.over_forgotten(u, r, targets),
    }  # fmt: skip


@torch.no_grad()
def sample_losses(problem: Problem, model: nn.Module, data: Dataset) -> dict[str, Tensor]:
    """The losses of the samples that have a label, {task: [n]}: the loss of one without is 0, which says nothing."""
    found: dict[str, list[Tensor]] = {task: [] for task in problem.tasks}
    for batch in chunks(data):
        losses, there = (
            problem.losses(model(batch.image), batch.labels),
            metrics.present(batch.labels),
        )
        for task, pieces in found.items():
            pieces.append(losses[task][there[task]])
    return {task: torch.cat(pieces) for task, pieces in found.items()}


def mean_losses(problem: Problem, model: nn.Module, data: Dataset) -> dict[str, float]:
    """{task: mean loss over the samples with a label}, of the tasks that have any."""
    return {
        task: loss.mean().item()
        for task, loss in sample_losses(problem, model, data).items()
        if len(loss)
    }


def chunks(data: Dataset) -> Iterator[Samples]:
    """All samples, a few at a time."""
    return (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))
