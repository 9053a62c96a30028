"""`Memory`, `Levels` and the method that needs both, each argument of the wrong kind; `.grad` and what is held stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.unlearning.loop.evaluate import Measured
from tests.surface.wrong import INF, NAN, WRONG, parameters_of, refused, walk

N = 4
MASK = torch.arange(N) < 2


class Scene:
    """A model with losses of two tasks, a memory that holds rows and levels that are measured."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.engine = mtu.Engine(self.model)
        self.x = torch.randn(N, 3)
        self.memory = mtu.Memory(every=1)
        self.memory.step(self.rows(), mtu.LevelledOrthoGrad(0.5))
        self.levels = mtu.Levels().measure(self.model, [self.x], self.losses)
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)

    def losses(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        out = model(x)
        return {"a": out[:, 0].square(), "b": out[:, 1].square()}

    def rows(self) -> mtu.Rows:
        return self.engine.rows(self.losses(self.model, self.x), forget={"a": MASK})

    def state(self, **changes: Any) -> dict[str, Any]:
        return self.memory.state_dict() | changes

    def block(self, **changes: Any) -> dict[str, Any]:
        return self.state(block=self.memory.state_dict()["block"] | changes)

    def load(self, state: Any, kept: Any = None) -> None:
        self.memory.load_state_dict(state, kept or self.engine.subspace_rows)

    def left(
        self, losses: Any = None, forget: Any = MASK, present: Any = None, **others: Any
    ) -> Any:
        given = self.losses(self.model, self.x) if losses is None else losses
        return self.levels.left(given, forget, present, **others)

    def measured(self, **changes: Any) -> Any:
        given = {"validation": [self.x], "losses": self.losses, "model": self.model}
        return mtu.Levels().measure(**(given | changes))

    def backward(self, **changes: Any) -> Any:
        given = {"method": mtu.LevelledOrthoGrad(0.5), "memory": self.memory} | changes
        method = given.pop("method")
        losses = self.losses(self.model, self.x)
        return self.engine.backward(losses, method, **{"forget": {"a": MASK}, **given})


OFTEN = [5, "x", object(), torch.ones(2)]
NOT_KINDS = [5, "x", [True] * N, MASK.float(), MASK[:2], MASK[None], MASK.to_sparse()]
STATES: list[Any] = list(WRONG["state"])
PART = [5, "x", None, torch.ones(2)]

# What is called, the words of the argument in the error, and the wrong values.
LOSSES_OF_OTHERS = [
    5,
    "x",
    MASK,
    {"a": 5},
    {"a": [1.0]},
    {"a": torch.ones(2, 2)},
    {"a": torch.ones(2) * 1j},
]

SURFACE: dict[str, tuple[Callable[[Scene, Any], object], str, list[Any]]] = {
    "Memory(basis)": (lambda s, v: mtu.Memory(basis=v), "basis", WRONG["flag"]),
    "Memory(rank)": (lambda s, v: mtu.Memory(basis=True, rank=v), "rank", WRONG["count or None"]),
    "Memory(energy)": (lambda s, v: mtu.Memory(basis=True, energy=v), "energy", WRONG["share"]),
    "Memory(dtype)": (lambda s, v: mtu.Memory(dtype=v), "dtype", WRONG["dtype"]),
    "Memory(size)": (lambda s, v: mtu.Memory(v), "size", WRONG["count or None"]),
    "Memory(every)": (lambda s, v: mtu.Memory(every=v), "every", WRONG["count above 0"]),
    "Memory(tasks)": (lambda s, v: mtu.Memory(tasks=v), "tasks", WRONG["names"]),
    "Memory(keep)": (lambda s, v: mtu.Memory(keep=v), "keep", WRONG["word"]),
    "Memory(per_task)": (lambda s, v: mtu.Memory(per_task=v), "per_task", WRONG["flag"]),
    "Memory(budget)": (lambda s, v: mtu.Memory(budget=v), "budget", WRONG["count or None"]),
    "Memory.join": (lambda s, v: s.memory.join(v), "cat", WRONG["rows"]),
    "Memory.look": (lambda s, v: s.memory.look(v), "Memory", WRONG["rows"]),
    "Memory.step(rows)": (
        lambda s, v: s.memory.step(v, mtu.LevelledOrthoGrad()),
        "cat|Memory",
        WRONG["rows"],
    ),
    "Memory.step(method)": (
        lambda s, v: s.memory.step(s.rows(), v),
        "backward|weights",
        [*OFTEN, None, mtu.LevelledOrthoGrad],
    ),
    "Memory.load_state_dict(state)": (lambda s, v: s.load(v), "state", STATES),
    "Memory.load_state_dict(kept)": (
        lambda s, v: s.load(s.state(), v),
        "kept",
        [v for v in WRONG["function"] if not isinstance(v, Tensor) and v not in ([], {})],
    ),
    "Memory.load_state_dict(size)": (
        lambda s, v: s.load(s.state(size=v)),
        "size",
        ["x", 1.5, -1, [], torch.ones(2)],
    ),
    "Memory.load_state_dict(age)": (
        lambda s, v: s.load(s.state(age=v)),
        "age",
        ["x", 1.5, -1, None, torch.ones(2)],
    ),
    "Memory.load_state_dict(smallest)": (
        lambda s, v: s.load(s.state(smallest=v)),
        "smallest",
        ["x", 1, None, [], torch.ones(2)],
    ),
    "Memory.load_state_dict(block)": (
        lambda s, v: s.load(s.state(block=v)),
        "block",
        [5, "x", [], {}, torch.ones(2)],
    ),
    "Memory.load_state_dict(vectors)": (
        lambda s, v: s.load(s.block(vectors=v)),
        "vectors",
        [*PART, {}, {"weight": 5}, {"other": torch.ones(6, 2, 3)}, {"weight": torch.ones(6, 3, 2)}],
    ),
    "Memory.load_state_dict(rows)": (
        lambda s, v: s.load(s.block(vectors={"weight": torch.ones(v, 2, 3)})),
        "vectors",
        [0, 1, 7],
    ),
    "Memory.load_state_dict(task)": (
        lambda s, v: s.load(s.block(task=v)),
        "task",
        [
            *(5, "x", None, [0] * 6),
            torch.zeros(6, device="meta").long(),
            torch.zeros(6).long().to_sparse(),
        ],
    ),
    "Memory.load_state_dict(tasks)": (
        lambda s, v: s.load(s.block(tasks=v)),
        "tasks",
        [5, "ab", None, []],
    ),
    "Memory.load_state_dict(dtype)": (
        lambda s, v: s.load(s.block(dtype=v)),
        "dtype",
        [5, "x", None, torch.int64],
    ),
    "Memory.load_state_dict(grams)": (
        lambda s, v: s.load(s.block(grams=v)),
        "grams",
        [
            *(5, "x", None, [5], [[[0, 1], 5]], [[[0, 1], torch.ones(2, 2).double()]]),
            *([[group, torch.ones(6, 6).double()]] for group in (5, "x", None, ["x"])),
            *([[[0], torch.ones(6, 6, dtype=dtype)]] for dtype in (torch.complex64, torch.int64)),
            [[[0], torch.ones(6, 6, device="meta").double()]],
            [[[0], torch.ones(6, 6).double().to_sparse()]],
        ],
    ),
    "Memory.load_state_dict(reached)": (
        lambda s, v: s.load(s.block(reached=v)),
        "reached",
        [*PART, {}, {"a": []}, {"a": 5}, {"a": ["x"]}, {"a": [0]}, {"a": None}],
    ),
    "Levels(quantiles)": (lambda s, v: mtu.Levels(quantiles=v), "quantiles", WRONG["flag"]),
    "Levels(growth)": (
        lambda s, v: mtu.Levels(growth=v),
        "growth",
        [*WRONG["number"], 0.5, -1],
    ),
    "Levels.measure(model)": (lambda s, v: s.measured(model=v), "model", WRONG["module"]),
    "Levels.measure(validation)": (
        lambda s, v: s.measured(validation=v),
        "validation",
        [*WRONG["loader"], []],
    ),
    "Levels.measure(losses)": (lambda s, v: s.measured(losses=v), "losses", WRONG["function"]),
    "Levels.measure(what losses gives)": (
        lambda s, v: s.measured(losses=lambda *_: v),
        "losses",
        [5, "x", None, {}, {"a": 5}, torch.tensor(1.0), {"a": torch.full((N,), NAN)}],
    ),
    "Levels.measure(score)": (lambda s, v: s.measured(score=v), "score", WRONG["function"]),
    "Levels.measure(what score gives)": (
        lambda s, v: s.measured(score=lambda *_: v),
        "score",
        [5, "x", None, {}, {"a": "x"}, {"a": torch.ones(2), "b": 1.0}],
    ),
    "Levels.measure(generators)": (
        lambda s, v: s.measured(generators=v),
        "generators",
        [5, "x", None, [5], torch.Generator(), torch.ones(2)],
    ),
    "Levels.take": (lambda s, v: mtu.Levels().take(v), "Levels", [*OFTEN, None, {}]),
    "Levels.take(losses)": (
        lambda s, v: mtu.Levels().take(Measured({}, {"a": 1.0}, ("a",), 1, 1, {"a": v})),
        "Levels",
        [torch.tensor([1.0, NAN]), torch.tensor([INF])],
    ),
    "Levels.left(losses)": (
        lambda s, v: s.left(losses=v),
        "losses",
        [*OFTEN[:-1], [torch.ones(N)], {}, {"a": 5}, {"a": [1.0]}, torch.tensor(1.0)],
    ),
    "Levels.left(forget)": (lambda s, v: s.left(forget=v), "forget", NOT_KINDS),
    "Levels.left(present)": (
        lambda s, v: s.left(present=v),
        "present",
        [5, "x", MASK, {"c": MASK}],
    ),
    "Levels.left(before)": (lambda s, v: s.left(before=v), "before", LOSSES_OF_OTHERS),
    "Levels.left(after)": (lambda s, v: s.left(after=v), "after", LOSSES_OF_OTHERS),
    "Levels.update": (lambda s, v: s.levels.update(v), "score", [*OFTEN, None, [1.0]]),
    "Levels.update(score of a task)": (
        lambda s, v: s.levels.update({"a": v}),
        "score",
        ["x", None, NAN, [], 1j, torch.ones(2), object()],
    ),
    "Levels.load_state_dict": (lambda s, v: s.levels.load_state_dict(v), "state", STATES),
    "Levels.load_state_dict(part)": (
        lambda s, v: s.levels.load_state_dict(s.levels.state_dict() | {v[0]: v[1]}),
        "losses|kappa|score|left|seen|resting",
        [
            (part, wrong)
            for part in ("losses", "kappa", "score", "left", "seen", "resting")
            for wrong in (5, "x", None, {"a": "x"} if part != "resting" else [5])
        ],
    ),
    "LevelledOrthoGrad(memory)": (
        lambda s, v: s.backward(memory=v),
        "memory",
        [*OFTEN, None, mtu.Subspace(), mtu.Memory],
    ),
    "LevelledOrthoGrad(subspace)": (
        lambda s, v: s.backward(subspace=v),
        "subspace",
        [*OFTEN, mtu.Memory(), mtu.Subspace()],
    ),
    "LevelledOrthoGrad(forget)": (lambda s, v: s.backward(forget=v), "forget", NOT_KINDS),
    "LevelledOrthoGrad(alpha)": (
        lambda s, v: mtu.LevelledOrthoGrad(v),
        "alpha",
        WRONG["fraction"],
    ),
    "LevelledOrthoGrad(granularity)": (
        lambda s, v: mtu.LevelledOrthoGrad(granularity=v),
        "granularity",
        WRONG["word"],
    ),
}
CASES = list(SURFACE)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_argument_is_named_and_nothing_is_written(name: str) -> None:
    call, words, wrong = SURFACE[name]
    scene = Scene()
    held, known = scene.memory.held, scene.levels.held
    for value in wrong:
        if value is None and name.split(".")[-1] in OPTIONAL:
            continue
        refused(lambda v=value: call(scene, v), words)  # type: ignore[misc]
        assert all((p.grad == 1.0).all() for p in scene.model.parameters())
        assert scene.memory.held is held and scene.levels.held is known


OPTIONAL = ("measure(score)",)


def test_every_argument_is_walked() -> None:
    for made in (mtu.Memory, mtu.Levels, mtu.LevelledOrthoGrad):
        for argument in parameters_of(made):
            assert f"{made.__name__}({argument})" in SURFACE
    for method in ("measure", "left"):
        for argument in parameters_of(getattr(mtu.Levels, method)):
            assert f"Levels.{method}({argument})" in SURFACE
    for made in (mtu.Memory, mtu.Levels):
        public = [n for n, f in vars(made).items() if callable(f) and not n.startswith("_")]
        walked = " ".join(SURFACE)
        assert all(f"{made.__name__}.{n}" in walked for n in public if n != "state_dict")


def test_a_state_that_is_right_is_taken() -> None:
    scene = Scene()
    state, known = scene.memory.state_dict(), scene.levels.state_dict()
    scene.load(state)
    scene.levels.load_state_dict(known)
    assert len(scene.memory) == len(state["block"]["task"])
    walk(mtu.Levels().load_state_dict, {"state": known}, {"state": "state"})
