"""The report's sections, each a function of an audit's data; what moved is in `effects`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtu_fast.unlearning.report import charts, tables
from mtu_fast.unlearning.report.markup import Markup, el, number
from mtu_fast.unlearning.report.tables import Data

NO_RETRAINED = (
    "No retrained model was given. Training one from scratch without the data is the only exact reference: with it, "
    "this section shows the gaps to it, ToW, over-forgetting, and how far the outputs of the two models lie apart."
)


def card(title: str, lead: str, *children: Any) -> Markup:
    """One section."""
    return el("section", el("h2", title), el("p", lead, class_="lead"), *children, class_="card")


def absent(text: str) -> Markup:
    """What is missing, said in its place."""
    return el("p", text, class_="absent")


def verdict(data: Data) -> Markup:
    """Headline, paragraph, three findings and the summary scores."""
    found = data["verdict"]
    order = ("good", "unknown", "fair", "poor")
    level = max((found[part]["level"] for part in ("removal", "kept", "attack")), key=order.index)
    signs = {"good": "✓", "fair": "△", "poor": "✕", "unknown": "?"}
    names = {
        "removal": "The data to forget",
        "kept": "Everything else",
        "attack": "Membership attack",
    }
    tiles = [
        _tile(
            name,
            el(
                "span",
                f"{signs[found[part]['level']]} {found[part]['word']}",
                class_=found[part]["level"],
            ),
        )
        for part, name in names.items()
    ]
    return el(
        "section", el("p", found["headline"], class_="headline"), el("p", found["text"]),
        el("dl", tiles, class_="tiles"), el("dl", _summary(data), class_="tiles"), class_=f"card verdict {level}",
    )  # fmt: skip


def _summary(data: Data) -> list[Markup]:
    uis, tow = data["uis"], data["tow"]
    before = f"before: {number(uis['original'], 1)}"
    ideal = f", retrained: {number(uis['retrained'], 1)}" if "retrained" in uis else ""
    found = [
        _tile("UIS, lower is better", number(uis["unlearned"], 1), before + ideal),
        _tile(
            "Parameters moved",
            number(100 * data["parameter_shift"], 2) + " %",
            "of the norm of all",
        ),
    ]
    if "retrained" in data["models"]:
        mean = None if tow is None else sum(tow.values()) / len(tow)
        over = data["over_forgotten"]
        found.insert(1, _tile("Mean gap to retrained", number(data["mean_gap"]), "0 is ideal"))
        found.insert(2, _tile("ToW, mean over tasks", number(mean), "1 is ideal"))
        names = (
            el("span", "⚑ " + ", ".join(over), class_="poor")
            if over
            else number(None)
            if over is None
            else "none"
        )
        found.append(_tile("Below the retrained model", names, "on the data to forget"))
    return found


def _tile(name: str, value: Any, small: str | None = None) -> Markup:
    return el(
        "div",
        el("dt", name),
        el("dd", value, None if small is None else el("small", small)),
        class_="tile",
    )


def ideal(data: Data) -> Markup:
    """The distance to the retrained model."""
    lead = "The model that was trained without the data from the start is what unlearning imitates."
    if "retrained" not in data["models"]:
        return card("Beside retraining", lead, absent(NO_RETRAINED))
    again = data["relearn"]
    steps = None if again is None else tables.table(
        "Relearn time: steps of fine-tuning on the forget data until their score is back at 95 % of the original's. "
        "Far fewer than the retrained model needs means hidden, not removed.", ["model", "steps"],
        [[model, "not within the limit" if count is None else count] for model, count in again.items()],
    )  # fmt: skip
    apart = tables.distance_table(data) if data["distances"] else absent(
        "No outputs were given, so the distance between the models' predictions is not known."
    )  # fmt: skip
    gaps = (
        tables.gap_table(data)
        if data["gaps"]
        else absent("The gaps could not be made; the notes below say why.")
    )
    return card("Beside retraining", lead, gaps, apart, steps)


def conflict(data: Data) -> Markup:
    """Heat maps of gradient cosines."""
    lead = (
        "Cosine between the gradients of forget and retain samples, mean over pairs, by layer. Positive (warm): a step "
        "that raises the forget loss there raises the retain loss too; near zero: the two are independent."
    )
    if data["cosines"] is None:
        return card(
            "Where forgetting and keeping meet",
            lead,
            absent("The gradient cosines were not asked for."),
        )
    maps = []
    for model, found in data["cosines"].items():
        used = found["samples"]
        said = (
            f"{model} model: {used['forget']} forget and {used['retain']} retain samples, of the first batch of "
            "either loader, read as layer × (forget task × retain task). A dash: the task does not reach the layer."
        )
        picture = charts.heat_map(
            found, f"Mean gradient cosines by layer and task pair, {model} model."
        )
        maps.append(el("figure", el("figcaption", said), el("div", picture, class_="scroll")))
    return card("Where forgetting and keeping meet", lead, maps)


def course(data: Data) -> Markup:
    """The history, and the cost."""
    lead = "How the run went from the original to the unlearned model, and what it cost."
    panels = [el("div", charts.lines(series, name, f"{name} over steps, by {', '.join(series)}."), class_="panel")
              for name, series in _series(data["history"] or ()).items()]  # fmt: skip
    plot = (
        el("figure", el("div", panels, class_="panels"))
        if panels
        else absent("No history was given.")
    )
    price = (
        absent("No cost was given.") if data["cost"] is None else tables.cost_table(data["cost"])
    )
    return card("How it went, and what it cost", lead, plot, price)


def _series(records: Sequence[Data]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{quantity: {task: [(step, value)]}} of all numbers in the records."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        for name, value in record.items():
            if name in ("step", "seconds"):
                continue
            for task, one in (value if isinstance(value, Mapping) else {name: value}).items():
                if isinstance(one, int | float) and not isinstance(one, bool):
                    found.setdefault(name.replace("_", " "), {}).setdefault(task, []).append((
                        record["step"],
                        one,
                    ))
    return found
