"""The report's two sections on what the unlearning did: to the data to forget, and to everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtu_fast.unlearning.report import charts, tables
from mtu_fast.unlearning.report.markup import Markup, el, number
from mtu_fast.unlearning.report.sections import absent, card
from mtu_fast.unlearning.report.tables import Data
from mtu_fast.unlearning.report.verdict import CHANCE


def removed(data: Data) -> Markup:
    """Scores and attack on the data to forget, and how their losses moved."""
    tasks, targets = data["request"]["tasks"], data["request"]["targets"]
    said = "Forget scores of each model by task; the table below has the numbers."
    chart = _score_dots(data, "forget", said)
    return card(
        "What was removed",
        "Scores on the data to forget should come down to the level of data that the model has never seen.",
        charts.key(data["models"]), el("figure", chart, el("figcaption", _aim(data))),
        tables.score_table(data, "forget", "Scores on the data to forget, higher is better."),
        _over_forgotten(data),
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


def _over_forgotten(data: Data) -> Markup | None:
    """The flag, and whether chance explains it."""
    over, beyond = (
        data["over_forgotten"] or data["verdict"]["over_forgotten"],
        data["verdict"]["over_forgotten"],
    )
    if not over:
        return None
    level = "retrained model's" if "retrained" in data["models"] else "original's on unseen data"
    sure = f"For {', '.join(beyond)} the difference is more than chance explains. " if beyond else (
        "The difference is within what chance explains for so few samples. "
    )  # fmt: skip
    return el(
        "p", el("span", "⚑ Over-forgetting: ", class_="flag"),
        f"the forget score is below the {level} for {', '.join(over)}. {sure}Data that were never seen would score "
        "higher: an excess is itself a trace, and usually costs similar data as well.",
    )  # fmt: skip


def _aim(data: Data) -> str:
    if "retrained" in data["models"]:
        return (
            "The retrained model never saw these data: its score is the level to reach, not zero."
        )
    return "No retrained model was given; the original's score on unseen data stands for the level to reach."


def _score_dots(data: Data, split: str, said: str) -> Markup:
    known = [
        t for t in data["request"]["tasks"] if data["scores"]["original"][split][t] is not None
    ]
    rows = {t: {m: data["scores"][m][split][t] for m in data["models"]} for t in known}
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
                band[f"{task}, {by}"] = (
                    max(0.5 - CHANCE * error, 0.0),
                    min(0.5 + CHANCE * error, 1.0),
                )
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
        ), class_="panel") for task in tasks if data["histograms"][split][task]
    ]  # fmt: skip
    if not panels:
        return absent("No sample there has a label.")
    outline = "; outline: retrained" if "retrained" in data["models"] else ""
    said = (
        f"Number of samples (logarithmic) by change of loss, after minus before. Filled: unlearned{outline}. The end "
        "bars hold what lies beyond; right of the dashed line the loss rose."
    )
    return el("figure", el("div", panels, class_="panels"), el("figcaption", said))
