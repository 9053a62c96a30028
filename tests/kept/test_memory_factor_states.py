"""Stored factors: a memory that loads them goes on alike, and damaged ones are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from tests.helpers.checks import clear, grad_vector
from tests.kept.factors import (
    FACTORS,
    MASK,
    OPTIONS,
    VOCABULARY,
    WIDTH,
    Deep,
    Heads,
    Small,
    Tied,
    Words,
    batch,
    build,
    kept_as_factors,
)
from tests.kept.scene import move


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [Deep, Words, Small, Tied], ids=lambda kind: kind.__name__)
def test_one_that_loads_the_state_goes_on_alike(
    kind: type[Heads], options: dict[str, Any], tmp_path: Path
) -> None:
    """To the bit, through a file that holds no code."""
    found = []
    for reload in (False, True):
        net, engine = build(kind, torch.float32)
        memory = mtu.Memory(**options)
        for seed in range(7):
            clear(list(net.parameters()))
            if seed == 4:
                torch.save(memory.state_dict(), tmp_path / "state.pt")
            if seed == 4 and reload:
                memory = mtu.Memory(**options)
                state = torch.load(tmp_path / "state.pt", weights_only=True)
                memory.load_state_dict(state, engine.subspace_rows)
            losses = net.losses(batch(seed, torch.float32))
            engine.backward(losses, mtu.OrthoGrad(0.3), forget={"b": MASK}, memory=memory)
            left_out = {"heads.a.weight"} if "tasks" in options else set()
            # where bytes are scarce, convolutions in groups and transposed ones too
            more = (
                {"apart.weight", "back.weight"} if kind is Small and "budget" in options else set()
            )
            assert kept_as_factors(memory) == (FACTORS[kind] | more) - left_out
            move(net)
        found.append((grad_vector(list(net.parameters())), memory.memory))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def _damaged() -> dict[str, tuple[Callable[[Any], object], type[Exception], str]]:
    def tensors(at: int, t: Callable[[Tensor], Any]) -> Callable[[Any], object]:
        def change(plain: Any) -> None:
            plain["tensors"] = list(plain["tensors"])
            plain["tensors"][at] = t(plain["tensors"][at])

        return change

    return {
        "kind": (lambda p: p.update(kind="other"), ValueError, r"\[0\]: kind: found 'other'"),
        "part": (lambda p: p.pop("shape"), ValueError, "found no shape"),
        "shape": (lambda p: p.update(shape=(96, 1.5)), TypeError, "shape: found .*whole numbers"),
        "other shape": (lambda p: p.update(shape=(4, 4)), ValueError, r"make rows of shape \(4, 4\)"),
        "one tensor": (lambda p: p["tensors"].pop(), ValueError, r"found \(8, 1, 96\), expected two"),
        "no tensor": (lambda p: p.update(tensors=[1, 2]), TypeError, r"found \[1, 2\], expected two"),
        "rows": (tensors(0, lambda t: t[1:]), ValueError, "one number of rows and positions"),
        "width": (tensors(0, lambda t: t[..., 1:]), ValueError, "make rows of shape"),
        "numbers": (tensors(1, lambda t: t.long()), TypeError, "found torch.int64, expected a real"),
        "sparse": (tensors(1, lambda t: t.to_sparse()), TypeError, "expected a dense one"),
    }  # fmt: skip


DAMAGED = _damaged()


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_factors_are_named(name: str) -> None:
    net, engine = build(Deep)
    memory = mtu.Memory(every=1)
    engine.backward(net.losses(batch(0)), mtu.OrthoGrad(0.3), forget=MASK, memory=memory)
    held, (change, error, says) = memory.held, DAMAGED[name]
    state = memory.state_dict()
    change(state["block"]["factors"]["body.0.weight"][0])
    with pytest.raises(error, match=says):
        memory.load_state_dict(state, engine.subspace_rows)
    assert memory.held is held


def of_conv(block: Any) -> Any:
    return block["factors"]["conv.weight"]


def walk(part: str, wrong: Any) -> Callable[[Any], object]:
    return lambda block: of_conv(block)[0].update(
        geometry=of_conv(block)[0]["geometry"] | {part: wrong}
    )


def less(block: Any) -> None:
    """What rows reach, without a parameter that they do."""
    for task, names in block["reached"].items():
        block["reached"][task] = [name for name in names if name != "conv.weight"]


TWICE = torch.zeros(10, WIDTH, WIDTH, 3, 3, dtype=torch.float64)
STATES: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "no list": (
        lambda b: b["factors"].update({"conv.weight": 5}),
        TypeError,
        r"factors\['conv.weight'\]: found 5, expected a list of 1",
    ),
    "unknown": (
        lambda b: b["factors"].update(other=[]),
        ValueError,
        r"factors\['other'\]: found no such parameter",
    ),
    "no mapping": (lambda b: b.update(factors=5), TypeError, "factors: found int"),
    "twice": (
        lambda b: b["vectors"].update({"conv.weight": TWICE}),
        ValueError,
        r"found \['conv.weight'\] among the vectors too",
    ),
    "rows of others": (
        lambda b: of_conv(b)[0].update(tensors=[t[1:] for t in of_conv(b)[0]["tensors"]]),
        ValueError,
        r"found 9 rows of shape \(96, 96, 3, 3\), expected 10",
    ),
    "stride": (walk("stride", (0, 1)), ValueError, "geometry: found .* for each axis"),
    "axes": (walk("padding", (1,)), ValueError, "geometry: found .* for each axis"),
    "groups": (walk("groups", 0), ValueError, "geometry: found .* for each axis"),
    "transposed": (walk("transposed", 1), TypeError, "transposed: found 1"),
    "weight": (walk("weight", (2, 2, 3, 3)), ValueError, "make rows of shape"),
    "another walk": (walk("stride", (2, 2)), ValueError, r"\['conv.weight'\]\[0\]: found"),
    "reached": (less, ValueError, "rows of task 'a' that reach 'conv.weight'"),
}


@pytest.mark.parametrize("name", STATES)
def test_damaged_states_are_named(name: str) -> None:
    net, engine = build(Small)
    memory = mtu.Memory(every=1)
    engine.backward(net.losses(batch(0)), mtu.OrthoGrad(0.3), forget={"b": MASK}, memory=memory)
    held, (change, error, says) = memory.held, STATES[name]
    state = memory.state_dict()
    change(state["block"])
    with pytest.raises(error, match=says):
        memory.load_state_dict(state, engine.subspace_rows)
    assert memory.held is held


def test_a_damaged_tied_table_is_named() -> None:
    net, engine = build(Tied)
    memory = mtu.Memory(every=1)
    engine.backward(net.losses(batch(0)), mtu.OrthoGrad(0.3), forget=MASK, memory=memory)
    changes: list[tuple[Callable[[Any], object], type[Exception], str]] = [
        (lambda p: p.pop("parts"), ValueError, "found no parts"),
        (lambda p: p["parts"].pop(), TypeError, r"parts: found .* two or more"),
        (lambda p: p["parts"][0].update(kind="x"), ValueError, r"parts\[0\]: kind: found 'x'"),
        (lambda p: p.update(shape=(3, 4)), ValueError, r"as many rows of shape \(3, 4\)"),
        (lambda p: p["parts"].append(dict(p)), ValueError, r"parts\[2\]: kind: found 'several'"),
    ]
    for change, error, says in changes:
        state = memory.state_dict()
        change(state["block"]["factors"]["table.weight"][0])
        with pytest.raises(error, match=says):
            memory.load_state_dict(state, engine.subspace_rows)


def test_a_damaged_table_is_named() -> None:
    net, engine = build(Words)
    memory = mtu.Memory(every=1)
    engine.backward(net.losses(batch(0)), mtu.OrthoGrad(0.3), forget=MASK, memory=memory)
    for index, error, says in (
        (torch.full((8, 5), VOCABULARY), ValueError, f"entries outside a table of {VOCABULARY}"),
        (torch.zeros(8, 5), TypeError, "an index of torch.float32, expected torch.int64"),
    ):
        state = memory.state_dict()
        plain = state["block"]["factors"]["table.weight"][0]
        plain["tensors"] = [index, plain["tensors"][1]]
        with pytest.raises(error, match=says):
            memory.load_state_dict(state, engine.subspace_rows)
