"""The report's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtu_fast.unlearning.report.markup import Markup, el, number, signed

Data = Mapping[str, Any]
SHOWN = ("1%", "5%", "50%", "95%", "99%")  # quantiles of drift that the page shows; JSON has all
NO_DRIFT: Data = {  # of a task without labels there
    "samples": 0, "mean": None, "quantiles": dict.fromkeys(SHOWN), "worst_mean": None, "worst": (), "worst_class": None,
}  # fmt: skip


def table(caption: str, head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Markup:
    """A table whose first column names the rows."""
    names = (el("th", cell, scope="col" if i else "row") for i, cell in enumerate(head))
    top = el("thead", el("tr", names))
    body = (
        el(
            "tr",
            el("th", row[0], scope="row"),
            (cell if _is_cell(cell) else el("td", cell) for cell in row[1:]),
        )
        for row in rows
    )
    return el("div", el("table", el("caption", caption), top, el("tbody", body)), class_="scroll")


def _is_cell(cell: Any) -> bool:
    return isinstance(cell, Markup) and cell.startswith("<td")


def task_name(data: Data, task: str) -> list[Any]:
    """The task, and whether it is one to forget from."""
    is_target = data["request"]["kind"] == "partial" and task in data["request"]["targets"]
    return [task, el("span", "target", class_="tag") if is_target else None]


def score_table(data: Data, split: str, caption: str) -> Markup:
    """Scores of all models on one split, and the changes that matter."""
    rows = []
    for task in data["request"]["tasks"]:
        values = {model: data["scores"][model][split][task] for model in data["models"]}
        row = [task_name(data, task), *(number(value) for value in values.values())]
        row += [
            signed(_less(values["unlearned"], values[m]))
            for m in ("original", "retrained")
            if m in values
        ]
        rows.append(row)
    beyond = ["unlearned − retrained"] if "retrained" in data["models"] else []
    return table(caption, ["task", *data["models"], "unlearned − original", *beyond], rows)


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def attack_table(data: Data) -> Markup:
    """AUC and accuracy of the attacks, a line a task and a kind."""
    rows = []
    for task in data["request"]["tasks"]:
        for by in ("loss", "entropy"):
            found = {
                model: data["membership"][model].get(task, {}).get(by) for model in data["models"]
            }
            if any(found.values()):
                cells = (
                    "–" if one is None else f"{number(one['auc'], 2)} ({number(one['accuracy'], 2)})"
                    for one in found.values()
                )  # fmt: skip
                rows.append([[f"{task}, by {by}", task_name(data, task)[1]], *cells])
    return table(
        "AUC of the attack, its accuracy in brackets; 0.50 is a guess.",
        ["task", *data["models"]],
        rows,
    )


def drift_table(data: Data, split: str, tasks: Sequence[str], caption: str) -> Markup:
    """Mean, quantiles and worst of the loss changes; a line a task, of the retrained model below it."""
    rows = []
    for task in tasks:
        for model in (m for m in data["models"] if m != "original"):
            one = data["drift"][model][split][task] or NO_DRIFT
            name = (
                [task, el("span", model, class_="tag")] if "retrained" in data["models"] else task
            )
            worst = one["worst_class"]
            rows.append([
                name, one["samples"], signed(one["mean"]), *(signed(one["quantiles"][q]) for q in SHOWN),
                signed(one["worst_mean"]), "–" if worst is None else f"{worst[0]} ({signed(worst[1], 2)})",
            ])  # fmt: skip
    quantiles = [f"{q[:-1]} %" for q in SHOWN]
    return table(caption, ["task", "samples", "mean", *quantiles, "worst 1 %", "worst class"], rows)


def worst_table(data: Data, split: str) -> Markup:
    """The samples whose losses rose most."""
    found = data["drift"]["unlearned"][split]
    rows = [
        [
            task,
            *(
                _place(one["index"]) + signed(one["change"], 2)
                for one in (found[task] or NO_DRIFT)["worst"]
            ),
        ]
        for task in data["request"]["tasks"]
    ]
    width = max(len(row) for row in rows)
    rows = [row + [""] * (width - len(row)) for row in rows]
    placed = any(
        one["index"] is not None for row in found.values() for one in (row or NO_DRIFT)["worst"]
    )
    caption = f"Largest rises of a sample's loss on {split}{' (# is its place in the loader)' if placed else ''}."
    return table(caption, ["task", *(f"{i}." for i in range(1, width))], rows)


def _place(index: int | None) -> str:
    return "" if index is None else f"#{index}: "


def gap_table(data: Data) -> Markup:
    """|unlearned − retrained| by split and task, with ToW."""
    rows = [
        [task_name(data, task), *(number(data["gaps"][split].get(task)) for split in ("forget", "retain", "test")),
         number((data["tow"] or {}).get(task))]
        for task in data["request"]["tasks"]
    ]  # fmt: skip
    caption = "Gap to the retrained model, 0 is ideal; ToW is the product of 1 − gap, 1 is ideal."
    return table(caption, ["task", "forget", "retain", "test", "ToW"], rows)


def distance_table(data: Data) -> Markup:
    """KL and logit distance by split and task."""
    rows = [
        [f"{split}, {task}", number(one["kl"]["mean"]), number(one["kl"]["95%"]), number(one["logit_distance"]["mean"])]
        for split, row in data["distances"].items() for task, one in row.items()
    ]  # fmt: skip
    caption = "Distance of the unlearned model's outputs from the retrained model's, per sample; KL in nats."
    return table(caption, ["data, task", "KL, mean", "KL, 95 %", "logits, mean"], rows)


def cost_table(cost: Data) -> Markup:
    """What was given as cost: numbers, or a number a variant."""
    variants = list(
        dict.fromkeys(
            name for value in cost.values() if isinstance(value, Mapping) for name in value
        )
    )
    if not variants:
        return table(
            "Cost.", ["what", ""], [[name, _amount(value)] for name, value in cost.items()]
        )
    rows = [
        [name, *(_amount(value.get(v)) for v in variants)] if isinstance(value, Mapping)
        else [name, _amount(value), *[""] * (len(variants) - 1)]
        for name, value in cost.items()
    ]  # fmt: skip
    return table("Cost.", ["what", *variants], rows)


def _amount(value: Any) -> str:
    return number(value, 1) if isinstance(value, int | float) or value is None else str(value)
