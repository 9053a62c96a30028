"""Micro-batches held and joined are one large batch; projections that add up are warned of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.checks import clear, grad_vector, grads, same_grads, trained
from tests.helpers.truth import relative_error

MICRO, EACH = 4, 4
LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}
FORGET = torch.arange(MICRO * EACH) % 5 < 2  # 2, 2, 2 and 1 of 4: unequal counts
WARNING = "not cleared since"


class Two(nn.Module):
    """A backbone and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 2)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Losses of both tasks, a value a sample."""
        h = self.backbone(x)
        return {task: head(h).square().mean(1) for task, head in self.heads.items()}


def scene(dtype: torch.dtype = torch.float64) -> tuple[Two, Tensor, mtu.Engine]:
    model = Two().to(dtype)
    x = torch.randn(MICRO * EACH, 6, dtype=dtype)
    return model, x, mtu.Engine(model, params=model.backbone.parameters())


def in_parts(
    model: Two,
    x: Tensor,
    engine: mtu.Engine,
    method: mtu.Method,
    forget: Tensor = FORGET,
    present: Tensor | None = None,
) -> mtu.Update:
    update = None
    for i in range(MICRO):
        part = slice(i * EACH, (i + 1) * EACH)
        assert update is None
        update = engine.accumulate(
            model(x[part]),
            method,
            forget=forget[part],
            sync=i == MICRO - 1,
            present=None if present is None else {"b": present[part]},
        )
    assert update is not None
    return update


METHODS: dict[str, Callable[[], mtu.Method]] = {
    "orthograd": lambda: mtu.OrthoGrad(0.3),
    "pcgrad": mtu.PCGrad,
    "munba": mtu.MUNBa,
    "mgda": mtu.MGDA,
    "graddiff": lambda: mtu.GradDiff(0.3),
}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("name", METHODS)
def test_four_times_four_are_sixteen(name: str, dtype: torch.dtype) -> None:
    model, x, engine = scene(dtype)
    params, method = trained(model), METHODS[name]()
    engine.backward(model(x), method, forget=FORGET)
    expected = grad_vector(params)
    clear(params)
    update = in_parts(model, x, engine, method)
    assert relative_error(grad_vector(params), expected) <= LIMIT[dtype]
    assert len(update.roles) == (2 * 16 if method.per == "sample" else 4)
    assert engine.accumulated_bytes == 0


def test_one_by_one_is_another_direction() -> None:
    """The case above is no empty one."""
    model, x, engine = scene()
    params = trained(model.backbone)
    in_parts(model, x, engine, mtu.OrthoGrad(0.3))
    joint = grad_vector(params)
    clear(params)
    with pytest.warns(UserWarning, match=WARNING):
        for part in range(0, 16, 4):
            mask = FORGET[part : part + 4]
            engine.backward(model(x[part : part + 4]), mtu.OrthoGrad(0.3), forget=mask)
    assert relative_error(grad_vector(params) / MICRO, joint) > 1e-2


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.3), mtu.PCGrad()])
def test_roles_that_some_micro_batches_lack(method: mtu.Method) -> None:
    """The first has nothing to forget, the second nothing to retain, the third no label for b."""
    model, x, engine = scene()
    params = trained(model)
    forget = torch.arange(16).ge(4) & torch.arange(16).lt(8)
    present = torch.arange(16).lt(8) | torch.arange(16).ge(12)
    engine.backward(model(x), method, forget=forget, present={"b": present})
    expected = grad_vector(params)
    clear(params)
    in_parts(model, x, engine, method, forget, present)
    assert relative_error(grad_vector(params), expected) <= 1e-12


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.3), mtu.PCGrad()])
def test_one_micro_batch_is_backward_to_the_bit(method: mtu.Method) -> None:
    model, x, engine = scene()
    params = trained(model)
    engine.backward(model(x), method, forget=FORGET)
    before = grads(params)
    clear(params)
    engine.accumulate(model(x), method, forget=FORGET, sync=True)
    assert same_grads(before, params)


def test_weights_of_all_rows() -> None:
    model, x, engine = scene()
    params = trained(model.backbone)
    losses = model(x)["a"]
    w = torch.randn(16, dtype=torch.float64)
    others = torch.ones(16, dtype=torch.float64)
    engine.rows(losses).backward(w, outside=others)
    expected = grad_vector(params)
    clear(model.parameters())
    frozen = model.heads.requires_grad_(False)
    assert frozen is model.heads
    for i in range(MICRO):
        part = slice(i * EACH, (i + 1) * EACH)
        engine.accumulate(model(x[part])["a"], w, sync=i == MICRO - 1)
    assert relative_error(grad_vector(params), expected) <= 1e-12


def test_a_subspace_joins_at_the_step() -> None:
    model, x, engine = scene()
    params, method = trained(model), mtu.InterferenceAware()
    found = []
    for parts in (False, True):
        subspace = mtu.Subspace(16)
        for forget in (FORGET, ~FORGET):
            clear(params)
            for i in range(MICRO if parts else 1):
                part = slice(i * EACH, (i + 1) * EACH) if parts else slice(None)
                engine.accumulate(
                    model(x[part]),
                    method,
                    forget=forget[part],
                    sync=i == MICRO - 1 or not parts,
                    subspace=subspace,
                )
        found.append(grad_vector(params))
    assert relative_error(found[1], found[0]) <= 1e-11


def test_held_memory_is_counted_and_let_go() -> None:
    model, x, engine = scene()
    one, other = x[:4].clone(), x[4:8].clone()
    engine.accumulate(model(one), mtu.OrthoGrad(), forget=FORGET[:4], sync=False)
    held = engine.accumulated_bytes
    assert held == engine.rows(model(one), forget=FORGET[:4]).nbytes
    engine.accumulate(model(other), mtu.OrthoGrad(), forget=FORGET[4:8], sync=False)
    assert engine.accumulated_bytes == 2 * held
    engine.discard()
    assert engine.accumulated_bytes == 0


def test_means_take_the_memory_of_one_micro_batch() -> None:
    model, x, engine = scene()
    found = []
    for part in range(0, 16, 4):
        mask = FORGET[part : part + 4]
        engine.accumulate(model(x[part : part + 4]), mtu.PCGrad(), forget=mask, sync=False)
        found.append(engine.accumulated_bytes)
    assert len(set(found)) == 1


def test_a_step_between_micro_batches_is_an_error() -> None:
    model, x, engine = scene()
    for method in (mtu.OrthoGrad(), mtu.PCGrad()):
        engine.accumulate(model(x[:4]), method, forget=FORGET[:4], sync=False)
        with torch.no_grad():
            model.backbone[0].weight.add_(1e-3)
        with pytest.raises(RuntimeError, match="parameters changed"):
            engine.accumulate(model(x[4:8]), method, forget=FORGET[4:8], sync=True)
        assert all(p.grad is None for p in model.parameters())
        assert engine.accumulated_bytes == 0  # a step that fails leaves nothing


def test_methods_of_unlike_rows_do_not_mix() -> None:
    model, x, engine = scene()
    engine.accumulate(model(x[:4]), mtu.OrthoGrad(), forget=FORGET[:4], sync=False)
    with pytest.raises(ValueError, match="one method for all micro-batches"):
        engine.accumulate(model(x[4:8]), mtu.PCGrad(), forget=FORGET[4:8], sync=True)


def test_no_row_at_all() -> None:
    model, x, engine = scene()
    nobody = {task: torch.zeros(4, dtype=torch.bool) for task in ("a", "b")}
    for method in (mtu.OrthoGrad(), mtu.PCGrad()):
        update = engine.accumulate(model(x[:4]), method, present=nobody, sync=True)
        assert update is not None and len(update.roles) == 0


# ---- what is warned of, and what is not ----------------------------------------------------------


def step(engine: mtu.Engine, model: Two, x: Tensor, method: mtu.Method | None = None) -> None:
    engine.backward(model(x), method or mtu.OrthoGrad(0.3), forget=FORGET)


def test_it_is_said_once() -> None:
    model, x, engine = scene()
    step(engine, model, x)
    with pytest.warns(UserWarning, match=WARNING) as said:
        step(engine, model, x)
        step(engine, model, x)
    assert len(said) == 1 and said[0].filename == __file__


@pytest.mark.parametrize("clearing", ["none", "zero", "data", "optimizer"])
def test_a_cleared_gradient_is_none(clearing: str) -> None:
    model, x, engine = scene()
    for _ in range(3):
        step(engine, model, x)
        if clearing == "none":
            model.zero_grad()
        elif clearing == "zero":
            model.zero_grad(set_to_none=False)
        elif clearing == "data":
            for p in model.parameters():
                p.grad.data.zero_()
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            optimizer.step()
            optimizer.zero_grad()


def test_sums_are_what_they_say() -> None:
    """Weighted sums add up: of methods without a Gram, of weights, and of accumulated steps with others."""
    model, x, engine = scene()
    for _ in range(2):
        step(engine, model, x, mtu.GradDiff(0.3))
    step(engine, model, x)
    step(engine, model, x, mtu.Mean())
    engine.backward(model(x)["a"], torch.ones(16))


def test_two_engines_and_an_ordinary_backward() -> None:
    model, x, engine = scene()
    other = mtu.Engine(model, params=model.backbone.parameters())
    for _ in range(2):
        step(engine, model, x)
        step(other, model, x)
        model(x)["a"].mean().backward()
        model.zero_grad()
    step(engine, model, x)
    model.zero_grad(set_to_none=False)
    model(x)["a"].mean().backward()
    step(engine, model, x)


def test_a_copy_of_the_engine_has_written_nothing() -> None:
    model, x, engine = scene()
    step(engine, model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.copy(engine._written).__class__ is engine._written.__class__
        copy.deepcopy(engine)
