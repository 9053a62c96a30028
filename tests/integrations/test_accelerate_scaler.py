"""Loss scalers: what they multiply and skip, as after an ordinary backward, and the methods that they spoil."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mtu_fast as mtu
from mtu_fast.integrations import _step
from mtu_fast.integrations import accelerate as ours
from mtu_fast.integrations._sides import sides
from mtu_fast.methods import Roles
from tests.helpers.truth import relative_error
from tests.integrations.accelerates import run
from tests.integrations.marks import marks
from tests.integrations.ranks import on_two
from tests.integrations.small import (
    METHODS,
    build,
    plain_step,
)

pytestmark = [*marks(), pytest.mark.usefixtures("fresh_state")]


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("name", METHODS)
def test_a_scaler(name: str, size: int) -> None:
    """float16's, on float32: what it multiplies it divides again."""
    expected = plain_step(build(), METHODS[name]())
    found, updates, _ = run(METHODS[name](), size, torch.amp.GradScaler("cpu", init_scale=2.0**12))
    assert relative_error(found, expected) <= 1e-6
    # what is logged is not scaled
    _, plain, _ = run(METHODS[name](), size)
    assert updates[-1] is not None and plain[-1] is not None
    assert torch.allclose(updates[-1].roles.loss, plain[-1].roles.loss, rtol=1e-6, atol=0)
    assert sides(updates[-1]) == pytest.approx(sides(plain[-1]), rel=1e-6)


def test_a_scaler_that_is_off() -> None:
    found, _, _ = run(mtu.MUNBa(), scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert relative_error(found, plain_step(build(), mtu.MUNBa())) <= 1e-6


def test_a_step_that_overflows_is_skipped_and_the_scale_lowered() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    model = nn.Linear(3, 2, bias=False)
    nn.init.constant_(model.weight, 1e-3)
    optimizer, engine = torch.optim.SGD(model.parameters(), lr=1.0), mtu.Engine(model)
    accelerator = SimpleNamespace(num_processes=1, sync_gradients=True, scaler=scaler)
    x, forget = torch.rand(4, 3) * 1e4, torch.arange(4) < 2
    start, scales = model.weight.detach().clone(), []
    for _ in range(3):
        scales.append(scaler.get_scale())
        losses = model(x).square().mean(1) * 1e-3
        update = ours.backward(accelerator, engine, losses, mtu.OrthoGrad(), forget=forget)
        assert update is None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(model.weight, start)
    assert scales == [2.0**127, 2.0**126, 2.0**125]


def overflow(name: str, over_ranks: bool) -> None:
    """A scaler skips the optimizer of the backbone and that of the heads; the frozen have none."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    for layer, value in zip(model, (1e-3, 1.0, 1.0), strict=True):
        nn.init.constant_(layer.weight, value)
        nn.init.zeros_(layer.bias)
    if over_ranks:
        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    engine = mtu.Engine(model, params=model[0].parameters())
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=1.0) for i in (0, 2)]
    accelerator = SimpleNamespace(num_processes=1, sync_gradients=True, scaler=scaler)
    forget, held = torch.arange(4) < 2, {n: p.clone() for n, p in model.state_dict().items()}
    for step in range(2):
        losses = model(torch.rand(4, 3) * 1e4).square().mean(1) * 1e-5
        assert ours.backward(accelerator, engine, losses, METHODS[name](), forget=forget) is None
        for each in optimizers:
            scaler.step(each)
        scaler.update()
        for each in optimizers:
            each.zero_grad()
        assert scaler.get_scale() == 2.0 ** (126 - step)
        assert all(torch.equal(p, held[n]) for n, p in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["orthograd", "pcgrad"])
def test_an_overflow_skips_the_optimizers_of_all_parameters(name: str) -> None:
    """As after an ordinary backward."""
    overflow(name, over_ranks=False)


def test_an_overflow_skips_the_optimizers_of_all_slices() -> None:
    """Of FSDP2."""
    on_two(overflow, "orthograd", True)


@pytest.mark.parametrize("name", ["orthograd", "pcgrad"])
def test_float16_losses_do_not_overflow_by_the_scale(name: str) -> None:
    """They are finite, and so are the gradients; times S they would be beyond float16."""
    model = nn.Linear(3, 2, bias=False).double()
    engine, x, forget = mtu.Engine(model), torch.randn(4, 3).double(), torch.arange(4) < 2
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    accelerator = SimpleNamespace(num_processes=1, sync_gradients=True, scaler=scaler)
    grads = []
    for scaled in (True, False):
        losses = (model(x).square().mean(1) + 8.0).half()
        if scaled:
            update = ours.backward(accelerator, engine, losses, METHODS[name](), forget=forget)
            assert update is not None
        else:
            engine.backward(losses, METHODS[name](), forget=forget)
        grads.append(model.weight.grad / (2.0**14 if scaled else 1.0))
        model.zero_grad()
    assert relative_error(*grads) <= 1e-3


SCALE = 2.0**10


PREPARED = {"forget": 2, "retain": 6, "forget_batches": 1, "retain_batches": 1}


def every_method() -> list[Any]:
    """Of all that are exported."""
    found = []
    for name in mtu.__all__:
        kind = getattr(mtu, name)
        is_method = inspect.isclass(kind) and issubclass(kind, mtu.Method)
        if is_method and not inspect.isabstract(kind):
            found.append(kind)
    return found


def made(kind: Any) -> Any:
    """One as it is made by default, ready to be asked; GDRGMA where its threshold is near the losses."""
    method = kind(threshold=1.0, slope=1.0) if kind is mtu.GDRGMA else kind()
    if hasattr(method, "prepare"):
        method.prepare(**PREPARED)
        method.start_epoch(0, lambda: {"a": 5.0, "b": 5.0})
    return method


def direction(kind: Any, scale: float) -> Tensor:
    """d over S for losses times S."""
    method = made(kind)
    task = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    sample, side = torch.arange(8) % 4, torch.tensor([0, 0, 1, 1] * 2)
    if method.per == "task":
        task, side = task[::2], torch.tensor([0, 1] * 2)
        sample = torch.full((4,), -1)
    loss = scale * torch.linspace(0.5, 2.0, len(task), dtype=torch.float64)
    roles = Roles(task, sample, side, loss, ("a", "b"))
    generator = torch.Generator().manual_seed(0)
    J = scale * (torch.randn(len(task), 30, generator=generator, dtype=torch.float64) + 0.3)
    G = J @ J.T
    if not method.needs_gram:
        return method(None, roles) @ J / scale
    is_global = getattr(method, "granularity", "global") == "global"
    return method(G if is_global else G[None], roles).reshape(-1) @ J / scale


@pytest.mark.parametrize("kind", every_method(), ids=lambda kind: kind.__name__)
def test_a_method_says_whether_a_scaler_spoils_it(kind: Any) -> None:
    plain, scaled = direction(kind, 1.0), direction(kind, SCALE)
    harmless = relative_error(scaled, plain) <= 1e-9
    assert harmless == kind.scale_equivariant


def test_those_that_it_spoils_are_refused() -> None:
    spoiled = {kind.__name__ for kind in every_method() if not _is_scalable(kind)}
    assert spoiled == {"FairGrad", "GDRGMA", "MUNBa", "NablaTau", "NashMTL"}
    with pytest.raises(ValueError, match="MUNBa: found a loss scaler, expected unscaled losses"):
        run(mtu.MUNBa(), scaler=torch.amp.GradScaler("cpu"))


def _is_scalable(kind: Any) -> bool:
    try:
        _step.check_scalable(made(kind))
    except ValueError:
        return False
    return True
