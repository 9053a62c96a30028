"""What stays in memory: nothing after a validation forward or a backward, and one layer beyond what is kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtu_fast as mtu
from mtu_fast._graph import probe
from tests.helpers.checks import random_weights, trained
from tests.helpers.zoo import by_name

N = 6
MASK = torch.tensor([True, False, False, True, False, False])
MODELS = [
    "mlp",
    "conv2d",
    "vit",
    "tied_language_model",
    "checkpointed",
    "mixture_of_experts",
    "batch_norm_train",
    "gru",
]


class Live(TorchDispatchMode):
    """Bytes of the storages that ops make while the mode is on; each counts until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        return sum(self.sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if (
                isinstance(t, Tensor)
                and t.layout is torch.strided
                and t.untyped_storage()._cdata not in given
            ):
                self._watch(t.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes and storage.nbytes():
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key, None)
            self.peak = max(self.peak, self.now)


pytestmark = [
    pytest.mark.usefixtures("only_new_objects"),
    # `.grad` is there before what is measured, so that it is no part of it.
    pytest.mark.filterwarnings("ignore:backward. .grad still holds:UserWarning"),
]


def alive(live: Live) -> int:
    """Bytes that a forward made and that are still there."""
    gc.collect()
    return live.now


def tensors() -> int:
    gc.collect()
    return sum(isinstance(o, Tensor) for o in gc.get_objects() if _is_plain(o))


def _is_plain(o: object) -> bool:
    return type(o) is Tensor or type(o) is nn.Parameter


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_validation_forward_leaves_nothing(name: str, grad: bool) -> None:
    model, forward = by_name(name).build(2, N)
    engine = mtu.Engine(model)
    engine.backward(forward(), mtu.OrthoGrad(), forget=MASK)
    before = tensors()
    with torch.set_grad_enabled(grad), Live() as live:
        out = forward()
    assert alive(live) > 0
    del out
    assert alive(live) == 0
    assert tensors() == before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.PCGrad(), mtu.GradDiff()])
def test_after_backward_nothing_of_the_graph_is_alive(name: str, method: mtu.Method) -> None:
    model, forward = by_name(name).build(2, N)
    engine = mtu.Engine(model)
    for _step in range(3):
        with Live() as live:
            losses = forward()
        update = engine.backward(losses, method, forget=MASK)
        del losses
        assert alive(live) == 0
        assert len(update.weights) == len(update.roles)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gru"])
def test_rows_free_the_graph_although_the_losses_live(name: str) -> None:
    """A loop that still holds its losses holds no more than after an ordinary backward."""
    model, forward = by_name(name).build(2, N)
    engine, params = mtu.Engine(model), trained(model)
    for _step in range(3):
        with Live() as live:
            losses = forward()
        whole = alive(live)
        engine.rows(losses).backward(mtu.OrthoGrad())
        held = alive(live)
        with Live() as plain:
            others = forward()
        torch.autograd.grad(sum(loss.sum() for loss in others.values()), params, allow_unused=True)
        assert held <= alive(plain) < whole
        del losses, others


def test_what_the_lowest_uses_saved_stays_with_the_losses() -> None:
    """A pass reaches the lowest uses and does not run them: what they saved, an input say, goes with the losses."""
    model, forward = by_name("gru").build(2, N)
    engine = mtu.Engine(model)
    for _step in range(3):
        with Live() as live:
            losses = forward()
        whole = alive(live)
        engine.rows(losses).backward(mtu.OrthoGrad())
        assert alive(live) < whole / 8
        del losses
        assert alive(live) == 0


def test_rows_hold_what_they_need_and_no_more() -> None:
    """Of a forward, rows keep the inputs of linear layers."""
    net = nn.Sequential(
        nn.Linear(30, 40), nn.GELU(), nn.Linear(40, 30), nn.Sigmoid(), nn.Linear(30, 3)
    ).double()
    engine, x = mtu.Engine(net), torch.randn(N, 30, dtype=torch.float64)
    for _step in range(2):
        with Live() as live:
            loss = net(x).square().sum(1)
        rows = engine.rows(loss)
        del loss
        assert alive(live) == N * (40 + 30) * 8
        assert rows.gram().shape == (N, N)
        del rows
        assert alive(live) == 0


