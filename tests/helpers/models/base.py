"""Case: a tiny model with fixed data, and `case`, the decorator that registers one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TASKS = ("a", "b", "c")
Loss = Callable[[Tensor], Tensor]
Task = Callable[[int, Tensor], tuple[nn.Module, Loss]]


class Net(nn.Module):
    """Parts (modules, parameters, constants) and a forward that is a function of them."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *inputs: Any) -> Tensor:
        return self.run(self, *inputs)

    if TYPE_CHECKING:  # parts are whatever they were given as

        def __getattr__(self, name: str) -> Any: ...


class MultiTask(nn.Module):
    """A backbone and one head per task."""

    def __init__(self, backbone: nn.Module, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        h = self.backbone(*inputs)
        return {name: head(h) for name, head in self.heads.items()}


@dataclass
class Parts:
    """What a registered function returns: a backbone, its inputs, and how a task reads the features."""

    backbone: nn.Module
    inputs: tuple[Any, ...]
    task: Task | None = None


@dataclass
class Forward:
    """A forward on fixed data: {task: unreduced losses [N]}."""

    model: MultiTask
    inputs: tuple[Any, ...]
    losses: dict[str, Loss]

    def __call__(self) -> dict[str, Tensor]:
        out = self.model(*self.inputs)
        return {name: loss(out[name]) for name, loss in self.losses.items()}


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    couples: a sample's loss depends on other samples (BatchNorm in train, say). float64: computed
    in float64 throughout. compiled: holds a compiled region. dropout: redraws at every forward.
    """

    name: str
    make: Callable[[int], Parts]
    couples: bool = False
    float64: bool = True
    compiled: bool = False
    dropout: bool = False

    @property
    def tolerance(self) -> float:
        """Relative error that rounding alone explains, in the precision of the case."""
        return 1e-10 if self.float64 else 1e-5

    def build(self, tasks: int = 1, n: int = 4, seed: int = 0) -> tuple[MultiTask, Forward]:
        """Model and `losses_fn() -> {task: [n]}`, a forward on fixed data at every call."""
        with (
            torch.random.fork_rng(devices=[]),
            _default_dtype(torch.float64 if self.float64 else torch.float32),
        ):
            torch.manual_seed(seed)
            parts = self.make(n)
            with torch.no_grad():
                features = parts.backbone(*parts.inputs)
            built = [(parts.task or flat)(t, features) for t in range(tasks)]
            model = MultiTask(parts.backbone, {TASKS[t]: head for t, (head, _) in enumerate(built)})
            _stir(model)
        return model, Forward(
            model, parts.inputs, {TASKS[t]: loss for t, (_, loss) in enumerate(built)}
        )


CASES: list[Case] = []


def case(**flags: bool) -> Callable[[Callable[[int], Parts]], Callable[[int], Parts]]:
    """Register a function `n -> Parts` under its own name."""

    def register(make: Callable[[int], Parts]) -> Callable[[int], Parts]:
        CASES.append(Case(make.__name__, make, **flags))
        return make

    return register


def flat(t: int, features: Tensor) -> tuple[nn.Module, Loss]:
    """A linear head on the flattened features; cross-entropy, squared error or a margin loss by task."""
    n, width = features.shape[0], features[0].numel()
    head = nn.Sequential(nn.Flatten(1), nn.Linear(width, 3 + t))
    return head, pointwise(t, (n,), 3 + t)


def pointwise(t: int, shape: tuple[int, ...], classes: int) -> Loss:
    """A loss of scores [N, ..., classes], averaged over all but N; targets are drawn here."""
    if t == 0:
        labels = torch.randint(0, classes, shape)

        def entropy(y: Tensor) -> Tensor:
            return (
                F
                .cross_entropy(y.movedim(-1, 1), labels, reduction="none")
                .reshape(shape[0], -1)
                .mean(1)
            )

        return entropy
    goal = torch.randn(*shape, classes)
    if t == 1:
        return lambda y: (y - goal).square().reshape(shape[0], -1).mean(1)
    return lambda y: F.softplus(-y * goal.sign()).reshape(shape[0], -1).sum(1)


def _stir(model: nn.Module) -> None:
    """Move every parameter off its initial value, so that no bias is zero and no scale is one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
