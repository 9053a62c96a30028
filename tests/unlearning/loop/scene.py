"""A tiny multi-task problem in float64 that a net has memorised a little: data, loaders, losses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import mtu_fast as mtu
from tests.helpers.models.base import MultiTask

NAMES = ("a", "b", "c", "d", "e")
FEATURES, CLASSES = 5, 3


def net(tasks: int = 2, seed: int = 0, dropout: float = 0.0) -> MultiTask:
    """A smooth backbone and a linear head a task."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 6), nn.Tanh()
        )
        return MultiTask(backbone, {name: nn.Linear(6, CLASSES) for name in NAMES[:tasks]}).double()


def data(tasks: int = 2, samples: int = 24, seed: int = 1) -> TensorDataset:
    """x [N, 5] and classes y [N, T]; -1 where a sample has no label for the last of several tasks, every fifth."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, dtype=torch.float64, generator=draw)
    y = torch.randint(CLASSES, (samples, tasks), generator=draw)
    if tasks > 1:
        y[::5, -1] = -1
    return TensorDataset(x, y)


def losses(
    model: nn.Module, batch: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Cross-entropy per sample and task, and who has a label."""
    x, y = batch
    found, present = {}, {}
    for i, (name, logits) in enumerate(model(x).items()):
        present[name] = y[:, i] >= 0
        found[name] = nn.functional.cross_entropy(logits, y[:, i].clamp(min=0), reduction="none")
    return found, present


def loader(
    dataset: Any,
    indices: Sequence[int],
    batch: int = 4,
    shuffle: bool = False,
    seed: int | None = None,
) -> Any:
    """A DataLoader over some samples; with a seed it has a generator of its own."""
    draw = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(
        Subset(dataset, list(indices)), batch_size=batch, shuffle=shuffle, generator=draw
    )


def sides(tasks: int = 2, shuffle: bool = False, forget: int = 6, **more: Any) -> dict[str, Any]:
    """forget= (the first samples), retain= and losses= of `unlearn`."""
    whole = data(tasks)
    return {
        "forget": loader(whole, range(forget), 3, shuffle, **more),
        "retain": loader(whole, range(forget, 24), 4, shuffle, **more),
        "losses": losses,
    }


def held_out(tasks: int = 2) -> Any:
    """Samples that nobody trains on."""
    return loader(data(tasks, 12, seed=2), range(12), 6)


def trained(model: MultiTask, tasks: int = 2, steps: int = 60) -> MultiTask:
    """The model after some steps of ordinary training on all the data, so that there is something to forget.

    Made once for each beginning: the same model, with the same draws ahead, is trained to the same
    parameters, and leaves the generator at the same place.
    """
    start = (repr(model), tasks, steps, parameters(model).numpy().tobytes(), random_state())
    if start not in _TRAINED:
        _train(model, tasks, steps)
        _TRAINED[start] = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    state, draws = _TRAINED[start]
    model.load_state_dict(state)
    model.zero_grad()
    torch.set_rng_state(draws)
    return model


_TRAINED: dict[tuple[object, ...], tuple[dict[str, Tensor], Tensor]] = {}


def random_state() -> bytes:
    """Where torch's generator stands."""
    return torch.get_rng_state().numpy().tobytes()


def _train(model: MultiTask, tasks: int, steps: int) -> None:
    x, y = data(tasks).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _step in range(steps):
        found, present = losses(model, (x, y))
        optimizer.zero_grad()
        torch.stack([found[name][present[name]].mean() for name in found]).sum().backward()
        optimizer.step()


def sgd(model: nn.Module, lr: float = 0.05, **more: Any) -> torch.optim.Optimizer:
    """Plain steps along the direction."""
    return torch.optim.SGD(model.parameters(), lr=lr, **more)


def parameters(model: nn.Module) -> Tensor:
    """All parameters end to end."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(model: nn.Module, method: Any = None, **more: Any) -> mtu.History:
    """A run without a progress bar, of SGD unless said otherwise."""
    arguments = {
        "method": method or mtu.OrthoGrad(0.5),
        "optimizer": sgd(model),
        "progress": False,
        **more,
    }
    return mtu.unlearn(model, **arguments)
