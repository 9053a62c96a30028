"""Resume in loops that are written out: four steps at once, and two and two, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.integrations.marks import marks
from tests.integrations.small import Texts, batches, build, losses_of, weights

pytestmark = marks()
SIZE, MICRO = 4, 2  # 16 samples: two steps an epoch

Backward = Callable[[mtu.Engine, Tensor, Any, Tensor, bool], Any]


class Run:
    """A model with dropout, Adam, and InterferenceAware with a subspace."""

    def __init__(self) -> None:
        self.model: nn.Module = build(attention_dropout=0.3)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.method, self.kept = mtu.InterferenceAware(0.3), mtu.Subspace(12, every=1)
        self.engine = mtu.Engine(self.model)

    def epoch(self, backward: Backward) -> None:
        """Two steps of two micro-batches each."""
        self.model.train()
        for index, batch in enumerate(batches(Texts(), SIZE)):
            losses, last = losses_of(self.model, batch), index % MICRO == MICRO - 1
            backward(self.engine, losses, self, batch["forget"].bool(), last)
            if last:
                self.optimizer.step()
                self.optimizer.zero_grad()


def plain(engine: mtu.Engine, losses: Tensor, run: Run, forget: Tensor, last: bool) -> None:
    engine.accumulate(losses, run.method, sync=last, forget=forget, subspace=run.kept)


@pytest.mark.parametrize("seed", [0, 1])
def test_plain(seed: int, tmp_path: Path) -> None:
    """What a plain loop saves: model, optimizer, subspace, and torch's random numbers."""
    torch.manual_seed(seed)
    whole = Run()
    torch.manual_seed(seed)
    whole.epoch(plain)
    parts: dict[str, Any] = {"model": whole.model, "optimizer": whole.optimizer, "kept": whole.kept}
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state | {"random": torch.get_rng_state()}, tmp_path / "half.pt")
    whole.epoch(plain)

    torch.manual_seed(7)
    resumed = Run()
    state = torch.load(tmp_path / "half.pt")
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.kept.load_state_dict(state["kept"], resumed.engine.subspace_rows)
    torch.set_rng_state(state["random"])
    resumed.epoch(plain)
    assert whole.kept.full and torch.equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("seed", [0, 1])
def test_accelerate(seed: int, tmp_path: Path) -> None:
    """`save_state` has model, optimizer and random numbers; rows of a subspace are loaded through the engine."""
    accelerate = pytest.importorskip("accelerate")
    from mtu_fast.integrations import accelerate as ours

    def begun() -> tuple[Any, Run, Backward]:
        for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState):
            state._reset_state()
        accelerator = accelerate.Accelerator(cpu=True)
        run = Run()
        run.model, run.optimizer = accelerator.prepare(run.model, run.optimizer)
        run.engine = mtu.Engine(run.model)

        def step(engine: mtu.Engine, losses: Tensor, run: Run, forget: Tensor, last: bool) -> None:
            accelerator.gradient_state._set_sync_gradients(last)
            ours.backward(accelerator, engine, losses, run.method, forget=forget, subspace=run.kept)

        return accelerator, run, step

    accelerator, whole, step = begun()
    torch.manual_seed(seed)
    whole.epoch(step)
    accelerator.save_state(str(tmp_path / "half"))
    torch.save(whole.kept.state_dict(), tmp_path / "kept.pt")
    whole.epoch(step)

    accelerator, resumed, step = begun()
    torch.manual_seed(7)
    accelerator.load_state(str(tmp_path / "half"))
    resumed.kept.load_state_dict(torch.load(tmp_path / "kept.pt"), resumed.engine.subspace_rows)
    resumed.epoch(step)
    assert whole.kept.full and torch.equal(weights(resumed.model), weights(whole.model))
