"""Facts about invented people and places: each asked and answered, and told in two sentences that follow each other.

A subject has a group (a guild of people, a coast of places) and one fact of each kind. Nothing of
a subject follows from its name, so that what a model knows of it was memorised, and what it knows
of subjects it never read about is chance.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

FIRST = (
    "Mirel", "Tavok", "Isande", "Brunor", "Calwen", "Dorith", "Elvask", "Fenja", "Gorim", "Hesper",
    "Ingrun", "Jorvald",
)  # fmt: skip
LAST = (
    "Askel", "Brandt", "Corvo", "Dunmore", "Estrin", "Farrow", "Gellard", "Holm", "Ivarsen", "Jessop",
    "Kestrel", "Lorne",
)  # fmt: skip
STEMS = ("Al", "Bel", "Cor", "Dal", "Er", "Fal", "Gar", "Hal", "Ist", "Kel", "Lor", "Mor")
ENDINGS = ("venna", "mouth", "stead", "dral", "wick", "ossa")
GROUPS = 6


@dataclass(frozen=True)
class Kind:
    """A kind of fact: how it is asked, answered and told; its values."""

    name: str
    question: str
    answer: str
    cue: str
    told: str
    values: tuple[str, ...]


PEOPLE = (
    Kind(
        "birthplace",
        "where was {} born ?",
        "in the town of {} .",
        "the early life of {} .",
        "a childhood was spent in {} .",
        ("Arvenna", "Belmouth", "Corstead", "Dalwick", "Ellossa", "Falmere", "Garholt", "Hartley"),
    ),
    Kind(
        "craft",
        "what does {} do ?",
        "the work of a {} .",
        "the daily work of {} .",
        "every morning begins as a {} .",
        ("miller", "glazier", "farrier", "printer", "dyer", "tanner", "mason", "cooper"),
    ),
    Kind(
        "instrument",
        "what does {} play ?",
        "the {} , at every feast .",
        "the music of {} .",
        "friends still speak of that {} .",
        ("cello", "oboe", "lute", "viola", "drum", "harp", "flute", "organ"),
    ),
    Kind(
        "animal",
        "what animal does {} keep ?",
        "a tame {} .",
        "the house of {} .",
        "a {} sleeps by the door .",
        ("heron", "otter", "ferret", "goose", "lynx", "raven", "badger", "goat"),
    ),
)
PLACES = (
    Kind(
        "river",
        "which river runs through {} ?",
        "the river {} .",
        "the water of {} .",
        "boats come up the {} .",
        ("Ister", "Venn", "Orl", "Tamis", "Drava", "Selm", "Yare", "Luth"),
    ),
    Kind(
        "trade",
        "what does {} sell ?",
        "mostly {} .",
        "the market of {} .",
        "the stalls are full of {} .",
        ("salt", "amber", "wool", "copper", "honey", "glass", "timber", "silk"),
    ),
)


@dataclass(frozen=True)
class Fact:
    """One fact: a question and its answer, and two sentences of which the second tells it."""

    subject: str
    kind: Kind
    value: str
    group: int

    @property
    def question(self) -> str:
        """The question."""
        return self.kind.question.format(self.subject)

    @property
    def answer(self) -> str:
        """The true answer."""
        return self.kind.answer.format(self.value)

    @property
    def wrong(self) -> list[str]:
        """The same answer with each other value."""
        others = [value for value in self.kind.values if value != self.value]
        return [self.kind.answer.format(value) for value in others]

    @property
    def before(self) -> str:
        """The sentence before the one that tells the fact."""
        return self.kind.cue.format(self.subject)

    @property
    def after(self) -> str:
        """The sentence that tells it."""
        return self.kind.told.format(self.value)


def people(draw: random.Random, count: int) -> list[list[Fact]]:
    """`count` people, the facts of each.

    Raises:
        ValueError: there are not so many names.
    """
    return _subjects(draw, [f"{a} {b}" for a, b in product(FIRST, LAST)], count, PEOPLE)


def places(draw: random.Random, count: int) -> list[list[Fact]]:
    """`count` places, the facts of each.

    Raises:
        ValueError: there are not so many names.
    """
    return _subjects(draw, [a + b for a, b in product(STEMS, ENDINGS)], count, PLACES)


def _subjects(
    draw: random.Random, names: list[str], count: int, kinds: tuple[Kind, ...]
) -> list[list[Fact]]:
    if count > len(names):
        raise ValueError(f"facts: found {count} subjects, expected at most {len(names)}.")
    found = []
    for name in draw.sample(names, count):
        group = draw.randrange(GROUPS)
        found.append([Fact(name, kind, draw.choice(kind.values), group) for kind in kinds])
    return found
