"""The report's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtu_fast.unlearning.report.markup import Markup, el, number, signed

Data = Mapping[str, Any]
SHOWN = ("1%", "5%", "50%", "95%", "99%")  # quantiles of drift that the page shows; JSON has all
NO_DRIFT: Data = {  # of a task without labels there
    "samples": 0,
    "mean": None,
    "quantiles": dict.fromkeys(SHOWN),
    "worst_mean": None,
    "worst": (),
    "worst_class": None,
}


def table(caption: str, head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Markup:
    """A table whose first column names the rows."""
    names = [el("th", head[0], scope="row")]
    for cell in head[1:]:
        names.append(el("th", cell, scope="col"))
    top = el("thead", el("tr", names))
    body = el("tbody", map(_row, rows))
    return el("div", el("table", el("caption", caption), top, body), class_="scroll")


def _row(cells: Sequence[Any]) -> Markup:
    name, *values = cells
    return el("tr", el("th", name, scope="row"), [el("td", value) for value in values])


def task_name(data: Data, task: str) -> list[Any]:
    """The task, and whether it is one to forget from."""
    return [task, _tag(data, task)]


def _tag(data: Data, task: str) -> Markup | None:
    request = data["request"]
    if request["kind"] == "partial" and task in request["targets"]:
        return el("span", "target", class_="tag")
    return None


def score_table(data: Data, split: str, caption: str) -> Markup:
    """Scores of all models on one split, and the changes that matter."""
    rows = []
    for task in data["request"]["tasks"]:
        values = {model: data["scores"][model][split][task] for model in data["models"]}
        row = [task_name(data, task), *map(number, values.values())]
        row.append(signed(_less(values["unlearned"], values["original"])))
        if "retrained" in values:
            row.append(signed(_less(values["unlearned"], values["retrained"])))
        rows.append(row)
    head = ["task", *data["models"], "unlearned − original"]
    if "retrained" in data["models"]:
        head.append("unlearned − retrained")
    return table(caption, head, rows)


def _less(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return a - b


def attack_table(data: Data) -> Markup:
    """AUC and accuracy of the attacks, one line per task and kind."""
    rows = []
    for task in data["request"]["tasks"]:
        for by in ("loss", "entropy"):
            found = attack_by(data, task, by)
            if any(found.values()):
                name = [f"{task}, by {by}", _tag(data, task)]
                rows.append([name, *map(_attack, found.values())])
    caption = "AUC of the attack, its accuracy in brackets; 0.50 is a guess."
    return table(caption, ["task", *data["models"]], rows)


def attack_by(data: Data, task: str, by: str) -> dict[str, Any]:
    """{model: the attack on a task by loss or entropy}; None where there is none."""
    found = {}
    for model in data["models"]:
        found[model] = data["membership"][model].get(task, {}).get(by)
    return found


def _attack(found: Data | None) -> str:
    if found is None:
        return "–"
    return f"{number(found['auc'], 2)} ({number(found['accuracy'], 2)})"


def drift_table(data: Data, split: str, tasks: Sequence[str], caption: str) -> Markup:
    """Mean, quantiles and worst of the loss changes; one line per task and model."""
    rows = []
    for task in tasks:
        for model in data["models"]:
            if model != "original":
                found = data["drift"][model][split][task] or NO_DRIFT
                rows.append([_drift_name(data, task, model), *_drift(found)])
    quantiles = [f"{q[:-1]} %" for q in SHOWN]
    return table(caption, ["task", "samples", "mean", *quantiles, "worst 1 %", "worst class"], rows)


def _drift_name(data: Data, task: str, model: str) -> Any:
    if "retrained" in data["models"]:
        return [task, el("span", model, class_="tag")]
    return task


def _drift(found: Data) -> list[Any]:
    quantiles = [signed(found["quantiles"][q]) for q in SHOWN]
    worst = "–"
    if found["worst_class"] is not None:
        label, change = found["worst_class"]
        worst = f"{label} ({signed(change, 2)})"
    return [found["samples"], signed(found["mean"]), *quantiles, signed(found["worst_mean"]), worst]


def worst_table(data: Data, split: str) -> Markup:
    """The samples whose losses rose most."""
    found = data["drift"]["unlearned"][split]
    rows = []
    for task in data["request"]["tasks"]:
        rows.append([task, *map(_worst, _worst_of(found[task]))])
    width = max(map(len, rows))
    for row in rows:
        # a task with fewer samples has fewer of the worst
        row += [""] * (width - len(row))
    places = ""
    if any(one["index"] is not None for row in found.values() for one in _worst_of(row)):
        places = " (# is its place in the loader)"
    ranks = [f"{i}." for i in range(1, width)]
    return table(f"Largest rises of a sample's loss on {split}{places}.", ["task", *ranks], rows)


def _worst_of(found: Data | None) -> Sequence[Data]:
    return (found or NO_DRIFT)["worst"]


def _worst(one: Data) -> str:
    change = signed(one["change"], 2)
    if one["index"] is None:
        return change
    return f"#{one['index']}: {change}"


def gap_table(data: Data) -> Markup:
    """|unlearned − retrained| by split and task, with ToW."""
    rows = []
    for task in data["request"]["tasks"]:
        row: list[Any] = [task_name(data, task)]
        for split in ("forget", "retain", "test"):
            row.append(number(data["gaps"][split].get(task)))
        row.append(number((data["tow"] or {}).get(task)))
        rows.append(row)
    caption = "Gap to the retrained model, 0 is ideal; ToW is the product of 1 − gap, 1 is ideal."
    return table(caption, ["task", "forget", "retain", "test", "ToW"], rows)


def distance_table(data: Data) -> Markup:
    """KL and logit distance by split and task."""
    rows = []
    for split, tasks in data["distances"].items():
        for task, one in tasks.items():
            kl = [number(one["kl"]["mean"]), number(one["kl"]["95%"])]
            rows.append([f"{split}, {task}", *kl, number(one["logit_distance"]["mean"])])
    caption = (
        "Distance of the unlearned model's outputs from the retrained model's, per sample; "
        "KL in nats."
    )
    return table(caption, ["data, task", "KL, mean", "KL, 95 %", "logits, mean"], rows)


def cost_table(cost: Data) -> Markup:
    """What was given as cost: numbers, or one number per variant."""
    # columns in the order in which they first occur
    variants = list(dict.fromkeys(_variants(cost)))
    rows = []
    for name, value in cost.items():
        if isinstance(value, Mapping):
            rows.append([name, *(_amount(value.get(variant)) for variant in variants)])
        else:
            empty = [""] * (len(variants) - 1)
            rows.append([name, _amount(value), *empty])
    return table("Cost.", ["what", *(variants or [""])], rows)


def _variants(cost: Data) -> Iterator[str]:
    for value in cost.values():
        if isinstance(value, Mapping):
            yield from value


def _amount(value: Any) -> str:
    if isinstance(value, int | float) or value is None:
        return number(value, 1)
    return str(value)
