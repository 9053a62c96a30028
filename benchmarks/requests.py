"""What may be asked for: which samples to forget from which tasks, and how much of the rest is still at hand.

A request has a name of parts joined by "+":

    full, partial     F is the first samples of the training data; from all tasks, or from those of the partial request
    class             F is every training sample of one class of the partial request's task (a seed has its own class)
    1%, 30%           of the training data are F (the case's own share without it)
    keep-tenth        a tenth of the retain data can still be drawn; keep-64: 64 samples
    x3                three such requests, one after another on the same model

    full, class, full+30%, partial+keep-64, full+x3
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.data import Dataset
from benchmarks.protocol import Problem

Parts = Mapping[str, Dataset]
KINDS = ("full", "partial", "class")
KEPT = {"all": 1.0, "tenth": 0.1, "64": 64}  # a share, or a number of samples
PART = re.compile(r"(?P<share>\d+)%|keep-(?P<keep>\w+)|x(?P<rounds>\d+)")


@dataclass(frozen=True)
class Request:
    """One request; see the module.

    Attributes:
        kind: "full", "partial" or "class".
        share: percent of the training data in F; None: the case's own number.
        keep: of the retain data, what can still be drawn; a key of `KEPT`.
        rounds: requests of this kind, one after another.
    """

    kind: str = "full"
    share: int | None = None
    keep: str = "all"
    rounds: int = 1

    @property
    def name(self) -> str:
        """The parts that are not as usual, joined by "+"."""
        parts = [self.kind]
        if self.share is not None:
            parts.append(f"{self.share}%")
        if self.keep != "all":
            parts.append(f"keep-{self.keep}")
        if self.rounds > 1:
            parts.append(f"x{self.rounds}")
        return "+".join(parts)

    @property
    def removal(self) -> str:
        """The kind of removal that `metrics.uis` counts by."""
        return "class" if self.kind == "class" else "instance"

    def targets(self, problem: Problem) -> tuple[str, ...]:
        """The tasks to forget from."""
        return problem.tasks if self.kind == "full" else problem.partial


def parse(name: str) -> Request:
    """The request of this name.

    Args:
        name: for example "full", "class", "full+30%", "partial+keep-64", "full+x3".

    Returns:
        The request.

    Raises:
        ValueError: it is not made of the parts that there are.
    """
    kind, *parts = name.split("+")
    found: dict[str, str] = {}
    for part in parts:
        match = PART.fullmatch(part)
        if match is None:
            raise ValueError(_unknown(name))
        found |= {key: value for key, value in match.groupdict().items() if value is not None}
    share, keep = int(found["share"]) if "share" in found else None, found.get("keep", "all")
    rounds = int(found.get("rounds", 1))
    mixed = kind == "class" and (share is not None or rounds > 1)
    wrong = share is not None and not 1 <= share <= 50
    if kind not in KINDS or keep not in KEPT or rounds < 1 or mixed or wrong:
        raise ValueError(_unknown(name))
    return Request(kind, share, keep, rounds)


def _unknown(name: str) -> str:
    return (
        f"request is {name!r}, expected {', '.join(KINDS[:-1])} or {KINDS[-1]}, with +N% (1 to 50 percent to forget), "
        f"+keep-{' or +keep-'.join(list(KEPT)[1:])}, +xN (N times); a class is neither a share nor asked for again"
    )


def arrange(parts: Parts, request: Request, problem: Problem, seed: int) -> list[Parts]:
    """The splits of each round: train, forget, retain, available, validation, test and held_out.

    `forget` holds what the round asks for; `gone` all that was asked for up to it; `retain` the
    rest. `held_out` is what membership in F is attacked against: test data, of the class where one
    is forgotten, and then validation and test data are without it.

    Args:
        parts: the splits of the case.
        request: what is asked for.
        problem: whose tasks and classes they are.
        seed: chooses the class.

    Returns:
        One mapping a round.

    Raises:
        ValueError: a class is to be forgotten from a task whose label is no class.
    """
    if request.kind == "class":
        return [_of_class(parts, request, problem, seed)]
    train = parts["train"]
    count = len(parts["forget"])
    if request.share is not None:
        count = max(1, round(len(train) * request.share / 100))
    rounds = []
    for turn in range(request.rounds):
        gone = count * (turn + 1)
        found = {
            **parts,
            "forget": train.subset(slice(gone - count, gone)),
            "gone": train.subset(slice(0, gone)),
            "retain": train.subset(slice(gone, len(train))),
            "held_out": parts["test"],
        }
        rounds.append(_at_hand(found, request))
    return rounds


def _at_hand(parts: dict[str, Dataset], request: Request) -> Parts:
    retain, kept = parts["retain"], KEPT[request.keep]
    count = round(kept * len(retain)) if kept <= 1 else int(kept)
    return {**parts, "available": retain.subset(slice(0, max(1, count)))}


def _of_class(parts: Parts, request: Request, problem: Problem, seed: int) -> Parts:
    (task,) = problem.partial
    if task not in problem.classes:
        raise ValueError(
            f"request is {request.name!r}, but the labels of {task!r} in {problem.name} are not one class a sample; "
            "ask for full or partial"
        )
    label = seed % problem.classes[task]
    inside = {
        name: parts[name][:].labels[task] == label for name in ("train", "validation", "test")
    }
    order = torch.argsort((~inside["train"]).int(), stable=True)
    train, count = parts["train"].subset(order), int(inside["train"].sum())
    found = {
        **parts,
        "train": train,
        "forget": train.subset(slice(0, count)),
        "gone": train.subset(slice(0, count)),
        "retain": train.subset(slice(count, len(train))),
        "held_out": parts["test"].subset(_where(inside["test"])),
    }
    for name in ("validation", "test"):
        found[name] = parts[name].subset(_where(~inside[name]))
    return _at_hand(found, request)


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()


def level(problem: Problem, request: Request, unseen: Mapping[str, float]) -> dict[str, float]:
    """{target: score to come down to}: that of unseen data, or chance, 1/classes, for a class.

    Args:
        problem: whose tasks they are.
        request: what is asked for.
        unseen: {target: the original's score on validation data}.

    Returns:
        The level of each target.
    """
    if request.kind != "class":
        return dict(unseen)
    return {task: 1 / problem.classes[task] for task in unseen}
