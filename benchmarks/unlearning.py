"""Every method, full-task and partial-task, over several seeds, against retraining: the table of unlearning.

    python -m benchmarks.unlearning [--data {digits,rooms,nyuv2,cityscapes}] [--root PATH] [--seeds 3]
                                    [--methods OrthoGrad,PCGrad] [--quick] [--workers 2] [--out DIR]

A net memorises the data; each method unlearns F from all tasks (full) or from the tasks of the partial request, whose
other tasks are then data to keep, by the protocol of `benchmarks.protocol`. Nets are trained and runs made in processes
of one thread each; a seed gives the same numbers however many there are. Steps are timed afterwards, alone, by one
thread too.

It prints the table and writes it as `unlearning_<data>.txt`, with `.csv` (a row a seed, request and method), `.json`
(all of it) and `.png`. Seeds count from 1: the settings were chosen on seed 0. NYUv2 and Cityscapes are read from
--root, in the layout that `benchmarks.data.folder` describes.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mtu_fast as mtu
from benchmarks import cases, protocol
from benchmarks.cases import Case, Choice
from benchmarks.data import Dataset
from benchmarks.environment import environment
from benchmarks.measure import interleaved
from benchmarks.methods import METHODS
from benchmarks.protocol import Entry
from benchmarks.unlearning_report import COLUMNS, plot, text
from benchmarks.unlearning_scores import compare
from mtu_fast import reference

State = dict[str, Tensor]
Row = dict[str, Any]
Job = tuple[Callable[..., Any], tuple[Any, ...]]
REQUESTS = ("full", "partial")
FIRST = 1  # seed 0 is what the settings of `cases` were chosen on

# ---- what a process does --------------------------------------------------------------------------------------------


def train_job(choice: Choice, seed: int, which: str) -> tuple[int, str, State]:
    """Train the original net of a seed, or the ideal of a request."""
    case, parts = cases.load(choice), cases.parts(choice, seed)
    if which == "original":
        model = protocol.train(case.problem, parts["train"], case.protocol, seed, _silent)
    else:
        model = protocol.retrain(case.problem, parts, which, case.protocol, seed, _silent)
    return seed, which, model.state_dict()


def unlearn_job(choice: Choice, seed: int, request: str, name: str, original: State, ideal: State) -> Row:
    """Search one method's settings and score the run that counts; "original" and "retrained" are scored as they are."""
    case, parts = cases.load(choice), cases.parts(choice, seed)
    targets = case.problem.requests[request]
    before, retrained = net_of(case, original), net_of(case, ideal)
    row: Row = {"seed": seed, "request": request, "method": name}
    model = {"original": before, "retrained": retrained}.get(name)
    if model is None:
        runs = protocol.search(case.problem, before, parts, targets, METHODS[name], case.protocol, seed, _silent)
        model, row = runs[0].model, row | runs[0].summary() | {"tried": [run.summary() for run in runs]}
    return row | compare(case.problem, parts, targets, before, model, retrained)


def net_of(case: Case, state: State) -> nn.Module:
    """The problem's net with these weights."""
    model = case.problem.net()
    model.load_state_dict(state)
    return model


def _silent(_count: int) -> None:
    """Progress is shown by the process that hands out the jobs."""


# ---- cost -----------------------------------------------------------------------------------------------------------


def sides(
    case: Case, parts: Mapping[str, Dataset], request: str, entry: Entry, model: nn.Module, seed: int
) -> dict[str, Callable[[], None]]:
    """A whole step on one batch, forward to `.grad`: {fast: by the engine, reference: by the slow one, if there is}."""
    problem, setting = case.problem, case.protocol
    alpha, generator = setting.grids[entry.family][0][0], torch.Generator().manual_seed(seed)
    targets, engine = problem.requests[request], mtu.Engine(model)
    batch, mask = protocol.draw(problem, parts, targets, setting, generator)
    batch, mask = entry.prepare(batch, mask, generator)
    engine_step = entry.begin(
        protocol.Situation(problem, setting, engine, model, entry.make(alpha), parts, targets, generator)
    )

    def losses() -> dict[str, Tensor]:
        model.zero_grad()
        return problem.losses(model(batch.image), batch.labels)

    def fast() -> None:
        engine_step(losses(), mask, {})

    def slow() -> None:
        if callable(entry.reference):
            entry.reference(list(model.parameters()), losses(), mask, alpha)
        elif entry.reference is not None:
            options: dict[str, Any] = {"alpha": alpha} if "alpha" in reference.METHODS[entry.reference].options else {}
            reference.backward(list(model.parameters()), losses(), entry.reference, forget=mask, **options)

    return {"fast": fast} | ({"reference": slow} if entry.reference is not None else {})


