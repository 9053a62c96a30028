"""A case of unlearning that takes seconds, and rows of results."""

from __future__ import annotations

from typing import Any

from benchmarks import cases, demo
from benchmarks.cases import Case
from benchmarks.data import Dataset
from benchmarks.protocol import Protocol
from benchmarks.scenes import make_scenes
from benchmarks.training import divide

SIZES = {"train": 60, "validation": 30, "test": 90}


def split(seed: int) -> dict[str, Dataset]:
    made = make_scenes(SIZES, seed)
    return {**divide(made.pop("train"), 10), **made}


TINY = Case(
    demo.problem(8),
    Protocol(epochs=12, batch=20, retain_batch=6, forget_batch=4, steps=2, every=1, watch=False, grids={
        family: tuple((alpha, 0.1 * lr) for alpha, lr in grid[:2]) for family, grid in cases.DIGITS.items()
    }),
    split, rounds=1,
)  # fmt: skip
PROBLEM = TINY.problem


def sources(data: Dataset) -> set[int]:
    return set(data[:].source.flatten().tolist())


def rows(method: str, levels: int, uis: list[float], **more: Any) -> list[dict[str, Any]]:
    base = {"method": method, "levels": levels, "reached": True, "gap": 0.1, "auc": 0.5, "drift": 0.1}  # fmt: skip
    return [base | {"seed": i, "uis": value} | more for i, value in enumerate(uis)]
