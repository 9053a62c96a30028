"""The public surface given what it does not take: an error that names the argument, and `.grad` untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.surface.wrong import WRONG, parameters_of, refused

N = 4


class Scene:
    """A model with a head outside, its engine, and losses of two tasks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"body": nn.Linear(3, 5), "head": nn.Linear(5, 2)})
        self.engine = mtu.Engine(self.model, self.model["body"].parameters())
        self.x = torch.randn(N, 3)
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)

    def losses(self) -> dict[str, Tensor]:
        out = self.model["head"](self.model["body"](self.x))
        return {"a": out[:, 0].square(), "b": out[:, 1].square()}

    def rows(self, **options: Any) -> mtu.Rows:
        return self.engine.rows(self.losses(), **options)

    def backward(self, *arguments: Any, **options: Any) -> mtu.Update:
        return self.engine.backward(self.losses(), *arguments, **options)

    def filled(self) -> mtu.Subspace:
        """A subspace that is full, with a basis."""
        made = mtu.Subspace(4, basis=True)
        made.keep(self.rows(forget=True))
        return made

    def unlearn(self, **options: Any) -> Any:
        settings: dict[str, Any] = {
            "retain": [self.x.clone()],
            "forget": [self.x],
            "losses": lambda model, x: model["head"](model["body"](x)).square().sum(1),
            "method": mtu.OrthoGrad(0.5),
            "max_steps": 1,
        }
        optimizer = options.pop("optimizer", torch.optim.SGD(self.model.parameters(), lr=0.1))
        return mtu.unlearn(options.pop("model", self.model), optimizer, **(settings | options))


MASK = torch.arange(N) < 2
NOT_A_MASK = [5, "x", [True] * N, MASK.float(), MASK[:2], MASK[None], MASK.to_sparse()]
META = torch.empty(N, dtype=torch.bool, device="meta")
NOT_WEIGHTS = [
    [1.0] * 2 * N,
    torch.ones(3),
    torch.ones(3, 2 * N),
    torch.ones(2 * N, dtype=torch.complex64),
    torch.ones(2 * N, device="meta"),
    torch.ones(2 * N).to_sparse(),
]
OFTEN = [5, "x", object()]
LOADERS = [v for v in WRONG["loader"] if v is not None]

