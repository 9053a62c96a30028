"""The verdict on membership inference: whether the data to forget can be told from unseen data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mtu_fast.unlearning.report.levels import guessed
from mtu_fast.unlearning.report.rules import CHANCE, CLEAR, NEAR, WIDE
from mtu_fast.unlearning.report.words import Finding, finding

CLASS = (
    "Whether an attacker can tell them from unseen data is not judged: any model without the class treats its data "
    "unlike others, and how far only a retrained model can say."
)


@dataclass(frozen=True)
class Attack:
    """One attack on the unlearned model, and the same on the retrained model, if there is one."""

    task: str
    by: str
    found: Mapping[str, float]
    ideal: Mapping[str, float] | None

    @property
    def away(self) -> float:
        """How far the AUC is from a guess."""
        return abs(self.found["auc"] - 0.5)

    @property
    def chance(self) -> float:
        """How far from a guess chance explains."""
        return CHANCE * self.found["error"]

    @property
    def excess(self) -> float:
        """How many standard errors the AUC lies outside what chance and the retrained model explain."""
        error = self.found["error"]
        bound = CHANCE
        if self.ideal is not None:
            # the retrained model's own distance is known to one standard error
            bound = max(CHANCE, abs(self.ideal["auc"] - 0.5) / error + 1)
        return self.away / error - bound

    @property
    def blurred(self) -> bool:
        """Whether chance explains so much that not being told apart means little."""
        return self.chance >= WIDE or NEAR < self.away <= self.chance


def attack(data: Mapping[str, Any]) -> Finding:
    """Whether an attack on a target tells its data apart."""
    if guessed(data):
        return finding("unknown", "not judged", CLASS)
    attacks = list(_attacks(data))
    if not attacks:
        return finding("unknown", "not tested", "Membership inference could not be tested.")
    worst = max(attacks, key=lambda one: one.excess)
    if worst.excess > 0:
        return _told_apart(worst)
    blurred = [one for one in attacks if one.blurred]
    if blurred:
        return _too_few(max(blurred, key=lambda one: (one.found["error"], one.away)))
    detail = (
        "An attacker who sees one number per sample cannot tell them from unseen data better than "
        "chance"
    )
    detail += "." if worst.ideal is None else " or than with the retrained model."
    return finding("good", "not told apart", detail)


def _attacks(data: Mapping[str, Any]) -> Iterator[Attack]:
    """The attacks on the targets that could be made."""
    found = data["membership"].get("unlearned", {})
    ideals = data["membership"].get("retrained", {})
    for task in data["request"]["targets"]:
        for by, one in found.get(task, {}).items():
            if one is not None:
                yield Attack(task, by, one, ideals.get(task, {}).get(by))


def _told_apart(one: Attack) -> Finding:
    beside = ""
    if one.ideal is not None:
        beside = f"; the retrained model gives {one.ideal['auc']:.2f}"
    detail = (
        f"An attacker can tell them from unseen data by the {one.by} of task {one.task} "
        f"(AUC {one.found['auc']:.2f}, chance is 0.50 ± {one.chance:.2f}{beside})."
    )
    return finding("poor" if one.away > CLEAR else "fair", "told apart", detail)


def _too_few(one: Attack) -> Finding:
    detail = (
        "There are too few samples to tell whether an attacker can tell them from unseen data: by the "
        f"{one.by} of task {one.task} the AUC is {one.found['auc']:.2f} with {one.found['samples']} samples of either "
        f"kind, and chance alone gives 0.50 ± {one.chance:.2f}."
    )
    return finding("unknown", "too few samples to tell", detail)
