"""What one process does for the table of unlearning: train a net, or make one run and write its record."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

import mtu_fast as mtu
from benchmarks import cases, protocol
from benchmarks.cases import Case
from benchmarks.environment import environment
from benchmarks.methods import METHODS
from benchmarks.protocol import Run, chunks, sample_losses
from benchmarks.requests import Parts, Request, arrange, level
from benchmarks.settling import Settling
from benchmarks.training import retrain, train
from benchmarks.unlearning_records import MODELS, SEARCHED, Attempt, Mode, Store
from benchmarks.unlearning_scores import compare, kept_rise

LOOKS = 5  # evaluations from one measurement of the drift to the next


def net_job(store: Store, request: Request | None, seed: int) -> None:
    """Train the original net of a seed (request None), or the ideal of a request, unless it is there."""
    if store.net(net_name(request), seed).exists():
        return
    case, parts = cases.load(store.choice), cases.parts(store.choice, seed)
    if request is None:
        model = train(case.problem, parts["train"], case.protocol, seed, _silent)
    else:
        last = arrange(parts, request, case.problem, seed)[-1]
        kind = "full" if request.kind == "full" else "partial"
        gone = {**last, "forget": last["gone"]}
        model = retrain(case.problem, gone, kind, case.protocol, seed, _silent)
    store.put_net(net_name(request), seed, model.state_dict())


def net_name(request: Request | None) -> str:
    """The name of a net: retraining does not depend on what is still at hand."""
    return "original" if request is None else dataclasses.replace(request, keep="all").name


def attempt_job(store: Store, attempt: Attempt) -> None:
    """Make one run and write its record, unless it is there; on the seed of the search without test data."""
    if store.get(attempt) is not None:
        return
    case = cases.load(store.choice)
    rounds = arrange(
        cases.parts(store.choice, attempt.seed), attempt.request, case.problem, attempt.seed
    )
    before = _net(case, store, None, attempt.seed)
    record: dict[str, Any] = {"date": environment()["date"], "torch": torch.__version__}
    model = before
    if attempt.method == "original":
        record["level"] = aim(case, before, rounds[-1], attempt)
    elif attempt.method not in MODELS:
        run = _run(case, before, rounds, attempt)
        model, record = run.model, record | _summary(run, attempt)
    if attempt.seed != SEARCHED:
        ideal = _net(case, store, attempt.request, attempt.seed)
        model = ideal if attempt.method == "retrained" else model
        asked = {**rounds[-1], "forget": rounds[-1]["gone"]}
        targets = attempt.request.targets(case.problem)
        record |= compare(
            case.problem, asked, targets, before, model, ideal, attempt.request.removal
        )
    store.put(attempt, record)


def _run(case: Case, original: nn.Module, rounds: list[Parts], attempt: Attempt) -> Run:
    """One run a round, each from where the last one ended; steps, time and history of all."""
    done = [_round(case, original, rounds[0], attempt)]
    for parts in rounds[1:]:
        done.append(_round(case, done[-1].model, parts, attempt))
    last = done[-1]
    last.history = [{"round": i} | seen for i, run in enumerate(done) for seen in run.history]
    last.steps, last.seconds = sum(run.steps for run in done), sum(run.seconds for run in done)
    last.reached = all(run.reached for run in done)
    return last


def _round(case: Case, model: nn.Module, parts: Parts, attempt: Attempt) -> Run:
    problem, targets = case.problem, attempt.request.targets(case.problem)
    look = protocol.unseen
    if attempt.seed != SEARCHED:
        look = Drift(case, model, parts, targets)
    held_out = protocol.HeldOut(problem, model, parts, targets, attempt.request.removal)
    is_levelled, settles = attempt.mode is not Mode.PLAIN, attempt.mode is Mode.SETTLED
    run = protocol.unlearn(
        problem, model, parts, targets, METHODS[attempt.method], attempt.alpha, attempt.lr,
        aim(case, model, parts, attempt), case.protocol, attempt.seed, _silent, look,
        levels(case, model, parts, attempt) if is_levelled else None,
        Settling(held_out, case.protocol.steps) if settles else None,
    )  # fmt: skip
    run.uis_validation = held_out.of(run)
    return run


def aim(case: Case, model: nn.Module, parts: Parts, attempt: Attempt) -> dict[str, float]:
    """{target: score that a run comes down to}."""
    targets = attempt.request.targets(case.problem)
    unseen = protocol.unseen_level(case.problem, model, parts, targets)
    return level(case.problem, attempt.request, unseen)


def levels(case: Case, model: nn.Module, parts: Parts, attempt: Attempt) -> mtu.Levels:
    """What forget samples and tasks come to rest at: losses and scores of unseen data; those of chance for a class."""
    problem = case.problem
    found = mtu.Levels().measure(
        model,
        list(chunks(parts["validation"])),
        lambda net, batch: problem.losses(net(batch.image), batch.labels),
        score=lambda net, batches: problem.scores(net, parts["validation"]),
    )
    if attempt.request.kind == "class":
        held = found.held
        (task,) = attempt.request.targets(problem)
        guess = torch.full_like(held.losses[task], math.log(problem.classes[task]))
        score = held.score | level(problem, attempt.request, {task: held.score[task]})
        found.held = dataclasses.replace(held, losses=held.losses | {task: guess}, score=score)
    return found


class Drift:
    """What the history of a run says at every `LOOKS`-th evaluation: the mean rise of the loss of what is kept."""

    def __init__(
        self, case: Case, original: nn.Module, parts: Parts, targets: tuple[str, ...]
    ) -> None:
        self.case, self.parts, self.targets = case, parts, targets
        self.before = self._losses(original)

    def _losses(self, model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
        problem = self.case.problem
        return {s: sample_losses(problem, model, self.parts[s]) for s in ("retain", "forget")}

    def __call__(self, step: int, model: nn.Module) -> dict[str, float]:
        """{drift} where it is time for it."""
        if step % (LOOKS * self.case.protocol.every):
            return {}
        return {"drift": kept_rise(self.before, self._losses(model), self.targets).mean().item()}


def _summary(run: Run, attempt: Attempt) -> dict[str, Any]:
    """What a record says of a run; of one of the table the way it went, as far as its drift was looked at."""
    found = run.summary() | {"ms": 1e3 * run.seconds / max(run.steps, 1)}
    if attempt.seed == SEARCHED:
        return found
    last = run.history[-1]
    return found | {"history": [seen for seen in run.history if "drift" in seen or seen is last]}


def _net(case: Case, store: Store, request: Request | None, seed: int) -> nn.Module:
    model = case.problem.net()
    model.load_state_dict(torch.load(store.net(net_name(request), seed)))
    return model


def _silent(_count: int) -> None:
    """Progress is shown by the process that hands out the jobs."""
