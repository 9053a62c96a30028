"""Weights of the wrong shape, and methods that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from tests.errors.bench import Bench, N, refused
from tests.helpers.checks import trained

pytestmark = pytest.mark.usefixtures("only_new_objects")


@pytest.mark.parametrize("shape", [(7,), (9,), (), (8, 1), (3, 8), (1, 1, 8)])
def test_weights_of_the_wrong_shape(bench: Bench, shape: tuple[int, ...]) -> None:
    rows = bench.engine.rows(bench.losses())
    message = r"weights: found shape .*, expected \[8\], one per row, or \[2, 8\] per layer, \[4, 8\] per tensor"
    with bench.untouched():
        for call in (
            lambda: rows.vjp(torch.ones(shape)),
            lambda: rows.backward(torch.ones(shape)),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        rows._parts.clear()


def test_weights_that_are_not_finite_are_called_so(bench: Bench) -> None:
    rows = bench.engine.rows(bench.losses())
    with bench.untouched(), pytest.raises(RuntimeError, match="weights that are not finite"):
        rows.backward(torch.full((8,), torch.nan))


def test_uneven_weights_say_nothing_of_the_heads(bench: Bench) -> None:
    rows = bench.engine.rows(bench.losses())
    with bench.untouched():
        with pytest.raises(
            ValueError, match=r"weights differ between rows of one kind and task.*outside"
        ):
            rows.backward(torch.arange(2.0 * N))
        with pytest.raises(ValueError, match=r"per layer say nothing of parameters outside"):
            rows.backward(torch.ones(2, 2 * N))
        rows._parts.clear()


def test_a_class_for_a_method(bench: Bench) -> None:
    message = r"found the class OrthoGrad, expected an instance of a method, such as mtu\.OrthoGrad\(alpha=0\.5\): call"
    refused(bench, TypeError, message, lambda l: bench.engine.backward(l, mtu.OrthoGrad))


@pytest.mark.parametrize("method", [None, 0.5, "orthograd", lambda G: G.sum(0)])
def test_a_method_of_the_wrong_type(bench: Bench, method: Any) -> None:
    rows = bench.engine.rows(bench.losses())
    message = (
        r"found .*, expected an mtu\.Method such as mtu\.OrthoGrad\(.*\), or weights \[R\]"
        r".*weighting\(rows\.gram\(\)\)"
    )
    with bench.untouched():
        with pytest.raises(TypeError, match=message):
            rows.backward(method)
        rows._parts.clear()
    refused(bench, TypeError, message, lambda l: bench.engine.backward(l, method))


def test_an_unknown_kind_of_rows(bench: Bench) -> None:
    refused(
        bench,
        ValueError,
        "per: found 'batch', expected one of 'sample', 'task'",
        lambda l: bench.engine.rows(l, per="batch"),
    )
    rows = bench.engine.rows(bench.losses())
    with pytest.raises(
        ValueError, match="per: found 'module', expected one of 'total', 'layer', 'tensor'"
    ):
        rows.gram(per="module")


def test_explain_before_any_rows(bench: Bench) -> None:
    with pytest.raises(RuntimeError, match=r"no rows yet.*engine\.rows"):
        bench.engine.explain()


class Equal(mtu.Method):
    """All rows weigh the same: the least that a method must have."""

    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        return torch.ones_like(roles.loss)

    def outside(self, roles: mtu.Roles) -> Tensor:
        return torch.ones_like(roles.loss)


class Counting(Equal):
    """A method with a state, which asks for no Gram."""

    needs_gram = False

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, G: Tensor | None, roles: mtu.Roles) -> Tensor:
        self.calls += 1
        return torch.ones_like(roles.loss)


def test_rows_that_are_used_up_do_not_reach_a_method(bench: Bench) -> None:
    rows, method = bench.engine.rows(bench.losses()), Counting()
    rows.backward(method)
    with pytest.raises(RuntimeError, match="used these rows up"):
        rows.backward(method)
    assert method.calls == 1


class NoMethod:
    """All that a method has, but for the base class."""

    per, granularity, needs_gram, needs_subspace = "sample", "global", True, False

    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        return torch.ones_like(roles.loss)


def test_a_method_of_ones_own(bench: Bench) -> None:
    method: Any = Equal()
    params = trained(bench.model)
    losses = bench.losses()
    plain = torch.autograd.grad(
        sum(loss.sum() for loss in losses.values()), params, retain_graph=True
    )
    before = [p.grad.clone() for p in params]
    bench.engine.backward(losses, method)
    for p, g, old in zip(params, plain, before, strict=True):
        assert torch.allclose(p.grad - old, g, rtol=1e-9, atol=1e-12)


def test_a_method_that_does_not_derive_from_the_base_class(bench: Bench) -> None:
    method: Any = NoMethod()
    said = r"(?s)found NoMethod, expected an mtu\.Method.*class Mine\(mtu\.Method\)"
    refused(bench, TypeError, said, lambda l: bench.engine.backward(l, method))
    rows = bench.engine.rows(bench.losses())
    with bench.untouched():
        with pytest.raises(TypeError, match=said):
            rows.backward(method)
        rows._parts.clear()


@pytest.mark.parametrize(("name", "value"), [("per", "samples"), ("granularity", "layers")])
def test_a_method_whose_flag_is_no_known_word(bench: Bench, name: str, value: str) -> None:
    method = type("Misspelt", (Equal,), {name: value})()
    refused(
        bench, TypeError, rf"Misspelt: {name} is '{value}', expected one of '",
        lambda l: bench.engine.backward(l, method),
    )  # fmt: skip


def test_weights_that_are_no_tensor(bench: Bench) -> None:
    weights: Any = [1.0, 2.0]
    rows = bench.engine.rows(bench.losses())
    with pytest.raises(TypeError, match=r"weights: found list, expected a real tensor \[8\]"):
        rows.vjp(weights)
