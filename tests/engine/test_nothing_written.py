"""A step that ends in an error leaves `.grad`, the rows, what is kept and the method as they were, wherever it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast.errors import NotFiniteError
from mtu_fast.methods import GradVac, NablaTau
from tests.helpers.truth import relative_error

N = 6
MASK = torch.arange(N) < 2
RETAINED = N - int(MASK.sum())


class Net(nn.Module):
    """A body of two precisions, and one parameter outside whose gradient may be spoilt."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Widened(4, 2))
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def losses(self, seed: int, *, spoilt: bool = False) -> dict[str, Tensor]:
        x = torch.randn(N, 3, generator=torch.Generator().manual_seed(seed))
        scale: Tensor = self.scale
        if spoilt:  # the square root at zero: 1 forwards, undefined backwards
            scale = scale + (scale - scale.detach()).abs().sqrt()
        out = self.body(x) * scale
        return {"a": out[:, 0].square(), "b": (out[:, 1] - 1.0).square()}


class Widened(nn.Linear):
    def __init__(self, wide: int, out: int) -> None:
        super().__init__(wide, out, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


@dataclass(frozen=True)
class Weighted(mtu.Method):
    """Weights without a Gram, of rows among which may be those of a memory; draws at every call."""

    generator: torch.Generator | None = None
    needs_gram = False
    takes_memory = True

    def __call__(self, G: Any, roles: mtu.Roles) -> Tensor:
        noise = torch.rand(len(roles), generator=self.generator, dtype=torch.float64) * 0
        return mtu.methods.mean_weights(roles, mtu.RETAIN) + noise


def build() -> tuple[Net, mtu.Engine]:
    torch.manual_seed(1)
    net = Net()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return net, mtu.Engine(net, net.body.parameters())


def untouched(net: nn.Module) -> bool:
    return all(p.grad is not None and bool((p.grad == 1.0).all()) for p in net.parameters())


def cleared(net: nn.Module) -> None:
    for p in net.parameters():
        p.grad = None


def test_a_basis_of_parameters_of_two_precisions() -> None:
    net, engine = build()
    memory = mtu.Memory(basis=True, every=1)
    for seed in range(3):
        engine.backward(net.losses(seed), mtu.OrthoGrad(0.5), forget=MASK, memory=memory)
        assert memory.held.rows is not None
        Q = memory.held.rows.jacobian()
        assert {q.dtype for q in Q.values()} == {torch.float64}  # one that holds all parameters'
        flat = torch.cat([q.double().flatten(1) for q in Q.values()], 1)
        assert relative_error(flat @ flat.T, torch.eye(len(flat)).double()) <= 1e-6
        cleared(net)


@pytest.mark.parametrize("form", [{}, {"basis": True}], ids=["rows", "basis"])
def test_a_memory_beside_weights_without_a_gram(form: dict[str, Any]) -> None:
    """The step is that of the weights, and rows are kept as they are beside any method."""
    net, engine = build()
    memory = mtu.Memory(every=1, **form)
    for seed in range(3):
        cleared(net)
        update = engine.backward(net.losses(seed), Weighted(), forget=MASK, memory=memory)
        losses = net.losses(seed)
        total = losses["a"][~MASK].mean() + losses["b"][~MASK].mean()
        params = list(net.parameters())
        for p, g in zip(params, torch.autograd.grad(total, params), strict=True):
            assert p.grad is not None
            assert relative_error(p.grad, g) <= 1e-6
        assert update.gram is None
        assert len(memory) == 2 * RETAINED * (seed + 1)


def test_rows_felt_most_need_a_gram() -> None:
    net, engine = build()
    memory = mtu.Memory(keep="conflicting", every=1)
    with pytest.raises(ValueError, match="Memory: found keep='conflicting' with a method that"):
        engine.backward(net.losses(0), Weighted(), forget=MASK, memory=memory)
    assert untouched(net) and len(memory) == 0


@pytest.mark.parametrize("kept", [mtu.Memory, mtu.Subspace])
def test_what_is_kept_fails_after_the_update_is_known(
    kept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, engine = build()
    keeper = kept(4, every=1, basis=True)
    method = mtu.OrthoGrad(0.5) if kept is mtu.Memory else mtu.InterferenceAware(0.5)
    look = kept.look

    def broken(self: Any, rows: mtu.Rows) -> Any:
        after = look(self, rows)

        def fails(update: mtu.Update) -> Any:
            after(update)
            raise MemoryError("no room")

        return fails

    for step in range(3):
        held, rows = keeper.held, engine.rows(net.losses(step), forget=MASK)
        with monkeypatch.context() as patch:
            patch.setattr(kept, "look", broken)
            with pytest.raises(MemoryError):
                keeper.step(rows, method)
        assert untouched(net) and keeper.held is held
        keeper.step(rows, method)  # the rows are there as before
        assert not untouched(net) and keeper.held is not held
        for p in net.parameters():
            p.grad = torch.ones_like(p)


def unsuitable() -> dict[str, Callable[[nn.Parameter], None]]:
    """Ways in which a `.grad` takes nothing in place."""

    def shared(p: nn.Parameter) -> None:
        p.grad = torch.ones((), dtype=p.dtype).expand(p.shape)

    def inferred(p: nn.Parameter) -> None:
        with torch.inference_mode():
            p.grad = torch.ones_like(p)

    return {"elements share memory": shared, "inference mode": inferred}


@pytest.mark.parametrize("words", unsuitable())
@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.5), Weighted(), mtu.Mean()], ids=repr)
def test_a_grad_that_takes_nothing(words: str, method: mtu.Method) -> None:
    """It is the last one to be written; those before it are not written either."""
    net, engine = build()
    for last in (list(net.parameters())[-1], net.scale):
        if last.dim() or "inference" in words:
            unsuitable()[words](last)
            with pytest.raises(RuntimeError, match=f"backward: found a .grad .*{words}"):
                engine.backward(net.losses(0), method, forget=MASK)
            assert untouched(net)
            last.grad = torch.ones_like(last)


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.5), Weighted(), mtu.Mean()], ids=repr)
def test_a_grad_that_requires_a_gradient_takes_the_step(method: mtu.Method) -> None:
    """A leaf, or a view that autograd lets nobody write to: added to as after `backward()`, whole."""
    for seed in range(2):
        net, engine = build()
        engine.backward(net.losses(seed), method, forget=MASK)
        expected = [p.grad for p in net.parameters()]
        net, engine = build()
        *_, weight, bias = list(net.body.parameters())
        weight.grad = torch.ones_like(weight).requires_grad_()
        bias.grad = torch.ones(2, *bias.shape, dtype=bias.dtype, requires_grad=True).unbind()[0]
        engine.backward(net.losses(seed), method, forget=MASK)
        for p, g in zip(net.parameters(), expected, strict=True):
            assert p.grad is not None and g is not None
            assert relative_error(p.grad.detach(), g) <= 1e-6


