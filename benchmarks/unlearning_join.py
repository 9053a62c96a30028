"""The result of the unlearning benchmark: made of the records that there are, with what is missing, and written."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.environment import environment
from benchmarks.methods import METHODS
from benchmarks.pool import one_thread
from benchmarks.requests import KINDS, parse
from benchmarks.unlearning_curves import plot_curves
from benchmarks.unlearning_records import (
    MODELS,
    SEARCHED,
    Mode,
    Record,
    Store,
    best,
    searched,
    tries,
)
from benchmarks.unlearning_report import COLUMNS, plot, text

Line = tuple[str, str, Mode]  # request, method, mode


def join(store: Store, case: Case, seeds: int) -> dict[str, Any]:
    """The rows of the table, ready for JSON: runs of the chosen settings, what was tried, and what is missing.

    Args:
        store: of records.
        case: of the choice.
        seeds: that the table is to have, from 1 on.

    Returns:
        data, quick, seeds, digest, environment, protocol, requests {name: targets}, rows, tried,
        chosen and missing.
    """
    # a record of before there were three modes holds a bool
    records = [record | {"levels": Mode(record["levels"])} for record in store.records()]
    lines = sorted({_line(record) for record in records if record["seed"] != SEARCHED}, key=_order)
    wanted = list(range(SEARCHED + 1, SEARCHED + 1 + seeds))
    rows: list[Record] = []
    chosen, missing = [], []
    for line in lines:
        setting = _chosen(store, case, line)
        if setting is None:
            missing.append(_gap(line, "not all settings tried on the seed of the search"))
            continue
        found = [r for r in records if _line(r) == line and r["seed"] in wanted and _is(r, setting)]
        rows += sorted(found, key=lambda record: record["seed"])
        chosen.append(_gap(line, "") | setting)
        if len(found) < len(wanted):
            have = [record["seed"] for record in found]
            missing.append(
                _gap(line, f"seeds {', '.join(str(s) for s in wanted if s not in have)}")
            )
    missing += _not_run(lines)
    with one_thread():
        where = environment()
    names = dict.fromkeys(row["request"] for row in rows)
    return {
        "data": store.choice.data, "quick": store.choice.quick, "seeds": wanted, "digest": store.digest,
        "environment": where, "protocol": asdict(case.protocol),
        "requests": {name: parse(name).targets(case.problem) for name in names},
        "rows": rows, "tried": [record for record in records if record["seed"] == SEARCHED],
        "chosen": chosen, "missing": missing,
    }  # fmt: skip


def _line(record: Mapping[str, Any]) -> Line:
    return record["request"], record["method"], record["levels"]


def _order(line: Line) -> tuple[Any, ...]:
    request, method, mode = line
    names = (*MODELS, *METHODS)
    known = names.index(method) if method in names else len(names)
    kinds = KINDS.index(request) if request in KINDS else len(KINDS)
    return kinds, request, known, method, mode


def _gap(line: Line, what: str) -> dict[str, Any]:
    request, method, mode = line
    return {"request": request, "method": method, "levels": mode, "missing": what}


def _chosen(store: Store, case: Case, line: Line) -> dict[str, float] | None:
    """The setting of a line; None where the search is not complete, or the method is gone."""
    name, method, mode = line
    if method in MODELS:
        return {"alpha": 0.0, "lr": 0.0}
    if method not in METHODS:
        return None
    asked = tries(case, searched(parse(name)), method, mode, SEARCHED, METHODS[method].family)
    found = best(map(store.get, asked))
    return None if found is None else {"alpha": found["alpha"], "lr": found["lr"]}


def _is(record: Record, setting: Mapping[str, float]) -> bool:
    return all(record[name] == value for name, value in setting.items())


def _not_run(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Methods of the full and the partial request of which there is no run at all."""
    there = set(lines)
    found = []
    for request in KINDS[:2]:
        for method in METHODS:
            for mode in Mode:
                if (request, method, mode) not in there:
                    found.append(_gap((request, method, mode), "not run"))
    return found


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """CSV, JSON, plots and the table as text; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"unlearning_{result['data']}"
    paths = [folder / f"{stem}{end}" for end in (".csv", ".json", ".png", "_curves.png", ".txt")]
    where = {key: result["environment"][key] for key in ("date", "commit", "torch", "cpu")}
    names = ["data", "request", "method", "levels", "seed", *COLUMNS]
    names += ["steps", "seconds", "reached", "alpha", "lr"]
    with paths[0].open("w", newline="") as file:
        table = csv.DictWriter(file, [*names, *where], extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for row in result["rows"]:
            mode = {"levels": row["levels"].word}
            table.writerow({"data": result["data"]} | where | row | mode)
    paths[1].write_text(json.dumps(result, indent=1) + "\n")
    plot(result, paths[2])
    plot_curves(result, paths[3])
    paths[4].write_text(text(result) + "\n")
    return paths
