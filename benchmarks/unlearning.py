"""Every method, full-task and partial-task, over several seeds, against retraining: the table of unlearning.

    python -m benchmarks.unlearning [--data {digits,rooms,nyuv2,cityscapes}] [--root PATH] [--seeds
                                    3] [--methods OrthoGrad,PCGrad] [--quick] [--workers 2] [--out
                                    DIR] [--kept 4] [--times | --update]

A net memorises the data; each method unlearns F from all tasks (full) or from the tasks of the
partial request, whose other tasks are then data to keep, by the protocol of `benchmarks.protocol`.
Nets are trained and runs made in processes of one thread each; a seed gives the same numbers
however many there are. Steps are timed afterwards, alone, by one thread too, on an untrained net.

It prints the table and writes it as `unlearning_<data>.txt`, with `.csv` (a row a seed, request and
method), `.json` (all of it) and `.png`. Seeds count from 1: the settings were chosen on seed 0.
NYUv2 and Cityscapes are read from --root, in the layout that `benchmarks.data.folder` describes.

`--times` times the steps of all methods in the JSON of the last run again, on a quiet machine say;
`--update` runs some methods again and puts their rows into it. What else is in the files stays.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
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

if not __package__:  # run as a file, or a process of such a run: the packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mtu_fast as mtu
from benchmarks import cases, protocol
from benchmarks.cases import Case, Choice
from benchmarks.data import Dataset, Samples
from benchmarks.environment import environment
from benchmarks.measure import Times, interleaved
from benchmarks.methods import METHODS
from benchmarks.protocol import Entry, Mask
from benchmarks.unlearning_report import COLUMNS, plot, text
from benchmarks.unlearning_scores import compare
from mtu_fast import reference

State = dict[str, Tensor]
Row = dict[str, Any]
WholeStep = Callable[[Samples, Mask], None]
Job = tuple[Callable[..., Any], tuple[Any, ...]]
REQUESTS = ("full", "partial")
FIRST = 1  # seed 0 is what the settings of `cases` were chosen on

# ---- what a process does -------------------------------------------------------------------------


def train_job(choice: Choice, seed: int, which: str) -> tuple[int, str, State]:
    """Train the original net of a seed, or the ideal of a request."""
    case, parts = cases.load(choice), cases.parts(choice, seed)
    if which == "original":
        model = protocol.train(case.problem, parts["train"], case.protocol, seed, _silent)
    else:
        model = protocol.retrain(case.problem, parts, which, case.protocol, seed, _silent)
    return seed, which, model.state_dict()


def unlearn_job(
    choice: Choice, seed: int, request: str, name: str, original: State, ideal: State
) -> Row:
    """Search one method's settings and score the run that counts; "original" and "retrained" are scored as they are."""
    case, parts = cases.load(choice), cases.parts(choice, seed)
    targets = case.problem.requests[request]
    before, retrained = net_of(case, original), net_of(case, ideal)
    row: Row = {"seed": seed, "request": request, "method": name}
    model = {"original": before, "retrained": retrained}.get(name)
    if model is None:
        runs = protocol.search(
            case.problem, before, parts, targets, METHODS[name], case.protocol, seed, _silent
        )
        model, row = (
            runs[0].model,
            row | runs[0].summary() | {"tried": [run.summary() for run in runs]},
        )
    return row | compare(case.problem, parts, targets, before, model, retrained)


def net_of(case: Case, state: State) -> nn.Module:
    """The problem's net with these weights."""
    model = case.problem.net()
    model.load_state_dict(state)
    return model


def _silent(_count: int) -> None:
    """Progress is shown by the process that hands out the jobs."""


# ---- cost ----------------------------------------------------------------------------------------


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
    case, parts, entry = cases.load(choice), cases.parts(choice, FIRST), METHODS[name]
    torch.manual_seed(FIRST)
    model, generator = case.problem.net(), torch.Generator().manual_seed(FIRST)
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


# ---- the whole -----------------------------------------------------------------------------------


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
    """All rows and settings as one dictionary, ready for JSON but for the times; each row says when it was made."""
    case, drawn = cases.load(choice), range(FIRST, FIRST + seeds)
    trainings: list[Job] = [
        (train_job, (choice, s, w)) for s in drawn for w in ("original", *REQUESTS)
    ]
    nets: dict[tuple[int, str], State] = {
        (s, w): state for s, w, state in do(trainings, workers, "train")
    }
    order = [
        (r, name, s) for r in REQUESTS for name in ("original", "retrained", *names) for s in drawn
    ]
    runs: list[Job] = [
        (unlearn_job, (choice, s, r, name, nets[s, "original"], nets[s, r])) for r, name, s in order
    ]
    rows = do(runs, workers, "unlearn")
    rows.sort(key=lambda row: order.index((row["request"], row["method"], row["seed"])))
    with one_thread():
        where = environment()
    return {
        "data": choice.data, "quick": choice.quick, "seeds": list(drawn), "environment": where,
        "protocol": asdict(case.protocol), "requests": case.problem.requests,
        "rows": [row | {"date": where["date"], "commit": where["commit"]} for row in rows],
    }  # fmt: skip


