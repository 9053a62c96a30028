"""How products with kept rows are made: as exact as those of all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._rows import own
from tests.helpers import matrices
from tests.helpers.checks import clear, grad_vector
from tests.helpers.truth import relative_error
from tests.kept.scene import move


class Deep(nn.Module):
    """A convolution, a norm and a head that only some steps reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.GroupNorm(3, 3)
        self.heads = nn.ModuleDict({task: nn.Linear(12, 4) for task in ("a", "b")})

    def losses(self, x: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        h = torch.tanh(self.norm(self.conv(x))).flatten(1)
        return {task: self.heads[task](h).square().sum(1) for task in tasks}


GRANULARITY = ["global", "layer", "tensor"]


def steps(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, beside: bool, per: Any, factor: float
) -> list[tuple[Tensor, Tensor]]:
    """`.grad` and Gram of twelve steps that are all taken in; `beside` says how products are made."""
    taken = own.kept_of if beside else lambda parts, shared: 0
    monkeypatch.setattr(own, "kept_of", taken)
    torch.manual_seed(0)
    net = Deep().to(dtype)
    engine, memory, found = mtu.Engine(net), mtu.Memory(60, every=1), []
    for seed in range(12):
        clear(list(net.parameters()))
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
        losses = net.losses(x, (("a", "b"), ("b",), ("b", "a"))[seed % 3])
        scaled = {task: factor * loss for task, loss in losses.items()}
        update = engine.backward(
            scaled, mtu.OrthoGrad(0.3, granularity=per),
            forget={"b": torch.arange(5) < 2}, memory=memory,
        )  # fmt: skip
        assert update.gram is not None and (update.into is not None) == (beside and seed > 0)
        into = torch.arange(len(update.roles)) if update.into is None else update.into
        stays = (update.roles.kind != mtu.FORGET).nonzero().flatten()
        gram = update.gram[..., into[stays][:, None], into[stays]]
        found.append((grad_vector(list(net.parameters())).double(), gram))
        move(net)
    return found


@pytest.mark.parametrize("per", GRANULARITY)
def test_beside_kept_rows_products_are_those_of_all_rows(
    monkeypatch: pytest.MonkeyPatch, per: Any
) -> None:
    """More batches than stay in matrices of their own, tasks that are missing and in another order."""
    found = steps(monkeypatch, torch.float64, True, per, 1.0)
    expected = steps(monkeypatch, torch.float64, False, per, 1.0)
    for (_, gram), (_, truth) in zip(found, expected, strict=True):
        assert relative_error(gram, truth) <= 1e-12
    if per == "global":  # of one tensor rows depend on one another
        for (grad, _), (truth, _) in zip(found, expected, strict=True):
            assert relative_error(grad, truth) <= 1e-9


def test_a_state_says_which_parameters_rows_of_each_task_reach() -> None:
    """The next step has the same bits, and a state that leaves out some of them is refused."""
    torch.manual_seed(0)
    net = Deep()
    engine, memory = mtu.Engine(net), mtu.Memory(40, every=1)
    mask = {"b": torch.arange(5) < 2}

    def step(kept: mtu.Memory, seed: int) -> Tensor:
        clear(list(net.parameters()))
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
        engine.backward(net.losses(x, ("a", "b")), mtu.OrthoGrad(0.3), forget=mask, memory=kept)
        return grad_vector(list(net.parameters()))

    for seed in range(6):
        step(memory, seed)
        move(net)
    state, again = memory.state_dict(), mtu.Memory(40, every=1)
    again.load_state_dict(state, engine.subspace_rows)
    assert torch.equal(step(again, 9), step(memory, 9))
    reached = state["block"]["reached"]
    assert set(reached["a"]) ^ set(reached["b"]) == {
        f"heads.{task}.{name}" for task in ("a", "b") for name in ("weight", "bias")
    }
    reached["a"] = reached["b"]
    with pytest.raises(ValueError, match=r"rows of task 'a' that reach 'heads\.a\.weight'"):
        again.load_state_dict(state, engine.subspace_rows)


@pytest.mark.parametrize("factor", [1.0, 1e-20, 1e18])
def test_products_beside_kept_rows_in_float32(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Also of rows whose squares float32 does not hold."""
    found = steps(monkeypatch, torch.float32, True, "global", factor)[:2]
    expected = steps(monkeypatch, torch.float32, False, "global", factor)[:2]
    for (_, gram), (_, truth) in zip(found, expected, strict=True):
        lengths = truth.diagonal().sqrt()
        assert ((gram - truth).abs() <= 1e-6 * lengths[:, None] * lengths).all()


class Explicit(nn.Module):
    """A model whose gradients are the rows it is given."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))


Rows = tuple[Tensor, Tensor]  # to retain, to forget


def directions(batches: list[Rows], method: mtu.Method, dtype: torch.dtype) -> list[Tensor]:
    """`.grad` of the steps that these rows, held in float32, make."""
    model = Explicit(batches[0][0].shape[1], dtype)
    engine, found = mtu.Engine(model), []
    memory = mtu.Memory(64, every=1)
    for retain, forget in batches:
        clear([model.weight])
        # that of a first step: the whole space
        subspace = mtu.Subspace() if method.needs_subspace else None
        J = torch.cat([retain, forget]).float().to(dtype)
        engine.backward(
            (J * model.weight).sum(1), method, forget=torch.arange(len(J)) >= len(retain),
            memory=memory, subspace=subspace,
        )  # fmt: skip
        found.append(grad_vector([model.weight]).double())
    return found


def conditioned(cond: float) -> list[Rows]:
    """Steps whose own rows are of this condition."""
    found = []
    for seed in range(3):
        J = matrices.conditioned(16, 200, cond, seed)
        g = [matrices.balanced_vector(J, seed + i) for i in range(3)]
        found.append((J, torch.stack(g)))
    return found


def resembling(near: float) -> list[Rows]:
    """Steps of random rows; those of the last are nearly sums of kept ones."""
    draw = torch.Generator().manual_seed(0)
    a, b, new = torch.randn(3, 16, 2000, generator=draw).unbind()
    g = torch.randn(3, 2000, generator=draw)
    return [(a, g), (b, g + a[:3]), (a + b + near * new, g + a[:3] + b[3:6])]


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.0), mtu.InterferenceAware(0.0)], ids=repr)
@pytest.mark.parametrize(
    ("made", "how"),
    [
        *((conditioned, cond) for cond in (10.0, 1e3, 1e5, 1e6)),
        *((resembling, near) for near in (1e-1, 1e-2, 1e-3, 1e-4)),
    ],
)
def test_float32_rows_beside_kept_ones_err_as_all_rows_do(
    made: Any, how: float, method: mtu.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However badly conditioned: the products with kept rows, and those kept of them, are not rounded to float32."""
    batches = made(how)
    truth = directions(batches, method, torch.float64)
    beside = directions(batches, method, torch.float32)
    monkeypatch.setattr(own, "kept_of", lambda parts, shared: 0)
    apart = directions(batches, method, torch.float32)
    for found, usual, exact in zip(beside, apart, truth, strict=True):
        assert relative_error(found, exact) <= 2 * relative_error(usual, exact) + 1e-6
