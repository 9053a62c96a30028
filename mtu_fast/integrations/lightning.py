"""`lightning`: a mixin whose `unlearn` stands for the loss, in automatic and in manual optimization.

    from mtu_fast.integrations.lightning import Unlearning

    class Model(Unlearning, lightning.LightningModule):
        def training_step(self, batch, index):
            losses = cross_entropy(self.net(batch.x), batch.y, reduction="none")
            return self.unlearn(losses, mtu.OrthoGrad(0.5), forget=batch.forget)

In manual optimization, `self.manual_backward(self.unlearn(...))`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mtu_fast._arguments import check_flag
from mtu_fast._checks.losses import Losses, by_task
from mtu_fast._checks.masks import Mask
from mtu_fast._rows.update import Update
from mtu_fast.engine import Engine
from mtu_fast.integrations import _step
from mtu_fast.integrations._checkpointed import Checkpointed
from mtu_fast.methods import Method
from mtu_fast.subspace import Subspace


class Unlearning(Checkpointed):
    """Stands before `LightningModule` among the bases; holds the engine, and one micro-batch until its backward.

    Checkpoints hold where methods and subspaces stand that are attributes of the module
    (`self.method = ...`); a module that overrides `on_save_checkpoint` or `on_load_checkpoint` calls
    `super()`'s.

    Attributes:
        update: the last update; None before the first, and where the scaler skips the step.
    """

    update: Update | None = None
    _micro: _step.Micro | None = None
    _sync: bool | None = None
    _batch: int | None = None  # that `_micro` is of

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # what a trainer does first; a hook would be lost where a user overrides it
        if name == "trainer" and _is_fitting(value):
            self._begin()

    def shared_parameters(self) -> Iterable[Tensor] | None:
        """What the method works on, to be overridden (`return self.backbone.parameters()`); None for all."""
        return None

    @property
    def sides(self) -> dict[str, float]:
        """Both sides' mean losses in the last step, for `self.log_dict`; empty before the first."""
        return {} if self.update is None else _step.sides(self.update)

    @property
    def engine(self) -> Engine:
        """The engine of this module, made when first asked for."""
        if self._engine is None:
            module: Any = self
            self._engine = Engine(_replicated(module), params=self.shared_parameters())
            self._take_rows(self._engine)
        return self._engine

    def unlearn(
        self,
        losses: Losses,
        method: Method,
        *,
        forget: Mask = None,
        present: Mapping[str, Tensor] | None = None,
        subspace: Subspace | None = None,
        sync: bool | None = None,
    ) -> Tensor:
        """What `training_step` returns, or `manual_backward` is given, so that `backward` is the engine's.

        Args:
            losses: unreduced and unscaled, `[N]` or `{task: [N]}`.
            method: a method.
            forget: as for `Engine.backward`.
            present: as for `Engine.backward`.
            subspace: as for `Engine.backward`.
            sync: whether a step follows this micro-batch; by default as `accumulate_grad_batches`
                has it, and True in manual optimization.

        Returns:
            The sum of the tasks' mean losses, `[]`, to be logged; it has no graph.

        Raises:
            TypeError: arguments of the wrong kind.
            ValueError: losses that are not one value a sample, a subspace that the method lacks, or a
                second call before the backward of the first.
            RuntimeError: several processes by another strategy than DDP.
        """
        module: Any = self
        if sync is not None:
            check_flag("unlearn: sync", sync)
        _step.check_joined(self.engine, module.trainer.world_size, "lightning")
        batch = _batch_of(module.trainer)

        def made() -> _step.Micro:
            self._check_first(batch)
            return _step.Micro.of(losses, method, forget, present, subspace)

        self._micro = _step.agreed(self.engine, made)
        self._sync, self._batch = sync, batch
        self._note_strays(method, subspace)
        return self._micro.mean

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The engine's, for what `unlearn` returned; else that of `LightningModule`.

        Args:
            loss: what `training_step` returned, as the trainer scaled it.
            args: for `LightningModule.backward`.
            kwargs: for `LightningModule.backward`.

        Raises:
            ValueError: something with a graph was added to what `unlearn` returned.
        """
        if self._micro is None:
            parent: Any = super()
            parent.backward(loss, *args, **kwargs)
            return
        # taken away first: after an error the next backward is somebody else's
        micro, self._micro = self._micro, None
        _step.agreed(self.engine, lambda: _check_bare(loss))
        module: Any = self
        trainer = module.trainer
        sync = self._follows_step(trainer) if self._sync is None else self._sync
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.update = _step.take(self.engine, micro, sync=sync, scaler=scaler)

    def _begin(self) -> None:
        """Rows of a run that was interrupted are none of the one that begins."""
        self._micro = None
        if self._engine is not None:
            self._engine.discard()

    def _check_first(self, batch: int | None) -> None:
        """No micro-batch of this batch waits for its backward; of an earlier one it may, where that was left out.

        Raises:
            ValueError: one does, and would be lost.
        """
        if self._micro is None:
            return
        micro, self._micro = self._micro, None
        if self._batch == batch:
            count = len(next(iter(by_task(micro.losses).values())))
            raise ValueError(
                f"unlearn: found a second call in batch {batch} before the backward of the first, whose {count} losses "
                "would be lost; expected one: concatenate the losses (and their masks), or in manual optimization "
                "call self.manual_backward(...) for each of them."
            )

    def _follows_step(self, trainer: Any) -> bool:
        module: Any = self
        # in manual optimization a step follows each backward, unless sync says otherwise
        return not module.automatic_optimization or not trainer.fit_loop._should_accumulate()


def _is_fitting(trainer: Any) -> bool:
    """Whether a trainer begins to train, and does not only evaluate."""
    return getattr(getattr(trainer, "state", None), "fn", None) == "fit"


def _batch_of(trainer: Any) -> int | None:
    """The number of the batch that is trained on, over all epochs."""
    return getattr(getattr(trainer, "fit_loop", None), "total_batch_idx", None)


def _check_bare(loss: Tensor) -> None:
    """A loss is what `unlearn` gave, which has no graph: with one something was added, which would get lost.

    Raises:
        ValueError: something was added.
    """
    if loss.requires_grad:
        raise ValueError(
            "lightning: found a loss with a graph of its own, expected what self.unlearn returned and nothing added: "
            "add penalties to each sample's loss before unlearn, or return them in another step."
        )


def _replicated(module: Any) -> Any:
    """What the trainer wraps the module in on several processes; else the module.

    Raises:
        RuntimeError: several processes that hold it in another way.
    """
    trainer = getattr(module, "_trainer", None)  # None before a trainer took the module
    if trainer is None or trainer.world_size == 1:
        return module
    from lightning.pytorch.strategies import DDPStrategy

    if not isinstance(trainer.strategy, DDPStrategy):
        found = type(trainer.strategy).__name__
        raise RuntimeError(
            f"lightning: found {trainer.world_size} processes by {found}, expected DDPStrategy (strategy='ddp'): "
            "others hold parameters and gradients in ways of their own."
        )
    return trainer.strategy.model
