"""What the rows over seeds say together: means, paired differences with intervals, and the goals."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from benchmarks.methods import OURS
from benchmarks.unlearning_records import MODELS, Mode

Row = Mapping[str, Any]
Name = tuple[str, Mode]  # method, mode
LEVEL = 0.95  # of an interval
LEADERS = 5
FEWEST = 3  # seeds of a mean that is ranked
# what the method is to reach: its UIS over that of the strongest other one
GOALS = {"full": 0.7, "partial": 0.5}
GAP = 0.5  # its gap to retraining, over OrthoGrad's
AUC = 0.10  # how far its AUC may be from that of the retrained model, mean over seeds
# how the strongest other one was run, in words
RUN = {Mode.PLAIN: "without levels", Mode.LEVELS: "with levels", Mode.SETTLED: "that settled"}


def label(name: Name) -> str:
    """How a line of the table is called; what is left of our method without levels is OrthoGrad with a memory."""
    method, mode = name
    if mode is Mode.SETTLED:
        return f"{method}, settled"
    if method == OURS:
        return OURS if mode is Mode.LEVELS else "OrthoGrad + memory"
    return f"{method} + levels" if mode is Mode.LEVELS else method


def ours(found: Mapping[Name, Sequence[Row]]) -> Name:
    """Our method with all it has: settled where such runs were made."""
    settled = (OURS, Mode.SETTLED)
    return settled if settled in found else (OURS, Mode.LEVELS)


def groups(result: Mapping[str, Any], request: str) -> dict[Name, list[Row]]:
    """{(method, mode): its rows over seeds}, in the order of the table."""
    found: dict[Name, list[Row]] = {}
    for row in result["rows"]:
        if row["request"] == request:
            found.setdefault((row["method"], Mode(row["levels"])), []).append(row)
    return found


def spread(rows: Sequence[Row], column: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds (0 for one seed)."""
    values = [row[column] for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Paired:
    """mean(a - b) over the seeds that both have, and the interval that holds it with 95 %, by Student's t.

    `low` and `high` are infinite for one seed.
    """

    mean: float
    low: float
    high: float
    seeds: int


def paired(a: Iterable[Row], b: Iterable[Row], column: str) -> Paired | None:
    """The difference of two lines, seed by seed; None where they have no seed in common."""
    other = {row["seed"]: row[column] for row in b}
    values = [row[column] - other[row["seed"]] for row in a if row["seed"] in other]
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Paired(mean, -float("inf"), float("inf"), 1)
    error = statistics.stdev(values) / count**0.5
    half = float(student.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Paired(mean, mean - half, mean + half, count)


def distance(a: Iterable[Row], b: Iterable[Row], column: str) -> float | None:
    """The mean of |a - b| over the seeds that both have; None without any."""
    other = {row["seed"]: row[column] for row in b}
    values = [abs(row[column] - other[row["seed"]]) for row in a if row["seed"] in other]
    return statistics.fmean(values) if values else None


def stop_gap(found: Mapping[Name, Sequence[Row]], rows: Iterable[Row]) -> float | None:
    """The gap on the forget data of a model that is at the level in every target, and as the retrained one elsewhere.

    (1/T) Σ |level - retrained model's forget score| over the targets, T all tasks, mean over the
    seeds of `rows`: what the stop alone makes of it, whatever the method. None where the level was
    not recorded.
    """
    seeds = {row["seed"] for row in rows}
    ideal = {
        row["seed"]: row["scores"]["forget"] for row in found.get(("retrained", Mode.PLAIN), [])
    }
    values = []
    for row in found.get(("original", Mode.PLAIN), []):
        scores = ideal.get(row["seed"])
        if scores is not None and "level" in row and row["seed"] in seeds:
            apart = [abs(level - scores[task]) for task, level in row["level"].items()]
            values.append(sum(apart) / len(scores))
    return statistics.fmean(values) if values else None


def stop_uis(found: Mapping[Name, Sequence[Row]], rows: Iterable[Row]) -> float | None:
    """The UIS of a model that is at the level in every target, and as the original everywhere else.

    100/T Σ ½ |test score of the original - level| / test score over the targets, T all tasks, mean
    over the seeds of `rows`: a level is a score on validation data, UIS goes by test data. None
    where the level was not recorded.
    """
    seeds, values = {row["seed"] for row in rows}, []
    for row in found.get(("original", Mode.PLAIN), []):
        if "level" in row and row["seed"] in seeds:
            test = row["scores"]["test"]
            apart = [abs(test[task] - level) / test[task] for task, level in row["level"].items()]
            values.append(50 * sum(apart) / len(test))
    return statistics.fmean(values) if values else None


def moved_uis(found: Mapping[Name, Sequence[Row]], rows: Iterable[Row]) -> float | None:
    """The half of UIS that is of test data, 100/T Σ ½ |score of the original - score| / that of the original.

    Mean over the seeds of `rows` that have an original; None without one.
    """
    before = {row["seed"]: row["scores"]["test"] for row in found.get(("original", Mode.PLAIN), [])}
    values = []
    for row in rows:
        if (test := before.get(row["seed"])) is not None:
            apart = [abs(test[task] - row["scores"]["test"][task]) / test[task] for task in test]
            values.append(50 * sum(apart) / len(test))
    return statistics.fmean(values) if values else None


def common(*lines: Iterable[Row]) -> list[list[Row]]:
    """The lines' rows on the seeds that all of them have."""
    rows = [list(line) for line in lines]
    seeds = set.intersection(*({row["seed"] for row in line} for line in rows))
    return [[row for row in line if row["seed"] in seeds] for line in rows]


def ranked(found: Mapping[Name, Sequence[Row]], every: bool = False) -> list[Name]:
    """The methods of a request that came down to the level on every seed, the lowest UIS first.

    On the seeds that they have in common; those of fewer than `FEWEST` seeds, where others have as
    many, are left out. every: those that did not come down, too.
    """
    methods = {name: rows for name, rows in found.items() if name[0] not in MODELS}
    least = min(FEWEST, max((len(rows) for rows in methods.values()), default=0))
    there = {
        name: rows
        for name, rows in methods.items()
        if len(rows) >= least and (every or came_down(rows))
    }
    if not there:
        return []
    shared = dict(zip(there, common(*there.values()), strict=True))
    return sorted(there, key=lambda name: spread(shared[name], "uis")[0])


def strongest(order: Iterable[Name], mode: Mode) -> Name | None:
    """The first of an order that is not ours and was run in this mode."""
    return next((name for name in order if name[0] != OURS and name[1] is mode), None)


def came_down(rows: Sequence[Row]) -> bool:
    """Whether enough was forgotten on every seed."""
    return all(row["reached"] for row in rows)


@dataclass(frozen=True)
class Goal:
    """One thing that the method is to reach: what it is measured by, what was found, what was aimed at."""

    what: str
    found: float
    aim: float

    @property
    def reached(self) -> bool:
        """Whether it is."""
        return self.found <= self.aim


def goals(found: Mapping[Name, Sequence[Row]], request: str) -> list[Goal]:
    """What our method reaches of `GOALS`, `GAP` and `AUC`; those that cannot be told yet are left out."""
    mine = found.get(ours(found), [])
    if not mine or request not in GOALS:
        return []
    made: list[Goal] = []
    # one that did not come down itself is held against all others
    by_uis = ranked(found, every=not came_down(mine))
    for mode, what in RUN.items():
        other = strongest(by_uis, mode)
        if other is not None:
            of = f"UIS over that of {label(other)}, the strongest other method {what}"
            made.append(Goal(of, _over(mine, found[other], "uis"), GOALS[request]))
    if ("OrthoGrad", Mode.PLAIN) in found:
        over = _over(mine, found["OrthoGrad", Mode.PLAIN], "gap")
        made.append(Goal("gap to retraining over OrthoGrad's", over, GAP))
    apart = distance(mine, found.get(("retrained", Mode.PLAIN), []), "auc")
    if apart is not None:
        made.append(Goal("AUC, distance to the retrained model's, mean over seeds", apart, AUC))
    return made


def gaps(missing: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is missing, in words: each reason once for each set of methods, with the requests it is said of."""
    methods: dict[tuple[str, str], dict[str, set[Mode]]] = {}
    for gap in missing:
        of = methods.setdefault((gap["request"], gap["missing"]), {})
        of.setdefault(gap["method"], set()).add(Mode(gap["levels"]))
    said: dict[tuple[str, str], list[str]] = {}
    for (request, reason), of in methods.items():
        # a name may hold a comma
        names = "; ".join(_all(method, modes) for method, modes in of.items())
        said.setdefault((reason, names), []).append(request)
    for (reason, names), asked in said.items():
        yield f"{' and '.join(asked)}, {reason}: {names}"


def _all(method: str, modes: set[Mode]) -> str:
    """A method that lacks all is named once."""
    if len(modes) == len(Mode):
        return method
    said = {mode: label((method, mode)) for mode in sorted(modes)}
    if Mode.PLAIN in said:
        said[Mode.PLAIN] += " without levels"
    return "; ".join(said.values())


def _over(a: Sequence[Row], b: Sequence[Row], column: str) -> float:
    """The mean of a over that of b, on the seeds that both have."""
    mine, other = common(a, b)
    if not mine:
        return float("nan")
    return spread(mine, column)[0] / spread(other, column)[0]