def last_run(path: Path, choice: Choice, seeds: int) -> dict[str, Any]:
    """The result in this file, which one of this choice and number of seeds may update.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another size or of other seeds.
    """
    old: dict[str, Any] = json.loads(path.read_text())
    wanted = {"quick": choice.quick, "seeds": list(range(FIRST, FIRST + seeds))}
    for name, value in wanted.items():
        if old[name] != value:
            raise ValueError(
                f"{path} has {name} {old[name]}, this run {value}; only the same are joined"
            )
    return old


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The old result with the rows of the methods that are in the new one replaced, or put behind; the old times."""
    made = {key: old["environment"][key] for key in ("date", "commit")}
    fresh = {row["method"] for row in new["rows"]}
    names = list(dict.fromkeys(row["method"] for row in [*old["rows"], *new["rows"]]))
    rows = [made | row for row in old["rows"] if row["method"] not in fresh] + new["rows"]
    rows.sort(
        key=lambda row: (REQUESTS.index(row["request"]), names.index(row["method"]), row["seed"])
    )
    return {**old, **new, "rows": rows}


def timed_anew(path: Path, root: Path | None) -> dict[str, Any]:
    """The result in this file, its rows and their environment as they are, with times (and where they are from) of now.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has a method that is not there any more.
    """
    result: dict[str, Any] = json.loads(path.read_text())
    seen = dict.fromkeys(row["method"] for row in result["rows"])
    names = [name for name in seen if name not in ("original", "retrained")]
    if unknown := sorted(set(names) - set(METHODS)):
        raise ValueError(f"{path} has rows of {', '.join(unknown)}; known are {', '.join(METHODS)}")
    kept = result["protocol"].get("kept", protocol.Protocol.kept)
    return result | all_times(Choice(result["data"], root, result["quick"], kept), names)


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """CSV, JSON, plot and the table as text; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        folder / f"unlearning_{result['data']}.{kind}" for kind in ("csv", "json", "png", "txt")
    ]
    where = {key: result["environment"][key] for key in ("date", "commit", "torch", "cpu")}
    names = [
        "data",
        "request",
        "method",
        "seed",
        *COLUMNS,
        "steps",
        "reached",
        "alpha",
        "lr",
        *where,
    ]
    with paths[0].open("w", newline="") as file:
        table = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows({"data": result["data"]} | where | row for row in result["rows"])
    paths[1].write_text(json.dumps(result, indent=1) + "\n")
    plot(result, paths[2])
    paths[3].write_text(text(result) + "\n")
    return paths


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, run, print the table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=cases.NAMES, default="rooms")
    parser.add_argument(
        "--root", type=Path, help="the folder that holds train and val, for nyuv2 and cityscapes"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--methods", default=",".join(METHODS), help=f"some of {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="less of everything, one setting a method"
    )
    kept = protocol.Protocol.kept
    parser.add_argument(
        "--kept", type=int, default=kept, help="rows of a subspace for each retain row of a step"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, help="benchmarks/results, or out with --quick")
    parser.add_argument(
        "--times", action="store_true", help="time the steps of the last run's methods anew"
    )
    parser.add_argument(
        "--update", action="store_true", help="put these methods' rows into the last run's"
    )
    options = parser.parse_args(arguments)
    names = [name for name in options.methods.split(",") if name]
    unknown = sorted(set(names) - set(METHODS))
    if unknown or not names:
        parser.error(
            f"--methods: {', '.join(unknown) or 'nothing'}; expected some of {', '.join(METHODS)}"
        )
    if min(options.seeds, options.workers, options.kept) < 1:
        counts = f"--seeds {options.seeds} --workers {options.workers} --kept {options.kept}"
        parser.error(f"{counts}: at least one of each is needed")
    try:
        choice = Choice(options.data, options.root, options.quick, options.kept)
        cases.parts(choice, 0)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    out = options.out or Path("out" if options.quick else "benchmarks/results")
    last = out / f"unlearning_{choice.data}.json"
    try:
        if options.times:
            result = timed_anew(last, options.root)
        old = last_run(last, choice, options.seeds) if options.update else None
    except (ValueError, FileNotFoundError) as error:
        parser.error(f"{'--times' if options.times else '--update'}: {error}")
    if not options.times:
        result = experiment(choice, options.seeds, names, options.workers)
        result = merged(old, result) if old is not None else result | all_times(choice, names)
    print(f"{text(result)}\n\nwritten: {', '.join(str(path) for path in write(result, out))}")


if __name__ == "__main__":
    main()
