"""The contract of `mtu.Method`: ten lines of a user's work everywhere, and no run takes another's checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import FrozenInstanceError, dataclass, field, replace
from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mtu_fast as mtu
from mtu_fast import methods

OURS = [
    kind for kind in vars(methods).values()
    if isinstance(kind, type) and issubclass(kind, mtu.Method) and not isabstract(kind)
]  # fmt: skip


@dataclass(frozen=True)
class Mine(mtu.Method):
    alpha: float = 0.5

    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        r = methods.mean_weights(roles, mtu.RETAIN)
        f = methods.mean_weights(roles, mtu.FORGET)
        return self.alpha * r - (1 - self.alpha) * f


@dataclass(frozen=True)
class Weighted(Mine):
    needs_gram = False


class Plain(mtu.Method):
    """No dataclass: nothing tells one from another."""

    def __init__(self, alpha: float = 0.5) -> None:
        self.alpha = alpha

    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        return Mine(self.alpha)(G, roles)


class Undecorated(Mine):
    """A subclass with an attribute that its base's fields do not know."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        object.__setattr__(self, "beta", beta)


@dataclass(frozen=True)
class Strays(Mine):
    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", 0.3)


@dataclass(frozen=True)
class Holds(Mine):
    value: Any = None


@dataclass(frozen=True)
class Counts(Mine):
    seen: list[object] = field(default_factory=list, compare=False)


