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
from typing import Any, NamedTuple

from torch import Tensor

from mtu_fast._arguments import check_flag
from mtu_fast._checks.losses import Losses, by_task
from mtu_fast._checks.masks import Mask
from mtu_fast._checks.warned import warn
from mtu_fast._rows.update import Update
from mtu_fast.engine import Engine
from mtu_fast.integrations import _resuming, _step
from mtu_fast.integrations._bases import check_order
from mtu_fast.integrations._checkpointed import Checkpointed
from mtu_fast.integrations._returned import DIVIDED, SCALED, check_returned, handed_out
from mtu_fast.integrations._runs import Around, batch_of, is_fitting, replicated, scaler_of
from mtu_fast.integrations._sides import sides
from mtu_fast.methods import Method
from mtu_fast.subspace import Subspace


class _Held(NamedTuple):
    """What is known of rows that are held: what they are for, and how many steps were taken before."""

    method: Method
    subspace: Subspace | None
    step: int


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
    _returned: Tensor | None = None  # by `unlearn`, for `_micro`
    _sync: bool | None = None
    _batch: int | None = None  # that `_micro` is of
    _held: _Held | None = None  # since the last step
    _around = Around()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_order(cls, Unlearning, ("lightning", "pytorch_lightning"))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # what a trainer does first; a hook would be lost where a user overrides it
        if name == "trainer" and is_fitting(value):
            self._begin()

    def shared_parameters(self) -> Iterable[Tensor] | None:
        """What the method works on, to be overridden (`return self.backbone.parameters()`); None for all."""
        return None

    @property
    def sides(self) -> dict[str, float]:
        """Both sides' mean losses in the last step, for `self.log_dict`; empty before the first."""
        return {} if self.update is None else sides(self.update)

    @property
    def engine(self) -> Engine:
        """The engine of this module, made when first asked for."""
        if self._engine is None:
            wrapped = replicated(self)
            self._engine, self._around = self._made_of(wrapped), Around(wrapped)
            self._take_rows(self._engine)
        return self._engine

    def _made_of(self, wrapped: Any) -> Engine:
        return Engine(wrapped, params=self.shared_parameters())

    def _engine_of_run(self) -> Engine:
        """The engine of the module as this trainer wraps it, which may be otherwise than the trainer before did."""
        before, wrapped = self.engine, replicated(self)
        if not self._around.holds(wrapped):
            after = self._made_of(wrapped)
            for subspace in self._subspaces().values():
                _resuming.resume_rows(after, subspace, _resuming.states_of_rows(before, subspace))
            self._engine, self._around = after, Around(wrapped)
        return self.engine

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
            The sum of the tasks' mean losses, `[]`, to be logged and returned as it is: a loss made
            from it is refused.

        Raises:
            TypeError: arguments of the wrong kind.
            ValueError: losses that are not one value a sample, a subspace that the method lacks, or a
                second call before the backward of the first.
            RuntimeError: several processes by another strategy than DDP, or a step that was taken
                without the rows held for it.
        """
        module: Any = self
        if sync is not None:
            check_flag("unlearn: sync", sync)
        engine = self._engine_of_run()
        _step.check_joined(engine, module.trainer.world_size, "lightning")
        batch = batch_of(module.trainer)

        def made() -> _step.Micro:
            self._check_first(batch)
            self._check_held()
            return _step.Micro.of(losses, method, forget, present, subspace)

        self._micro = _step.agreed(engine, made)
        self._sync, self._batch = sync, batch
        self._note_strays(method, subspace)
        self._returned = handed_out(self._micro.mean)
        return self._returned

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The engine's, for what `unlearn` returned; else that of `LightningModule`.

        Args:
            loss: what `training_step` returned, as the trainer scaled it.
            args: for `LightningModule.backward`.
            kwargs: for `LightningModule.backward`.

        Raises:
            ValueError: something else than what `unlearn` returned.
        """
        if self._micro is None:
            parent: Any = super()
            parent.backward(loss, *args, **kwargs)
            return
        # taken away first: after an error the next backward is somebody else's
        micro, self._micro = self._micro, None
        handed, self._returned = self._returned, None
        trainer, scaler = self._run, scaler_of(self)
        assert handed is not None
        nodes = [SCALED] * (scaler is not None) + [DIVIDED] * self._is_automatic
        _step.agreed(self.engine, lambda: check_returned(loss, handed, nodes))
        sync = self._follows_step(trainer) if self._sync is None else self._sync
        self._held = None if sync else _Held(micro.method, micro.subspace, trainer.global_step)
        self.update = _step.take(self.engine, micro, sync=sync, scaler=scaler)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """That of `LightningModule`, with the rows held before where the last `training_step` gave none.

        Args:
            epoch: as for `LightningModule.optimizer_step`.
            batch_idx: likewise.
            optimizer: likewise.
            optimizer_closure: likewise.
        """

        def closure() -> Any:
            loss = optimizer_closure()
            self._finish()
            return loss

        parent: Any = super()
        parent.optimizer_step(epoch, batch_idx, optimizer, closure)

    def _finish(self) -> None:
        """The step of what is held, where the last batch before it was left out, or had an ordinary loss."""
        # a call whose loss was not returned
        self._micro = self._returned = None
        held, self._held = self._held, None
        if held is not None:
            given = held.method, held.subspace
            self.update = _step.finish(self.engine, *given, scaler=scaler_of(self))

    def _begin(self) -> None:
        """Rows of a run that was interrupted are none of the one that begins."""
        self._micro = self._returned = self._held = None
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

    def _check_held(self) -> None:
        """No step was taken since rows were held for it; in manual optimization it is said.

        Raises:
            RuntimeError: one was.
        """
        if self._held is None:
            return
        step = self._run.global_step
        if step == self._held.step:
            return
        if self._is_automatic:
            self._held = None
            self.engine.discard()
            raise RuntimeError(
                f"unlearn: found rows held for step {step - 1}, which was taken without them: training_step returned "
                "no self.unlearn(...) for the last batch before it, and an optimizer_step of the module's own called "
                "no super()'s. Call it, or leave out another batch."
            )
        # it may have been that of other parameters
        warn(
            "unlearn: found an optimizer step since rows were held by sync=False, which they are not in: the last "
            "micro-batch before a step is given without sync=False."
        )

    @property
    def _run(self) -> Any:
        module: Any = self
        return module.trainer

    @property
    def _is_automatic(self) -> bool:
        module: Any = self
        return bool(module.automatic_optimization)

    def _follows_step(self, trainer: Any) -> bool:
        # in manual optimization a step follows each backward, unless sync says otherwise
        return not self._is_automatic or not trainer.fit_loop._should_accumulate()
