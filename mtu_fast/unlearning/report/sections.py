"""The report's sections, each a function of an audit's data; what moved is in `effects`, the verdict in `summary`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtu_fast.unlearning.report import charts, tables
from mtu_fast.unlearning.report.levels import aims
from mtu_fast.unlearning.report.markup import Markup, el
from mtu_fast.unlearning.report.tables import Data

Series = dict[str, dict[str, list[tuple[float, float]]]]

NO_RETRAINED = (
    "No retrained model was given. Training one from scratch without the data is the only exact reference: with it, "
    "this section shows the gaps to it, ToW, over-forgetting, and how far the outputs of the two models lie apart."
)
NO_OUTPUTS = "No outputs were given, so the distance between the models' predictions is not known."
NO_GAPS = "The gaps could not be made; the notes below say why."
RELEARN = (
    "Relearn time: steps of fine-tuning on the forget data until their score is back at 95 % of the original's. "
    "Far fewer than the retrained model needs means hidden, not removed."
)


def card(title: str, lead: str, *children: Any) -> Markup:
    """One section."""
    return el("section", el("h2", title), el("p", lead, class_="lead"), *children, class_="card")


def absent(text: str) -> Markup:
    """What is missing, said in its place."""
    return el("p", text, class_="absent")


def ideal(data: Data) -> Markup:
    """The distance to the retrained model."""
    title = "Beside retraining"
    lead = "The model that was trained without the data from the start is what unlearning imitates."
    if "retrained" not in data["models"]:
        return card(title, lead, absent(NO_RETRAINED))
    gaps = tables.gap_table(data) if data["gaps"] else absent(NO_GAPS)
    apart = tables.distance_table(data) if data["distances"] else absent(NO_OUTPUTS)
    return card(title, lead, gaps, apart, _relearned(data["relearn"]))


def _relearned(found: Mapping[str, int | None] | None) -> Markup | None:
    if found is None:
        return None
    rows = []
    for model, count in found.items():
        rows.append([model, "not within the limit" if count is None else count])
    return tables.table(RELEARN, ["model", "steps"], rows)


def conflict(data: Data) -> Markup:
    """Heat maps of gradient cosines."""
    title = "Where forgetting and keeping meet"
    lead = (
        "Cosine between the gradients of forget and retain samples, mean over pairs, by layer. Positive (warm): a step "
        "that raises the forget loss there raises the retain loss too; near zero: the two are independent."
    )
    if data["cosines"] is None:
        return card(title, lead, absent("The gradient cosines were not asked for."))
    maps = [_heat_map(model, found) for model, found in data["cosines"].items()]
    return card(title, lead, maps)


def _heat_map(model: str, found: Data) -> Markup:
    used = found["samples"]
    said = (
        f"{model} model: {used['forget']} forget and {used['retain']} retain samples, of the first batch of "
        "either loader, read as layer × (forget task × retain task). A dash: the task does not reach the layer."
    )
    describe = f"Mean gradient cosines by layer and task pair, {model} model."
    picture = charts.heat_map(found, describe)
    return el("figure", el("figcaption", said), el("div", picture, class_="scroll"))


def course(data: Data) -> Markup:
    """The history, and the cost."""
    lead = (
        "How the run went from the original to the unlearned model, and what it cost. Dotted lines are the levels to "
        "reach."
    )
    panels = []
    levels = {"forget": aims(data), "forget loss": data.get("loss_levels", {})}
    for name, series in _without_mirrors(_series(data["history"] or ())).items():
        said = f"{name} over steps, by {', '.join(series)}."
        chart = charts.lines(series, name, said, levels.get(name))
        panels.append(el("div", chart, class_="panel"))
    plot = absent("No history was given.")
    if panels:
        plot = el("figure", el("div", panels, class_="panels"))
    price = absent("No cost was given.")
    if data["cost"] is not None:
        price = tables.cost_table(data["cost"])
    return card("How it went, and what it cost", lead, plot, price)


def _series(records: Sequence[Data]) -> Series:
    """{quantity: {task: [(step, value)]}} of all numbers in the records."""
    found: Series = {}
    for record in records:
        for name, task, value in _numbers(record):
            quantity = found.setdefault(name.replace("_", " "), {})
            quantity.setdefault(task, []).append((record["step"], value))
    return found


def _without_mirrors(found: Series) -> Series:
    """Without scores that are losses with the sign changed, as those of a run that was given no score."""
    kept = dict(found)
    for name, series in found.items():
        losses = found.get(f"{name} loss")
        if losses is not None and _negated(losses) == series:
            del kept[name]
    return kept


def _negated(
    series: Mapping[str, list[tuple[float, float]]],
) -> dict[str, list[tuple[float, float]]]:
    found = {}
    for task, points in series.items():
        found[task] = [(step, -value) for step, value in points]
    return found


def _numbers(record: Data) -> Iterator[tuple[str, str, float]]:
    """(quantity, task, value) of the numbers in one record; one of no task has its own name for the task."""
    for name, value in record.items():
        if name in ("step", "seconds"):
            continue
        by_task = value if isinstance(value, Mapping) else {name: value}
        for task, one in by_task.items():
            if isinstance(one, int | float) and not isinstance(one, bool):
                yield name, task, one
