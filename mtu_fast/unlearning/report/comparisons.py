"""Scores that compare models: UIS, and with a retrained model gaps, ToW and over-forgetting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtu_fast.unlearning.metrics import gaps, mean_gap, over_forgotten, tow, uis

Table = dict[str, dict[str, Any]]
WITH_RETRAINED = ("gaps", "mean_gap", "tow", "over_forgotten")


def comparisons(
    scores: Mapping[str, Any], targets: Sequence[str], removal: str, notes: list[str]
) -> dict[str, Any]:
    """UIS of each model; gaps, ToW and over-forgetting where there is a retrained model.

    They are of the tasks that have a score on all of the data. What cannot be computed is None, and
    a note says why.
    """
    known = _scored_everywhere(scores["original"])
    chosen = [task for task in targets if task in known]
    if not chosen:
        notes.append(
            "UIS, gaps, ToW and over-forgetting left out: no task to forget has labels in all of "
            "the data."
        )
        return {"uis": dict.fromkeys(scores)} | dict.fromkeys(WITH_RETRAINED)
    if known != list(scores["original"]["forget"]):
        notes.append(
            "UIS, gaps, ToW and over-forgetting are of the tasks with labels in all of the data: "
            f"{known}."
        )
    # metrics want tables without gaps
    tables = {}
    for model, table in scores.items():
        tables[model] = _restricted(table, known)
    of_models = {}
    for model, table in tables.items():
        of_models[model] = _attempt(notes, "UIS", uis, tables["original"], table, chosen, removal)
    beside = _beside_retrained(tables, chosen, notes)
    return {"uis": of_models} | beside


def _scored_everywhere(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    known = []
    for task in table["forget"]:
        scores = [row[task] for row in table.values()]
        if None not in scores:
            known.append(task)
    return known


def _restricted(table: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> Table:
    """The rows of a score table with these tasks only."""
    found = {}
    for split, row in table.items():
        found[split] = {task: row[task] for task in tasks}
    return found


def _beside_retrained(
    tables: Mapping[str, Table], targets: Sequence[str], notes: list[str]
) -> dict[str, Any]:
    if "retrained" not in tables:
        return dict.fromkeys(WITH_RETRAINED)
    unlearned, retrained = tables["unlearned"], tables["retrained"]
    return {
        "gaps": gaps(unlearned, retrained),
        "mean_gap": mean_gap(unlearned, retrained),
        "tow": _attempt(notes, "ToW", tow, unlearned, retrained),
        "over_forgotten": over_forgotten(unlearned, retrained, targets),
    }


def _attempt(notes: list[str], name: str, score: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return score(*arguments)
    except ValueError as error:
        # scores that are no shares: a report without this number is better than none
        note(notes, f"{name} left out: {error}.")
        return None


def note(notes: list[str], text: str) -> None:
    """Add a note unless it is there."""
    if text not in notes:
        notes.append(text)
