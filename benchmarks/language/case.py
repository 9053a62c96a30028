"""The language benchmark's data and sizes: who is forgotten, what is kept, what was never read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import Samples, concat
from benchmarks.language import facts, model
from benchmarks.language.facts import Fact
from benchmarks.language.texts import IGNORED, Texts
from benchmarks.protocol import Grid, Problem, Protocol

REQUESTS = ("people", "birthplace")
MODES = ("full", "lora")

# (alpha, learning rate) by family, equally many in each; adapters start at zero, and are moved faster
FULL: dict[str, Grid] = {
    "protective": ((0.7, 1.0), (0.9, 1.0)),
    "ascent": ((0.0, 0.03), (0.0, 0.1)),
    "orthogonal": ((0.5, 1.0), (0.7, 1.0)),
}
FASTER = 4.0
GRIDS = {
    "full": FULL,
    "lora": {family: tuple((a, FASTER * lr) for a, lr in grid) for family, grid in FULL.items()},
}


@dataclass(frozen=True)
class Sizes:
    """How many of each: people in all, of whom some are forgotten; those never read; places; the model."""

    people: int = 40
    forgotten: int = 8
    unseen: int = 20  # for validation, and again for test
    places: int = 15
    width: int = 64
    layers: int = 2
    rank: int = 8  # of LoRA
    protocol: Protocol = field(
        default=Protocol(
            epochs=55,
            peak=6e-3,
            retain_batch=16,
            forget_batch=8,
            steps=60,
            every=2,
            clip=0.1,
            watch=False,
        )
    )


QUICK = Sizes(
    people=12, forgotten=4, unseen=4, places=4, width=32, layers=1, rank=4,
    protocol=Protocol(
        epochs=6, peak=6e-3, retain_batch=6, forget_batch=4, steps=2, every=2, clip=0.1, watch=False,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One seed: the problem, its texts, and the splits of each request.

    `parts[request]`: forget, retain (people, the facts to keep), general (places), train (all three,
    in this order), validation and test (people never read, the kinds of fact that are forgotten).
    `told` {split: facts} stands beside `parts`, for what is generated.
    """

    problem: Problem
    texts: Texts
    sizes: Sizes
    parts: dict[str, dict[str, Samples]]
    told: dict[str, dict[str, list[Fact]]]

    def protocol(self, mode: str) -> Protocol:
        """The protocol of a mode, with its settings; the first alone where all is small."""
        grids = GRIDS[mode]
        if self.sizes == QUICK:
            grids = {family: grid[:1] for family, grid in grids.items()}
        return replace(self.sizes.protocol, grids=grids)


def sizes_of(quick: bool) -> Sizes:
    """The sizes of the table, or those of a test."""
    return QUICK if quick else Sizes()


@lru_cache(maxsize=1)
def load(seed: int, quick: bool) -> Case:
    """The case of one seed, made once a process."""
    sizes = sizes_of(quick)
    draw = random.Random(seed)
    people = facts.people(draw, sizes.people + 2 * sizes.unseen)
    known, unseen = people[: sizes.people], people[sizes.people :]
    groups = {
        "forgotten": _flat(known[: sizes.forgotten]),
        "others": _flat(known[sizes.forgotten :]),
        "validation": _flat(unseen[: sizes.unseen]),
        "test": _flat(unseen[sizes.unseen :]),
        "general": _flat(facts.places(draw, sizes.places)),
    }
    texts = Texts(_flat(list(groups.values())))  # tokens of names are no knowledge of people
    told = {request: split(groups, request) for request in REQUESTS}
    parts = {request: _samples(texts, of) for request, of in told.items()}
    return Case(_problem(texts, sizes), texts, sizes, parts, told)


def split(groups: dict[str, list[Fact]], request: str) -> dict[str, list[Fact]]:
    """The splits of a request: all facts of the forgotten people, or their birthplaces alone."""
    forget = [fact for fact in groups["forgotten"] if _asked(fact, request)]
    kept = [fact for fact in groups["forgotten"] if not _asked(fact, request)]
    return {
        "forget": forget,
        "retain": kept + groups["others"],
        "general": groups["general"],
        "validation": [fact for fact in groups["validation"] if _asked(fact, request)],
        "test": [fact for fact in groups["test"] if _asked(fact, request)],
    }


def _asked(fact: Fact, request: str) -> bool:
    return request == "people" or fact.kind.name == request


def _samples(texts: Texts, told: dict[str, list[Fact]]) -> dict[str, Samples]:
    parts = {name: texts.samples(of) for name, of in told.items()}
    return parts | {"train": concat(parts["forget"], parts["retain"], parts["general"])}


def _problem(texts: Texts, sizes: Sizes) -> Problem:
    net = partial(model.Reader, len(texts), texts.ask, sizes.width, sizes.layers)
    return Problem("language", model.TASKS, model.STATES, net, model.losses, likelihood)


def targets(request: str) -> tuple[str, ...]:
    """The tasks to forget from: all, or those whose text states the fact; the category is then kept."""
    return model.TASKS if request == "people" else model.STATES


def to_retrain(parts: dict[str, Samples]) -> dict[str, Samples]:
    """The splits as `protocol.retrain` takes them: places are learned again, too."""
    return parts | {"retain": concat(parts["retain"], parts["general"])}


def adapted(net: nn.Module, rank: int) -> nn.Module:
    """The net with LoRA adapters, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    reader: Any = net
    reader.requires_grad_(False)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    reader.lm = get_peft_model(
        reader.lm, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    )
    return reader


@torch.no_grad()
def likelihood(net: nn.Module, data: Samples) -> dict[str, float]:
    """{task: mean of exp(−loss)}: how likely the true text is, a token; the category's probability."""
    found = model.losses(net(data.image), data.labels)
    return {task: float(torch.exp(-loss).mean()) for task, loss in found.items()}


@torch.no_grad()
def exact(net: nn.Module, data: Samples) -> dict[str, float]:
    """{task: share of samples of which every token that counts is the likeliest}: what greedy decoding would say."""
    out = net(data.image)
    found = {"category": _share(out["category"].argmax(-1) == data.labels["category"])}
    for task in model.STATES:
        following = data.labels[task][:, 1:]
        right = (out[task][:, :-1].argmax(-1) == following) | (following == IGNORED)
        found[task] = _share(right.all(1))
    return found


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _flat(subjects: Sequence[list[Fact]]) -> list[Fact]:
    found: list[Fact] = []
    for each in subjects:
        found += each
    return found