class Described(Plain):
    def describe(self) -> dict[str, Any]:
        return {"alpha": self.alpha}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loader(seed: int) -> DataLoader[Any]:
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def losses(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    found: Tensor = (model(x) - y).square().mean(1)
    return found


def run(method: Any, checkpoint: Path | None = None, steps: int = 4) -> mtu.History:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return mtu.unlearn(
        model, optimizer, forget=loader(0), retain=loader(1), losses=losses, method=method,
        max_steps=steps, every=2, checkpoint=checkpoint, progress=False,
    )  # fmt: skip


# ---- ours ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OURS)
def test_every_method_is_a_frozen_dataclass(kind: Callable[[], mtu.Method]) -> None:
    method = kind()
    assert {"__dataclass_fields__", "__repr__", "__eq__", "__hash__"} <= set(vars(kind))
    assert method == kind() and hash(method) == hash(kind()) and repr(method) == repr(kind())
    assert deepcopy(method) == method
    with pytest.raises(FrozenInstanceError):
        setattr(method, "needs_gram", False)  # noqa: B010


@pytest.mark.parametrize("kind", OURS)
def test_what_describes_a_method_is_plain(kind: Callable[[], mtu.Method]) -> None:
    described = kind().describe()
    assert described == kind().describe()
    assert all(type(v) in (str, int, float, type(None)) for v in described.values())


def test_descriptions_of_all_methods_differ() -> None:
    described = [kind().describe() for kind in OURS]
    assert all(described.count(one) == 1 for one in described)


def test_state_is_no_part_of_what_describes_a_method() -> None:
    """∇τ, GradVac and the interference-aware method change as they go."""
    method = mtu.GradVac()
    before, who = method.describe(), _roles(3)
    method(torch.eye(3, dtype=torch.float64), who)
    assert method.describe() == before and method == mtu.GradVac()


def _roles(R: int) -> mtu.Roles:
    index = torch.zeros(R, dtype=torch.int64)
    return mtu.Roles(index, index, index, index.double(), ("a",), torch.float64)


def test_a_preference_is_the_callers_no_more() -> None:
    given = {"a": 1.0}
    method = mtu.AlignedMTL(given)
    given["a"] = 2.0
    assert method == mtu.AlignedMTL({"a": 1.0}) != mtu.AlignedMTL({"a": 2.0})
    assert method.describe() != mtu.AlignedMTL({"a": 2.0}).describe()


# ---- one's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Mine(0.3), Weighted(0.3)], ids=repr)
def test_ten_lines_are_a_method(method: mtu.Method) -> None:
    """The same gradient as GradDiff, which they spell out."""
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for one in (method, mtu.GradDiff(0.3)):
        model = net()
        mtu.Engine(model).backward(model(x).square().sum(1), one, forget=torch.arange(5) < 2)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_without_a_gram_the_weights_outside_are_the_weights() -> None:
    model = net()
    engine = mtu.Engine(model, params=model[0].parameters())
    engine.backward(losses(model, next(iter(loader(0)))), Weighted(), forget=torch.arange(4) < 2)
    assert all(p.grad is not None for p in model.parameters())


def test_without_a_call_it_is_no_method() -> None:
    with pytest.raises(TypeError, match=r"abstract method '?__call__"):
        type("Nothing", (mtu.Method,), {})()


@pytest.mark.parametrize("method", [Mine(0.3), Weighted(0.3)], ids=repr)
def test_a_run_of_ones_own_method_goes_on_where_it_stood(
    method: mtu.Method, tmp_path: Path
) -> None:
    whole = run(method, steps=8)
    run(method, tmp_path / "run.pt")
    resumed = run(method, tmp_path / "run.pt", steps=8)
    assert [r.forget_loss for r in resumed.records] == [r.forget_loss for r in whole.records]


@pytest.mark.parametrize("other", [Mine(0.4), Weighted(0.3), mtu.GradDiff(0.3)], ids=repr)
def test_no_other_method_resumes_a_checkpoint(other: mtu.Method, tmp_path: Path) -> None:
    run(Mine(0.3), tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"of a run with other settings: method was .*Mine.*0\.3"):
        run(other, tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Plain(0.3), "Plain is no dataclass"),
        (Undecorated(0.3), "Undecorated is no dataclass"),
        (Strays(), r"Strays has the attributes \['beta'\], which are no fields"),
        (Holds(value=object()), r"Holds\.value is object, which has no value"),
        (Holds(value={"a": [lambda: 0]}), r"Holds\.value\['a'\]\[0\] is function"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_nothing_tells_apart_gets_no_checkpoint(
    method: mtu.Method, said: str, tmp_path: Path
) -> None:
    with pytest.raises(
        TypeError, match=rf"checkpoint: {said}.*@dataclass\(frozen=True\).*describe"
    ):
        run(method, tmp_path / "run.pt")
    assert not (tmp_path / "run.pt").exists()
    assert run(method).step == 4  # without one it is a method like any other


def test_a_class_that_describes_itself_is_known_by_that(tmp_path: Path) -> None:
    run(Described(0.3), tmp_path / "run.pt")
    run(Described(0.3), tmp_path / "run.pt", steps=6)
    with pytest.raises(ValueError, match="other settings: method"):
        run(Described(0.4), tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.arange(3.0), torch.tensor([0.0, 1.0, 3.0])),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        ({"a": 1}, {"a": 2}),
        ([1, 2], [2, 1]),
        (Mine(0.1), Mine(0.2)),
        ("1", 1),
        (None, "None"),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_fields_of_other_value_are_told_apart(one: Any, other: Any) -> None:
    assert Holds(value=one).describe() == Holds(value=deepcopy(one)).describe()
    assert Holds(value=one).describe() != Holds(value=other).describe()


def test_a_field_out_of_comparison_is_out_of_the_description() -> None:
    method = Counts()
    before = method.describe()
    method.seen.append(object())
    assert method.describe() == before


@dataclass(frozen=True)
class Drawing(Mine):
    """Weights that a generator draws."""

    source: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def __call__(self, G: Tensor, roles: mtu.Roles) -> Tensor:
        drawn = torch.rand(len(roles), generator=self.source, dtype=torch.float64)
        return drawn / len(roles)


def test_the_generators_of_a_method_are_found_whatever_they_are_called(tmp_path: Path) -> None:
    whole = run(Drawing(), steps=8)
    run(Drawing(), tmp_path / "run.pt")
    resumed = run(Drawing(), tmp_path / "run.pt", steps=8)
    assert [r.forget_loss for r in resumed.records] == [r.forget_loss for r in whole.records]


def test_hooks_of_a_schedule_that_nothing_would_call() -> None:
    class Hooked(Mine):
        def start_epoch(self, epoch: int, validation: Callable[[], Mapping[str, float]]) -> None:
            """Never called."""

    with pytest.raises(TypeError, match=r"Hooked has start_epoch, which nothing would call.*Sched"):
        run(Hooked())


def test_a_copy_with_another_field_is_another_method() -> None:
    assert replace(mtu.OrthoGrad(0.3), alpha=0.4) == mtu.OrthoGrad(0.4)
    with pytest.raises(ValueError, match=r"alpha: found 1\.4"):
        replace(mtu.OrthoGrad(0.3), alpha=1.4)
