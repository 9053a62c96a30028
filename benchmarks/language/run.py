"""A small Llama that forgets people, or their birthplaces, by full fine-tuning and by LoRA: table and plot.

    python -m benchmarks.language.run [--seeds 2] [--methods NPO,OrthoGrad] [--workers 2] [--quick]
                                      [--out DIR]

The model memorises facts about invented people and places (`facts.py`) in three tasks: to answer a
question, to say a category, to go on with the next sentence. Requests: "people", all facts of eight
of forty people, from all tasks; "birthplace", one kind of fact about them, from the two tasks that
state it, while the category and their other facts are kept. Places are never seen in unlearning
("general"). The protocol is that of `benchmarks.protocol`: the same training, batches, clipping,
stop and number of settings for every method, against retraining from scratch.

It writes `language.json`, `.csv` (a row a seed, mode, request and method), `.txt` and `.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks import protocol, training
from benchmarks.environment import environment
from benchmarks.language.case import (
    MODES,
    REQUESTS,
    Case,
    adapted,
    load,
    sizes_of,
    targets,
    to_retrain,
)
from benchmarks.language.methods import METHODS, OURS
from benchmarks.language.report import plot, text
from benchmarks.language.scores import judge
from benchmarks.pool import Job, do, one_thread

REFERENCES = ("original", "retrained")
FIRST = 2  # the settings were chosen on seed 1
State = dict[str, Tensor]
Row = dict[str, Any]


def train_job(seed: int, quick: bool, which: str) -> tuple[int, str, State, float]:
    """Train the original of a seed, or the ideal of a request; with the processor's seconds."""
    start = time.process_time()
    case = load(seed, quick)
    if which == "original":
        model = training.train(
            case.problem, case.parts[REQUESTS[0]]["train"], case.sizes.protocol, seed, _silent
        )
    else:
        request = "full" if which == REQUESTS[0] else "partial"
        parts = to_retrain(case.parts[which])
        model = training.retrain(case.problem, parts, request, case.sizes.protocol, seed, _silent)
    return seed, which, model.state_dict(), time.process_time() - start


def unlearn_job(
    seed: int, quick: bool, mode: str, request: str, name: str, original: State, ideal: State
) -> Row:
    """Search one method's settings, and score the run that counts; originals and retrained as they are."""
    start = time.process_time()
    case = load(seed, quick)
    torch.manual_seed(seed)  # adapters start alike, whatever the process did before
    before, retrained = net_of(case, original), net_of(case, ideal)
    row: Row = {"seed": seed, "mode": mode, "request": request, "method": name}
    if name in REFERENCES:
        model = before if name == "original" else retrained
        row |= judge(case, request, model, retrained)
        return row | {"job_seconds": time.process_time() - start}
    if mode == "lora":
        before = adapted(before, case.sizes.rank)
    runs = search(case, before, mode, request, name, seed)
    row |= runs[0].summary() | {"tried": [run.summary() for run in runs]}
    row["ms"] = 1e3 * runs[0].seconds / max(1, runs[0].steps)
    row |= judge(case, request, runs[0].model, retrained)
    return row | {"job_seconds": time.process_time() - start}


def search(
    case: Case, before: nn.Module, mode: str, request: str, name: str, seed: int
) -> list[protocol.Run]:
    """Every setting of a method, the one that counts first: level reached, then lowest UIS on validation data."""
    problem, parts, asked = case.problem, case.parts[request], targets(request)
    settings, entry = case.protocol(mode), METHODS[name]
    level = protocol.unseen_level(problem, before, parts, asked)
    held_out = protocol.HeldOut(problem, before, parts, asked)
    runs = []
    for alpha, lr in settings.grids[entry.family]:
        levels = levels_of(case, before, request) if name == OURS else None
        run = protocol.unlearn(
            problem, before, parts, asked, entry, alpha, lr, level, settings, seed, _silent,
            levels=levels,
        )  # fmt: skip
        run.uis_validation = held_out.of(run)
        runs.append(run)
    return sorted(runs, key=lambda run: (not run.reached, run.uis_validation))


def levels_of(case: Case, before: nn.Module, request: str) -> mtu.Levels:
    """Losses and scores of people never read, at which what is forgotten comes to rest."""
    problem, unseen = case.problem, case.parts[request]["validation"]
    return mtu.Levels().measure(
        before,
        [unseen],
        lambda net, batch: problem.losses(net(batch.image), batch.labels),
        score=lambda net, batches: problem.scores(net, unseen),
    )


def net_of(case: Case, state: State) -> nn.Module:
    """The problem's net with these weights."""
    model = case.problem.net()
    model.load_state_dict(state)
    return model


def _silent(_count: int) -> None:
    """Progress is shown by the process that hands out the jobs."""


def experiment(seeds: Sequence[int], quick: bool, names: Sequence[str], workers: int) -> Any:
    """All rows and settings as one dictionary, ready for JSON."""
    trainings: list[Job] = []
    for seed in seeds:
        trainings += [(train_job, (seed, quick, which)) for which in ("original", *REQUESTS)]
    nets: dict[tuple[int, str], State] = {}
    seconds = 0.0
    for seed, which, state, took in do(trainings, workers, "train"):
        nets[seed, which] = state
        seconds += took
    order = []
    for request in REQUESTS:
        order += [("full", request, name) for name in REFERENCES]
        order += [(mode, request, name) for mode in MODES for name in names]
    runs: list[Job] = []
    for seed in seeds:
        for mode, request, name in order:
            states: tuple[dict[str, Tensor], ...] = (nets[seed, "original"], nets[seed, request])
            runs.append((unlearn_job, (seed, quick, mode, request, name, *states)))
    rows = do(runs, workers, "unlearn")
    rows.sort(
        key=lambda row: (order.index((row["mode"], row["request"], row["method"])), row["seed"])
    )
    with one_thread():
        where = environment()
    return {
        "seeds": list(seeds),
        "environment": where,
        "processor_minutes": (seconds + sum(row["job_seconds"] for row in rows)) / 60,
        "sizes": asdict(sizes_of(quick)),
        "rows": rows,
    }


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """CSV, JSON, plot and the table as text; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"language.{kind}" for kind in ("csv", "json", "png", "txt")]
    names = list(dict.fromkeys(key for row in result["rows"] for key in row if key != "tried"))
    with paths[0].open("w", newline="") as file:
        table = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(result["rows"])
    paths[1].write_text(json.dumps(result, indent=1) + "\n")
    plot(result, paths[2])
    paths[3].write_text(text(result) + "\n")
    return paths


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the options, run, print the table, write the results; return them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first", type=int, default=FIRST, help="the first seed")
    parser.add_argument("--methods", default=",".join(METHODS), help=", ".join(METHODS))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--out", type=Path, help="benchmarks/results, or out with --quick")
    options = parser.parse_args(arguments)
    names = [name for name in options.methods.split(",") if name]
    if unknown := sorted(set(names) - set(METHODS)):
        parser.error(f"--methods: {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
    seeds = range(options.first, options.first + options.seeds)
    result = experiment(seeds, options.quick, names, options.workers)
    out = options.out or Path("out" if options.quick else "benchmarks/results")
    written = ", ".join(str(path) for path in write(result, out))
    print(f"{text(result)}\n\nwritten: {written}")
    return result


if __name__ == "__main__":
    main()
