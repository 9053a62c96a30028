"""Every setting of every method and reference, of the wrong kind or out of range."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch

import mtu_fast as mtu
from mtu_fast import methods, reference
from tests.surface.wrong import WRONG, refused, walk

FIELDS = {
    "a": "exponent",
    "alpha": "fraction",
    "beta": "fraction",
    "c": "not negative",
    "energy": "share",
    "generator": "generator",
    "granularity": "word",
    "kappa": "numbers by task",
    "order": "word",
    "orders": "orders",
    "preference": "weights by task",
    "rank": "count or None",
    "resting": "names or none",
    "retain": "word",
    "ridge": "not negative",
    "slope": "not negative",
    "targets": "targets",
    "tau": "numbers by task",
    "threshold": "number",
    "tol": "fraction",
}
WIDER = {reference.METHODS["fairgrad"]: {"a": "positive"}}


def classes() -> list[type]:
    """Every method and every reference."""
    found = []
    for name in methods.__all__:
        made = getattr(methods, name)
        if isinstance(made, type) and issubclass(made, mtu.Method):
            found.append(made)
    abstract = (methods.Method, methods.Scheduled)
    # tests of other files register references of their own
    ours = [made for made in reference.METHODS.values() if made.__module__.startswith("mtu_fast.")]
    return [made for made in found if made not in abstract] + ours


@pytest.mark.parametrize("made", classes(), ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_a_wrong_setting_is_named(made: Any) -> None:
    for field in fields(made):
        if field.init:
            kind = WIDER.get(made, FIELDS).get(field.name, FIELDS[field.name])
            for value in WRONG[kind]:
                refused(partial(made, **{field.name: value}), field.name)


def roles() -> mtu.Roles:
    zeros = torch.zeros(4).long()
    index = torch.arange(4)
    return mtu.Roles(zeros, index, index % 2, torch.ones(4).double(), ("a",), torch.float64)


def ready(made: Any) -> Any:
    """An instance that may be called."""
    method = made()
    if isinstance(method, methods.NablaTau):
        method.prepare(forget=1, retain=9, forget_batches=1, retain_batches=1)
        method.start_epoch(0, lambda: {"a": 1.0})
    return method


@pytest.mark.parametrize(
    "made", [c for c in classes() if issubclass(c, mtu.Method)], ids=lambda c: c.__name__
)
def test_a_wrong_matrix_or_roles_are_named(made: Any) -> None:
    method = ready(made)
    given = {"G": torch.eye(4).double() if method.needs_gram else None, "roles": roles()}
    kinds = {"roles": "roles"} | ({"G": "gram"} if method.needs_gram else {})
    walk(lambda G, roles: method(G, roles), given, kinds)
    walk(method.outside, {"roles": roles()}, {"roles": "roles"})


def test_roles() -> None:
    good = vars(roles())
    kinds = dict.fromkeys(("task", "sample", "kind", "loss"), "tensor")
    walk(mtu.Roles, good, kinds | {"rank": "tensor or None", "tasks": "names", "dtype": "dtype"})
    walk(methods.mean_weights, {"roles": roles(), "kind": 0}, {"roles": "roles", "kind": "of rows"})
    walk(methods.dependence_tolerance, {"dtype": torch.float32}, {"dtype": "dtype"})


def test_labels() -> None:
    target, generator = torch.arange(4), torch.Generator()
    walk(
        mtu.random_labels,
        {"target": target, "classes": 4, "generator": generator},
        {"target": "tensor", "classes": "count above 0", "generator": "generator"},
    )
    walk(mtu.shuffled_targets, {"target": target, "generator": None}, {"generator": "generator"})
    for value in [*WRONG["tensor"][:10], torch.ones(4).to_sparse(), torch.tensor(1.0)]:
        refused(lambda v=value: mtu.shuffled_targets(v), "target")  # type: ignore[misc]


def test_hooks_and_states() -> None:
    method = methods.NablaTau()
    counts = {"forget": 1, "retain": 9, "forget_batches": 1, "retain_batches": 1}
    walk(method.prepare, counts, dict.fromkeys(counts, "count above 0"))
    walk(
        method.start_epoch,
        {"epoch": 0, "validation": lambda: {"a": 1.0}},
        {"epoch": "count", "validation": "function"},
    )
    for value in WRONG["numbers by task"]:
        refused(lambda v=value: method.start_epoch(0, lambda: v), "validation")  # type: ignore[misc]
    for made in (methods.NablaTau(), methods.GradVac()):
        walk(made.load_state_dict, {"state": made.state_dict()}, {"state": "state"})
    walk(mtu.OrthoGrad().load_state_dict, {"state": {}}, {"state": "mapping"})