# What is called, the words of the argument in the error, and the wrong values.
SURFACE: dict[str, tuple[Callable[[Scene, Any], object], str, list[Any]]] = {
    "Engine(model)": (lambda s, v: mtu.Engine(v), "model", [*OFTEN, None, [nn.Linear(1, 1)]]),
    "Engine(params)": (
        lambda s, v: mtu.Engine(s.model, params=v),
        "params",
        [*OFTEN, [5], ["body.weight"], [torch.ones(3, requires_grad=True)], []],
    ),
    "Engine(memory_budget)": (
        lambda s, v: mtu.Engine(s.model, memory_budget=v),
        "memory_budget",
        [-1, 1.5, "1", None, True],
    ),
    "Engine(precision)": (
        lambda s, v: mtu.Engine(s.model, precision=v),
        "precision",
        [5, None, "tf32"],
    ),
    "rows(losses)": (
        lambda s, v: s.engine.rows(v),
        "losses",
        [*OFTEN, None, [torch.ones(N)], {}, {"a": 5}, {"a": [1.0]}, torch.ones(N)],
    ),
    "rows(forget)": (lambda s, v: s.rows(forget=v), "forget", NOT_A_MASK),
    "rows(forget on meta)": (lambda s, v: s.rows(forget=v), "forget", [META, {"c": MASK}]),
    "rows(present)": (lambda s, v: s.rows(present=v), "present", [5, MASK, {"c": MASK}]),
    "rows(present of a task)": (lambda s, v: s.rows(present={"a": v}), "present", NOT_A_MASK),
    "rows(per)": (lambda s, v: s.rows(per=v), "per", [5, "task ", None]),
    "backward(method)": (
        lambda s, v: s.backward(v),
        "method|weights",
        [5, "OrthoGrad", None, mtu.OrthoGrad, lambda G: G],
    ),
    "backward(weights)": (lambda s, v: s.backward(v), "weights", NOT_WEIGHTS[1:]),
    "backward(subspace)": (
        lambda s, v: s.backward(mtu.InterferenceAware(0.5), subspace=v),
        "subspace",
        [5, "x", [torch.ones(3)]],
    ),
    "Rows.backward(outside)": (
        lambda s, v: s.rows().backward(torch.ones(2 * N), outside=v),
        "outside",
        [5, "x", [1.0], torch.ones(3)],
    ),
    "Rows.gram(per)": (lambda s, v: s.rows().gram(v), "per", [5, "sample", None]),
    "Rows.names(per)": (lambda s, v: s.rows().names(v), "per", [5, "sample", None]),
    "Rows.vjp(w)": (lambda s, v: s.rows().vjp(v), "weights", NOT_WEIGHTS),
    "Rows.jvp(d)": (
        lambda s, v: s.rows().jvp(v),
        "jvp",
        [5, "x", [torch.ones(3)], {"body.weight": torch.ones(5, 3)}, {torch.ones(2): 1.0}],
    ),
    "Rows.to_subspace(tasks)": (
        lambda s, v: s.rows().to_subspace(v),
        "tasks",
        [5, "a", ["unknown"], []],
    ),
    "cat": (lambda s, v: mtu.cat(s.rows(), v), "cat", [5, None, torch.ones(3)]),
    "subspace_rows(vectors)": (
        lambda s, v: s.engine.subspace_rows(v, "a"),
        "vectors",
        [
            5,
            [torch.ones(2, 5, 3)],
            {"x": torch.ones(2)},
            {"body.weight": [1.0]},
            {"body.weight": torch.ones(5, 3)},
        ],
    ),
    "Subspace(size)": (lambda s, v: mtu.Subspace(v), "size", [0, -1, 1.5, "x", True]),
    "Subspace(every)": (lambda s, v: mtu.Subspace(every=v), "every", [0, 1.5, None, "x"]),
    "Subspace(tasks)": (lambda s, v: mtu.Subspace(tasks=v), "tasks", [5, "a"]),
    "Subspace(basis)": (lambda s, v: mtu.Subspace(basis=v), "basis", ["x", 1, None]),
    "Subspace(rank)": (lambda s, v: mtu.Subspace(basis=True, rank=v), "rank", [0, 1.5, "x"]),
    "Subspace(energy)": (
        lambda s, v: mtu.Subspace(basis=True, energy=v),
        "energy",
        [0.0, 1.5, "x", float("nan")],
    ),
    "Subspace(dtype)": (
        lambda s, v: mtu.Subspace(basis=True, dtype=v),
        "dtype",
        [5, "float32", torch.int64, torch.complex64],
    ),
    "Subspace.keep": (lambda s, v: mtu.Subspace().keep(v), "Subspace", [5, torch.ones(3)]),
    "accumulate(sync)": (
        lambda s, v: s.engine.accumulate(s.losses(), mtu.OrthoGrad(0.5), sync=v),
        "sync",
        WRONG["flag"],
    ),
    "accumulate(method)": (
        lambda s, v: s.engine.accumulate(s.losses(), v, sync=True),
        "method|weights|backward",
        [5, "OrthoGrad", None, mtu.OrthoGrad],
    ),
    "Rows.backward(check)": (
        lambda s, v: s.rows().backward(mtu.OrthoGrad(0.5), check=v),
        "check",
        WRONG["flag"],
    ),
    "Rows.backward(complex outside)": (
        lambda s, v: s.rows().backward(torch.ones(2 * N), outside=v),
        "outside",
        NOT_WEIGHTS,
    ),
    "subspace_rows(task)": (
        lambda s, v: s.engine.subspace_rows({"body.weight": torch.ones(2, 5, 3)}, v),
        "task",
        [["a"], {}, torch.ones(2)],
    ),
    "subspace_rows(dtype)": (
        lambda s, v: s.engine.subspace_rows({"body.weight": torch.ones(2, 5, 3)}, "a", v),
        "dtype",
        WRONG["dtype"],
    ),
    "subspace_rows(odd vectors)": (
        lambda s, v: s.engine.subspace_rows({"body.weight": v}, "a"),
        "vectors",
        [torch.ones(2, 5, 3, dtype=torch.complex64), torch.ones(2, 5, 3).to_sparse()],
    ),
    "Subspace.project(gradients)": (
        lambda s, v: s.filled().project(v),
        "gradients",
        [*OFTEN, [torch.ones(3)], {"body.weight": torch.ones(5, 3)}, {torch.ones(2): 1.0}],
    ),
    "Subspace.project(into)": (lambda s, v: s.filled().project({}, v), "into", WRONG["flag"]),
    "Subspace.load_state_dict(state)": (
        lambda s, v: mtu.Subspace().load_state_dict(v, s.engine.subspace_rows),
        "state",
        WRONG["state"],
    ),
    "Subspace.load_state_dict(kept)": (
        lambda s, v: mtu.Subspace().load_state_dict(s.filled().state_dict(), v),
        "kept",
        WRONG["function"],
    ),
    "Subspace.join": (lambda s, v: s.filled().join(v), "cat", WRONG["rows"]),
    "Subspace.step": (
        lambda s, v: s.filled().step(v, mtu.InterferenceAware()),
        "cat",
        WRONG["rows"],
    ),
    "unlearn(validation)": (lambda s, v: s.unlearn(validation=v), "validation", LOADERS),
    "unlearn(monitor)": (lambda s, v: s.unlearn(monitor=v), "monitor", [*LOADERS, []]),
    "unlearn(odd forget)": (lambda s, v: s.unlearn(forget=v), "forget", [*LOADERS, None]),
    "unlearn(odd retain)": (lambda s, v: s.unlearn(retain=v), "retain", [*LOADERS, None]),
    "unlearn(score)": (lambda s, v: s.unlearn(score=v), "score", WRONG["function"]),
    "unlearn(what score gives)": (
        lambda s, v: s.unlearn(score=lambda *_: v),
        "score",
        [5, "x", [], {}, {"loss": "x"}, {"loss": torch.ones(2)}, {"loss": None}],
    ),
    "unlearn(forget_losses)": (
        lambda s, v: s.unlearn(forget_losses=v),
        "forget_losses",
        WRONG["function"],
    ),
    "unlearn(epochs)": (
        lambda s, v: s.unlearn(epochs=v),
        "epochs",
        [v for v in WRONG["count above 0"] if v is not None],
    ),
    "unlearn(max_drift)": (lambda s, v: s.unlearn(max_drift=v), "max_drift", WRONG["bound"]),
    "unlearn(scheduler)": (lambda s, v: s.unlearn(scheduler=v), "scheduler", WRONG["scheduler"]),
    "unlearn(subspace)": (lambda s, v: s.unlearn(subspace=v), "subspace", [5, "x", []]),
    "unlearn(generators)": (
        lambda s, v: s.unlearn(generators=v),
        "generators",
        [5, "x", None, [5], torch.Generator(), torch.ones(2)],
    ),
    "unlearn(progress)": (lambda s, v: s.unlearn(progress=v), "progress", WRONG["flag"]),
    "unlearn(model)": (lambda s, v: s.unlearn(model=v), "model", [5, "x"]),
    "unlearn(max_steps)": (lambda s, v: s.unlearn(max_steps=v), "max_steps", [-1, 1.5, "x"]),
    "unlearn(every)": (lambda s, v: s.unlearn(every=v), "every", [0, 1.5, "x"]),
    "unlearn(settle)": (lambda s, v: s.unlearn(settle=v), "settle", [0, -1, 1.5, "x"]),
    "unlearn(forget)": (lambda s, v: s.unlearn(forget=v), "forget", [5, []]),
    "unlearn(retain)": (lambda s, v: s.unlearn(retain=v), "retain", [5, []]),
    "unlearn(targets)": (lambda s, v: s.unlearn(targets=v), "targets", ["loss", [], ["x"], 5]),
    "unlearn(params)": (lambda s, v: s.unlearn(params=v), "params", [5, [], [5]]),
    "unlearn(clip)": (lambda s, v: s.unlearn(clip=v), "clip", [-1.0, "x"]),
    "unlearn(losses)": (lambda s, v: s.unlearn(losses=v), "losses", [5, "x"]),
    "unlearn(method)": (
        lambda s, v: s.unlearn(method=v),
        "method|weights",
        [5, "x", mtu.OrthoGrad],
    ),
    "unlearn(optimizer)": (lambda s, v: s.unlearn(optimizer=v), "optimizer", [5, "SGD"]),
    "backward(memory)": (
        lambda s, v: s.backward(mtu.OrthoGrad(0.5), memory=v),
        "memory",
        [5, "x", mtu.Subspace()],
    ),
    "Memory(size)": (lambda s, v: mtu.Memory(v), "size", [0, -1, 1.5, "x", True]),
    "Memory(every)": (lambda s, v: mtu.Memory(every=v), "every", [0, 1.5, None, "x"]),
    "Memory(tasks)": (lambda s, v: mtu.Memory(tasks=v), "tasks", [5, "a"]),
    "Memory(keep)": (lambda s, v: mtu.Memory(keep=v), "keep", [5, "all", None]),
    "Memory(per_task)": (lambda s, v: mtu.Memory(per_task=v), "per_task", ["x", 1, None]),
    "Memory(budget)": (lambda s, v: mtu.Memory(budget=v), "budget", [0, 1.5, "x"]),
    "Levels(quantiles)": (lambda s, v: mtu.Levels(quantiles=v), "quantiles", ["x", 1, None]),
    "Levels(growth)": (
        lambda s, v: mtu.Levels(growth=v),
        "growth",
        [0.5, "x", float("nan"), True],
    ),
    "Levels.update": (lambda s, v: mtu.Levels().update(v), "score", [5, "x", 0.5]),
    "unlearn(levels)": (lambda s, v: s.unlearn(levels=v), "levels", [5, "x", True]),
    "unlearn(memory)": (lambda s, v: s.unlearn(memory=v), "memory", [5, "x"]),
    "unlearn(checkpoint)": (lambda s, v: s.unlearn(checkpoint=v), "checkpoint", [5, 1.5]),
}
CASES = [(name, i) for name, (_, _, wrong) in SURFACE.items() for i in range(len(wrong))]


@pytest.mark.parametrize(("name", "which"), CASES)
def test_a_wrong_argument_is_named_and_nothing_is_written(name: str, which: int) -> None:
    call, words, wrong = SURFACE[name]
    scene = Scene()
    before = [p.detach().clone() for p in scene.model.parameters()]
    refused(lambda: call(scene, wrong[which]), words)
    assert all((p.grad == 1.0).all() for p in scene.model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(scene.model.parameters(), before, strict=True))


def test_every_public_callable_is_walked() -> None:
    walked = " ".join(SURFACE)
    for name in (
        "Engine",
        "rows",
        "backward",
        "accumulate",
        "cat",
        "Subspace",
        "vjp",
        "jvp",
        "gram",
    ):
        assert name in walked
    for argument in parameters_of(mtu.unlearn, ["memory", "levels"]):
        assert f"unlearn({argument})" in walked


def test_rows_of_tasks_that_are_no_strings_can_be_shown() -> None:
    scene = Scene()
    losses = dict(zip((1, ("b", 2)), scene.losses().values(), strict=True))
    assert "tasks 1, ('b', 2)" in repr(scene.engine.rows(losses))
