"""Rows by themselves: Gram matrices and combinations agree with one another, in any grouping and order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.checks import (
    assert_rows,
    clear,
    grad_vector,
    joined,
    random_weights,
    trained,
    truth_of,
    twin,
    vector,
)
from tests.helpers.models.base import Forward, MultiTask
from tests.helpers.truth import combine_truth, relative_error
from tests.helpers.zoo import by_name

N = 4
MASK = torch.tensor([True, False, False, True])


def build(
    name: str = "conv2d", tasks: int = 2
) -> tuple[MultiTask, Forward, list[Tensor], mtu.Engine]:
    model, forward = by_name(name).build(tasks, N)
    return model, forward, trained(model), mtu.Engine(model)


def test_what_rows_say_of_themselves() -> None:
    _, forward, _, engine = build()
    rows = engine.rows(forward(), forget={"b": MASK})
    assert len(rows) == len(rows.roles) == 2 * N
    assert repr(rows) == "Rows(8 rows: 2 to forget, tasks a, b)"


def test_gram_is_the_product_of_combinations() -> None:
    """vᵀ G w = ⟨Jᵀ v, Jᵀ w⟩, for rows asked again and again."""
    _, forward, params, engine = build()
    rows = engine.rows(forward())
    v, w = random_weights(2 * N), random_weights(2 * N, seed=1)
    parts = [vector([rows.vjp(u).get(p) for p in params], params) for u in (v, w)]
    assert float(v @ rows.gram() @ w) == pytest.approx(float(parts[0] @ parts[1]), rel=1e-11)
    assert torch.equal(rows.gram(), rows.gram())


@pytest.mark.parametrize("per", ["layer", "tensor"])
def test_names_are_those_of_the_matrices(per: str) -> None:
    model, forward, _, engine = build()
    rows = engine.rows(forward())
    w, grams, names = random_weights(2 * N), rows.gram(per), rows.names(per)
    assert len(names) == len(grams)
    d = rows.vjp(w)
    for name, G in zip(names, grams, strict=True):
        mine = [p for key, p in model.named_parameters() if name in (key, key.rpartition(".")[0])]
        size = sum(float(d[p].square().sum()) for p in mine if p in d)
        assert float(w @ G @ w) == pytest.approx(size, rel=1e-10)
    with pytest.raises(ValueError, match="per: found 'module'"):
        rows.names("module")


def test_combine_is_linear_and_takes_any_real_dtype() -> None:
    _, forward, params, engine = build()
    rows = engine.rows(forward())
    w = torch.arange(2 * N)
    one = vector([rows.vjp(w.double()).get(p) for p in params], params)
    for other in (w, w.float(), w.double().requires_grad_()):
        assert (
            relative_error(vector([rows.vjp(other).get(p) for p in params], params), one) <= 1e-13
        )
    assert not vector([rows.vjp(0 * w).get(p) for p in params], params).any()


@pytest.mark.parametrize("per", ["layer", "tensor"])
def test_weights_per_block(per: str) -> None:
    """[L, R]: each block of parameters has weights of its own, also through backward."""
    model, forward, params, engine = build()
    names = [name for name, _ in model.named_parameters()]
    keys = [name if per == "tensor" else name.rpartition(".")[0] for name in names]
    blocks = list(dict.fromkeys(keys))
    losses = forward()
    J = truth_of(losses, params)
    w = random_weights(len(blocks) * 2 * N).view(len(blocks), -1)
    truth = [combine_truth({j: J[j]}, w[blocks.index(key)])[j] for j, key in enumerate(keys)]
    rows = engine.rows(losses)
    assert rows.gram(per=per).shape == (len(blocks), 2 * N, 2 * N)
    rows.backward(w)
    assert relative_error(grad_vector(params), vector(truth, params)) <= 1e-12


def test_jvp_of_a_combination_is_the_gram_times_its_weights() -> None:
    """J Jᵀ w = G w, whole and by blocks; what is left out does not move."""
    _, forward, params, engine = build()
    rows = engine.rows(forward())
    w = random_weights(2 * N)
    d = rows.vjp(w)
    assert relative_error(rows.jvp(d), rows.gram() @ w) <= 1e-12
    for per in ("layer", "tensor"):
        assert relative_error(rows.jvp(d, per), rows.gram(per) @ w) <= 1e-12
    one = {params[0]: d[params[0]]}
    assert relative_error(rows.jvp(one), rows.jvp(d, "tensor")[0]) <= 1e-13
    assert not rows.jvp({}).any() and rows.jvp({}, "layer").shape == (len(rows.names()), 2 * N)


def test_jvp_is_the_change_of_the_losses() -> None:
    """To first order: central differences err by their step squared."""
    _, forward, params, engine = build()
    rows = engine.rows(forward())
    d = {p: torch.randn_like(p) for p in params}
    felt, step = rows.jvp(d), 1e-4
    ends = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for p, t in d.items():
                p.add_(t, alpha=sign * step)
        ends.append(torch.cat([loss.detach() for loss in forward().values()]))
        with torch.no_grad():
            for p, t in d.items():
                p.sub_(t, alpha=sign * step)
    assert relative_error(felt, (ends[0] - ends[1]) / (2 * step)) <= 1e-6


def test_jvp_names_what_it_was_given_instead() -> None:
    _, forward, params, engine = build()
    rows = engine.rows(forward())
    name, p = next(iter(rows.parameters.items()))
    with pytest.raises(TypeError, match="jvp: found list, expected"):
        rows.jvp([torch.zeros_like(q) for q in params])
    with pytest.raises(
        ValueError,
        match=r"found a tensor of shape \(3,\) as a key, expected parameters of the engine",
    ):
        rows.jvp({torch.zeros(3): torch.zeros(3)})
    with pytest.raises(ValueError, match="found 'weight' as a key"):
        rows.jvp({"weight": torch.zeros(3)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=rf"{name}: found shape \(2,\), expected \({p.shape[0]}, "):
        rows.jvp({p: torch.zeros(2)})
    with pytest.raises(TypeError, match=f"{name}: found float, expected a tensor"):
        rows.jvp({p: 1.0})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=f"{name}: found torch.complex64"):
        rows.jvp({p: torch.zeros(p.shape, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="per: found 'module'"):
        rows.jvp({}, per="module")
    rows.backward(random_weights(2 * N))
    with pytest.raises(RuntimeError, match="used these rows up"):
        rows.jvp({p: torch.zeros_like(p)})


def test_cat_is_associative_and_copies_nothing() -> None:
    model, forward, params, engine = build()
    calls = [
        forward(),
        twin(by_name("conv2d"), model, 2, n=3)(),
        twin(by_name("conv2d"), model, 2, n=1, seed=9)(),
    ]
    J = joined(*(truth_of(losses, params) for losses in calls))
    a, b, c = (engine.rows(losses) for losses in calls)
    flat = mtu.cat(a, b, c)
    assert_rows(flat, J, params, 1e-12)
    for nested in (mtu.cat(mtu.cat(a, b), c), mtu.cat(a, mtu.cat(b, c))):
        assert torch.equal(nested.gram(), flat.gram())
    assert torch.equal(mtu.cat(a).gram(), a.gram())


def test_cat_keeps_absent_samples_out() -> None:
    model, forward, params, engine = build()
    first, second = forward(), twin(by_name("conv2d"), model, 2, n=3)()
    here = torch.cat([
        MASK,
        torch.ones(N, dtype=torch.bool),
        torch.ones(3, dtype=torch.bool),
        torch.tensor([True, False, True]),
    ])
    J = {
        j: stack[here]
        for j, stack in joined(truth_of(first, params), truth_of(second, params)).items()
    }
    a = engine.rows(first, present={"a": MASK})
    b = engine.rows(second, present={"b": torch.tensor([True, False, True])})
    assert_rows(mtu.cat(a, b), J, params, 1e-12)


def test_absent_rows_are_not_held() -> None:
    """What is kept of a call is of the samples that have a label."""
    _, forward, _, engine = build()
    rows = engine.rows(forward(), present={"a": MASK, "b": ~MASK})
    assert [use.count for part in rows._parts for use in part.uses.values()] == [2] * sum(
        len(part.uses) for part in rows._parts
    )


def test_rows_of_samples_and_means_meet() -> None:
    """The mean of a retain loader beside single forget samples."""
    model, forward, params, engine = build()
    first, second = forward(), twin(by_name("conv2d"), model, 2, n=3)()
    means = {
        j: torch.stack([part.mean(0) for part in stack.split(N)])
        for j, stack in truth_of(first, params).items()
    }
    J = joined(means, truth_of(second, params))
    both = mtu.cat(engine.rows(first, per="task"), engine.rows(second, forget=True))
    assert both.roles.sample.tolist() == [-1, -1, 0, 1, 2, 0, 1, 2]
    assert_rows(both, J, params, 1e-12)


def test_backward_is_combine() -> None:
    _, forward, params, engine = build()
    losses = forward()
    w = random_weights(2 * N)
    rows = engine.rows(losses)
    d = vector([rows.vjp(w).get(p) for p in params], params)
    clear(params)
    rows.backward(w)
    assert torch.equal(grad_vector(params), d)


@pytest.mark.parametrize("name", ["mlp", "tied_language_model"])
def test_rank_counts_independent_rows(name: str) -> None:
    """The same samples twice add no rank."""
    _, forward, _, engine = build(name)
    once = engine.rows(forward())
    assert int(once.rank()) == len(once)
    assert int(mtu.cat(once, engine.rows(forward())).rank()) == len(once)


# ---- rows that a method is meant for -------------------------------------------------------------


class Reading(mtu.Method):
    """Says nothing of parameters outside."""

    def __call__(self, G: Any, roles: mtu.Roles) -> Tensor:
        return torch.ones(len(roles), dtype=torch.float64)


def two_layers() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return net, net(torch.randn(5, 3, dtype=torch.float64)).square().sum(1)


@pytest.mark.parametrize("method", [mtu.PCGrad(), mtu.NashMTL(), mtu.MUNBa()], ids=repr)
def test_methods_of_mean_rows_refuse_sample_rows(method: Any) -> None:
    net, loss = two_layers()
    rows = mtu.Engine(net).rows(loss, forget=torch.arange(5) < 2)
    with pytest.raises(
        ValueError, match=rf"{type(method).__name__} works on mean rows.*per='task'"
    ):
        rows.backward(method)
    assert all(p.grad is None for p in net.parameters())
    rows.backward(method, check=False)
    assert all(p.grad is not None for p in net.parameters())


def test_a_method_of_a_subspace_refuses_rows_without_one() -> None:
    net, loss = two_layers()
    rows = mtu.Engine(net).rows(loss, forget=torch.arange(5) < 2)
    with pytest.raises(
        ValueError, match=r"InterferenceAware moves in a subspace.*subspace\.step\(rows, method\)"
    ):
        rows.backward(mtu.InterferenceAware())
    mtu.Subspace().step(rows, mtu.InterferenceAware())
    assert all(p.grad is not None for p in net.parameters())


def test_outside_is_asked_for_where_there_are_parameters_outside() -> None:
    net, loss = two_layers()
    mtu.Engine(net).backward(loss, Reading())
    assert all(p.grad is not None for p in net.parameters())
    net, loss = two_layers()
    engine = mtu.Engine(net, params=net[0].parameters())
    with pytest.raises(
        NotImplementedError, match=r"Reading\.outside\(roles\): expected weights \[R\]"
    ):
        engine.backward(loss, Reading())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("given", "found"), [(torch.ones(3).double(), r"shape \(3,\)"), (None, "NoneType")]
)
def test_what_outside_returns_has_a_weight_for_each_row(given: Any, found: str) -> None:
    method = Reading()
    method.outside = lambda roles: given  # type: ignore[method-assign]
    net, loss = two_layers()
    with pytest.raises((TypeError, ValueError), match=f"outside: found {found}, expected"):
        mtu.Engine(net, params=net[0].parameters()).backward(loss, method)


@pytest.mark.parametrize("scale", [1e-170, 1e-200, 1e-300])
def test_rows_whose_squares_underflow_are_named(scale: float) -> None:
    layer = nn.Linear(3, 2).double()
    engine, x = mtu.Engine(layer), torch.randn(4, 3, dtype=torch.float64)
    size = torch.tensor([1.0, scale, 0.0, 1.0], dtype=torch.float64)
    losses = layer(x).square().sum(1) * size
    with pytest.raises(ValueError, match=r"\('loss', 1\).*shorter than 1e-150.*power of two"):
        engine.backward(losses, mtu.OrthoGrad(0.5), forget=torch.arange(4) == 0)
    assert layer.weight.grad is None
    rows = engine.rows(layer(x).square().sum(1) * size.float().double())  # zero rows are fine
    assert (rows.gram().diagonal() > 0).tolist() == [True, False, False, True]


def test_the_same_rows_are_not_joined_twice() -> None:
    model, forward = by_name("mlp").build(tasks=2)
    engine = mtu.Engine(model)
    rows, others = engine.rows(forward()), engine.rows(forward())
    for both in ((rows, rows), (mtu.cat(rows, others), rows), (mtu.cat(rows), mtu.cat(rows))):
        with pytest.raises(ValueError, match="cat: found the same rows twice, expected each once"):
            mtu.cat(*both)
    assert len(mtu.cat(rows, others)) == len(rows) + len(others)


def test_a_method_that_writes_into_the_gram_is_told() -> None:
    class Writes(mtu.Method):
        def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
            G.diagonal(dim1=-2, dim2=-1).add_(1.0)
            return torch.ones(len(roles), dtype=torch.float64)

    model, forward = by_name("mlp").build(tasks=2)
    with pytest.raises(RuntimeError, match=r"Writes: found that it wrote into G, .* G.clone\(\)"):
        mtu.Engine(model).backward(forward(), Writes(), forget=True)
    assert all(p.grad is None for p in model.parameters())
