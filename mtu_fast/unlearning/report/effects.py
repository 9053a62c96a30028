"""The report's two sections on what the unlearning did: to the data to forget, and to everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtu_fast.unlearning.report import charts, tables
from mtu_fast.unlearning.report.levels import aims, guessed
from mtu_fast.unlearning.report.markup import Markup, el, number
from mtu_fast.unlearning.report.rules import CHANCE
from mtu_fast.unlearning.report.sections import absent, card
from mtu_fast.unlearning.report.tables import Data

ATTACK = (
    "Logistic regression on one number per sample, forget data against unseen data, both equally many. "
    f"The shaded range is what chance explains ({CHANCE:g} standard errors). A result below it is a trace "
    "as well: the data then stand out in a way that the attack reads the wrong way round."
)


def removed(data: Data) -> Markup:
    """Scores and attack on the data to forget, and how their losses moved."""
    tasks, targets = data["request"]["tasks"], data["request"]["targets"]
    others = None
    if len(targets) < len(tasks):
        others = el(
            "p",
            "In tasks not to be forgotten these data were used and still are: a high value is right there.",
        )
    return card(
        "What was removed",
        "Scores on the data to forget should come down to the level of data that the model has never seen.",
        charts.key(data["models"]),
        el("figure", _score_dots(data), el("figcaption", _aim(data))),
        tables.score_table(data, "forget", "Scores on the data to forget, higher is better."),
        _over_forgotten(data),
        el("h3", "Can an attacker tell that the data were used?"),
        el("p", ATTACK),
        others,
        _attack_figure(data),
        tables.attack_table(data),
        el("h3", "How the losses on the data to forget moved"),
        tables.drift_table(
            data, "forget", targets, "Change of each sample's loss; a rise is wanted here."
        ),
        _histograms(data, "forget", [task for task in tasks if task in targets]),
    )


def _over_forgotten(data: Data) -> Markup | None:
    """The flag, and whether chance explains it."""
    beyond = data["verdict"]["over_forgotten"]
    over = data["over_forgotten"] or beyond
    if not over:
        return None
    level = "original's on unseen data"
    if "retrained" in data["models"]:
        level = "retrained model's"
    sure = "The difference is within what chance explains for so few samples. "
    if beyond:
        sure = f"For {', '.join(beyond)} the difference is more than chance explains. "
    text = (
        f"the forget score is below the {level} for {', '.join(over)}. {sure}Data that were never seen would score "
        "higher: an excess is itself a trace, and usually costs similar data as well."
    )
    return el("p", el("span", "⚑ Over-forgetting: ", class_="flag"), text)


def _aim(data: Data) -> str:
    line = " The dashed lines are the levels."
    if guessed(data):
        return (
            "No retrained model was given; chance is the level to reach for a removed class." + line
        )
    if data["request"].get("removal") == "class":
        return "The retrained model never saw this class: its score is the level to reach." + line
    if "retrained" in data["models"]:
        return (
            "The retrained model never saw these data: its score is the level to reach, not zero."
            + line
        )
    return (
        "No retrained model was given; the original's score on unseen data stands for the level to reach."
        + line
    )


def _score_dots(data: Data) -> Markup:
    """Forget scores of each model by task."""
    scores = data["scores"]
    rows, values = {}, [0.0]
    for task in data["request"]["tasks"]:
        if scores["original"]["forget"][task] is not None:
            rows[task] = {model: scores[model]["forget"][task] for model in data["models"]}
            values += rows[task].values()
    levels = aims(data)
    values += levels.values()
    low, high = min(values), max(values[1:])
    # shares on their whole axis, unless they are all small
    if 0.4 < high <= 1:
        high = 1.0
    said = "Forget scores of each model by task; the table below has the numbers."
    return charts.dots(rows, low, high or 1.0, said, levels=levels)


def _attack_figure(data: Data) -> Markup:
    rows, band, levels = {}, {}, {}
    for task in data["request"]["tasks"]:
        for by in ("loss", "entropy"):
            found = tables.attack_by(data, task, by)
            if all(found.values()):
                name = f"{task}, {by}"
                rows[name] = {model: one["auc"] for model, one in found.items()}
                # the attack's standard error by the number of samples
                chance = CHANCE * found["unlearned"]["error"]
                band[name] = (max(0.5 - chance, 0.0), min(0.5 + chance, 1.0))
                levels[name] = rows[name].get("retrained", 0.5)
    if not rows:
        return absent("Membership inference could not be made; the notes below say why.")
    said = "AUC of the membership attack by task and model; the shaded range is chance."
    return el("figure", charts.dots(rows, 0.0, 1.0, said, band, levels))


def moved(data: Data) -> Markup:
    """Scores and drift of everything that was to stay."""
    return card(
        "What else moved",
        "A mean hides damage to single samples, so every sample's loss is compared before and after. A rise is damage.",
        charts.key(data["models"]),
        _moved_on(data, "retain", "retained data"),
        _moved_on(data, "test", "unseen data"),
        _other_tasks(data),
    )


def _moved_on(data: Data, split: str, name: str) -> list[Markup]:
    tasks = data["request"]["tasks"]
    caption = f"Change of each sample's loss on {name}: mean, quantiles, mean of the worst 1 %."
    return [
        el("h3", f"On {name}"),
        tables.score_table(data, split, f"Scores on {name}, higher is better."),
        tables.drift_table(data, split, tasks, caption),
        _histograms(data, split, tasks),
        tables.worst_table(data, split),
    ]


def _other_tasks(data: Data) -> list[Markup]:
    """How the tasks that are no target moved on the data to forget."""
    targets = data["request"]["targets"]
    others = [task for task in data["request"]["tasks"] if task not in targets]
    if not others:
        return []
    text = f"Only {', '.join(targets)} was to be forgotten: on the same samples these tasks are to stay as they were."
    caption = "Change of each sample's loss; it should be near zero."
    return [
        el("h3", "The forget data's other tasks"),
        el("p", text),
        tables.drift_table(data, "forget", others, caption),
        _histograms(data, "forget", others),
    ]


def _histograms(data: Data, split: str, tasks: Sequence[str]) -> Markup:
    panels = []
    for task in tasks:
        found = data["histograms"][split][task]
        if found:
            drift = data["drift"]["unlearned"][split][task]
            level = _rise_to(data, task) if split == "forget" else None
            chart = charts.histogram(found, task, _described(split, task, drift), level)
            panels.append(el("div", chart, class_="panel"))
    if not panels:
        return absent("No sample there has a label.")
    outline = "; outline: retrained" if "retrained" in data["models"] else ""
    said = (
        f"Number of samples (logarithmic) by change of loss, after minus before. Filled: unlearned{outline}. The end "
        "bars hold what lies beyond; right of the thin dashed line the loss rose."
    )
    if split == "forget" and any(_rise_to(data, task) is not None for task in tasks):
        said += " The bold dashed line is the mean rise that leads to the level to reach."
    return el("figure", el("div", panels, class_="panels"), el("figcaption", said))


def _rise_to(data: Data, task: str) -> float | None:
    """The mean change of a target's loss that leads to the level to reach."""
    level = data.get("loss_levels", {}).get(task)
    before = data.get("mean_losses", {}).get(task)
    if level is None or before is None:
        return None
    return float(level - before)


def _described(split: str, task: str, drift: Any) -> str:
    return (
        f"Histogram of loss changes on {split} data, task {task}: mean {number(drift['mean'])}, "
        f"worst percent {number(drift['worst_mean'])}."
    )