@pytest.mark.parametrize("name", MODELS)
def test_many_steps_do_not_grow(name: str) -> None:
    model, forward = by_name(name).build(2, N)
    engine = mtu.Engine(model, params=model.backbone.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    counts = []
    for step in range(20):
        optimizer.zero_grad()
        engine.backward(forward(), mtu.OrthoGrad(), forget=MASK)
        optimizer.step()
        if step in (2, 19):
            counts.append(tensors())
    assert counts[0] == counts[1]


def test_plans_hold_index_vectors_only() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).double()
    engine = mtu.Engine(net)
    before = tensors()
    for length in range(1, 30):
        engine.rows(net(torch.randn(N, length, 64, dtype=torch.float64)).square().sum((1, 2)))
    gc.collect()
    left = [o for o in gc.get_objects() if _is_plain(o)]
    floats = [t for t in left if t.is_floating_point() and t.numel() >= N * 64]
    assert len(floats) <= before
    assert sum(t.numel() for t in left if not t.is_floating_point()) <= 30 * 40 * 6 * N * 30


def test_an_engine_is_freed() -> None:
    model, forward = by_name("mlp").build(2, N)
    engine = mtu.Engine(model)
    engine.backward(forward(), mtu.OrthoGrad(), forget=MASK)
    ref = weakref.ref(engine)
    del engine
    gc.collect()
    assert ref() is None


# ---- the peak ------------------------------------------------------------------------------------

WIDTH, DEPTH, BATCH = 64, 12, 8
ACTIVATION = BATCH * WIDTH * 8
ROWS_OF_A_LAYER = BATCH * WIDTH * WIDTH * 8


def deep(tokens: int | None) -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for _layer in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()]
    shape = (BATCH, WIDTH) if tokens is None else (BATCH, tokens, WIDTH)
    return nn.Sequential(*layers).double(), torch.randn(shape, dtype=torch.float64)


def peak_of_rows(engine: mtu.Engine, net: nn.Module, x: Tensor) -> tuple[int, int, mtu.Rows]:
    """Bytes that `rows` held at most, and those it keeps, beyond the forward's."""
    loss = net(x).flatten(1).square().sum(1)
    with Live() as live:
        rows = engine.rows(loss)
        del loss
        gc.collect()
        return live.peak, live.now, rows


@pytest.mark.parametrize("tokens", [None, 4])
def test_the_peak_of_rows_with_factors_kept(tokens: int | None) -> None:
    """Kept: an output gradient a layer. Beyond it: a few activations of one layer, no weight gradient at all."""
    net, x = deep(tokens)
    engine = mtu.Engine(net)
    for _checked in range(3):
        peak_of_rows(engine, net, x)
    assert {line.kept for line in engine.explain().lines} == {"factors"}
    peak, kept, _rows = peak_of_rows(engine, net, x)
    one = ACTIVATION * (tokens or 1)
    assert DEPTH * one <= kept <= (DEPTH + 1) * one
    assert peak <= kept + 6 * one
    assert peak < ROWS_OF_A_LAYER + kept


@pytest.mark.parametrize("tokens", [2, 16])
def test_the_peak_of_a_check(tokens: int) -> None:
    """Uses larger than a gradient are not there beside it; smaller ones are, and the gradient is the peak."""
    net, x = deep(tokens)
    engine = mtu.Engine(net)
    one, gradient = ACTIVATION * tokens, DEPTH * WIDTH * WIDTH * 8
    for _checked in range(3):
        peak, kept, _rows = peak_of_rows(engine, net, x)
        assert DEPTH * one <= kept <= (DEPTH + 1) * one
        larger = kept > gradient
        assert larger == (tokens == 16)
        beside = 0 if larger else gradient + 2 * WIDTH * WIDTH * 8  # and a layer's sums
        assert peak <= kept + beside + 6 * one


