"""What a step of each method costs: timed alone, by one thread, on an untrained net, beside the slow reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks import cases, protocol
from benchmarks.cases import Case, Choice
from benchmarks.data import Dataset, Samples
from benchmarks.environment import environment
from benchmarks.measure import Times, interleaved
from benchmarks.methods import METHODS
from benchmarks.pool import Job, do, one_thread
from benchmarks.protocol import Entry, Mask
from mtu_fast import reference

WholeStep = Callable[[Samples, Mask], None]
REQUESTS = ("full", "partial")
SEED = 1


def sides(
    case: Case,
    parts: Mapping[str, Dataset],
    request: str,
    entry: Entry,
    model: nn.Module,
    generator: torch.Generator,
) -> dict[str, WholeStep]:
    """A whole step on a batch, forward to `.grad`: {fast: by the engine, reference: by the slow one, if there is}."""
    problem, alpha = case.problem, case.protocol.grids[entry.family][0][0]
    situation = protocol.Situation(
        problem,
        case.protocol,
        mtu.Engine(model),
        model,
        entry.make(alpha),
        parts,
        problem.requests[request],
        generator,
    )
    engine_step = entry.begin(situation)

    def losses(batch: Samples) -> dict[str, Tensor]:
        model.zero_grad()
        return problem.losses(model(batch.image), batch.labels)

    def fast(batch: Samples, mask: Mask) -> None:
        engine_step(losses(batch), mask, {})

    def slow(batch: Samples, mask: Mask) -> None:
        if callable(entry.reference):
            entry.reference(list(model.parameters()), losses(batch), mask, alpha)
        elif entry.reference is not None:
            options: dict[str, Any] = (
                {"alpha": alpha} if "alpha" in reference.METHODS[entry.reference].options() else {}
            )
            reference.backward(
                list(model.parameters()), losses(batch), entry.reference, forget=mask, **options
            )

    steps: dict[str, WholeStep] = {"fast": fast}
    return steps | ({"reference": slow} if entry.reference is not None else {})


def step_times(choice: Choice, request: str, name: str) -> tuple[str, str, dict[str, float]]:
    """(request, method, {fast, reference: ms of a step; ratio of the two}), medians over rounds.

    A round is one period of the method (`Entry.period`), of which the mean is taken, and one step
    of the reference, which does the same work in each. The net is untrained: training changes no
    shape.
    """
    case, parts, entry = cases.load(choice), cases.parts(choice, SEED), METHODS[name]
    torch.manual_seed(SEED)
    model, generator = case.problem.net(), torch.Generator().manual_seed(SEED)
    competitors = sides(case, parts, request, entry, model, generator)
    targets, counts = (
        case.problem.requests[request],
        {"fast": entry.period(case.protocol, parts), "reference": 1},
    )
    # one a round, the first to warm up: a subspace must not take in the same rows again
    batches = [
        entry.prepare(
            *protocol.draw(case.problem, parts, targets, case.protocol, generator), generator
        )
        for _ in range(1 + case.rounds)
    ]

    def rounds(side: str) -> Callable[[], None]:
        step, turns = competitors[side], iter(batches)

        def one() -> None:
            batch, mask = next(turns)
            for _ in range(counts[side]):
                step(batch, mask)

        return one

    measured = interleaved({side: rounds(side) for side in competitors}, case.rounds)
    times = {
        side: Times(tuple(ms / counts[side] for ms in found.rounds))
        for side, found in measured.items()
    }
    found = {side: mine.median for side, mine in times.items()}
    if "reference" in times:
        found["ratio"] = times["reference"].ratio(times["fast"])[0]
    return request, name, found


def all_times(choice: Choice, names: Sequence[str]) -> dict[str, Any]:
    """What a result says of time: {times: {request: {method: as `step_times`}}, times_environment}."""
    timings: list[Job] = [
        (step_times, (choice, request, name)) for request in REQUESTS for name in names
    ]
    times: dict[str, dict[str, Any]] = {request: {} for request in REQUESTS}
    for request, name, found in do(timings, 1, "ms a step"):
        times[request][name] = found
    with one_thread():
        return {"times": times, "times_environment": environment()}
