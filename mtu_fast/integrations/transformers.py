"""`transformers`: a mixin for any `Trainer`, whose steps are then the engine's.

    from mtu_fast.integrations.transformers import Unlearning

    class Unlearner(Unlearning, transformers.Trainer): ...

    trainer = Unlearner(model, args, train_dataset=retain, forget_dataset=forget, method=mtu.OrthoGrad(0.5))
    trainer.train()

Or one data set whose items say by a column `forget` (0 or 1) whether they are to be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from mtu_fast._arguments import check_function, check_tensors, check_text
from mtu_fast._checks.losses import Losses, labelled
from mtu_fast._checks.warned import warn
from mtu_fast._distributed.ranks import attempt, everyone
from mtu_fast._rows.update import Update
from mtu_fast.engine import Engine
from mtu_fast.integrations import _resuming, _states, _step
from mtu_fast.integrations._bases import check_order
from mtu_fast.integrations._compiled import trains_compiled
from mtu_fast.integrations._language import Batch, language_model_losses
from mtu_fast.integrations._losses import (
    check_default,
    check_model,
    check_settings,
    warn_unused_step,
)
from mtu_fast.integrations._own_loss import check_own_loss
from mtu_fast.integrations._pairs import Collate, check_sampling, check_sets, pairs
from mtu_fast.integrations._schedule import items_of_a_step, schedule_of, validation_losses
from mtu_fast.integrations._sides import Sides
from mtu_fast.methods import Method
from mtu_fast.subspace import Subspace

PerSample = Callable[[Any, Batch], Losses | tuple[Losses, Mapping[str, Tensor]]]


class Unlearning:
    """Stands before `Trainer` among the bases; `training_step` then takes rows, and solves at the step.

    What the arguments of training say holds: gradient accumulation (rows are held until the step,
    see `Engine.accumulate`), bf16, gradient checkpointing, clipping by the global norm, schedules,
    logging, evaluation, saving and resuming. On several processes (DDP) a step is that of all ranks'
    samples in one batch. Under `torch_compile`, or of a model that is compiled, the training forward
    runs eagerly, so that its graph can be read. Evaluation is the `Trainer`'s own. A scheduled method
    (`mtu.NablaTau`) takes its schedule from `forget_dataset`, `train_dataset` and `eval_dataset`:
    its epochs are passes over the data to forget, and training ends with the last of them.

    Args:
        args: for the `Trainer`.
        method: a method.
        losses: (model, batch) -> unreduced losses, `[N]` or `{task: [N]}`, or a pair of them and
            `{task: [N] bool}` where labels are missing; the batch is without the forget column.
            `language_model_losses` by default, for causal language models; in the first step they
            are compared with the loss that the model computes itself.
        forget_column: the name of what says which samples are to be forgotten, `[N]`, or `{task:
            [N]}` from a collator of your own.
        forget_dataset: a second data set, all of which is to be forgotten; `train_dataset` is then
            to be retained. A batch holds `per_device_train_batch_size` of each, the smaller set
            anew as often as the larger one takes.
        params: what the method works on, from the model; all that require grad by default.
        subspace: rows kept from earlier steps, saved with checkpoints.
        kwargs: for the `Trainer`.

    Attributes:
        update: the last update; None before the first, and where the scaler skips the step.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: an empty data set, a method without the subspace that it works in, label smoothing,
            an optimizer that steps within the backward, sampling by lengths of two data sets, or no
            `losses` where the `Trainer` has a loss of its own or the model is no causal LM.
    """

    update: Update | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_order(cls, Unlearning, ("transformers",))

    def __init__(
        self,
        *args: Any,
        method: Method,
        losses: PerSample | None = None,
        forget_column: str = "forget",
        forget_dataset: Any = None,
        params: Callable[[Any], Iterable[Tensor]] | None = None,
        subspace: Subspace | None = None,
        **kwargs: Any,
    ) -> None:
        _step.check_alone(method, subspace)
        if losses is not None:
            check_function("losses", losses, "model, batch")
        check_text(forget_column=forget_column)
        if params is not None:
            check_function("params", params, "model")
        if forget_dataset is not None and "train_dataset" in kwargs:
            check_sets(kwargs["train_dataset"], forget_dataset)
        # before the Trainer's own __init__, which calls what is overridden here
        self.method, self.subspace = method, subspace
        self.losses = language_model_losses if losses is None else losses
        self.forget_column, self._params = forget_column, params
        self._engine: Engine | None = None
        self._wrapped: Any = None  # what it was made of
        self._state: Mapping[str, Any] | None = None
        self._empty = None if subspace is None else subspace.held
        self._is_said, self._is_checked = False, losses is not None
        self._sides = Sides()
        super().__init__(*args, **kwargs)
        trainer: Any = self
        check_settings(trainer)
        warn_unused_step(trainer)
        if not self._is_checked:
            check_default(trainer)
            check_model(trainer)
        self._schedule = schedule_of(trainer, method, trainer.train_dataset, forget_dataset)
        if forget_dataset is not None:
            check_sampling(trainer.args)
            trainer.train_dataset = pairs(trainer.train_dataset, forget_dataset)
            trainer.data_collator = Collate(trainer.data_collator, forget_column)
        _check_alone(trainer)

    @property
    def engine(self) -> Engine:
        """The engine of the model, made when first asked for."""
        trainer: Any = self
        if self._engine is not None and self._engine.model is not trainer.model:
            # the Trainer made another model, as for a search: its rows are none of the one before
            self._engine = None
            if self.subspace is not None and self._empty is not None:
                self.subspace.held = self._empty
        if self._engine is None:
            model = trainer.model
            self._wrapped = _step.replicated(trainer.model_wrapped) or model
            params = None if self._params is None else self._params(model)
            self._engine = Engine(self._wrapped, params=params)
            # kept rows come back through an engine, of which there was none at loading
            if self._state is not None and self.subspace is not None:
                self.subspace.load_state_dict(self._state, self._engine.subspace_rows)
            self._state = None
        return self._engine

    def _engine_of_run(self) -> Engine:
        """The engine of the model as it is wrapped by now; one that was asked for before knew nothing of other ranks.

        Raises:
            RuntimeError: several processes whose rows it does not join.
        """
        trainer: Any = self
        engine = self.engine
        if self._wrapped is not (_step.replicated(trainer.model_wrapped) or trainer.model):
            # kept rows, if there are any, go through the next engine
            self._state = None if self.subspace is None else self.subspace.state_dict()
            self._engine = None
            engine = self.engine
        if not engine.is_joined and trainer.args.world_size > 1:
            raise RuntimeError(
                f"Trainer: found {trainer.args.world_size} processes and a model without DistributedDataParallel, so "
                "that each would train alone; expected train() before evaluate() or predict(), after which the Trainer "
                "of transformers wraps it no more. Evaluate first in a Trainer of its own."
            )
        return engine

    def training_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Rows of one micro-batch, and at the step the update.

        Args:
            model: as the `Trainer` wraps it.
            inputs: the batch.
            args: what the `Trainer` adds to divide its loss by; not needed.
            kwargs: the same.

        Returns:
            The mean loss over the number of micro-batches, to be logged.

        Raises:
            ValueError: no forget column, or losses that are not one value a sample.
            RuntimeError: as for `Engine.accumulate`.
        """
        trainer: Any = self
        model.train()
        # schedule-free optimizers hold other weights while they train
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        if self._schedule is not None:
            self._schedule.before(trainer.state.global_step, lambda: validation_losses(trainer))
        engine = self._engine_of_run()
        batch = self._prepared(inputs)
        # an error waits until all processes meet; a forward may meet the others, so it runs all the same
        forget = attempt(lambda: self._mask(batch))
        found = attempt(lambda: self._losses_of(model, batch))

        def made() -> _step.Micro:
            mask, (losses, present) = forget.get(), found.get()
            return _step.Micro.of(losses, self.method, mask, present, self.subspace)

        micro = _step.agreed(engine, made)
        accelerator = trainer.accelerator
        sync = bool(accelerator.sync_gradients)
        update = _step.take(engine, micro, sync=sync, scaler=accelerator.scaler)
        # rows are held until the micro-batch that a step follows
        if sync:
            self.update = update
            if update is not None:
                self._sides.add(update)
            self._end_of_schedule()
        # the Trainer adds up what the micro-batches of a step return
        return micro.mean / trainer.current_gradient_accumulation_steps

    def prediction_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """The `Trainer`'s; the model knows nothing of the forget column.

        Args:
            model: the model.
            inputs: the batch.
            args: for the `Trainer`.
            kwargs: for the `Trainer`.

        Returns:
            What the `Trainer` returns.
        """
        parent: Any = super()
        known = {name: value for name, value in inputs.items() if name != self.forget_column}
        return parent.prediction_step(model, known, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The `Trainer`'s, with both sides' mean losses since the last line, for TensorBoard, W&B and others.

        Args:
            logs: what the `Trainer` logs.
            args: for the `Trainer`.
            kwargs: for the `Trainer`.
        """
        parent: Any = super()
        if "loss" in logs:
            # over the same steps as the Trainer's
            logs, self._sides = logs | self._sides.means(), Sides()
        parent.log(logs, *args, **kwargs)

    # ---- hooks of the Trainer --------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        trainer: Any = self
        parent: Any = super()
        parent._set_signature_columns_if_needed()
        # the Trainer drops columns that the model's forward does not name
        if self.forget_column not in trainer._signature_columns:
            trainer._signature_columns.append(self.forget_column)

    def _get_collator_with_removed_columns(self, data_collator: Any, *args: Any, **kw: Any) -> Any:
        parent: Any = super()
        remove = parent._get_collator_with_removed_columns
        if not isinstance(data_collator, Collate):
            return remove(data_collator, *args, **kw)
        # columns are dropped from items, which stand within the pairs
        return Collate(remove(data_collator.collate, *args, **kw), data_collator.column)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        parent: Any = super()
        parent._save_optimizer_and_scheduler(output_dir)
        _states.save(self._own_state(), output_dir, self._ranks())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        parent: Any = super()
        parent._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = _states.load(checkpoint, self._ranks(), keeps=self.subspace is not None)
        if state is not None:
            self._take(state)

    def _take(self, state: Mapping[str, Any]) -> None:
        """Go on from what `_own_state` gave."""
        _resuming.resume_method(self.method, state["method"])
        # without an engine: the next one takes the rows
        self._state, self._engine = state["subspace"], None

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        trainer: Any = self
        # rows of a run that was interrupted, or of a batch size that was too large, are none of this one
        if self._engine is not None:
            self._engine.discard()
        self._sides = Sides()
        if self._schedule is not None:
            micro = batch_size or trainer.args.per_device_train_batch_size
            self._schedule.begin(items_of_a_step(trainer.args, micro))
        return parent._inner_training_loop(batch_size, *args, **kwargs)

    def _end_of_schedule(self) -> None:
        trainer: Any = self
        if self._schedule is not None and self._schedule.is_last(trainer.state.global_step):
            trainer.control.should_training_stop = True

    def _ranks(self) -> Any:
        trainer: Any = self
        return everyone(trainer.args.world_size, trainer.args.device)

    def _own_state(self) -> dict[str, Any]:
        return {
            "method": _resuming.state_of_method(self.method),
            "subspace": None if self.subspace is None else self.subspace.state_dict(),
        }

    def _losses_of(self, model: Any, batch: Batch) -> tuple[Losses, Mapping[str, Tensor]]:
        trainer: Any = self
        with self._readable(), trainer.compute_loss_context_manager():
            # before the forward: in evaluation mode a model may change weights that its graph needs (RWKV)
            checked = attempt(lambda: self._is_checked or check_own_loss(trainer.model, batch))
            found = labelled(self.losses(model, batch))
            # an error waits for the forward, in which the processes may meet
            self._is_checked = checked.get()
            return found

    def _prepared(self, inputs: Batch) -> Batch:
        """The batch on the device."""
        trainer: Any = self
        return dict(trainer._prepare_inputs(inputs))

    def _mask(self, batch: Batch) -> Any:
        if self.forget_column not in batch:
            raise ValueError(
                f"batch: found {sorted(batch)}, expected {self.forget_column!r} too, 1 where a sample "
                "is to be forgotten: a column of numbers in the data set that the collator passes on (the default one "
                "drops strings and None, those that pack samples drop it too), or forget_dataset= for a second one."
            )
        mask, name = batch.pop(self.forget_column), self.forget_column
        if isinstance(mask, Mapping):
            return {task: _flags(f"{name}[{task!r}]", one) for task, one in mask.items()}
        return _flags(name, mask)

    def _readable(self) -> AbstractContextManager[Any]:
        trainer: Any = self
        if not trainer.args.torch_compile and not trains_compiled(trainer.model):
            return nullcontext()
        if not self._is_said:
            self._is_said = True
            warn(
                "torch.compile: the training forward runs eagerly, so that its graph can be read; evaluation is "
                "compiled.",
            )
        return Engine.eager()


def _flags(name: str, column: Any) -> Tensor:
    """A column of 0 and 1 as a mask."""
    check_tensors(**{name: column})
    mask = column.bool()
    # a GPU would have to be waited for
    if column.device.type == "cpu" and not bool((column == mask).all()):
        raise ValueError(f"{name}: found {column.unique().tolist()[:8]}, expected 0 and 1.")
    return mask


def _check_alone(trainer: Any) -> None:
    # several processes are looked at in the step, once the Trainer has wrapped the model
    _step.check_single(trainer.args.n_gpu, "Trainer")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise RuntimeError(
            "Trainer: found DeepSpeed or FSDP, expected neither: they hold parameters and gradients in pieces of their "
            "own, which the engine does not see."
        )
