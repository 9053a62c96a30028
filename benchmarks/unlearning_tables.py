"""The tables of the README and the docs on unlearning, made of the committed results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import METHODS, OURS
from benchmarks.unlearning_records import MODELS, Mode
from benchmarks.unlearning_report import COLUMNS, interval
from benchmarks.unlearning_stats import (
    LEADERS,
    Name,
    Row,
    distance,
    gaps,
    goals,
    groups,
    label,
    moved_uis,
    ours,
    paired,
    ranked,
    spread,
    stop_gap,
    stop_uis,
    strongest,
)

RESULTS = Path(__file__).resolve().parent / "results"
DATA = ("digits", "rooms")
REQUESTS = ("full", "partial")
NONE = "*No runs with this protocol are committed yet.*"
Found = Mapping[Name, Sequence[Row]]
Result = dict[str, Any]


def results() -> dict[str, Result]:
    """{data: its committed result}, of the data that have one."""
    paths = {data: RESULTS / f"unlearning_{data}.json" for data in DATA}
    return {data: json.loads(path.read_text()) for data, path in paths.items() if path.exists()}


def blocks() -> Iterator[tuple[str, str, Result, Found]]:
    """(data, request, result, its rows) of the full and the partial request."""
    for data, result in results().items():
        for request in REQUESTS:
            found = groups(result, request)
            if found:
                yield data, request, result, found


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, or a line that says that there is nothing yet."""
    if not rows:
        return NONE + "\n"
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows)) + "\n"


def every() -> str:
    """UIS of every method that was tried: without levels, with them, and settled at them."""
    made = list(blocks())
    names = list(dict.fromkeys(name for *_, found in made for name, _ in found))
    order = [name for name in (*MODELS, *METHODS) if name in names]
    head = ["UIS"]
    for data, request, *_ in made:
        head += [f"{data}, {request}", "+ levels", "settled"]
    rows = []
    for method in order:
        cells = [method]
        for _, _, result, found in made:
            cells += [cell(found.get((method, mode), ()), "uis", result) for mode in Mode]
        rows.append(cells)
    return markdown(head, rows)


def leaders() -> str:
    """What the five lowest UIS, and OrthoGrad, did and cost, beside the original and the retrained model."""
    columns = ("uis", "gap", "tow", "drift", "drift_99", "auc")
    head = ["", *(COLUMNS[column][0] for column in columns), "steps", "ms", "s"]
    rows = []
    for data, request, result, found in blocks():
        rows.append([f"**{data}, {request}**", *[""] * (len(head) - 1)])
        names = [(model, Mode.PLAIN) for model in MODELS] + ranked(found)[:LEADERS]
        for name in dict.fromkeys([*names, ("OrthoGrad", Mode.PLAIN)]):
            mine = found.get(name, ())
            if mine:
                cells = [cell(mine, column, result) for column in columns]
                rows.append([label(name), *cells, *_cost(name, mine)])
    return markdown(head, rows)


def differences() -> str:
    """Our method minus each of the strongest others, paired by seed, with intervals."""
    rows = []
    for data, request, _, found in blocks():
        others = [name for name in ranked(found) if name[0] != OURS][:LEADERS]
        for name in others:
            cells = [
                interval(
                    paired(found.get(ours(found), ()), found[name], column), *COLUMNS[column][1:]
                )
                for column in ("uis", "gap", "drift")
            ]
            rows.append([f"{data}, {request}", label(ours(found)), label(name), *cells])
    return markdown(["", "of", "minus that of", "UIS", "gap, points", "drift"], rows, left=3)


def reached() -> str:
    """What our method was to reach, with all it has, and whether it did."""
    rows = []
    for data, request, _, found in blocks():
        for goal in goals(found, request):
            word = "yes" if goal.reached else "**no**"
            rows.append([
                f"{data}, {request}",
                label(ours(found)),
                goal.what,
                f"{goal.found:.2f}",
                f"{goal.aim:.2f}",
                word,
            ])
    return markdown(["", "", "", "found", "at most", "reached"], rows, left=3)


