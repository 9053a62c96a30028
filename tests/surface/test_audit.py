"""`audit` and what it gives, each argument of the wrong kind; models and their `.grad` stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast.unlearning.report import write_html
from tests.surface.wrong import NAN, WRONG, parameters_of, refused
from tests.unlearning.report import setting

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ("original", "unlearned", "retrained")
NO_MASK = torch.zeros(8, dtype=torch.bool)
NO_SCORE = [5, "x", None, [], {}, {"class": 1.0}, {"class": "x", "depth": 1.0}]
NO_SCORE += [{"class": torch.ones(2), "depth": 1.0}, {"class": NAN, "depth": 1.0}, {"x": 1.0}]

BAD_STEP: list[Any] = ["x", None, [], 1j, torch.ones(2)]


class Scene:
    """Small models and data, gradients all ones."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "page.html"
        self.models = dict(zip(MODELS, setting.nets(), strict=True))
        for p in self.parameters():
            p.grad = torch.ones_like(p)

    def parameters(self) -> list[Tensor]:
        return [p for model in self.models.values() for p in model.parameters()]

    def audit(self, **changes: Any) -> mtu.Audit:
        given = {"cosine_samples": 2, **self.models, **changes}
        models = [given.pop(name) for name in MODELS]
        return setting.audit(*models, **given)


def gives(argument: str) -> Callable[[Scene, Any], object]:
    """The audit whose function gives the value."""
    return lambda s, v: s.audit(**{argument: lambda *_: v})


MADE: list[mtu.Audit] = []


def made() -> mtu.Audit:
    """One that was made, once for all."""
    if not MADE:
        MADE.append(setting.audit(cosine_samples=0))
    return MADE[0]


# What is called, the words of the argument in the error, and the wrong values.
SURFACE: dict[str, tuple[Callable[[Scene, Any], object], str, list[Any]]] = {
    "audit(original)": (lambda s, v: s.audit(original=v), "original", WRONG["module"]),
    "audit(unlearned)": (lambda s, v: s.audit(unlearned=v), "unlearned", WRONG["module"]),
    "audit(retrained)": (
        lambda s, v: s.audit(retrained=v),
        "retrained",
        [v for v in WRONG["module"] if v is not None],
    ),
    "audit(forget)": (lambda s, v: s.audit(forget=v), "forget", [*WRONG["loader"], []]),
    "audit(retain)": (lambda s, v: s.audit(retain=v), "retain", [*WRONG["loader"], []]),
    "audit(test)": (lambda s, v: s.audit(test=v), "test", [*WRONG["loader"], []]),
    "audit(losses)": (lambda s, v: s.audit(losses=v), "losses", [*WRONG["function"], None]),
    "audit(what losses gives)": (
        gives("losses"),
        "losses",
        [5, "x", None, {}, {"a": 5}, torch.tensor(1.0), torch.ones(8, 2)],
    ),
    "audit(score)": (lambda s, v: s.audit(score=v), "score", [*WRONG["function"], None]),
    "audit(what score gives)": (gives("score"), "score", NO_SCORE),
    "audit(targets)": (
        lambda s, v: s.audit(targets=v),
        "targets",
        [*WRONG["names"], ["unknown"]],
    ),
    "audit(outputs)": (lambda s, v: s.audit(outputs=v), "outputs", WRONG["function"]),
    "audit(what outputs gives)": (
        gives("outputs"),
        "outputs",
        [5, "x", None, [], {"class": 5}, {"class": torch.ones(2)}, {"class": torch.ones(8)}],
    ),
    "audit(labels)": (lambda s, v: s.audit(labels=v), "labels", WRONG["function"]),
    "audit(what labels gives)": (
        gives("labels"),
        "labels",
        [5, "x", None, [], {"class": 5}, {"class": [1]}, {"class": torch.ones(2)}],
    ),
    "audit(present)": (lambda s, v: s.audit(present=v), "present", WRONG["function"]),
    "audit(what present gives)": (
        gives("present"),
        "present",
        [5, "x", [], {"class": 5}, {"class": torch.ones(8)}, {"unknown": NO_MASK}],
    ),
    "audit(history)": (
        lambda s, v: s.audit(history=v),
        "history",
        [5, object(), [5], ["x"], [{"loss": 1.0}], {"step": 1}]
        + [[{"step": wrong}] for wrong in BAD_STEP]
        + [[{"step": 1, "score": wrong}] for wrong in (object(), 1j)],
    ),
    "audit(cost)": (
        lambda s, v: s.audit(cost=v),
        "cost",
        [5, "x", [1], torch.ones(2), {"ms": object()}, {"ms": "x"}, {"ms": {"a": object()}}],
    ),
    "audit(relearn)": (lambda s, v: s.audit(relearn=v), "relearn", WRONG["function"]),
    "audit(what relearn gives)": (
        gives("relearn"),
        "relearn|optimizer",
        WRONG["optimizer"],
    ),
    "audit(relearn_limit)": (
        lambda s, v: s.audit(relearn_limit=v),
        "relearn_limit",
        WRONG["count above 0"],
    ),
    "audit(params)": (lambda s, v: s.audit(params=v), "params", WRONG["function"]),
    "audit(what params gives)": (gives("params"), "params", [5, "x", [5], []]),
    "audit(removal)": (lambda s, v: s.audit(removal=v), "removal", WRONG["word"]),
    "audit(cosine_samples)": (
        lambda s, v: s.audit(cosine_samples=v),
        "cosine_samples",
        WRONG["count"],
    ),
    "audit(title)": (lambda s, v: s.audit(title=v), "title", WRONG["text"]),
    "audit(seed)": (lambda s, v: s.audit(seed=v), "seed", [*WRONG["index"], -1]),
    "Audit.to_json": (lambda s, v: made().to_json(v), "path", [*WRONG["path"], None]),
    "Audit.to_html": (lambda s, v: made().to_html(v), "path", [*WRONG["path"], None]),
    "Audit.from_json": (lambda s, v: mtu.Audit.from_json(v), "path", [*WRONG["path"], None]),
    "write_html(path)": (
        lambda s, v: write_html(v, [made()]),
        "path",
        [*WRONG["path"], None],
    ),
    "write_html(audits)": (
        lambda s, v: write_html(s.path, v),
        "audit",
        [5, "x", None, [], [5], {}, made, torch.ones(2), iter([1])],
    ),
    "write_html(title)": (
        lambda s, v: write_html(s.path, [made()], v),
        "title",
        [v for v in WRONG["text"] if v is not None],
    ),
}


@pytest.mark.parametrize("name", SURFACE)
def test_a_wrong_argument_is_named_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    call, words, wrong = SURFACE[name]
    scene = Scene(tmp_path)
    before = [p.detach().clone() for p in scene.parameters()]
    modes = [m.training for model in scene.models.values() for m in model.modules()]
    drawn = torch.get_rng_state()
    for value in wrong:
        refused(lambda v=value: call(scene, v), words)  # type: ignore[misc]
    assert all(p.grad is not None and (p.grad == 1.0).all() for p in scene.parameters())
    assert all(torch.equal(p, q) for p, q in zip(scene.parameters(), before, strict=True))
    assert modes == [m.training for model in scene.models.values() for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not list(tmp_path.iterdir())


def test_every_argument_is_walked() -> None:
    assert {f"audit({name})" for name in parameters_of(mtu.audit)} <= set(SURFACE)
    assert {f"write_html({name})" for name in parameters_of(write_html)} <= set(SURFACE)
