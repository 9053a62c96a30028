"""Every method, with levels and without, over several seeds, against retraining: the tables of unlearning.

    python -m benchmarks.unlearning [--data {digits,rooms,nyuv2,cityscapes}] [--root PATH] [--all]
                                    [--methods OrthoGrad,PCGrad]
                                    [--levels {both,with,without,settled,all}]
                                    [--requests full,partial] [--seeds 3] [--workers 2] [--quick]
                                    [--records out/unlearning] [--out DIR] [--join | --times]

A net memorises the data; each method unlearns F by the protocol of `benchmarks.protocol`: from all
tasks (full), or from the tasks of the partial request, whose other tasks are then data to keep.
`benchmarks.requests` lists what else can be asked for. A setting is chosen on validation data of
seed 0; the table is of seeds 1 and on. Requests beyond full and partial take the settings of these.
A run ends at the level (--levels without, with, or both), or goes on there to its last step and ends
with the best of its models (settled; all: these three).

Every run is a record in --records, and one that is there is not made again: what was broken off
goes on, several calls may share the work, and what benchmarks/results has is not run again. A seed
gives the same numbers however many processes there are. Without --all three methods are tried on
three seeds, in a quarter of an hour on two cores; with it all of them on five, in some two hours.

It prints the table and writes it as `unlearning_<data>.txt`, with `.csv` (a row a run), `.json` (all
records), `.png` and `_curves.png`. `--join` makes these of the records that there are, and says
what is missing. `--times` times steps alone, with the slow reference's beside them, for the table.
NYUv2 and Cityscapes are read from --root, in the layout that `benchmarks.data.folder` describes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file, or a process of such a run: the packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import cases, protocol
from benchmarks.cases import Case, Choice
from benchmarks.methods import METHODS, OURS
from benchmarks.pool import Job, do
from benchmarks.requests import KINDS, Request, parse
from benchmarks.unlearning_jobs import attempt_job, net_job, net_name
from benchmarks.unlearning_join import join, write
from benchmarks.unlearning_records import (
    MODELS,
    SEARCHED,
    Attempt,
    Mode,
    Store,
    best,
    open_store,
    searched,
    tries,
)
from benchmarks.unlearning_report import text
from benchmarks.unlearning_times import all_times

DEFAULT = ("OrthoGrad", "GradDiff", OURS)
RESULTS = Path("benchmarks/results")
MODES = {
    "both": (Mode.PLAIN, Mode.LEVELS),
    "with": (Mode.LEVELS,),
    "without": (Mode.PLAIN,),
    "settled": (Mode.SETTLED,),
    "all": tuple(Mode),
}


@dataclass(frozen=True)
class Plan:
    """What a call is asked for."""

    requests: tuple[Request, ...]
    methods: tuple[str, ...]
    modes: tuple[Mode, ...]
    seeds: int
    workers: int

    @property
    def drawn(self) -> range:
        """The seeds of the table."""
        return range(SEARCHED + 1, SEARCHED + 1 + self.seeds)

    def lines(self) -> Iterator[tuple[Request, str, Mode]]:
        """Every line of the table that has settings to choose."""
        for request in self.requests:
            for name in self.methods:
                yield from ((request, name, mode) for mode in self.modes)


def run(store: Store, case: Case, plan: Plan) -> None:
    """Make every record of a plan that is not there: nets, then the search, then the table, seed by seed."""
    nets: list[Job] = [(net_job, (store, None, seed)) for seed in (SEARCHED, *plan.drawn)]
    for seed in plan.drawn:
        nets += [(net_job, (store, request, seed)) for request in plan.requests]
    do(_once(nets), plan.workers, "train")
    asked = [
        attempt
        for request, name, mode in plan.lines()
        for attempt in tries(case, searched(request), name, mode, SEARCHED, METHODS[name].family)
    ]
    do(_missing(store, asked), plan.workers, "choose")
    wanted: list[Attempt] = []
    for seed in plan.drawn:
        wanted += [Attempt(r, name, Mode.PLAIN, seed) for r in plan.requests for name in MODELS]
        wanted += [chosen(store, case, *line, seed) for line in plan.lines()]
    do(_missing(store, wanted), plan.workers, "unlearn")


def chosen(store: Store, case: Case, request: Request, name: str, mode: Mode, seed: int) -> Attempt:
    """A run of the table, with the setting that was chosen.

    Raises:
        RuntimeError: the search is not complete.
    """
    asked = tries(case, searched(request), name, mode, SEARCHED, METHODS[name].family)
    found = best(map(store.get, asked))
    if found is None:
        raise RuntimeError(f"{name}: the search on seed {SEARCHED} is not complete in {store.home}")
    return Attempt(request, name, mode, seed, found["alpha"], found["lr"])


def _once(jobs: Sequence[Job]) -> list[Job]:
    """The jobs without those that train the same net."""
    found: dict[Path, Job] = {}
    for job in jobs:
        _, (store, request, seed) = job
        path = store.net(net_name(request), seed)
        if not path.exists():
            found.setdefault(path, job)
    return list(found.values())


def _missing(store: Store, attempts: Sequence[Attempt]) -> list[Job]:
    wanted = {store.key(attempt): attempt for attempt in attempts}
    return [(attempt_job, (store, a)) for a in wanted.values() if store.get(a) is None]


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan of these options.

    Raises:
        ValueError: unknown methods or requests, or nothing to do.
    """
    names: Sequence[str] = tuple(METHODS) if options.all else DEFAULT
    if options.methods is not None:
        names = [name for name in options.methods.split(",") if name]
    unknown = sorted(set(names) - set(METHODS))
    if unknown or not names:
        raise ValueError(
            f"--methods: {', '.join(unknown) or 'nothing'}; expected some of {', '.join(METHODS)}"
        )
    seeds = options.seeds if options.seeds is not None else 5 if options.all else 3
    if min(seeds, options.workers, options.kept) < 1:
        counts = f"--seeds {seeds} --workers {options.workers} --kept {options.kept}"
        raise ValueError(f"{counts}: at least one of each is needed")
    requests = tuple(parse(name) for name in options.requests.split(","))
    return Plan(requests, tuple(names), MODES[options.levels], seeds, options.workers)


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=cases.NAMES, default="rooms")
    add("--root", type=Path, help="the folder that holds train and val, for nyuv2 and cityscapes")
    add("--all", action="store_true", help="every method on five seeds, into benchmarks/results")
    add("--methods", help=f"some of {', '.join(METHODS)}")
    add(
        "--levels",
        choices=MODES,
        default="all",
        help="methods with levels, without, or both; settled at them; or all",
    )
    add("--requests", default=",".join(KINDS[:2]), help="for example full,class,full+30%%,full+x3")
    add("--seeds", type=int, help="of the table, from 1 on")
    add("--quick", action="store_true", help="less of everything, one setting a method")
    kept = protocol.Protocol.kept
    add("--kept", type=int, default=kept, help="rows of a subspace for each retain row of a step")
    add("--workers", type=int, default=2, help="processes of one thread each")
    add("--records", type=Path, default=Path("out/unlearning"), help="the folder of records")
    add("--out", type=Path, help="of the tables: benchmarks/results with --all, else out")
    add("--join", action="store_true", help="run nothing, make the tables of what there is")
    add("--times", action="store_true", help="run nothing, time the steps of the methods")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, run what is missing, print the table, write the results."""
    parser = parser_of()
    options = parser.parse_args(arguments)
    try:
        plan = plan_of(options)
        choice = Choice(options.data, options.root, options.quick, options.kept)
        case = cases.load(choice)
        cases.parts(choice, SEARCHED)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    out = options.out or (RESULTS if options.all and not options.quick else Path("out"))
    last = out / f"unlearning_{choice.data}.json"
    store = open_store(options.records, case, choice, last)
    if not options.join and not options.times:
        run(store, case, plan)
    old: dict[str, Any] = json.loads(last.read_text()) if last.exists() else {}
    times = all_times(choice, plan.methods) if options.times else old
    times = {name: times[name] for name in ("times", "times_environment") if name in times}
    result = join(store, case, plan.seeds) | times
    print(f"{text(result)}\n\nwritten: {', '.join(str(path) for path in write(result, out))}")


if __name__ == "__main__":
    main()
