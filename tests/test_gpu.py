"""The whole engine on the device: models of the zoo against one backward per row there, whatever serves the ops.

Bodies run on the CPU as well, so that they are known to be right where there is no GPU.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast import reference
from mtu_fast._ops import _library
from tests.helpers.checks import clear, grad_vector, trained, truth_of, vector
from tests.helpers.models.base import Forward, MultiTask
from tests.helpers.truth import gram_truth, matrix, relative_error
from tests.helpers.zoo import by_name

N = 4
MASK = torch.tensor([True, False, False, True])  # on the CPU: the engine takes it to the losses
NAMES = [
    "mlp",
    "conv2d",
    "embedding",
    "vit",
    "tied_autoencoder",
    "batch_norm_train",
    "layer_norm",
    "contrastive",
]
NAMES += ["conv_transposed", "group_norm_2d", "fused_attention", "gru"]
Built = tuple[MultiTask, Forward, list[Tensor], mtu.Engine]

pytestmark = pytest.mark.usefixtures("one_thread", "exact_float32")


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of the truth are TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def build(
    name: str, device: str, float64: bool = True, tasks: int = 3, precision: str = "highest"
) -> Built:
    """A case made on the device from the start: data that losses hold are there too."""
    with torch.device(device):
        model, forward = replace(by_name(name), float64=float64).build(tasks, N)
    assert {p.device.type for p in model.parameters()} == {device}
    return model, forward, trained(model), mtu.Engine(model, precision=precision)


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gram_and_combine_are_those_of_autograd(name: str, float64: bool, device: str) -> None:
    _, forward, params, engine = build(name, device, float64)
    for call in range(2):
        losses = forward()
        J = {j: rows.cpu() for j, rows in truth_of(losses, params).items()}
        rows = engine.rows(losses)
        gram = rows.gram()
        assert gram.dtype == torch.float64 and gram.device.type == device
        tolerance = 1e-10 if float64 else 1e-5
        assert relative_error(gram.cpu(), gram_truth(J)) <= tolerance, f"call {call}"
        w = torch.randn(len(rows), dtype=torch.float64)
        found = rows.vjp(w)
        assert {d.device.type for d in found.values()} == {device}
        d = vector([found.get(p) for p in params], params).cpu()
        assert relative_error(d, w @ matrix(J)) <= tolerance
        assert relative_error(rows.jvp(found).cpu(), matrix(J) @ d) <= tolerance


@pytest.mark.parametrize("name", ["mlp", "conv2d", "vit"])
@pytest.mark.parametrize("forget", [MASK, {"b": MASK}, True])
def test_orthograd_is_that_of_the_reference(
    name: str, forget: Tensor | dict[str, Tensor] | bool, device: str
) -> None:
    _, forward, params, engine = build(name, device)
    losses = forward()
    reference.backward(params, losses, forget=forget, alpha=0.3, tol=1e-7)
    expected = grad_vector(params)
    clear(params)
    engine.backward(losses, mtu.OrthoGrad(alpha=0.3), forget=forget)
    assert relative_error(grad_vector(params), expected) <= 1e-6


@pytest.mark.parametrize("name", ["mlp", "batch_norm_train"])
def test_mean_is_the_ordinary_backward(name: str, device: str) -> None:
    _, forward, params, engine = build(name, device)
    losses = forward()
    total = torch.stack([loss.mean() for loss in losses.values()]).sum()
    expected = vector(
        torch.autograd.grad(total, params, retain_graph=True, allow_unused=True), params
    )
    engine.backward(losses, mtu.Mean())
    assert relative_error(grad_vector(params), expected) <= 1e-12


def test_pcgrad_is_that_of_the_reference(device: str) -> None:
    _, forward, params, engine = build("mlp", device)
    losses = forward()
    reference.backward(params, losses, "pcgrad")
    expected = grad_vector(params)
    clear(params)
    engine.backward(losses, mtu.PCGrad())
    assert relative_error(grad_vector(params), expected) <= 1e-10


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("name", ["conv2d", "vit"])
def test_precision_is_a_permission(name: str, precision: str, device: str) -> None:
    _, forward, params, engine = build(name, device, float64=False, precision=precision)
    losses = forward()
    J = truth_of(losses, params)
    tolerance = 1e-2 if precision == "medium" else 1e-5
    assert relative_error(engine.rows(losses).gram(), gram_truth(J)) <= tolerance


def test_rows_of_two_forwards_meet(device: str) -> None:
    _, forward, params, engine = build("mlp", device)
    first, second = forward(), forward()
    J = truth_of({**first, **{f"{task} again": loss for task, loss in second.items()}}, params)
    assert (
        relative_error(mtu.cat(engine.rows(first), engine.rows(second)).gram(), gram_truth(J))
        <= 1e-10
    )


def test_losses_on_two_devices_are_refused(device: str) -> None:
    _, forward, params, engine = build("mlp", device)
    losses = forward()
    losses["b"] = (
        torch.ones(N, device="cpu" if device == "cuda" else "meta", requires_grad=True) * 2
    )
    with pytest.raises(ValueError, match="losses are on different devices"):
        engine.rows(losses)
    assert all(p.grad is None for p in params)


def test_the_table_says_what_serves_the_device(device: str) -> None:
    ours = {each.op: each for each in _library.implementations() if each.device == device.upper()}
    for name, op in _library.ops().items():
        if device == "cuda" and op.triton_file:
            assert ours[name].serves == "kernel (Triton)", ours[name].why
        if device == "cpu" and op.has_kernel("CPU"):
            assert ours[name].serves == "kernel (mtu_fast._C)"


def held(device: str) -> int:
    """Bytes on the GPU, or tensors where there is none."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return sum(type(each) is Tensor for each in gc.get_objects())


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("name", ["mlp", "conv2d", "vit"])
def test_steps_leave_no_memory_behind(name: str, device: str) -> None:
    """Nothing waits for the garbage collector either: it is off."""
    _, forward, params, engine = build(name, device, float64=False)
    found = []
    gc.disable()
    try:
        for _ in range(8):
            engine.backward(forward(), mtu.OrthoGrad(alpha=0.5), forget=MASK)
            clear(params)
            found.append(held(device))
    finally:
        gc.enable()
    assert len(set(found[3:])) == 1, found


@pytest.mark.parametrize("of_on_host", [True, False])
@pytest.mark.parametrize("at_on_host", [True, False])
def test_an_index_may_lie_on_the_host(of_on_host: bool, at_on_host: bool, device: str) -> None:
    """Of activations, looked at in every step, and of a table that is a parameter."""
    with torch.device(device):
        body, head, table = nn.Linear(3, 3), nn.Linear(3, 2), nn.Embedding(6, 3)
    model = nn.ModuleList([body, head, table]).double()
    engine, params = mtu.Engine(model), trained(model)
    of = torch.arange(N, device="cpu" if of_on_host else device)
    for _ in range(6):
        x = torch.randn(N, 5, 3, dtype=torch.float64, device=device)
        at = torch.randint(0, 5, (N,), device="cpu" if at_on_host else device)
        losses = head(body(x).tanh()[of, at] * table.weight[at]).square().mean(1)
        J = truth_of({"a": losses}, params)
        clear(params)
        engine.backward(losses, torch.ones(N, dtype=torch.float64, device=device)).check()
        assert relative_error(grad_vector(params).cpu(), matrix(J).sum(0).cpu()) <= 1e-10
