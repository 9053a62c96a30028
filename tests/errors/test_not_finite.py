"""Gradients, rows and weights that are not finite."""

from __future__ import annotations

from math import isfinite
from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast._checks.values import all_finite
from tests.errors.bench import MASK, Bench, Losses, N, refused

pytestmark = pytest.mark.usefixtures("only_new_objects")


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize(
    "way", ["orthograd", "orthograd per layer", "pcgrad", "graddiff", "mean", "weights"]
)
def test_finite_losses_with_infinite_gradients(earlier: int, way: str) -> None:
    """The square root of zero."""
    bench = Bench()
    head = bench.model.heads["a"]

    def losses(at_zero: bool) -> Losses:
        found = bench.losses()
        shift = found["a"].detach() * torch.tensor([0.0, 1.0 if at_zero else 0.0, 0.0, 0.0])
        return {**found, "a": (found["a"] - shift).clamp(min=0).sqrt()}

    assert head is not None
    for _call in range(earlier):
        bench.engine.rows(losses(False))
    methods: dict[str, Any] = {
        "orthograd": mtu.OrthoGrad(), "orthograd per layer": mtu.OrthoGrad(granularity="layer"), "pcgrad": mtu.PCGrad(),
        "graddiff": mtu.GradDiff(), "mean": mtu.Mean(), "weights": torch.ones(2 * N),
    }  # fmt: skip

    def call(_: Losses) -> None:
        bench.engine.backward(losses(True), methods[way], forget=MASK)

    refused(bench, RuntimeError, r"not finite", call)


def test_the_row_that_is_not_finite_is_named(bench: Bench) -> None:
    found = bench.losses()
    scale = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    rows = bench.engine.rows({"a": found["a"], "b": (found["b"] * scale).sqrt()})
    with pytest.raises(
        RuntimeError, match=r"\[\('b', 2\)\] is not finite although its loss is.*present"
    ):
        rows.gram()


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("which", ["bias", "weight"])
def test_an_infinite_gradient_that_all_rows_share(earlier: int, which: str) -> None:
    bench = Bench()
    parameter = next(p for name, p in bench.model.named_parameters() if name.endswith(which))

    def losses(power: float) -> Losses:
        found = bench.losses()
        return {**found, "b": found["b"] * (1 + (parameter.sum() * 0).pow(power))}

    for _call in range(earlier):
        bench.engine.rows(losses(2.0))

    def call(_: Losses) -> None:
        bench.engine.backward(losses(0.5), mtu.OrthoGrad(), forget=MASK)

    refused(
        bench,
        RuntimeError,
        r"\('b', 0\), .* is not finite although its loss is .*\.grad is untouched",
        call,
    )


class Restless(torch.autograd.Function):
    """Its backward weakens the last row a little more at every call, so that no two are alike."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        Restless.calls += 1
        left = torch.ones(N, dtype=grads[0].dtype)
        left[-1] /= Restless.calls
        return grads[0] * left


def test_rows_that_move_between_two_passes(bench: Bench) -> None:
    Restless.calls = 0
    found = bench.losses()
    with (
        pytest.warns(RuntimeWarning, match="one backward each"),
        pytest.raises(
            RuntimeError,
            match=r"arrives at \w+ differs from one backward to the next.*\.grad is untouched",
        ),
    ):
        bench.engine.rows({"b": found["b"], "a": Restless.apply(found["a"])})


def test_weights_that_are_not_finite(bench: Bench) -> None:
    rows = bench.engine.rows(bench.losses())
    with (
        bench.untouched(),
        pytest.raises(RuntimeError, match=r"not finite; \.grad is untouched.*weights"),
    ):
        rows.backward(torch.full((2 * N,), torch.inf, dtype=torch.float64))
    rows._parts.clear()


@pytest.mark.parametrize(
    "values", [[3e38, 3e38], [3e38, torch.inf], [torch.inf, -torch.inf], [torch.nan, 0.0]]
)
def test_a_sum_that_overflows_is_no_verdict(values: list[float]) -> None:
    assert all_finite([torch.ones(2), torch.tensor(values)]) == all(map(isfinite, values))