def test_a_check_that_sums_uses_one_by_one_finds_what_one_that_holds_them_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over views between parameter and use, and several tasks; a fault in a pass is found either way."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(self.first(x)) @ self.second.weight.T.reshape(8, 8) + self.second.bias
            h = h @ self.second.weight
            return {"a": h.square().mean((1, 2)), "b": h.sin().mean((1, 2))}

    model = Turned().double()
    found = []
    for held in (True, False):
        monkeypatch.setattr(probe.Check, "_may_hold", lambda *_, held=held: held)
        engine = mtu.Engine(model)
        for seed in range(3):
            x = torch.randn(N, 3, 6, dtype=torch.float64, generator=torch.manual_seed(seed))
            rows = engine.rows(model(x))
            assert not engine.explain().anew
            found.append(rows.vjp(random_weights(2 * N)))
    for one, other in zip(found[:3], found[3:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


class Tokens(nn.Module):
    """A class token before a sequence: its gradient is a part of a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.lift = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), self.lift * x], 1)


def test_rows_keep_no_gradient_that_they_are_a_part_of() -> None:
    net = Tokens()
    rows = mtu.Engine(net, params=[net.token]).rows(
        net(torch.randn(BATCH, 50, WIDTH)).square().sum((1, 2))
    )
    assert rows.nbytes == BATCH * WIDTH * 4


def test_the_peak_of_rows_with_rows_kept() -> None:
    """More positions than width: rows are kept, and one layer's factors at a time."""
    tokens = 96
    net, x = deep(tokens)
    engine = mtu.Engine(net)
    peak_of_rows(engine, net, x)
    assert {line.kept for line in engine.explain().lines} == {"rows"}
    peak, kept, _rows = peak_of_rows(engine, net, x)
    one = ACTIVATION * tokens
    assert kept <= DEPTH * ROWS_OF_A_LAYER + one
    assert peak <= kept + 4 * one + ROWS_OF_A_LAYER


def test_the_peak_of_a_gram_is_one_layer() -> None:
    net, x = deep(4)
    engine = mtu.Engine(net)
    *_, rows = peak_of_rows(engine, net, x)
    with Live() as live:
        G = rows.gram()
    assert G.shape == (BATCH, BATCH)
    tile = 2 * (BATCH * 4) ** 2 * 8 + 2 * ACTIVATION * 4 + ROWS_OF_A_LAYER
    assert live.peak <= 2 * tile
    assert live.peak < DEPTH * ROWS_OF_A_LAYER / 3


def test_the_peak_of_combine_is_the_direction_and_one_layer() -> None:
    net, x = deep(4)
    engine = mtu.Engine(net)
    *_, rows = peak_of_rows(engine, net, x)
    direction = DEPTH * WIDTH * WIDTH * 8
    with Live() as live:
        rows.vjp(random_weights(BATCH))
    assert live.peak <= direction + 4 * WIDTH * WIDTH * 8 + 4 * ACTIVATION * 4


def test_a_step_never_holds_the_jacobian() -> None:
    net, x = deep(4)
    engine = mtu.Engine(net)
    jacobian = BATCH * DEPTH * WIDTH * WIDTH * 8
    for _step in range(2):
        loss = net(x).flatten(1).square().sum(1)
        with Live() as live:
            engine.backward(loss, mtu.OrthoGrad(), forget=torch.arange(BATCH) < 3)
    assert live.peak < jacobian / 2


class KeyBias(nn.Module):
    """Wide for its three samples; the key's bias changes nothing, so that its gradient is all rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        attention = torch.softmax(self.query(x) @ self.key(x).mT / 8, -1)
        return attention[..., :2].square().mean((1, 2))


def test_a_check_that_asks_what_rounds_holds_one_more_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gradient to compare with and one under other weights, of which the latter goes before the next comes."""
    backwards = []
    ordinary = probe._backward

    def counted(*args: Any) -> Any:
        backwards.append(args)
        return ordinary(*args)

    monkeypatch.setattr(probe, "_backward", counted)
    model, x = KeyBias(), torch.randn(3, 6, 256)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    engine = mtu.Engine(model)
    with Live() as live:
        rows = engine.rows(model(x))
    assert len(backwards) == 5  # the check's own, and one for each factor
    assert live.peak < 3 * size
    assert len(rows.gram()) == 3
