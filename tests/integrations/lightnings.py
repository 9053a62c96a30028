"""Lightning modules and their `fit`, as users write them, for the tests of the mixin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from tests.integrations.marks import marks
from tests.integrations.small import (
    COUNT,
    RATE,
    Texts,
    build,
    losses_of,
    moved,
    weights,
)

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.strategies import DDPStrategy

from mtu_fast.integrations.lightning import Unlearning

MARKS = marks("ignore:.*(num_workers|logging interval|isinstance|callbacks used to).*")


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Automatic(Unlearning, lightning.LightningModule):
    """What a user writes: the loss is `self.unlearn(...)`."""

    def __init__(self, method: mtu.Method, dropout: float = 0.0) -> None:
        super().__init__()
        self.net, self.method = build(attention_dropout=dropout), method
        self.penalty = 0.0

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        """One micro-batch."""
        losses, forget = losses_of(self.net, batch), batch["forget"].bool()
        loss = self.unlearn(losses, self.method, forget=forget)
        self.log("loss", loss)
        if self.penalty:
            loss = loss + self.penalty * self.net.lm_head.weight.square().sum()
        return loss

    def configure_optimizers(self) -> Any:
        """As everywhere here."""
        return torch.optim.SGD(self.net.parameters(), lr=RATE)


class Manual(Automatic):
    """`manual_backward` of it."""

    def __init__(self, method: mtu.Method) -> None:
        super().__init__(method)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One micro-batch; a step after the last."""
        losses, forget = losses_of(self.net, batch), batch["forget"].bool()
        last = (index + 1) * len(forget) == COUNT
        self.manual_backward(self.unlearn(losses, self.method, forget=forget, sync=last))
        if last:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Adam(Automatic):
    """With state in the optimizer."""

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)


def gloo(**more: Any) -> DDPStrategy:
    """DDP on CPUs."""
    return DDPStrategy(process_group_backend="gloo", **more)


def fit(
    module: Any, size: int = COUNT, resume: Path | None = None, **more: Any
) -> tuple[Tensor, Any]:
    """How far the model moved in one epoch, and the trainer."""
    start = weights(module.net)
    given: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1}
    trainer = lightning.Trainer(**(QUIET | given | more))
    loader = torch.utils.data.DataLoader(Texts(), batch_size=size)
    trainer.fit(module, loader, ckpt_path=resume)
    return moved(module.net, start), trainer


def losses_by_side(net: Any) -> tuple[Tensor, Tensor]:
    """All samples' losses before a step, and which of them are to be forgotten."""
    data = Texts()
    with torch.no_grad():
        losses = losses_of(net, {"input_ids": data.tokens, "labels": data.tokens})
    return losses, torch.tensor([bool(data[i]["forget"]) for i in range(COUNT)])


class Kept(Adam):
    """Holds what changes from step to step as attributes."""

    def __init__(self, method: mtu.Method, subspace: mtu.Subspace | None = None) -> None:
        super().__init__(method)
        self.subspace = subspace

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        """One micro-batch."""
        losses, forget = losses_of(self.net, batch), batch["forget"].bool()
        return self.unlearn(losses, self.method, forget=forget, subspace=self.subspace)


def saved(folder: Path) -> dict[str, Any]:
    """After the second and the fourth of four epochs; of rows, writing them makes explicit what both runs then hold."""
    half = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "{epoch}", save_top_k=-1, every_n_epochs=2
    )
    return {"callbacks": [half], "enable_checkpointing": True, "max_epochs": 4}


class Leaving(Automatic):
    """Takes a call back: some batches are left out, as Lightning allows; or stops as a user does."""

    left_out: frozenset[int] = frozenset()
    stops_at: int | None = None

    def on_fit_start(self) -> None:
        """A user's hook, without a call of what it overrides."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        """One micro-batch."""
        loss = super().training_step(batch, index)
        if index == self.stops_at:
            raise InterruptedError("stop")
        return None if index in self.left_out else loss


class Ranks(Automatic):
    """Says at the end of training whether all ranks have the same weights."""

    def on_train_end(self) -> None:
        """Compares them with the first rank's."""
        mine = weights(self.net)
        first = mine.clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(mine, first)
        assert self.update is not None
        assert self.update.roles.rank is not None and self.update.roles.rank.unique().numel() == 2
