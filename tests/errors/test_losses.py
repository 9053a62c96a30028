"""Losses that are none: each a clear error, `.grad` as it was to the bit, nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mtu_fast as mtu
from tests.errors.bench import MASK, Bench, Losses, N, refused

pytestmark = pytest.mark.usefixtures("only_new_objects")

BAD_LOSSES: list[tuple[str, Callable[[Losses], Any], type[Exception], str]] = [
    (
        "mean",
        lambda l: l["a"].mean(),
        ValueError,
        r"losses\['loss'\].*one number.*labels=.*reduction='none'",
    ),
    (
        "one mean",
        lambda l: {**l, "b": l["b"].mean()},
        ValueError,
        r"losses\['b'\].*found shape \(\).*reduction='none'",
    ),
    (
        "pixels",
        lambda l: l["a"][:, None].expand(4, 9),
        ValueError,
        r"\(4, 9\).*more than one value per sample.*flatten\(1\)",
    ),
    ("a column", lambda l: l["a"][:, None], ValueError, r"\(4, 1\).*loss\.squeeze\(1\)"),
    (
        "unequal",
        lambda l: {"a": l["a"], "b": l["b"][:3]},
        ValueError,
        r"lengths \{'a': 4, 'b': 3\}.*present=",
    ),
    (
        "reduced to [1]",
        lambda l: {"a": l["a"], "b": l["b"].mean()[None]},
        ValueError,
        r"lengths \{'a': 4, 'b': 1\}",
    ),
    (
        "a parameter",
        lambda _: nn.Parameter(torch.ones(4)),
        ValueError,
        r"found a parameter itself.*clone",
    ),
    ("detached", lambda l: l["a"].detach(), ValueError, r"no graph \(grad_fn is None\).*no_grad"),
    (
        "one detached",
        lambda l: {"a": l["a"], "b": l["b"].detach()},
        ValueError,
        r"losses\['b'\].*no graph",
    ),
    (
        "nan",
        lambda l: l["a"] * torch.tensor([1, torch.nan, 1, 1]),
        ValueError,
        r"non-finite.*samples \[1\].*0/0",
    ),
    (
        "inf",
        lambda l: {**l, "b": l["b"] / torch.tensor([1.0, 1, 0, 0])},
        ValueError,
        r"losses\['b'\].*samples \[2, 3\]",
    ),
    ("none", lambda l: {}, ValueError, r"found no task"),
    (
        "complex",
        lambda l: torch.complex(l["a"], l["b"]),
        TypeError,
        r"losses\['loss'\]: found torch.complex128.*real",
    ),
    ("a list", lambda l: list(l.values()), TypeError, r"found list, expected a tensor \[N\]"),
    ("a float", lambda l: {"a": 1.0}, TypeError, r"losses\['a'\]: found float"),
    ("nothing", lambda l: None, TypeError, r"found NoneType"),
]


@pytest.mark.parametrize(
    ("bad", "error", "match"), [c[1:] for c in BAD_LOSSES], ids=[c[0] for c in BAD_LOSSES]
)
@pytest.mark.parametrize("way", ["orthograd", "graddiff", "pcgrad", "rows"])
def test_bad_losses(
    bench: Bench, bad: Callable[[Losses], Any], error: type[Exception], match: str, way: str
) -> None:
    methods = {"orthograd": mtu.OrthoGrad(), "graddiff": mtu.GradDiff(), "pcgrad": mtu.PCGrad()}

    def call(losses: Losses) -> None:
        if way == "rows":
            bench.engine.rows(bad(losses))
        else:
            bench.engine.backward(bad(losses), methods[way], forget=True)

    refused(bench, error, match, call)


def test_losses_made_without_grad(bench: Bench) -> None:
    def call(_: Losses) -> None:
        with torch.no_grad():
            losses = bench.losses()
        bench.engine.backward(losses, mtu.OrthoGrad())

    refused(bench, ValueError, "no_grad", call)


def test_losses_on_two_devices(bench: Bench) -> None:
    refused(bench, ValueError, r"different devices \{'a': 'cpu', 'b': 'meta'\}.*one",
            lambda l: bench.engine.rows({"a": l["a"], "b": l["b"].to("meta")}))  # fmt: skip


def test_a_loss_that_reaches_no_parameter(bench: Bench) -> None:
    x = torch.randn(N, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="none of the engine's parameters"):
        bench.engine.rows(x.square().sum(1))


@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()])
def test_losses_of_another_model(method: mtu.Method) -> None:
    model = nn.Linear(3, 2)
    other = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=r"none of the engine's parameters \(weight, bias.*another model.*frozen"
    ):
        mtu.Engine(model).backward(other(torch.randn(N, 3)).square().sum(1), method, forget=MASK)
    assert model.weight.grad is None and other.weight.grad is None
