"""The line for `accelerator.backward`, in real loops of `accelerate`: accumulation, mixed precision and the scaler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mtu_fast as mtu
from mtu_fast.integrations import _step
from mtu_fast.integrations._sides import sides
from mtu_fast.methods import Roles
from tests.helpers.truth import relative_error
from tests.integrations.ranks import on_two
from tests.integrations.small import (
    COUNT,
    METHODS,
    RATE,
    STATES,
    Texts,
    batches,
    build,
    checkpointed,
    losses_of,
    moved,
    plain_step,
    weights,
)

pytest.importorskip("accelerate")

import accelerate
from accelerate.state import AcceleratorState, GradientState, PartialState

from mtu_fast.integrations import accelerate as ours

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps one state a process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(
    method: mtu.Method,
    size: int = COUNT,
    scaler: Any = None,
    epochs: int = 1,
    checkpointing: bool = False,
    **more: Any,
) -> tuple[Tensor, list[mtu.Update | None], nn.Module]:
    """A loop as Accelerate's documentation has it; how far the model moved."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=COUNT // size, **more
    )
    if scaler is not None:
        accelerator.scaler = scaler
    model = build()
    if checkpointing:
        checkpointed(model)
    start, found = weights(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = torch.utils.data.DataLoader(Texts(), batch_size=size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if scaler is not None:
        optimizer.scaler = scaler
    engine = mtu.Engine(model)
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                losses = losses_of(model, batch)
                forget = batch["forget"].bool()
                found.append(ours.backward(accelerator, engine, losses, method, forget=forget))
                optimizer.step()
                optimizer.zero_grad()
    return moved(model, start), found, model


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_the_plain_loop(name: str, size: int) -> None:
    expected = plain_step(build(), METHODS[name]())
    found, updates, _ = run(METHODS[name](), size)
    assert relative_error(found, expected) <= 1e-6
    assert [update is None for update in updates] == [True] * (16 // size - 1) + [False]


def test_bf16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_step(build(), mtu.OrthoGrad(0.5))
    found, _, _ = run(mtu.OrthoGrad(0.5), mixed_precision="bf16")
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("size", [16, 4])
def test_gradient_checkpointing(size: int) -> None:
    found, _, model = run(mtu.OrthoGrad(0.5), size, checkpointing=True)
    assert model.is_gradient_checkpointing
    assert relative_error(found, plain_step(build(), mtu.OrthoGrad(0.5))) <= 1e-6


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


# ---- methods that a scaler spoils ----------------------------------------------------------------

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


def over_ranks() -> list[Tensor]:
    """On each rank: half of the samples, in one micro-batch and in two."""
    found = []
    for size in (8, 4):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=8 // size)
        model = build()
        start = weights(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        loader = torch.utils.data.DataLoader(Texts(), batch_size=size)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        engine = mtu.Engine(wrapped)
        for batch in loader:
            with accelerator.accumulate(wrapped):
                losses, forget = losses_of(wrapped, batch), batch["forget"].bool()
                update = ours.backward(
                    accelerator, engine, losses, mtu.OrthoGrad(0.5), forget=forget
                )
                optimizer.step()
                optimizer.zero_grad()
        assert update is not None and len(update.roles) == COUNT
        found.append(moved(model, start))
    return found


def test_two_processes_are_one() -> None:
    expected = plain_step(build(), mtu.OrthoGrad(0.5))
    for rank in on_two(over_ranks):
        for found in rank:
            assert relative_error(found, expected) <= 1e-6


# ---- checkpoints ---------------------------------------------------------------------------------


def kept(name: str, folder: Path, resume: bool) -> Tensor:
    """The weights after four passes, saved after the second; or after the last two."""
    accelerator = accelerate.Accelerator(cpu=True)
    model, (method, subspace) = build(), (make() for make in STATES[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(Texts(), batch_size=4)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    engine = mtu.Engine(wrapped)
    state = ours.State(engine, method, subspace)
    accelerator.register_for_checkpointing(state)
    if resume:
        accelerator.load_state(str(folder))
    for epoch in range(2 if resume else 0, 4):
        for batch in loader:
            losses, forget = losses_of(wrapped, batch), batch["forget"].bool()
            more: dict[str, Any] = {"forget": forget, "subspace": subspace}
            ours.backward(accelerator, engine, losses, method, **more)
            optimizer.step()
            optimizer.zero_grad()
        if epoch == 1:
            accelerator.save_state(str(folder))
    return weights(model)


@pytest.mark.parametrize("name", STATES)
def test_a_state_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    whole = kept(name, tmp_path, False)
    assert torch.equal(kept(name, tmp_path, True), whole)


def test_a_state_of_two_processes_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, resumed = (on_two(kept, "rows", tmp_path, resume) for resume in (False, True))
    assert all(torch.equal(each, whole[0]) for each in (*whole, *resumed))
    with pytest.raises(ValueError, match="found rows kept by 2 processes, expected 1"):
        kept("rows", tmp_path, True)


def test_a_state_of_another_form_is_refused() -> None:
    engine = mtu.Engine(nn.Linear(2, 2))
    state = ours.State(engine, mtu.InterferenceAware(), mtu.Subspace()).state_dict()
    with pytest.raises(ValueError, match="found rows kept from earlier steps, expected no subspac"):
        ours.State(engine, mtu.Mean()).load_state_dict(state)
    with pytest.raises(ValueError, match="State: "):
        ours.State(engine, mtu.Mean()).load_state_dict({})
    with pytest.raises(TypeError, match=r"engine: found Linear, expected mtu.Engine"):
        ours.State(nn.Linear(2, 2), mtu.Mean())
    with pytest.raises(ValueError, match="Mean does not use one"):
        ours.State(engine, mtu.Mean(), mtu.Subspace())


def wrong_on_one_rank() -> Tensor:
    """Losses of another form on one rank; the step after it is in order."""
    torch.distributed.init_process_group("gloo")
    model = build()
    start, wrapped = weights(model), nn.parallel.DistributedDataParallel(model)
    engine, accelerator = mtu.Engine(wrapped), accelerate.Accelerator(cpu=True)
    rank, method = torch.distributed.get_rank(), mtu.OrthoGrad(0.5)
    for bad in (0, 1, None):
        batch = [*batches(Texts(), 8)][rank]
        losses, forget = losses_of(wrapped, batch), batch["forget"].bool()
        if bad is None:
            ours.backward(accelerator, engine, losses, method, forget=forget)
            break
        losses = losses.mean() if rank == bad else losses
        with pytest.raises(ValueError, match=f"rank {bad}: losses"):
            ours.backward(accelerator, engine, losses, method, forget=forget)
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return moved(model, start)


def test_what_one_rank_finds_wrong_all_raise() -> None:
    expected = plain_step(build(), mtu.OrthoGrad(0.5))
    for found in on_two(wrong_on_one_rank):
        assert relative_error(found, expected) <= 1e-6


def test_several_processes_are_refused() -> None:
    model = build()
    accelerator = SimpleNamespace(num_processes=2, sync_gradients=True, scaler=None)
    losses = model(input_ids=Texts().tokens).logits.mean((1, 2))
    with pytest.raises(RuntimeError, match="accelerate: found 2 processes"):
        ours.backward(accelerator, mtu.Engine(model), losses, mtu.OrthoGrad())
