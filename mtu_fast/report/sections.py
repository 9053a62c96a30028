"""The report's sections, each a function of an audit's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtu_fast.report import charts, tables
from mtu_fast.report.markup import Markup, el, number
from mtu_fast.report.tables import Data
from mtu_fast.report.verdict import CHANCE

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
    names = {"removal": "The data to forget", "kept": "Everything else", "attack": "Membership attack"}
    tiles = [
        _tile(name, el("span", f"{signs[found[part]['level']]} {found[part]['word']}", class_=found[part]["level"]))
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
        _tile("Parameters moved", number(100 * data["parameter_shift"], 2) + " %", "of the norm of all"),
    ]
    if "retrained" in data["models"]:
        mean = None if tow is None else sum(tow.values()) / len(tow)
        over = data["over_forgotten"]
        found.insert(1, _tile("Mean gap to retrained", number(data["mean_gap"]), "0 is ideal"))
        found.insert(2, _tile("ToW, mean over tasks", number(mean), "1 is ideal"))
        names = el("span", "⚑ " + ", ".join(over), class_="poor") if over else "none"
        found.append(_tile("Below the retrained model", names, "on the data to forget"))
    return found


def _tile(name: str, value: Any, small: str | None = None) -> Markup:
    return el("div", el("dt", name), el("dd", value, None if small is None else el("small", small)), class_="tile")


def removed(data: Data) -> Markup:
    """Scores and attack on the data to forget, and how their losses moved."""
    tasks, targets = data["request"]["tasks"], data["request"]["targets"]
    said = "Forget scores of each model by task; the table below has the numbers."
    over = data["over_forgotten"]
    flag = None if not over else el(
        "p", el("span", "⚑ Over-forgetting: ", class_="flag"),
        f"the forget score is below the retrained model's for {', '.join(over)}. Data that were never seen would score "
        "higher: the excess is itself a trace, and usually costs similar data as well.",
    )  # fmt: skip
    chart = _score_dots(data, "forget", said)
    return card(
        "What was removed",
        "Scores on the data to forget should come down to the level of data that the model has never seen.",
        charts.key(data["models"]), el("figure", chart, el("figcaption", _aim(data))),
        tables.score_table(data, "forget", "Scores on the data to forget, higher is better."), flag,
        el("h3", "Can an attacker tell that the data were used?"),
        el("p", "Logistic regression on one number per sample, forget data against unseen data, both equally many. "
                f"The shaded range is what chance explains ({CHANCE:g} standard errors). A result below it is a trace "
                "as well: the data then stand out in a way that the attack reads the wrong way round."),
        None if len(targets) == len(tasks) else el(
            "p", "In tasks not to be forgotten these data were used and still are: a high value is right there."
        ),
        _attack_figure(data), tables.attack_table(data),
        el("h3", "How the losses on the data to forget moved"),
        tables.drift_table(data, "forget", targets, "Change of each sample's loss; a rise is wanted here."),
        _histograms(data, "forget", [task for task in tasks if task in targets]),
    )  # fmt: skip


def _aim(data: Data) -> str:
    if "retrained" in data["models"]:
        return "The retrained model never saw these data: its score is the level to reach, not zero."
    return "No retrained model was given; the original's score on unseen data stands for the level to reach."


def _score_dots(data: Data, split: str, said: str) -> Markup:
    rows = {t: {m: data["scores"][m][split][t] for m in data["models"]} for t in data["request"]["tasks"]}
    values = [value for row in rows.values() for value in row.values()]
    low, high = min(0.0, *values), max(values)
    return charts.dots(rows, low, 1.0 if 0.4 < high <= 1 else high or 1.0, said)


def _attack_figure(data: Data) -> Markup | None:
    found, rows, band = data["membership"], {}, {}
    for task in data["request"]["tasks"]:
        for by in ("loss", "entropy"):
            one = {m: found[m][task][by] for m in data["models"] if found[m].get(task, {}).get(by)}
            if len(one) == len(data["models"]):
                rows[f"{task}, {by}"] = {m: value["auc"] for m, value in one.items()}
                error = one["unlearned"]["error"]
                band[f"{task}, {by}"] = (max(0.5 - CHANCE * error, 0.0), min(0.5 + CHANCE * error, 1.0))
    if not rows:
        return absent("Membership inference could not be made; the notes below say why.")
    said = "AUC of the membership attack by task and model; the shaded range is chance."
    return el("figure", charts.dots(rows, 0.0, 1.0, said, band))


def moved(data: Data) -> Markup:
    """Scores and drift of everything that was to stay."""
    others = [task for task in data["request"]["tasks"] if task not in data["request"]["targets"]]
    parts: list[Any] = []
    for split, name in (("retain", "retained data"), ("test", "unseen data")):
        parts += [
            el("h3", f"On {name}"), tables.score_table(data, split, f"Scores on {name}, higher is better."),
            tables.drift_table(data, split, data["request"]["tasks"],
                               f"Change of each sample's loss on {name}: mean, quantiles, mean of the worst 1 %."),
            _histograms(data, split, data["request"]["tasks"]), tables.worst_table(data, split),
        ]  # fmt: skip
    if others:
        parts += [
            el("h3", "The forget data's other tasks"),
            el("p", f"Only {', '.join(data['request']['targets'])} was to be forgotten: on the same samples these "
                    "tasks are to stay as they were."),
            tables.drift_table(data, "forget", others, "Change of each sample's loss; it should be near zero."),
            _histograms(data, "forget", others),
        ]  # fmt: skip
    return card(
        "What else moved",
        "A mean hides damage to single samples, so every sample's loss is compared before and after. A rise is damage.",
        charts.key(data["models"]), *parts,
    )  # fmt: skip


def _histograms(data: Data, split: str, tasks: Sequence[str]) -> Markup:
    panels = [
        el("div", charts.histogram(
            data["histograms"][split][task], task,
            f"Histogram of loss changes on {split} data, task {task}: mean "
            f"{number(data['drift']['unlearned'][split][task]['mean'])}, worst percent "
            f"{number(data['drift']['unlearned'][split][task]['worst_mean'])}.",
        ), class_="panel") for task in tasks
    ]  # fmt: skip
    outline = "; outline: retrained" if "retrained" in data["models"] else ""
    said = (
        f"Number of samples (logarithmic) by change of loss, after minus before. Filled: unlearned{outline}. The end "
        "bars hold what lies beyond; right of the dashed line the loss rose."
    )
    return el("figure", el("div", panels, class_="panels"), el("figcaption", said))


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
    return card("Beside retraining", lead, tables.gap_table(data), apart, steps)


def conflict(data: Data) -> Markup:
    """Heat maps of gradient cosines."""
    lead = (
        "Cosine between the gradients of forget and retain samples, mean over pairs, by layer. Positive (warm): a step "
        "that raises the forget loss there raises the retain loss too; near zero: the two are independent."
    )
    if data["cosines"] is None:
        return card("Where forgetting and keeping meet", lead, absent("The gradient cosines were not asked for."))
    maps = []
    for model, found in data["cosines"].items():
        used = found["samples"]
        said = f"{model} model: {used['forget']} forget and {used['retain']} retain samples, read as layer × (forget " \
               "task × retain task). A dash: the task does not reach the layer."  # fmt: skip
        picture = charts.heat_map(found, f"Mean gradient cosines by layer and task pair, {model} model.")
        maps.append(el("figure", el("figcaption", said), el("div", picture, class_="scroll")))
    return card("Where forgetting and keeping meet", lead, maps)


def course(data: Data) -> Markup:
    """The history, and the cost."""
    lead = "How the run went from the original to the unlearned model, and what it cost."
    panels = [el("div", charts.lines(series, name, f"{name} over steps, by {', '.join(series)}."), class_="panel")
              for name, series in _series(data["history"] or ()).items()]  # fmt: skip
    plot = el("figure", el("div", panels, class_="panels")) if panels else absent("No history was given.")
    price = absent("No cost was given.") if data["cost"] is None else tables.cost_table(data["cost"])
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
                    found.setdefault(name, {}).setdefault(task, []).append((record["step"], one))
    return found
