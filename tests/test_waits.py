"""On a device that runs behind the host a step asks it for nothing; the CPU stands in for one, and ops are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from benchmarks.models import MODELS, Case, build
from benchmarks.waits import BEFORE, Record, behind, recorded
from mtu_fast._graph.rules.base import RULES
from tests.helpers.truth import relative_error

pytestmark = pytest.mark.usefixtures("one_thread", "running_behind")

Step = Callable[[], object]


@pytest.fixture
def running_behind() -> Iterator[None]:
    with behind("cpu"):
        yield


def redrawn(case: Case) -> None:
    """Another batch."""
    inputs = case.inputs
    fresh = torch.randn_like(inputs) if inputs.is_floating_point() else inputs.flip(0)
    object.__setattr__(case, "inputs", fresh)
    for labels in case.labels.values():
        labels.copy_(torch.randint_like(labels, 10))


# ---- whole steps ---------------------------------------------------------------------------------


def orthograd(case: Case, engine: mtu.Engine) -> Step:
    return lambda: engine.backward(case.losses(), mtu.OrthoGrad(0.5), forget=case.forget)


def partly_labelled(case: Case, engine: mtu.Engine) -> Step:
    present = {t: torch.arange(len(y)) % 3 != i for i, (t, y) in enumerate(case.labels.items())}
    return lambda: engine.backward(
        case.losses(), mtu.OrthoGrad(0.5), forget=case.forget, present=present
    )


def of_two_loaders(case: Case, engine: mtu.Engine) -> Step:
    def step() -> mtu.Update:
        forget = engine.rows(case.losses(), forget=True)
        return mtu.cat(forget, engine.rows(case.losses())).backward(mtu.OrthoGrad(0.5))

    return step


def in_subspace(case: Case, engine: mtu.Engine) -> Step:
    subspace = mtu.Subspace(size=8, every=100, tasks=list(case.labels)[:1])
    method = mtu.InterferenceAware(0.5)
    return lambda: engine.backward(case.losses(), method, forget=case.forget, subspace=subspace)


def accumulated(case: Case, engine: mtu.Engine) -> Step:
    def step() -> None:
        for sync in (False, True):
            engine.accumulate(case.losses(), mtu.OrthoGrad(0.5), forget=case.forget, sync=sync)

    return step


def of_means(case: Case, engine: mtu.Engine) -> Step:
    return lambda: engine.backward(case.losses(), mtu.MGDA())


def weighted(case: Case, engine: mtu.Engine) -> Step:
    return lambda: engine.backward(case.losses(), mtu.GradDiff(0.5), forget=case.forget)


WAYS = [orthograd, partly_labelled, of_two_loaders, in_subspace, accumulated, of_means, weighted]


def prepared(case: Case, way: Callable[[Case, mtu.Engine], Step]) -> Step:
    """A step of which plans are made and checked."""
    step = way(case, mtu.Engine(case.model, case.params.values()))

    def cleared() -> None:
        case.model.zero_grad()
        step()

    for _ in range(BEFORE):
        cleared()
    redrawn(case)
    return cleared


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_never_waits_and_is_the_same_ops_on_every_batch(model: str, tasks: int) -> None:
    case = build(model, tasks, quick=True)
    step = prepared(case, orthograd)
    first = recorded(step)
    redrawn(case)
    second = recorded(step)  # the fifth: the plan is checked
    third = recorded(step)
    assert not first.waits and not second.waits
    assert first.ops == third.ops and len(second.ops) > len(first.ops)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("way", WAYS[1:])
def test_other_steps_do_not_wait_either(way: Any, tasks: int) -> None:
    case = build("mlp", tasks, quick=True)
    step = prepared(case, way)
    first = recorded(step)
    redrawn(case)
    recorded(step)
    assert not first.waits and first.ops == recorded(step).ops


def test_tokens_with_shifted_labels(tasks: int = 2) -> None:
    vocabulary, width = 11, 8
    model = nn.Sequential(nn.Embedding(vocabulary, width), nn.Tanh(), nn.Linear(width, vocabulary))
    tokens = torch.randint(vocabulary, (6, 7))
    engine = mtu.Engine(model)

    def step() -> None:
        model.zero_grad()
        logits = model(tokens)[:, :-1]
        each = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        engine.backward(each.mean(1), mtu.OrthoGrad(0.5), forget=torch.arange(6) < 2)

    for _ in range(BEFORE):
        step()
    assert not recorded(step).waits


def test_what_waits_is_counted() -> None:
    """Each of these, on a GPU."""
    x = torch.ones(3)
    waits: dict[str, Step] = {
        "_local_scalar_dense": lambda: bool(x.any()),
        "equal": lambda: torch.equal(x, x),
        "nonzero": x.nonzero,
        "index": lambda: x[x > 0],
        "tolist": x.tolist,
        "numpy": x.numpy,
        "lift_fresh": lambda: torch.tensor([1.0]),
    }
    for name, look in waits.items():
        assert name in recorded(look).waits
    assert not recorded(lambda: x[torch.arange(2)] + x.sum()).waits
    assert isinstance(recorded(x.sum), Record)


# ---- what such a step writes ---------------------------------------------------------------------


def of_both(case: Case, way: Callable[[Case, mtu.Engine], Step]) -> list[dict[str, Tensor]]:
    """The `.grad` of a step that does not wait, and of one that does."""
    found = []
    for waits in (False, True):
        engine = mtu.Engine(case.model, case.params.values())
        case.model.zero_grad()
        if waits:
            with engine.waiting():
                way(case, engine)()
        else:
            way(case, engine)()
        named = case.model.named_parameters()
        found.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    return found


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_a_step_that_waits_writes(way: Any, tasks: int) -> None:
    case = build("transformer", tasks, quick=True, dtype=torch.float64)
    one, other = of_both(case, way)
    assert one.keys() == other.keys()
    for name, g in one.items():
        assert relative_error(g, other[name]) <= 1e-9, name


@pytest.mark.parametrize("forget", [True, False, None])
def test_masks_that_say_nothing(forget: bool | None) -> None:
    """No sample to forget, none to retain, and a task without a label: known to the device only."""
    case = build("mlp", 2, quick=True, dtype=torch.float64)
    mask = None if forget is None else torch.full((len(case.inputs),), forget)
    present = {"task0": torch.zeros(len(case.inputs), dtype=torch.bool)}

    def way(case: Case, engine: mtu.Engine) -> Step:
        return lambda: engine.backward(
            case.losses(), mtu.OrthoGrad(0.5), forget=mask, present=present
        )

    one, other = of_both(case, way)
    for name, g in one.items():
        expected = other.get(name, torch.zeros_like(g))
        assert relative_error(g + 1, expected + 1) <= 1e-9, name


def test_ill_conditioned_rows_stay_orthogonal() -> None:
    """Nearly equal retain rows, in float32: sums in float64 leave nothing that would have to be refined."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
    x = torch.randn(1, 20) + 1e-4 * torch.randn(8, 20)
    engine = mtu.Engine(net)
    forget = torch.arange(8) < 2
    rows = engine.rows(net(x).squeeze(1), forget=forget)
    J = torch.cat([part.flatten(1) for part in rows.jacobian().values()], 1).double()
    rows.backward(mtu.OrthoGrad(0.0))
    d = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).double()
    retain = J[~forget]
    assert torch.linalg.cond(retain) > 1e4
    cosines = (retain @ d) / (retain.norm(dim=1) * d.norm())
    assert cosines.abs().max() <= 1e-6