def test_a_method_goes_back_to_where_it_stood() -> None:
    net, engine = build()
    twin = GradVac(0.5, torch.Generator().manual_seed(3))
    method = GradVac(0.5, torch.Generator().manual_seed(3))
    for seed in range(4):
        with pytest.raises(NotFiniteError):
            engine.backward(net.losses(seed, spoilt=True), method, forget=MASK)
        assert untouched(net)
        found = []
        for each in (method, twin):
            cleared(net)
            found.append(engine.backward(net.losses(seed), each, forget=MASK).weights)
        assert torch.equal(*found)
        for p in net.parameters():
            p.grad = torch.ones_like(p)


def test_the_generator_of_weights_goes_back() -> None:
    net, engine = build()
    method = Weighted(torch.Generator().manual_seed(3))
    assert method.generator is not None
    before = method.generator.get_state()
    for memory in (None, mtu.Memory()):
        with pytest.raises(NotFiniteError):
            engine.backward(net.losses(0, spoilt=True), method, forget=MASK, memory=memory)
        assert torch.equal(method.generator.get_state(), before) and untouched(net)


def test_a_micro_batch_that_fails_is_not_half_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of its two mean rows fails; the step is then that of the other micro-batches."""
    found = []
    from mtu_fast._rows import means

    for fails in (False, True):
        net, engine = build()
        cleared(net)
        for seed in range(3):
            if fails:
                made, real = [0], means._mean

                def one_more(*given: Any, made: list[int] = made, real: Any = real) -> Any:
                    made[0] += 1
                    if made[0] == 2:
                        raise RuntimeError("no room")
                    return real(*given)

                with monkeypatch.context() as patch:
                    patch.setattr(means, "_mean", one_more)
                    if seed:
                        with pytest.raises(RuntimeError, match="no room"):
                            engine.accumulate(net.losses(9), mtu.PCGrad(), sync=False, forget=MASK)
            engine.accumulate(net.losses(seed), mtu.PCGrad(), sync=seed == 2, forget=MASK)
        found.append([p.grad for p in net.parameters()])
    for p, q in zip(*found, strict=True):
        assert p is not None and q is not None and torch.equal(p, q)


@pytest.mark.parametrize("method", [mtu.OrthoGrad(0.5), Weighted(), mtu.Mean()], ids=repr)
def test_a_hook_that_fails_finds_a_whole_step(method: mtu.Method) -> None:
    net, engine = build()
    cleared(net)
    memory = mtu.Memory() if method.takes_memory else None
    expected_net, other = build()
    cleared(expected_net)
    other.backward(expected_net.losses(0), method, forget=MASK)

    def hook(p: Tensor) -> None:
        raise OSError("of the user's")

    next(net.parameters()).register_post_accumulate_grad_hook(hook)
    with pytest.raises(OSError, match="of the user's"):
        engine.backward(net.losses(0), method, forget=MASK, memory=memory)
    for p, q in zip(net.parameters(), expected_net.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert relative_error(p.grad, q.grad) <= 1e-6
    assert memory is None or len(memory) == 2 * RETAINED


def test_an_epoch_that_does_not_start() -> None:
    method = NablaTau()
    method.prepare(forget=1, retain=9, forget_batches=2, retain_batches=9)
    method.start_epoch(0, lambda: {"a": 1.0})
    before = method.state_dict()
    with pytest.raises(ValueError, match="validation"):
        method.start_epoch(5, lambda: {"a": float("nan")})
    assert method.state_dict() == before
    for made, key in ((method, "alpha"), (GradVac(), "targets")):
        state = made.state_dict()
        with pytest.raises((TypeError, ValueError, AttributeError)):
            made.load_state_dict({**state, key: "x", "tasks": ["other"]})
        assert made.state_dict() == state