def step_times(
    choice: Choice, seed: int, request: str, name: str, original: State
) -> tuple[str, str, dict[str, float]]:
    """(request, method, {fast, reference: median ms of a step; ratio: median of the rounds' ratios})."""
    case, parts = cases.load(choice), cases.parts(choice, seed)
    competitors = sides(case, parts, request, METHODS[name], net_of(case, original), seed)
    times = interleaved(competitors, case.rounds)
    found = {side: measured.median for side, measured in times.items()}
    if "reference" in times:
        found["ratio"] = times["reference"].ratio(times["fast"])[0]
    return request, name, found


# ---- the whole ------------------------------------------------------------------------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """What a process of the pool runs under: results then do not depend on the number of processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def do(jobs: Sequence[Job], workers: int, title: str) -> list[Any]:
    """The jobs' results, in the order in which they end; in this process if there is one worker."""
    with tqdm(total=len(jobs), desc=title, unit="job") as bar, one_thread():
        if workers == 1:
            return list(_counted((function(*arguments) for function, arguments in jobs), bar))
        context = get_context("spawn")
        with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
            waiting = [pool.submit(function, *arguments) for function, arguments in jobs]
            return list(_counted((done.result() for done in as_completed(waiting)), bar))


def _counted(results: Iterable[Any], bar: Any) -> Iterator[Any]:
    for result in results:
        bar.update()
        yield result


def experiment(choice: Choice, seeds: int, names: Sequence[str], workers: int) -> dict[str, Any]:
    """All rows, times and settings as one dictionary, ready for JSON."""
    case, drawn = cases.load(choice), range(FIRST, FIRST + seeds)
    trainings: list[Job] = [(train_job, (choice, s, w)) for s in drawn for w in ("original", *REQUESTS)]
    nets: dict[tuple[int, str], State] = {(s, w): state for s, w, state in do(trainings, workers, "train")}
    order = [(r, name, s) for r in REQUESTS for name in ("original", "retrained", *names) for s in drawn]
    runs: list[Job] = [(unlearn_job, (choice, s, r, name, nets[s, "original"], nets[s, r])) for r, name, s in order]
    rows = do(runs, workers, "unlearn")
    rows.sort(key=lambda row: order.index((row["request"], row["method"], row["seed"])))
    timings: list[Job] = [
        (step_times, (choice, FIRST, request, name, nets[FIRST, "original"])) for request in REQUESTS for name in names
    ]
    times: dict[str, dict[str, Any]] = {request: {} for request in REQUESTS}
    for request, name, found in do(timings, 1, "ms a step"):
        times[request][name] = found
    return {
        "data": choice.data, "quick": choice.quick, "seeds": list(drawn), "environment": environment(), "times": times,
        "protocol": asdict(case.protocol), "requests": case.problem.requests, "rows": rows,
    }  # fmt: skip


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """CSV, JSON, plot and the table as text; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"unlearning_{result['data']}.{kind}" for kind in ("csv", "json", "png", "txt")]
    where = {key: result["environment"][key] for key in ("date", "commit", "torch", "cpu")}
    names = ["data", "request", "method", "seed", *COLUMNS, "steps", "reached", "alpha", "lr", *where]
    with paths[0].open("w", newline="") as file:
        table = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({"data": result["data"]} | row | where for row in result["rows"])
    paths[1].write_text(json.dumps(result, indent=1) + "\n")
    plot(result, paths[2])
    paths[3].write_text(text(result) + "\n")
    return paths


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, run, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=cases.NAMES, default="rooms")
    parser.add_argument("--root", type=Path, help="the folder that holds train and val, for nyuv2 and cityscapes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS), help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--quick", action="store_true", help="less of everything, one setting a method")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, help="benchmarks/results, or out with --quick")
    options = parser.parse_args(arguments)
    names = [name for name in options.methods.split(",") if name]
    unknown = sorted(set(names) - set(METHODS))
    if unknown or not names:
        parser.error(f"--methods: {', '.join(unknown) or 'nothing'}; expected some of {', '.join(METHODS)}")
    if options.seeds < 1 or options.workers < 1:
        parser.error(f"--seeds {options.seeds} --workers {options.workers}: at least one of each is needed")
    try:
        choice = Choice(options.data, options.root, options.quick)
        cases.parts(choice, 0)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    result = experiment(choice, options.seeds, names, options.workers)
    out = options.out or Path("out" if options.quick else "benchmarks/results")
    print(f"{text(result)}\n\nwritten: {', '.join(str(path) for path in write(result, out))}")


if __name__ == "__main__":
    main()