# ---- unsound steps -------------------------------------------------------------------------------


class Net:
    """Two linear layers whose losses can be spoiled."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.engine = mtu.Engine(self.model, self.model[0].parameters())
        self.x = torch.randn(6, 4)

    def step(self, factor: Tensor | float = 1.0, **given: Any) -> mtu.Update:
        for p in self.params:
            p.grad = None if p.grad is None else p.grad.clone()  # else a warning tells of it
        losses = self.model(self.x).squeeze(1) * factor
        method = given.pop("method", mtu.OrthoGrad(0.5))
        return self.engine.backward(losses, method, forget=torch.arange(6) < 2, **given)

    def grads(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params]

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())


def spoiled(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([1.0, 1.0, value, 1.0, 1.0, 1.0], dtype=dtype)


UNSOUND: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "losses": ({"factor": spoiled(torch.nan)}, ValueError, r"non-finite value for samples \[2\]"),
    "no_gram": (
        {"factor": spoiled(torch.inf), "method": mtu.GradDiff(0.5)},
        ValueError,
        r"non-finite value for samples \[2\]",
    ),
    "weights": (
        {"method": torch.full((6,), torch.inf, dtype=torch.float64)},
        RuntimeError,
        "update is not finite",
    ),
    "outside": (
        {"method": torch.arange(6, dtype=torch.float64)},
        ValueError,
        "weights differ between rows",
    ),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_step_adds_nothing_and_is_raised_later(name: str) -> None:
    given, kind, text = UNSOUND[name]
    net = Net()
    for _ in range(2):
        net.step()
    before = net.grads()
    update = net.step(**given)
    assert update.unsound is not None and bool(update.unsound)
    for g, old in zip(net.grads(), before, strict=True):
        assert torch.equal(g, old)
    with pytest.raises(kind, match=f"earlier call, which added nothing.*{text}"):
        net.step()
    sound = net.step()  # said once
    assert sound.unsound is not None and not bool(sound.unsound)
    sound.check()
    assert any(not torch.equal(g, old) for g, old in zip(net.grads(), before, strict=True))


@pytest.mark.parametrize("name", UNSOUND)
def test_check_raises_it_at_once(name: str) -> None:
    given, kind, text = UNSOUND[name]
    net = Net()
    update = net.step(**given)
    with pytest.raises(kind, match=text):
        update.check()
    net.step().check()


def test_a_row_that_is_not_finite() -> None:
    net = Net()
    net.x[3] = 0.0
    with torch.no_grad():
        net.params[1].zero_()

    def losses() -> Tensor:
        return net.model[0](net.x).square().sum(1).sqrt()

    update = net.engine.backward(losses(), mtu.OrthoGrad(0.5), forget=torch.arange(6) < 2)
    with pytest.raises(mtu.errors.NotFiniteError, match=r"to retain \[\('loss', 3\)\]"):
        update.check()
    assert all(p.grad is None or not p.grad.any() for p in net.params)


def test_a_row_too_short_for_its_square() -> None:
    net = Net()
    net.model.double()
    net.engine = mtu.Engine(net.model)
    net.x = net.x.double()
    update = net.step(factor=spoiled(1e-200, torch.float64))
    with pytest.raises(ValueError, match=r"shorter than 1e-150"):
        update.check()
    net.step(factor=spoiled(0.0, torch.float64)).check()


def test_rows_of_an_unsound_step_leave_the_subspace() -> None:
    net = Net()
    net.engine = mtu.Engine(net.model)
    subspace = mtu.Subspace(size=2, every=1)
    method = mtu.InterferenceAware(0.5)
    for _ in range(3):
        net.step(method=method, subspace=subspace)
    net.step(method=method, subspace=subspace, factor=spoiled(torch.nan)[[2, 1, 0, 3, 4, 5]])
    with pytest.raises(ValueError, match="non-finite value"):
        net.step(method=method, subspace=subspace)
    for _ in range(2):
        net.step(method=method, subspace=subspace).check()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.params)


# ---- plans ---------------------------------------------------------------------------------------


def test_a_plan_that_fails_its_check_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails between checks is noticed at the next one; no step adds anything until the plan is made anew."""
    net = Net()
    for _ in range(BEFORE + 1):
        net.step()
    served = RULES["AddmmBackward0"]

    def wrong(*args: Any) -> Any:
        uses = served(*args)
        return {k: use.with_tensors(*(2 * t for t in use.tensors)) for k, use in uses.items()}

    before = net.grads()
    with monkeypatch.context() as patch:
        patch.setitem(RULES, "AddmmBackward0", wrong)
        first = net.step()  # the fifth: a check is due
        unread = net.engine._space.ledger._open[:]
        net.engine._space.ledger._open.clear()  # the host is ahead: it knows nothing yet
        second = net.step()
        net.engine._space.ledger._open += unread
    for g, old in zip(net.grads(), before, strict=True):
        assert torch.equal(g, old)
    assert all(u.unsound is not None and bool(u.unsound) for u in (first, second))
    with pytest.raises(RuntimeError, match=r"did not add up.*The plan is dropped"):
        net.step()
    net.step().check()
    assert any(not torch.equal(g, old) for g, old in zip(net.grads(), before, strict=True))


@pytest.mark.parametrize("seed", [1, 5, 9])
def test_rounding_is_no_fault(seed: int) -> None:
    """Sums of float32 err by more than a few units on some batches, whatever they did on the first one."""
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3)]
    head = [nn.BatchNorm2d(16).eval(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*body, *head, nn.Linear(16, 10))
    engine, optimizer = mtu.Engine(model), torch.optim.AdamW(model.parameters())
    for _step in range(18):
        out = model(torch.randn(8, 3, 10, 10))
        loss = nn.functional.cross_entropy(out, torch.randint(0, 10, (8,)), reduction="none")
        engine.backward(loss, mtu.OrthoGrad(0.5), forget=torch.arange(8) < 3).check()
        optimizer.step()
        optimizer.zero_grad()
