"""Runs as small JSON records, each under a key of all its settings: what is there is not run again.

A folder of records can be filled by several processes, and by calls that were broken off. A record
is written beside its name and then moved there, so none is ever half there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Choice, settled
from benchmarks.requests import Request

Record = dict[str, Any]
State = dict[str, Tensor]
FORMAT = 1  # of a record; another one makes all runs anew
MODELS = ("original", "retrained")  # scored as they are
SEARCHED = 0  # the seed that settings are chosen on; those of the table count from 1


class Mode(IntEnum):
    """What a method has beside itself; a record holds the number, and one of before there were three a bool.

    Attributes:
        PLAIN: nothing; a run ends when it is down to the level.
        LEVELS: samples and tasks that are down to theirs rest.
        SETTLED: with levels, a run goes on to its last step (`settling.Settling`).
    """

    PLAIN = 0
    LEVELS = 1
    SETTLED = 2

    @property
    def word(self) -> str:
        """As it stands in the name of a record, and in the CSV."""
        return self.name.lower()


@dataclass(frozen=True)
class Attempt:
    """One run: a method (or a model of `MODELS`) with one setting, asked one thing, on one seed."""

    request: Request
    method: str
    mode: Mode
    seed: int
    alpha: float = 0.0
    lr: float = 0.0

    @property
    def line(self) -> tuple[str, str, Mode]:
        """(request, method, mode): the line of the table that it belongs to."""
        return self.request.name, self.method, self.mode

    @property
    def settings(self) -> Record:
        """What a record repeats of it, its mode under "levels"."""
        return {
            "request": self.request.name, "method": self.method, "levels": self.mode, "seed": self.seed,
            "alpha": self.alpha, "lr": self.lr,
        }  # fmt: skip


@dataclass(frozen=True)
class Store:
    """The records and nets of one choice in a folder.

    Attributes:
        folder: that holds them.
        choice: data, and whether small.
        digest: of everything a run depends on, but for its own settings.
        joined: {key: record} of a table that was read, records without a file.
    """

    folder: Path
    choice: Choice
    digest: str
    joined: Mapping[str, Record] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        """Where this choice's records lie."""
        return self.folder / (self.choice.data + ("-quick" if self.choice.quick else ""))

    def key(self, attempt: Attempt) -> str:
        """The name of an attempt's record."""
        setting = f"{attempt.mode.word}-seed{attempt.seed}-alpha{attempt.alpha:g}-lr{attempt.lr:g}"
        name = f"{attempt.request.name}-{attempt.method}-{setting}"
        return re.sub(r"[^\w.+%-]+", "_", name) + f"-{self.digest}"

    def get(self, attempt: Attempt) -> Record | None:
        """The record of an attempt, if it was made."""
        key = self.key(attempt)
        path = self.home / f"{key}.json"
        if path.exists():
            found: Record = json.loads(path.read_text())
            return found
        return self.joined.get(key)

    def put(self, attempt: Attempt, record: Record) -> None:
        """Write the record of an attempt."""
        key = self.key(attempt)
        self._write(f"{key}.json", json.dumps({"key": key, **attempt.settings, **record}, indent=1))

    def records(self) -> list[Record]:
        """All records of this digest, each once."""
        found = dict(self.joined)
        for path in sorted(self.home.glob(f"*-{self.digest}.json")):
            record = json.loads(path.read_text())
            found[record["key"]] = record
        return list(found.values())

    def net(self, which: str, seed: int) -> Path:
        """Where a trained net lies, or will lie."""
        return self.home / "nets" / f"{which}-seed{seed}-{self.digest}.pt"

    def put_net(self, which: str, seed: int, state: State) -> None:
        """Keep a trained net."""
        path = self.net(which, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        torch.save(state, beside)
        os.replace(beside, path)

    def _write(self, name: str, text: str) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        beside = self.home / f".{name}.{os.getpid()}"
        beside.write_text(text + "\n")
        os.replace(beside, self.home / name)


def digest(case: Case, choice: Choice) -> str:
    """Eight digits of everything that the runs of a choice have in common."""
    protocol = {name: value for name, value in asdict(case.protocol).items() if name != "grids"}
    common = {"format": FORMAT, "protocol": protocol, "data": choice.data, "quick": choice.quick}
    return hashlib.sha1(json.dumps(common, sort_keys=True).encode()).hexdigest()[:8]


def open_store(folder: Path, case: Case, choice: Choice, joined: Path | None = None) -> Store:
    """The records in a folder, and those in the table that was made of others.

    Args:
        folder: of records; need not exist.
        case: of the choice.
        choice: data and size.
        joined: a JSON that `unlearning` wrote; its records of the same digest count as made.

    Returns:
        The store.
    """
    mine, known = digest(case, choice), {}
    if joined is not None and joined.exists():
        table = json.loads(joined.read_text())
        for record in (*table.get("tried", ()), *table["rows"]):
            if record.get("key", "").endswith(mine):
                known[record["key"]] = record
    return Store(folder, choice, mine, known)


def searched(request: Request) -> Request:
    """The request on which the settings of this one are chosen: full, or partial."""
    return Request("full" if request.kind == "full" else "partial")


def tries(
    case: Case, request: Request, method: str, mode: Mode, seed: int, family: str
) -> Iterator[Attempt]:
    """Every setting of a method on the seed that settings are chosen on."""
    grid = settled(family) if mode is Mode.SETTLED else family
    for alpha, lr in case.protocol.grids[grid]:
        yield Attempt(request, method, mode, seed, alpha, lr)


def best(records: Iterable[Record | None]) -> Record | None:
    """The try that counts: level reached, then lowest validation UIS; None where one is missing yet."""
    found = list(records)
    there = [record for record in found if record is not None]
    if not there or len(there) < len(found):
        return None
    return min(there, key=lambda record: (not record["reached"], record["uis_validation"]))
