"""What a subspace refuses, and how its errors name it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mtu_fast as mtu
from tests.kept.scene import (
    PARTIAL,
    batch,
    broken,
    build,
)


def test_errors_tell_kept_rows_from_those_of_the_step() -> None:
    net, engine = build()
    rows = engine.rows(net.losses(batch(0)), forget=PARTIAL)
    bad = engine.rows(broken(net, 1), forget=PARTIAL)
    says = r"\(task, sample\) to forget \[\('a', 2\)\], kept for the subspace \[\('a', 2\)\] is not finite"
    with pytest.raises(RuntimeError, match=says):
        mtu.cat(rows, bad, bad.to_subspace(("a",))).gram()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"size": 0}, ValueError, "size: found 0"),
        ({"size": 1.5}, TypeError, "size: found 1.5"),
        ({"every": None}, TypeError, "every: found None"),
        ({"tasks": "seg"}, TypeError, "expected several names"),
        ({"energy": 0}, ValueError, "energy: found 0"),
        ({"energy": True, "basis": True}, TypeError, "energy: found True"),
        ({"energy": "1"}, TypeError, "energy: found '1'"),
        (
            {"basis": True, "dtype": float},
            TypeError,
            "dtype: found <class 'float'>, expected a real dtype",
        ),
        ({"basis": True, "dtype": torch.int32}, TypeError, "dtype: found torch.int32"),
        ({"rank": 3}, ValueError, "basis=True"),
        ({"dtype": torch.bfloat16}, ValueError, "basis=True"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        mtu.Subspace(**options)


def test_misuse_is_named() -> None:
    net, engine = build()
    losses = net.losses(batch(0))
    with pytest.raises(
        ValueError, match=r"InterferenceAware moves in a subspace .* mtu.Subspace\(\)"
    ):
        engine.backward(losses, mtu.InterferenceAware(), forget=PARTIAL)
    with pytest.raises(ValueError, match="OrthoGrad does not use one"):
        engine.backward(losses, mtu.OrthoGrad(), forget=PARTIAL, subspace=mtu.Subspace())
    with pytest.raises(TypeError, match=r"found int, expected an mtu\.Subspace"):
        engine.backward(losses, mtu.InterferenceAware(), forget=PARTIAL, subspace=3)
    with pytest.raises(TypeError, match="found dict, expected Rows"):
        mtu.Subspace().keep(losses)
    with pytest.raises(ValueError, match="per='task'"):
        mtu.Subspace().keep(engine.rows(losses, forget=PARTIAL, per="task"))
    with pytest.raises(ValueError, match=r"tasks names \['c'\], the rows have \['a', 'b'\]"):
        mtu.Subspace(tasks=("c",)).keep(engine.rows(net.losses(batch(0))))
    assert all(p.grad is None for p in net.parameters())