def binding() -> str:
    """UIS and gap by what makes them: the stop, and what a method does to the retained and to unseen data."""
    rows = []
    for data, request, result, found in blocks():
        names = [ours(found), *[name for name in ranked(found) if name[0] != OURS][:2]]
        for name in dict.fromkeys([*names, ("OrthoGrad", Mode.PLAIN)]):
            if name in found:
                cells = _bound(found, name, result)
                rows.append([f"{data}, {request}", label(name), *cells])
    head = ["", "", "UIS of the stop", "UIS", "of it test", "gap of the stop"]
    return markdown([*head, "gap F", "gap R", "gap T", "AUC, distance"], rows, left=2)


def _bound(found: Found, name: Name, result: Result) -> list[str]:
    """One line of `binding`."""
    mine = found[name]
    uis, least = stop_uis(found, mine), stop_gap(found, mine)
    moved = moved_uis(found, mine)
    apart = distance(mine, found.get(("retrained", Mode.PLAIN), ()), "auc")
    gaps_of = [cell(mine, column, result) for column in ("gap_forget", "gap_retain", "gap_test")]
    return [
        "-" if uis is None else f"{uis:.1f}",
        cell(mine, "uis", result),
        "-" if moved is None else f"{moved:.1f}",
        "-" if least is None else f"{100 * least:.1f}",
        *gaps_of,
        "-" if apart is None else f"{100 * apart:.0f}",
    ]


def requests() -> str:
    """Other requests: classes, shares, what is still at hand, and requests one after another."""
    rows, columns = [], ("uis", "gap", "drift", "auc")
    for data, result in results().items():
        for request in result["requests"]:
            if request in REQUESTS:
                continue
            rows.append([f"**{data}, {request}**", *[""] * (len(columns) + 1)])
            for name, mine in groups(result, request).items():
                cells = [cell(mine, column, result) for column in columns]
                rows.append([label(name), *cells, *_cost(name, mine)[:1]])
    return markdown(["", *(COLUMNS[column][0] for column in columns), "steps"], rows)


def short() -> str:
    """UIS of our method, of the other that is strongest most often in each mode, and of the retrained model."""
    made = list(blocks())
    names: list[Name] = [("original", Mode.PLAIN), *(("OrthoGrad", mode) for mode in Mode)]
    for mode in Mode:
        others = [strongest(ranked(found), mode) for *_, found in made]
        counts = Counter(name for name in others if name is not None and name[0] != "OrthoGrad")
        names += [name for name, _ in counts.most_common(1)]
    last = {ours(found) for *_, found in made}
    names += [*sorted(last), ("retrained", Mode.PLAIN)]
    rows = []
    for name in dict.fromkeys(names):
        if any(name in found for *_, found in made):
            rows.append([label(name), *(cell(f.get(name, ()), "uis", r) for _, _, r, f in made)])
    return markdown(
        ["UIS", *(f"{data}, {request}" for data, request, *_ in made)], rows if made else []
    )


def lacking() -> str:
    """What the tables are to have and do not."""
    lines = []
    for data in DATA:
        if data not in results():
            lines.append(f"* {data}: everything.")
            continue
        lines += [f"* {data}, {said}." for said in gaps(results()[data]["missing"])]
        if not results()[data]["missing"]:
            lines.append(f"* {data}: nothing.")
    return "\n".join(lines) + "\n"


def cell(rows: Sequence[Row], column: str, result: Mapping[str, Any]) -> str:
    """Mean ± deviation, a star where the level was not reached, the seeds where they are fewer."""
    if not rows:
        return "-"
    _, factor, digits = COLUMNS[column]
    mean, deviation = (factor * value for value in spread(rows, column))
    star = "" if all(row.get("reached", True) for row in rows) else "*"
    few = f" ({len(rows)})" if len(rows) < len(result["seeds"]) else ""
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}{star}{few}"


def _cost(name: Name, rows: Sequence[Row]) -> list[str]:
    if name[0] in MODELS:
        return ["", "", ""]
    steps, ms, seconds = (spread(rows, column)[0] for column in ("steps", "ms", "seconds"))
    return [f"{steps:.0f}", f"{ms:.0f}", f"{seconds:.1f}"]
